"""What is done to a cell, and what must be true then.

The program of a world: `chaos_inside.py DATA GROUPS SCENARIO [SECONDS]`.
Prints one JSON line of figures, and ends with 0 if every promise was kept; else it tells which was not, and the ends of the logs.
"""

from __future__ import annotations

import asyncio
import json
import logging
import random
import signal
import sys
import time
import traceback
from collections.abc import Awaitable, Callable
from pathlib import Path

import structlog
from chaos_cell import INGRESS_PORT, Cell, Part, all_listed, fill, until
from chaos_runbook import walk
from chaos_users import History, Requests, beside
from chaos_world import World

from atoll.model.errors import AtollError
from atoll.sdk.client import Client

CONVERGE_S = 30.0
LOG_BYTES = 6_000
Figures = dict[str, object]


def requests_of(cell: Cell) -> dict[str, Requests]:
    return {site: Requests(host.address, INGRESS_PORT, f"web-{site}") for site, host in cell.sites.items()}


def none_failed(requests: dict[str, Requests]) -> Figures:
    for site, one in requests.items():
        assert not one.bad, f"{len(one.bad)} of {one.good + len(one.bad)} requests at {site} failed, the first with {one.bad[0][1]}"
        assert one.good > 20, f"only {one.good} requests at {site}"
    return {
        "requests": sum(one.good for one in requests.values()),
        "requests_failed": 0,
        "slowest_request_s": round(max(one.slowest_s for one in requests.values()), 2),
    }


async def placed(client: Client, cell: Cell, site: str, name: str) -> float:
    """Return how long it takes until an app is accepted and its one instance has a node."""
    began = time.monotonic()
    await client.put_app(cell.web(site, replicas=1, name=name))

    async def has_node() -> bool:
        return any(one.instance.node for one in await client.instances("default", app=name))

    await until(has_node, f"a node for {name}", CONVERGE_S)
    return time.monotonic() - began


async def lose_the_leading_server(cell: Cell, client: Client) -> float:
    """Kill it, and return how long after its death a plan was committed through another; start it again."""
    await until(lambda: cell.leader(client), "a leading server")
    leader = await cell.leader(client)
    assert leader is not None
    name = f"after-{leader}-{time.monotonic():.0f}"
    cell.servers[leader].kill()
    took = await placed(client, cell, "b", name)
    assert await cell.leader(client) != leader
    cell.servers[leader].start()
    # A server that starts while nobody leads the store says so and ends, as its supervisor would see: let it be there first.
    async with cell.client(only=leader) as own:
        await until(lambda: all_listed(own), f"{leader} to serve again")
    await client.delete_app("default", name)
    return took


async def pause(part: Part, seconds: float) -> None:
    part.signal(signal.SIGSTOP)
    await asyncio.sleep(seconds)
    part.signal(signal.SIGCONT)


async def cut_off_a_site(cell: Cell, client: Client, seconds: float) -> Figures:
    """Cut site a from all control machines; crash what runs there, and ask for more of it; then let it return."""
    cell.world.cut(cell.sites["a"], from_=(*cell.control, cell.sites["b"]))
    began = time.monotonic()
    await asyncio.sleep(min(2.0, seconds / 4))
    before = cell.running("a")
    cell.crash("a")
    await until(lambda: len(cell.running("a") - before) == 1, "the crashed instance to run again, by its agent alone", 10)
    restarted_s = time.monotonic() - began
    await client.put_app(cell.web("a", replicas=3))
    await asyncio.sleep(max(0.0, began + seconds - time.monotonic()))
    cell.world.heal()
    converged_s = await cell.serves(client, "a", 3, CONVERGE_S)
    return {"cut_s": seconds, "restarted_within_s": round(restarted_s, 2), "converged_s": round(converged_s, 2)}


async def short(cell: Cell, seconds: float) -> Figures:
    """One of each, with users at the data path and at the API all the while."""
    requests = requests_of(cell)
    history = History([cell.client(first=n % 3) for n in range(4)], cell.image)
    async with cell.client() as client, beside(*requests.values(), history):
        await asyncio.sleep(1)
        plan_s = await lose_the_leading_server(cell, client)
        leading = await asyncio.to_thread(cell.store_leader)
        assert leading is not None
        await pause(cell.members[leading], 1.5)
        # One way: that machine's server and member still speak, and hear nobody.
        deaf = cell.control[1]
        cell.world.cut(deaf, from_=tuple(host for host in cell.control if host is not deaf), one_way=True)
        await asyncio.sleep(1.5)
        cell.world.heal()
        figures = await cut_off_a_site(cell, client, seconds)
    history.check()
    cell.check_alive()
    figures |= {"leader_killed_to_plan_s": round(plan_s, 2), "operations": history.answered, "errors": len(history.errors)}
    return figures | none_failed(requests)


async def site(cell: Cell, seconds: float) -> Figures:
    requests = requests_of(cell)
    async with cell.client() as client, beside(*requests.values()):
        figures = await cut_off_a_site(cell, client, seconds)
    return figures | none_failed(requests)


async def down(cell: Cell, seconds: float) -> Figures:
    """Kill every server and every member of etcd; crash an instance at each site meanwhile; then start all of it again."""
    requests = requests_of(cell)
    async with cell.client() as client, beside(*requests.values()):
        await asyncio.sleep(1)
        for part in (*cell.servers.values(), *cell.members.values()):
            part.kill()
        began = time.monotonic()
        for where in cell.sites:
            await asyncio.sleep(seconds / 4)
            before = cell.running(where)
            cell.crash(where)
            await until(lambda before=before, where=where: len(cell.running(where) - before) == 1, "the crashed instance", 10)  # type: ignore[misc]
        await asyncio.sleep(max(0.0, began + seconds - time.monotonic()))
        for part in (*cell.members.values(), *cell.servers.values()):
            part.start()
        back = time.monotonic()
        await client_writes(client, cell, 60.0)
        converged_s = await cell.serves(client, "a", 2, CONVERGE_S)
        writes_s = time.monotonic() - back
        await cell.serves(client, "b", 2, CONVERGE_S)
        await placed(client, cell, "a", "after")
    return {"down_s": seconds, "writes_again_s": round(writes_s, 2), "converged_s": round(converged_s, 2)} | none_failed(requests)


async def client_writes(client: Client, cell: Cell, seconds: float) -> None:
    async def written() -> bool:
        try:
            await client.put_app(cell.web("b"))
        except AtollError:
            return False
        return True

    await until(written, "a write", seconds)


async def upgrade(cell: Cell, seconds: float) -> Figures:
    """End and start one server after the other, again and again, under a load of calls by the SDK and of requests."""
    requests = requests_of(cell)
    history = History([cell.client(first=n % 3) for n in range(6)], cell.image, records=6)
    restarts = 0
    async with beside(*requests.values(), history):
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            for server in cell.servers.values():
                status = await asyncio.to_thread(server.end)
                assert status == 0, f"a server ended with {status}: {server.log[-2000:]}"
                server.start()
                async with cell.client(only=server.host.name) as alone:
                    await until(lambda alone=alone: answers(alone), "the server to be back", 30)  # type: ignore[misc]
                restarts += 1
    history.check()
    assert not history.errors, f"{len(history.errors)} calls failed: {history.errors[:5]}"
    return {"restarts": restarts, "calls": history.answered, "calls_failed": 0} | none_failed(requests)


async def answers(client: Client) -> bool:
    try:
        await client.apps("default")
    except AtollError:
        return False
    return True


async def disk(cell: Cell, seconds: float) -> Figures:
    """Fill the disk of one member of etcd, and that of one node; both get room again after a time."""
    requests = requests_of(cell)
    history = History([cell.client(first=n % 3) for n in range(3)], cell.image)
    filled = [cell.small_disks[name] for name in ("c3", "b")]
    async with cell.client() as client, beside(*requests.values(), history):
        await asyncio.sleep(1)
        for where in filled:
            await asyncio.to_thread(fill, where)
        await asyncio.sleep(seconds / 2)
        await client_writes(client, cell, 10.0)
        before = cell.running("b")
        cell.crash("b")
        await until(lambda: len(cell.running("b") - before) == 1, "the crashed instance, on a full disk", 15)
        await asyncio.sleep(seconds / 2)
        written = history.answered
        for where in filled:
            (where / "fill").unlink()
        member = cell.members["c3"]
        ended = not member.alive
        if ended:
            member.start()
        await client.put_app(cell.web("b", replicas=3))
        converged_s = await cell.serves(client, "b", 3, CONVERGE_S)
        await until(lambda: asyncio.to_thread(cell.synced, "c3"), "the member to follow the others", CONVERGE_S)
    history.check()
    figures: Figures = {"full_s": seconds, "operations": written, "member_ended": ended, "converged_s": round(converged_s, 2)}
    return figures | none_failed(requests)


async def runbook(cell: Cell, seconds: float) -> Figures:
    """Go through docs/runbook.md; `seconds` is of no account."""
    requests = requests_of(cell)
    async with beside(*requests.values()):
        await walk(cell, requests)
    return none_failed(requests)


async def storm(cell: Cell, seconds: float) -> Figures:
    """Faults drawn at random, one or two at a time, mended before the next; users see none of them at the data path."""
    seed = int(time.time())
    choose = random.Random(seed)
    requests = requests_of(cell)
    history = History([cell.client(first=n % 3) for n in range(4)], cell.image, records=8, seed=seed)
    done: dict[str, int] = {}
    async with cell.client() as client, beside(*requests.values(), history):
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            what = choose.sample(sorted(FAULTS), choose.choice((1, 2)))
            done.update({name: done.get(name, 0) + 1 for name in what})
            try:
                await asyncio.gather(*(FAULTS[name](cell, choose) for name in what))
            finally:
                cell.world.heal()
                cell.revive()
            await asyncio.sleep(choose.uniform(0.5, 4.0))
        await client_writes(client, cell, CONVERGE_S)
        took = [await cell.serves(client, where, 2, CONVERGE_S) for where in cell.sites]
    history.check()
    cell.check_alive()
    figures: Figures = {"seed": seed, "faults": done, "operations": history.answered, "errors": len(history.errors)}
    return figures | {"converged_s": round(max(took), 2)} | none_failed(requests)


async def _kill(cell: Cell, choose: random.Random) -> None:
    """One process of the control plane, or an agent or an ingress: not an instance, and not Envoy."""
    part = choose.choice(cell.parts)
    part.kill()
    await asyncio.sleep(choose.uniform(0.0, 3.0))


async def _pause(cell: Cell, choose: random.Random) -> None:
    await pause(choose.choice([*cell.members.values(), *cell.servers.values(), *cell.agents.values()]), choose.uniform(0.5, 8.0))


async def _isolate(cell: Cell, choose: random.Random) -> None:
    """A control machine from the other two, both ways or one."""
    host = choose.choice(cell.control)
    others = tuple(other for other in cell.control if other is not host)
    cell.world.cut(host, from_=others, one_way=choose.random() < 0.5)
    await asyncio.sleep(choose.uniform(1.0, 8.0))


async def _cut_site(cell: Cell, choose: random.Random) -> None:
    site = choose.choice(list(cell.sites.values()))
    cell.world.cut(site, from_=cell.control, one_way=choose.random() < 0.3)
    await asyncio.sleep(choose.uniform(1.0, 12.0))


async def _crash(cell: Cell, choose: random.Random) -> None:
    site = choose.choice(list(cell.sites))
    if len(cell.running(site)) > 1:
        cell.crash(site)


FAULTS: dict[str, Callable[[Cell, random.Random], Awaitable[None]]] = {
    "kill": _kill,
    "pause": _pause,
    "isolate": _isolate,
    "cut-site": _cut_site,
    "crash": _crash,
}
SCENARIOS: dict[str, Callable[[Cell, float], Awaitable[Figures]]] = {
    "short": short,
    "site": site,
    "down": down,
    "upgrade": upgrade,
    "disk": disk,
    "storm": storm,
    "runbook": runbook,
}


async def main(data: Path, groups: str, scenario: str, seconds: float) -> int:
    logging.disable(logging.WARNING)
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR))
    cell = Cell(World(groups), data)
    began = time.monotonic()
    try:
        await cell.start()
        started_s = time.monotonic() - began
        figures = await SCENARIOS[scenario](cell, seconds)
    except Exception:  # noqa: BLE001 - whatever it was, its story is told
        traceback.print_exc(file=sys.stdout)
        for words in (("servers",), ("nodes",), ("ps",), ("events",)):
            print(f"--- atoll {' '.join(words)}\n{cell.atoll(*words, check=False)[-LOG_BYTES:]}")
        for part in cell.parts:
            print(f"--- {part.host.name}: {part.command[len(part.host.run_in) :][:3]}\n{part.log[-LOG_BYTES:]}")
        return 1
    finally:
        cell.close()
    print(json.dumps({"scenario": scenario, "started_s": round(started_s, 1), **figures}))
    return 0


if __name__ == "__main__":
    place, own_groups, name, *rest = sys.argv[1:]
    sys.exit(asyncio.run(main(Path(place), own_groups, name, float(rest[0]) if rest else 10.0)))
