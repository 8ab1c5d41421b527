"""How often an agent says over HTTP what is in use: seldom in a large cell, often where something depends on it."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from pathlib import Path

from control_cell import LoopClock, run_virtual
from detection_net import CELL_KEY, Net
from structlog.testing import capture_logs

from atoll.api.service import KINDS, Service
from atoll.api.service.beat_keys import grant_of
from atoll.images.fake import FakeImages
from atoll.model import beats, codec, keys
from atoll.model.beats import BeatGrant
from atoll.model.errors import Invalid
from atoll.model.ports.store import Put
from atoll.model.records import Assignment, Capacity, Heartbeat, Instance, Node, OwnerKind
from atoll.model.spec import AppSpec, Metrics, Port, RuntimeName, Scale
from atoll.network.fake import FakeNetwork, FakeNetworkState
from atoll.node.agent import Agent
from atoll.node.beating import DEAF_S, HEARTBEAT_S, Beating
from atoll.node.contact import Contact
from atoll.node.fake import FakeControlPlane, FakeMachine, FakeProber, MemoryLogs
from atoll.node.record import MemoryRecord
from atoll.node.vitals import USAGES_S
from atoll.runtimes.fake import FakeHost, FakeRuntime
from atoll.store.cache import State
from atoll.store.memory import MemoryStore

CALM_S = 15.0


class Here:
    """One agent that beats to a server that leads, and says the rest to a scripted control plane."""

    def __init__(self, net: Net, data: Path, spread_s: float = 0.0, seed: int = 1, control: FakeControlPlane | None = None) -> None:
        self.net = net
        self.host = FakeHost(clock=net.clock)
        self.control = control or FakeControlPlane()
        net.sites["n1"] = "a"
        epoch = beats.epoch_at(net.clock.now())
        self.control.granted = BeatGrant(
            key=beats.key_of(CELL_KEY, "n1", epoch),
            epoch=epoch,
            lasts_s=1e6,
            servers=("leader:7600",),
            heartbeat_s=CALM_S,
            spread_s=spread_s,
        )
        self.beating = beating = Beating(
            "n1", control=self.control, opener=net.net, clock=net.clock, servers=(), contact=Contact(boot_id=""), bind=("n1", 0)
        )
        self.agent = Agent(
            node="n1",
            control=self.control,
            runtimes=[FakeRuntime(self.host)],
            images=FakeImages(),
            network=FakeNetwork(FakeNetworkState()),
            clock=net.clock,
            random=random.Random(seed),
            data=data,
            record=MemoryRecord(),
            logs=MemoryLogs(data),
            prober=FakeProber(),
            machine=FakeMachine(),
            beating=beating,
        )
        work = (beating.run(), self.agent.run(), self._keep_alive())
        self.tasks = [asyncio.create_task(one) for one in work]

    async def _keep_alive(self) -> None:
        """An agent that hears nothing connects anew, and says so with a heartbeat."""
        while True:
            await asyncio.sleep(5.0)
            self.control.prefetch()

    def run(self, id: str, spec: AppSpec) -> None:
        instance = Instance(
            id=id,
            project="default",
            owner_kind=OwnerKind.APP,
            owner="web",
            release=1,
            node="n1",
            runtime=RuntimeName.RUNC,
            created_at=self.net.clock.now(),
        )
        self.control.assign(Assignment(instance=instance, workload=spec, revision=0))

    async def count(self, span_s: float) -> int:
        """Return how many heartbeats come in that time."""
        self.control.heartbeats.clear()
        await asyncio.sleep(span_s)
        return len(self.control.heartbeats)

    async def close(self) -> None:
        for task in self.tasks:
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)


def on_agent(data: Path, test: Callable[[Here], Awaitable[None]]) -> None:
    async def main() -> None:
        net = Net()
        await net.server()
        here = Here(net, data)
        await asyncio.sleep(20)
        try:
            await test(here)
        finally:
            await here.close()
            await net.close()

    run_virtual(main())


class Refusing(FakeControlPlane):
    """Refuses what heartbeats say, as long as it is told to."""

    refuses = True

    async def heartbeat(self, heartbeat: Heartbeat) -> None:
        await super().heartbeat(heartbeat)
        if self.refuses:
            raise Invalid(f"cpu_milli: -{len(self.heartbeats)} cannot be", field="cpu_milli", mend="see its log")


def test_that_a_heartbeat_is_refused_is_said_in_the_agents_log_once_until_one_is_taken(tmp_path: Path) -> None:
    async def main() -> None:
        net = Net()
        await net.server()
        control = Refusing()
        here = Here(net, tmp_path, control=control)
        await asyncio.sleep(100)
        control.refuses = False
        await asyncio.sleep(100)
        control.refuses = True
        await asyncio.sleep(100)
        await here.close()
        await net.close()
        assert len(control.heartbeats) > 10

    with capture_logs() as said:
        run_virtual(main())
    refused = [(each["node"], each["mend"]) for each in said if each["log_level"] == "warning" and "refused" in each["event"]]
    assert refused == [("n1", "see its log")] * 2


def test_while_beats_are_acknowledged_heartbeats_come_as_seldom_as_the_server_asks_for(tmp_path: Path) -> None:
    async def test(here: Here) -> None:
        assert 300 / CALM_S - 1 <= await here.count(300) <= 300 / CALM_S + 1

    on_agent(tmp_path, test)


def test_where_the_leader_does_not_acknowledge_beats_heartbeats_come_at_once_and_often(tmp_path: Path) -> None:
    async def test(here: Here) -> None:
        here.net.cut.add(("n1", "leader"))
        assert await here.count(5) >= 1, "the first within the time that a silent node has"
        assert 60 / DEAF_S - 1 <= await here.count(60) <= 60 / DEAF_S + 1
        here.net.cut.clear()
        await asyncio.sleep(5)
        assert await here.count(150) <= 150 / CALM_S + 1

    on_agent(tmp_path, test)


def test_an_agent_that_began_while_nobody_was_there_beats_as_soon_as_it_is_heard(tmp_path: Path) -> None:
    """It waited up to 15 s to ask for its key, was heard by HTTP alone meanwhile, and was given up in between."""

    async def main() -> None:
        net = Net()
        await net.server()
        here = Here(net, tmp_path)
        here.control.cut()
        try:
            await asyncio.sleep(61.0)
            assert not here.beating.pulse.answered
            here.control.heal()
            await here.control.until(lambda control: control.heartbeats)
            await asyncio.sleep(1.0)
            assert here.beating.pulse.answered
        finally:
            await here.close()
            await net.close()

    run_virtual(main())


def returns_after(data: Path, spread_s: float, seed: int) -> float:
    """Return when an agent is back whose server has died, while others take its calls at once."""

    async def main() -> float:
        net = Net()
        await net.server()
        here = Here(net, data, spread_s, seed)
        try:
            await asyncio.sleep(20)
            here.control.cut()
            await asyncio.sleep(0.01)
            here.control.heal()
            here.control.nodes.clear()
            for tenths in range(1_000):
                if here.control.nodes:
                    return tenths / 10
                await asyncio.sleep(0.1)
            raise AssertionError("it stays away")
        finally:
            await here.close()
            await net.close()

    return run_virtual(main())


def test_agents_whose_server_has_died_come_back_over_as_long_as_the_servers_ask_for_and_at_once_where_they_do_not(
    tmp_path: Path,
) -> None:
    spread = [returns_after(tmp_path / f"{seed}", 20.0, seed) for seed in range(8)]
    assert max(spread) <= 20.2
    assert max(spread) - min(spread) > 8.0
    assert all(returns_after(tmp_path / f"at-once-{seed}", 0.0, seed) <= 0.2 for seed in range(4))


def test_a_node_on_which_something_scales_by_what_it_says_is_heard_as_often_as_in_a_small_cell(tmp_path: Path) -> None:
    async def test(here: Here) -> None:
        scale = Scale(replicas=1, max=3, metric="depth", target=5.0)
        here.run("web-1", AppSpec(name="web", image="x", ports=(Port(port=80),), metrics=Metrics(port=80), scale=scale))
        await asyncio.sleep(CALM_S + 1)
        assert await here.count(100) >= 100 / HEARTBEAT_S - 1

    on_agent(tmp_path, test)


def test_instances_that_do_not_say_what_they_use_hold_a_heartbeat_up_for_seconds_and_keep_no_other_from_saying_it(
    tmp_path: Path,
) -> None:
    async def silent(call: str, id: str) -> None:
        if call == "usage" and id.startswith("silent"):
            await asyncio.sleep(1_000_000)

    async def test(here: Here) -> None:
        here.host.before = silent
        talking = {f"web-{number}" for number in range(10)}
        for id in (*(f"silent-{number}" for number in range(60)), *sorted(talking)):
            here.run(id, AppSpec(name="web", image="x"))
        await asyncio.sleep(60)
        assert await here.count(200) >= 200 / (CALM_S + USAGES_S) - 1
        assert all({usage.instance for usage in beat.usage} == talking for beat in here.control.heartbeats)

    on_agent(tmp_path, test)


async def test_the_more_nodes_there_are_the_less_often_each_is_asked_for_a_heartbeat() -> None:
    clock = LoopClock()
    store = MemoryStore(clock)
    asked = []
    async with State(store, KINDS) as state:
        service = Service(store, state, clock, random.Random(1), bytes(range(32)))
        for have in (0, 400, 1_000, 3_000):
            names = [f"n{number:04d}" for number in range(len(state.records(Node)), have)]
            for first in range(0, len(names), 400):
                part = names[first : first + 400]
                done = await store.txn(
                    [],
                    [
                        Put(keys.node(n), codec.encode(Node(name=n, capacity=Capacity(cpu_milli=1, memory_bytes=1, disk_bytes=1))))
                        for n in part
                    ],
                )
                await state.reach(done.revision)
            grant = grant_of(service.context, "n0000")
            asked.append((grant.heartbeat_s, grant.spread_s))
    await store.close()
    assert asked == [(HEARTBEAT_S, 0.0), (HEARTBEAT_S, 2.0), (10.0, 5.0), (CALM_S, 15.0)]
