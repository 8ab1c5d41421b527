"""One machine: a fake host, network and disk that outlive its agents, and the agents, one life after another."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Sequence
from pathlib import Path

from atoll.images.fake import FakeImages
from atoll.model.errors import RuntimeFailed, Unavailable
from atoll.model.ports.network import Link
from atoll.model.ports.runtime import Box, Found, Runtime, Started
from atoll.model.records import Assignment, Exit, Usage
from atoll.model.spec import Health, Port
from atoll.network.fake import FakeNetwork, FakeNetworkState
from atoll.node.agent import Agent
from atoll.node.fake import FakeMachine, MemoryLogs
from atoll.node.record import Entry, MemoryRecord
from atoll.node.transitions import State
from atoll.runtimes.fake import FakeRuntime
from atoll.runtimes.fake_host import Behaviour, FakeHost, behaviour_of
from atoll.sim.clock import VirtualClock
from atoll.sim.faults import Faults, Life
from atoll.sim.line import Line
from atoll.sim.server import Server
from atoll.sim.story import Story

START_S = 0.05
"""The longest that a runtime's call usually takes."""
LISTEN_S = 0.3
"""How long a fake process takes until it listens, at most."""
SLOW_CALL_S = 70.0
"""A call that hangs takes up to so long: longer than the agent's patience with starting."""


class SimRuntime(FakeRuntime):
    """The fake runtime with the time that it takes, its failures, and its agent's death."""

    def __init__(self, host: FakeHost, life: Life, faults: Faults, story: Story, choose: random.Random) -> None:
        super().__init__(host)
        self._life = life
        self._faults = faults
        self._story = story
        self._choose = choose

    async def _before(self, call: str) -> None:
        self._life.check()
        await asyncio.sleep(self._choose.random() * START_S)
        if self._faults.hit(self._faults.profile.runtime_fails / 4):
            self._story.mark(f"runtime: {call} hangs")
            await self._faults.dawdle(SLOW_CALL_S)
        self._life.check()
        if self._faults.hit(self._faults.profile.runtime_fails):
            self._story.mark(f"runtime: {call} fails")
            raise RuntimeFailed(f"{call} was told to fail")

    async def _after(self) -> None:
        await self._faults.pause()
        self._life.check()

    async def create(self, box: Box) -> None:
        await self._before("create")
        await super().create(box)
        await self._after()

    async def start(self, id: str) -> Started:
        await self._before("start")
        started = await super().start(id)
        if self._faults.hit(self._faults.profile.runtime_fails / 4):
            self._story.mark("runtime: start hangs when done")
            await self._faults.dawdle(SLOW_CALL_S)
        await self._after()
        return started

    async def wait(self, id: str) -> Exit:
        self._life.check()
        exit = await super().wait(id)
        self._life.check()
        return exit

    async def signal(self, id: str, name: str) -> None:
        await self._before("signal")
        await super().signal(id, name)
        await self._after()

    async def kill(self, id: str) -> None:
        await self._before("kill")
        await super().kill(id)
        await self._after()

    async def usage(self, id: str) -> Usage:
        self._life.check()
        return await super().usage(id)

    async def delete(self, id: str) -> None:
        await self._before("delete")
        await super().delete(id)
        await self._after()

    async def recover(self) -> Sequence[Found]:
        await self._before("recover")
        return await super().recover()


class SimNetwork(FakeNetwork):
    def __init__(self, state: FakeNetworkState, life: Life, faults: Faults, story: Story) -> None:
        super().__init__(state)
        self._life = life
        self._faults = faults
        self._story = story

    async def _before(self, call: str) -> None:
        self._life.check()
        await self._faults.pause()
        self._life.check()
        if self._faults.hit(self._faults.profile.runtime_fails):
            self._story.mark(f"network: {call} fails")
            raise Unavailable(f"{call} was told to fail")

    async def attach(self, id: str, *, project: str, ports: Sequence[Port]) -> Link:
        await self._before("attach")
        link = await super().attach(id, project=project, ports=ports)
        await self._faults.pause()
        self._life.check()
        return link

    async def detach(self, id: str) -> None:
        await self._before("detach")
        await super().detach(id)

    async def recover(self, keep: Sequence[str]) -> Sequence[Link]:
        await self._before("recover")
        return await super().recover(keep)


class SimRecord:
    """The disk's record, as an agent's life can reach it. Implements `LocalRecord`."""

    def __init__(self, disk: MemoryRecord, life: Life) -> None:
        self._disk = disk
        self._life = life

    def load(self) -> list[Entry]:
        self._life.check()
        return self._disk.load()

    def put_assignment(self, assignment: Assignment) -> None:
        self._life.check()
        self._disk.put_assignment(assignment)

    def put_state(self, id: str, state: State) -> None:
        self._life.check()
        self._disk.put_state(id, state)

    def put_secrets(self, id: str, secrets: dict[str, str]) -> None:
        self._life.check()
        self._disk.put_secrets(id, secrets)

    def remove(self, id: str) -> None:
        self._life.check()
        self._disk.remove(id)

    def close(self) -> None: ...


class SimProber:
    """Probes what the fake processes would answer. Implements `Prober`."""

    def __init__(self, machine: SimMachine, faults: Faults) -> None:
        self._machine = machine
        self._faults = faults

    async def probe_port(self, address: str, port: int) -> str:
        await self._faults.pause()
        return self._machine.refuses(address)

    async def probe(self, runtime: Runtime, id: str, address: str | None, health: Health, port: int, http2: bool) -> str:
        await self._faults.pause()
        return self._machine.refuses(address or "")


class SimMachine:
    """A node of the cell. `started` is called with each process that starts."""

    def __init__(
        self,
        name: str,
        *,
        server: Server,
        clock: VirtualClock,
        choose: random.Random,
        faults: Faults,
        story: Story,
        data: Path,
        cpu_milli: int,
        memory_bytes: int,
        started: Callable[[SimMachine, Box], None],
    ) -> None:
        self.name = name
        self.capacity = (cpu_milli, memory_bytes)
        self._server = server
        self._clock = clock
        self._choose = choose
        self._faults = faults
        self._story = story
        self._data = data
        self._started = started
        self.host = FakeHost(clock=clock, script=self._script)
        self.links = FakeNetworkState()
        self.record = MemoryRecord()
        self.images = FakeImages(delay_s=0.2)
        self._machine = FakeMachine(cpu_milli=cpu_milli, memory_bytes=memory_bytes)
        self._since: dict[str, tuple[float, float]] = {}
        """Instance → when its process started, and when it listens."""
        self.sick: set[tuple[str, int | None]] = set()
        self.life = Life(name)
        self.life.end()
        self.line = Line(server, self.life, faults, story)
        self.agent: Agent | None = None
        self._task: asyncio.Task[None] | None = None
        self._lives = 0

    def start_agent(self) -> None:
        if self.life.alive:
            return
        self._lives += 1
        self.life = Life(f"agent {self.name} life {self._lives}")
        was_cut = self.line.is_cut
        self.line = Line(self._server, self.life, self._faults, self._story)
        if was_cut:
            self.line.cut()
        self._story.tell("the agent starts", node=self.name, life=self._lives)
        self.agent = Agent(
            node=self.name,
            control=self.line,
            runtimes=[SimRuntime(self.host, self.life, self._faults, self._story, self._choose)],
            images=self.images,
            network=self.make_network(),
            clock=self._clock,
            random=self._choose,
            data=self._data,
            record=SimRecord(self.record, self.life),
            logs=MemoryLogs(self._data),
            prober=SimProber(self, self._faults),
            machine=self._machine,
            arch="amd64",
        )
        self._task = asyncio.create_task(self._run(self.agent, self.life), name=f"agent {self.name} {self._lives}")

    def make_network(self) -> FakeNetwork:
        return SimNetwork(self.links, self.life, self._faults, self._story)

    async def _run(self, agent: Agent, life: Life) -> None:
        try:
            await agent.run()
        except Exception as error:  # noqa: BLE001 - the promise is that nothing ends it
            if life.alive:
                self._story.breaks(f"the agent of {self.name} ended: {error!r}")
            return
        self._story.breaks(f"the agent of {self.name} returned")

    async def crash_agent(self) -> None:
        """Kill the agent; what it started runs on. When this returns, nothing of the agent runs any more."""
        if not self.life.alive:
            return
        states = sorted({runner.state.phase.value for runner in self.agent.runners.values()}) if self.agent else []
        for state in states:
            self._story.mark(f"agent killed while {state}")
        self._story.tell("the agent is killed", node=self.name)
        self.life.end()
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        self.agent = None

    async def restart(self) -> None:
        """Lose power: every process and link is gone, the disk stays."""
        await self.crash_agent()
        self._story.tell("the machine loses power", node=self.name)
        self.host.crash_all()
        self.host.processes.clear()
        self.links = FakeNetworkState()

    def refuses(self, address: str) -> str:
        """Return why nobody answers at `address`, or nothing if an instance does."""
        id = next((id for id, link in self.links.links.items() if link.address == address), None)
        if id is None:
            return "no route to host"
        process = self.host.processes.get(id)
        if process is None or not process.running:
            return "connection refused"
        if (id, process.pid) in self.sick:
            return "timed out"
        return "" if asyncio.get_running_loop().time() >= self._since[id][1] else "connection refused"

    def make_sick(self, id: str) -> None:
        """Let the instance's process hang: it runs, but answers nothing."""
        self.sick.add((id, self.host.processes[id].pid))

    def _script(self, box: Box) -> Behaviour:
        now = asyncio.get_running_loop().time()
        self._since[box.id] = (now, now + self._choose.random() * LISTEN_S)
        self._story.imprint("start", self.name, box.id)
        self._story.tell("a process starts", node=self.name, instance=box.id, argv=" ".join(box.argv))
        self._started(self, box)
        if box.argv[0] == "flaky":
            failed = not self._faults.healed and self._choose.random() < float(box.argv[1])
            return Behaviour(exit_code=int(failed), after_s=self._choose.random() * float(box.argv[2]))
        return behaviour_of(box)
