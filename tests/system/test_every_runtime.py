"""kill -9 of an agent while an instance of every runtime of this machine runs: all are adopted, and nothing is left after."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from msgspec import structs
from test_agent import BUSYBOX, Killable, Place, app
from test_agent import layer as layer  # a fixture

from atoll.model.errors import Unsupported
from atoll.model.records import Assignment, Status
from atoll.model.spec import AppSpec, Isolation, Resources, RuntimeName, Stop, Volume
from atoll.model.states import Phase
from atoll.model.units import Bytes, Seconds
from atoll.model.worker import Worker
from atoll.runtimes.offer import RUNTIMES, isolation_of

pytestmark = [pytest.mark.system, pytest.mark.timeout(240)]
START_S_MAX = 120.0
"""A machine boots under emulation, maybe beside much else."""


class Node(Place):
    """A node that offers all that this machine can run."""

    async def look(self) -> None:
        offered = []
        for kind in RUNTIMES:
            runtime = kind(self.data / "probe" / kind.name, cgroup=self.cgroup)
            try:
                await runtime.probe()
            except Unsupported:
                continue
            finally:
                await runtime.close()
            offered.append(str(kind.name))
        self.runtimes = tuple(offered)

    async def sweep(self) -> None:
        for kind in RUNTIMES:
            if kind.name in self.runtimes:
                runtime = kind(self.data / kind.name, cgroup=self.cgroup)
                for found in await runtime.recover():
                    await runtime.delete(found.id)
                await runtime.close()
        network = self.network(0)
        await network.recover(())
        await network.close()


@pytest.fixture
async def node(tmp_path: Path, layer: Path) -> AsyncIterator[Node]:
    if not BUSYBOX.exists():
        pytest.skip("needs busybox-static")
    (layer / "worker").mkdir(exist_ok=True)
    (layer / "worker/index.js").write_text("export default { fetch() { return new Response('hello'); } };")
    node = Node(tmp_path / "agent", layer)
    await node.look()
    yield node
    await node.sweep()


def _assignment(name: RuntimeName) -> Assignment:
    id, isolation = f"on-{name}", isolation_of(name)
    if isolation is Isolation.ISOLATE:
        spec = AppSpec(name="web", image="box", worker=Worker(main="index.js", compatibility_date="2026-11-01"))
        made = structs.replace(app(id), workload=spec)
    else:
        made = app(
            id,
            "sleep",
            "100000",
            isolation=isolation,
            resources=Resources(memory=Bytes(64 << 20), disk=Bytes(16 << 20)),
            volumes=(Volume(name="kept", path="/kept"),),
            stop=Stop(grace=Seconds(0.1)),
        )
    return structs.replace(made, instance=structs.replace(made.instance, runtime=name))


async def _all_run(agent: Killable, ids: list[str]) -> None:
    def holds(statuses: dict[str, Status]) -> bool:
        return all(id in statuses and statuses[id].phase is Phase.RUNNING for id in ids)

    try:
        await agent.until(holds, START_S_MAX)
    except TimeoutError:
        told = {id: (agent.statuses[id].phase, agent.statuses[id].message) if id in agent.statuses else None for id in ids}
        raise AssertionError(f"not all run: {told}") from None


async def test_after_kill_9_an_instance_of_every_runtime_is_adopted_and_nothing_is_left(node: Node) -> None:
    everything = [_assignment(RuntimeName(name)) for name in node.runtimes]
    ids = [assignment.instance.id for assignment in everything]
    assert ids
    first = await Killable.start(node, everything)
    await _all_run(first, ids)
    pids = {id: first.statuses[id].pid for id in ids}
    await first.kill()
    await asyncio.sleep(0.5)
    for id, pid in pids.items():
        assert Path(f"/proc/{pid}").exists(), id

    second = await Killable.start(node, everything)
    await _all_run(second, ids)
    assert {id: second.statuses[id].pid for id in ids} == pids
    assert {second.statuses[id].restarts for id in ids} == {0}

    for id in ids:
        second.tell(do="remove", id=id)
    async with asyncio.timeout(START_S_MAX):
        while [*(node.data / "instances").iterdir(), *(node.data / "logs").iterdir()]:  # noqa: ASYNC110 - another process does it
            await asyncio.sleep(0.05)
    assert [id for id, pid in pids.items() if Path(f"/proc/{pid}").exists() and not _is_dead(pid)] == []
    await second.kill()
    await node.sweep()
    assert node.left() == []


def _is_dead(pid: int | None) -> bool:
    """Whether it has ended and only waits for its parent to hear of it."""
    try:
        return os.fspath(Path(f"/proc/{pid}/stat").read_text()).rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True
