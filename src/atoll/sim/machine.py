"""One machine: a fake host, network and disk that outlive its agents, and the agents, one life after another."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Sequence
from pathlib import Path

from atoll.images.fake import FakeImages
from atoll.model.ports.runtime import Box, Runtime
from atoll.model.spec import Health
from atoll.network.fake import FakeNetwork, FakeNetworkState
from atoll.node.agent import Agent
from atoll.node.beating import Beating
from atoll.node.fake import FakeMachine, MemoryLogs
from atoll.runtimes.fake_host import Behaviour, FakeHost, behaviour_of
from atoll.sim.clock import VirtualClock
from atoll.sim.faults import Faults, Life
from atoll.sim.gpus import Bays, Rack, make_hardware
from atoll.sim.line import Line
from atoll.sim.lives import SimNetwork, SimRuntime
from atoll.sim.loop import VirtualLoop, process_context
from atoll.sim.net import Net
from atoll.sim.record import Disk, SimContact, SimRecord
from atoll.sim.server import BEATS_PORT, Server
from atoll.sim.story import Story

LISTEN_S = 0.3
"""How long a fake process takes until it listens, at most."""


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

    kind_of_rack: type[Rack] = Rack

    def __init__(
        self,
        name: str,
        *,
        site: str,
        servers: Sequence[Server],
        net: Net,
        clock: VirtualClock,
        choose: random.Random,
        faults: Faults,
        story: Story,
        data: Path,
        cpu_milli: int,
        memory_bytes: int,
        started: Callable[[SimMachine, Box], None],
        bays: Bays = Bays(0),
    ) -> None:
        self.name = name
        self.capacity = (cpu_milli, memory_bytes)
        self.site = site
        self.clock = clock
        self._servers = servers
        self._net = net
        self._context = process_context(name)
        self._choose = choose
        self._faults = faults
        self._story = story
        self._data = data
        self._started = started
        self.host = FakeHost(clock=clock, script=self._script)
        self.links = FakeNetworkState()
        self.disk = Disk(choose, story)
        self.images = FakeImages(delay_s=0.2)
        self._machine = FakeMachine(cpu_milli=cpu_milli, memory_bytes=memory_bytes)
        hardware = make_hardware(name, bays, clock)
        self.rack = self.kind_of_rack(hardware, data / "gpus", clock) if hardware is not None else None
        self._since: dict[str, tuple[float, float]] = {}
        """Instance → when its process started, and when it listens."""
        self.sick: set[tuple[str, int | None]] = set()
        self.life = Life(name)
        self.life.end()
        self.line = self._make_line()
        self.agent: Agent | None = None
        self._task: asyncio.Task[None] | None = None
        self._lives = 0
        self.agent_since = 0.0
        """When the newest agent started."""
        self.boots = 1

    def start_agent(self) -> None:
        if self.life.alive:
            return
        self._lives += 1
        self.agent_since = asyncio.get_running_loop().time()
        self.life = Life(f"agent {self.name} life {self._lives}")
        self.line = self._make_line()
        self._story.tell("the agent starts", node=self.name, life=self._lives)
        beating = self._beating() if self._faults.profile.beats else None
        self.agent = Agent(
            node=self.name,
            site=self.site,
            region=self.site,
            control=self.line,
            runtimes=[self.make_runtime()],
            images=self.images,
            network=self.make_network(),
            clock=self.clock,
            random=self._choose,
            data=self._data,
            record=self.make_record(),
            logs=MemoryLogs(self._data),
            prober=SimProber(self, self._faults),
            machine=self._machine,
            devices=self.rack.devices(self.life, self._faults, self._story) if self.rack is not None else None,
            arch="amd64",
            beating=beating,
            contact=beating.contact if beating is not None else SimContact(self.disk, str(self.boots)),
        )
        self._task = asyncio.get_running_loop().create_task(
            self._run(self.agent, beating, self.life), name=f"agent {self.name} {self._lives}", context=self._context
        )

    def _make_line(self) -> Line:
        return Line(self.name, self._servers, self._net, self.life, self._faults, self._story, self._choose)

    def make_record(self) -> SimRecord:
        return SimRecord(self.disk, self.life)

    def make_runtime(self) -> SimRuntime:
        return SimRuntime(self.host, self.life, self._faults, self._story, self._choose)

    def pause_agent(self) -> None:
        """Let the agent stand still: what it started runs on."""
        self._story.tell("an agent stands still", node=self.name)
        self._loop.stop_process(self.name)

    def resume_agent(self) -> None:
        self._loop.continue_process(self.name)

    @property
    def paused(self) -> bool:
        return self._loop.is_stopped(self.name)

    @property
    def _loop(self) -> VirtualLoop:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, VirtualLoop)  # noqa: S101 - nothing here runs on another
        return loop

    def make_network(self) -> FakeNetwork:
        return SimNetwork(self.links, self.life, self._faults, self._story)

    def _beating(self) -> Beating:
        servers = [f"{server.name}:{BEATS_PORT}" for server in self._servers]
        contact = SimContact(self.disk, str(self.boots))
        # Its own end, so that a datagram comes from a place of the network.
        bind = (self.name, 0)
        return Beating(
            self.name,
            control=self.line,
            opener=self._net.datagrams,
            clock=self.clock,
            servers=servers,
            contact=contact,
            bind=bind,
        )

    async def _run(self, agent: Agent, beating: Beating | None, life: Life) -> None:
        beats = asyncio.create_task(beating.run(), name=f"beats of {self.name}") if beating is not None else None
        try:
            await agent.run()
        except Exception as error:  # noqa: BLE001 - the promise is that nothing ends it
            if life.alive:
                self._story.breaks(f"the agent of {self.name} ended: {error!r}")
            return
        finally:
            if beats is not None and beating is not None:
                beating.orderly = life.alive  # who is killed says no goodbye
                beats.cancel()
                await asyncio.gather(beats, return_exceptions=True)
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
        self.resume_agent()
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        self.agent = None

    async def restart(self, *, forgets: bool = False) -> None:
        """Lose power: every process and link is gone, the disk stays, but for its newest writes where it `forgets`."""
        await self.crash_agent()
        self.disk.lose_power(forgets=forgets)
        self._story.tell("the machine loses power", node=self.name)
        self.boots += 1
        self.host.crash_all()
        self.host.processes.clear()
        self.links = FakeNetworkState()
        if self.rack is not None:
            self.rack.lose_power()

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
