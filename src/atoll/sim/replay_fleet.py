"""The machines of a replay, light ones: each speaks to the API as an agent does, and an instance on it is a timer.

What an agent does on its machine (images, roots, networks, probes) is one span here, `START_S`. A machine that fails says nothing
any more and forgets what it ran; when it is back, it starts again what is still meant to run on it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

from atoll.control.detection.exchange import Exchange
from atoll.model.errors import AtollError
from atoll.model.ports.control_plane import AssignmentBatch, ControlPlane
from atoll.model.records import Assignment, Exit, Heartbeat, Instance, Node, Status
from atoll.model.states import Desired, Phase
from atoll.sim.clock import VirtualClock

START_S = 1.0
"""From the assignment to a process that is ready; its image is there."""
STOP_S = 0.2
"""From the stop signal to the end."""
BEAT_S = 0.5
HEARTBEAT_S = 15.0
"""Over HTTP, as agents of large cells send them."""
RETRY_S = 1.0
RUN = "run"
"""The command of what ends by itself, after so many seconds; everything else runs until it is told to stop."""


class Machine:
    def __init__(self, node: Node) -> None:
        self.node = node
        self.boots = 0
        self.processes: dict[str, Instance] = {}
        self.following: asyncio.Task[None] | None = None
        self.words: dict[str, Status] = {}
        """What is still to be reported."""
        self.reporting = False
        self.ending: set[str] = set()
        """Instances that were told to stop."""


class Fleet:
    """`ends_at(after_s, node, instance)` is called when something runs that ends by itself; call `end` when it is time."""

    def __init__(
        self,
        nodes: Sequence[Node],
        control: ControlPlane,
        detection: Exchange,
        clock: VirtualClock,
        ends_at: Callable[[float, str, str], None],
    ) -> None:
        self._control = control
        self._detection = detection
        self._clock = clock
        self._ends_at = ends_at
        self._machines = {node.name: Machine(node) for node in nodes}
        self._up: dict[str, Machine] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._word = 0
        self._failure: BaseException | None = None

    def check(self) -> None:
        """Raise what ended one of the fleet's own tasks, which nothing may."""
        if self._failure is not None:
            raise RuntimeError("a machine's own task ended") from self._failure

    async def start(self) -> None:
        """Switch all machines on; return when all have registered."""
        for name in self._machines:
            await self.switch_on(name)
        self._spawn(self._beat())
        self._spawn(self._heartbeats())

    async def close(self) -> None:
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def switch_on(self, name: str) -> None:
        machine = self._machines[name]
        self._up[name] = machine
        await self._control.register_node(machine.node)
        machine.following = self._spawn(self._follow(machine))

    def switch_off(self, name: str) -> None:
        """It loses power: nothing of what it ran is left, and nothing more is heard of it."""
        machine = self._up.pop(name)
        machine.boots += 1
        machine.processes.clear()
        machine.words.clear()
        machine.ending.clear()
        if machine.following is not None:
            machine.following.cancel()

    def end(self, name: str, id: str) -> None:
        """Let a process end by itself, with success, if it still runs."""
        machine = self._up.get(name)
        if machine is not None and (instance := machine.processes.pop(id, None)) is not None:
            self._say(machine, instance, Phase.SUCCEEDED, exit=Exit(code=0, at=self._clock.now()))

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._done)
        return task

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self._failure = error

    async def _beat(self) -> None:
        while True:
            self._detection.hear(self._up)
            await asyncio.sleep(BEAT_S)

    async def _heartbeats(self) -> None:
        while True:
            for name in list(self._up):
                await self._control.heartbeat(Heartbeat(node=name, at=self._clock.now()))
            await asyncio.sleep(HEARTBEAT_S)

    async def _follow(self, machine: Machine) -> None:
        async for batch in self._control.assignments(machine.node.name):
            self._take(machine, batch)

    def _take(self, machine: Machine, batch: AssignmentBatch) -> None:
        for assignment in batch.put:
            self._assign(machine, assignment)
        for id in batch.removed:
            machine.processes.pop(id, None)
            machine.words.pop(id, None)
            machine.ending.discard(id)

    def _assign(self, machine: Machine, assignment: Assignment) -> None:
        instance = assignment.instance
        known = instance.id in machine.processes
        if instance.desired is Desired.STOP:
            if instance.id in machine.ending:
                return
            machine.ending.add(instance.id)
            asyncio.get_running_loop().call_later(STOP_S if known else 0.0, self._stopped, machine, machine.boots, instance)
        elif not known:
            machine.processes[instance.id] = instance
            command = assignment.workload.command
            run_s = float(command[1]) if command[:1] == (RUN,) else None
            asyncio.get_running_loop().call_later(START_S, self._started, machine, machine.boots, instance, run_s)

    def _started(self, machine: Machine, boots: int, instance: Instance, run_s: float | None) -> None:
        if machine.boots != boots or instance.id not in machine.processes:
            return
        now = self._clock.now()
        self._say(machine, instance, Phase.RUNNING, ready=True, started_at=now, ready_at=now)
        if run_s is not None:
            self._ends_at(run_s, machine.node.name, instance.id)

    def _stopped(self, machine: Machine, boots: int, instance: Instance) -> None:
        if machine.boots == boots:
            machine.processes.pop(instance.id, None)
            self._say(machine, instance, Phase.STOPPED, exit=Exit(code=143, at=self._clock.now(), signal="TERM"))

    def _say(
        self,
        machine: Machine,
        instance: Instance,
        phase: Phase,
        *,
        ready: bool = False,
        started_at: float | None = None,
        ready_at: float | None = None,
        exit: Exit | None = None,
    ) -> None:
        self._word += 1
        machine.words[instance.id] = Status(
            instance=instance.id,
            project=instance.project,
            node=machine.node.name,
            phase=phase,
            ready=ready,
            phase_at=self._clock.now(),
            started_at=started_at,
            ready_at=ready_at,
            exit=exit,
            word=self._word,
        )
        if not machine.reporting:
            machine.reporting = True
            self._spawn(self._report(machine))

    async def _report(self, machine: Machine) -> None:
        try:
            while machine.words:
                words = list(machine.words.values())
                try:
                    await self._control.report(machine.node.name, words)
                except AtollError:
                    await asyncio.sleep(RETRY_S)
                    continue
                for word in words:
                    if machine.words.get(word.instance) is word:
                        del machine.words[word.instance]
        finally:
            machine.reporting = False
