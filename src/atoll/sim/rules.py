"""What must hold at every moment of every run, checked on each revision of the disk and each process that starts."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Mapping
from typing import Any

from atoll.model import codec, keys
from atoll.model.devices import GpuGrant
from atoll.model.errors import Unavailable
from atoll.model.ports.control_plane import RoutingBatch
from atoll.model.ports.runtime import Box
from atoll.model.ports.store import Change, Revision, WatchBatch
from atoll.model.records import Event, Instance, Job, Node, NodeHealth, NodeLiveness, OwnerKind, Release, Status
from atoll.model.spec import Workload
from atoll.model.states import TRANSITIONS, Desired, Phase, advance
from atoll.node.decide import HOLD_S
from atoll.sim.gpus import overcommitted
from atoll.sim.machine import SimMachine
from atoll.sim.members import Cluster
from atoll.sim.server import KINDS
from atoll.sim.serving import Serving
from atoll.sim.story import Story

_FIXED = ("id", "project", "owner_kind", "owner", "release", "generation", "index", "attempt", "created_at")
"""Fields of an instance that never change."""
STOPPED_S = 25.0
"""What must not run twice has been stopped by its node when that has been lost for so long: `stop_after_disconnect` (8 s), the
grace (3 s), the longest standstill of an agent, and what is left of the leader's margin (`control/patience.py`)."""
WELL_S = 12.0
"""A machine that was well, and reached by every server, for so long is not given up."""


class Rules:
    """The observer. It reads the disk itself, so that no part of the system stands between it and what is true."""

    def __init__(self, story: Story, machines: Mapping[str, SimMachine], *, calm: bool) -> None:
        self._story = story
        self._machines = machines
        self._calm = calm
        self.records: dict[type[Any], dict[str, Any]] = {kind: {} for kind in KINDS.values()}
        self.revision = 0
        self.stopped_at: dict[str, int] = {}
        """Instance → revision at which it was told to stop, or removed."""
        self.serving = Serving(story, self.records)
        self.once: dict[str, str] = {}
        """Instance → owner, of those that must never run twice."""
        self.lost_at: dict[str, float] = {}
        """Node → since when it is lost."""
        self.unwell_at: dict[str, float] = {}
        """Machine → when it was last away, paused, or out of some server's reach."""
        self._runs: set[str] = set()
        """Jobs that schedules have made."""

    async def watch(self, cluster: Cluster) -> None:
        """Follow every revision for ever."""
        while True:
            try:
                async for batch in cluster.machine.watch("", start=Revision(self.revision + 1)):
                    self._take(batch)
            except Unavailable:
                self._story.breaks("the store has forgotten what it had acknowledged")
                await asyncio.sleep(1.0)

    def _take(self, batch: WatchBatch) -> None:
        if batch.revision != self.revision + 1:
            self._story.breaks(f"the store went from revision {self.revision} to {batch.revision}")
        self.revision = batch.revision
        placed: list[Instance] = []
        for change in batch.changes:
            self._story.imprint(change.key, change.item.value if change.item else None)
            prefix = change.key[: change.key.find("/") + 1]
            kind = KINDS.get(prefix)
            if kind is not None:
                self._change(kind, change.key.removeprefix(prefix), change, placed)
        for instance in placed:
            self._check_room(instance.node or "")
        if self._calm:
            self.serving.check()

    def _change(self, kind: type[Any], key: str, change: Change, placed: list[Instance]) -> None:
        records = self.records[kind]
        old = records.get(key)
        new = codec.decode(change.item.value, kind) if change.item else None
        if new is None:
            records.pop(key, None)
        else:
            records[key] = new
        if kind is Instance:
            self._check_instance(key, old, new)
            if new is not None and new.node is not None and (old is None or old.node is None):
                placed.append(new)
        elif kind is NodeLiveness and new is not None:
            if new.health is not NodeHealth.LOST:
                self.lost_at.pop(key, None)
            elif key not in self.lost_at:
                self.lost_at[key] = asyncio.get_running_loop().time()
                self._check_lost(key)
        elif kind is Status and new is not None:
            self._check_status(key, old, new)
        elif kind is Job and new is not None and old is None and new.parent:
            self._check_run(key)
        elif kind is Release and old is not None and new is not None and old != new:
            self._story.breaks(f"release {key} was changed")
        elif kind is Event and new is not None and old is None:
            self._story.mark(f"event: {new.code}")
            self._story.tell(f"event {new.subject}: {new.code}", message=new.message)

    def _check_instance(self, key: str, old: Instance | None, new: Instance | None) -> None:
        if new is None:
            status = self.records[Status].get(key)
            if old is not None:
                self.stopped_at.setdefault(old.id, self.revision)
                self._story.tell("instance removed", id=old.id, desired=old.desired, phase=status.phase if status else None)
            return
        self._story.tell("instance", id=new.id, desired=new.desired, node=new.node, release=new.release, generation=new.generation)
        if new.desired is Desired.STOP:
            self.stopped_at.setdefault(new.id, self.revision)
        spec = self.spec_of(new) if old is None else None
        if spec is not None and spec.lost.stop_after_disconnect is not None:
            self.once[new.id] = f"{new.project}/{new.owner}"
        if old is None:
            if new.id in self.stopped_at:
                self._story.breaks(f"instance {new.id} was made again")
            return
        if advance(old.desired, new.desired) is not new.desired:
            self._story.breaks(f"instance {new.id} was to {old.desired}, then to {new.desired}")
        if old.node is not None and (old.node, old.runtime, old.gpus) != (new.node, new.runtime, new.gpus):
            self._story.breaks(f"instance {new.id} was moved from {old.node} to {new.node}")
        for field in _FIXED:
            if getattr(old, field) != getattr(new, field):
                self._story.breaks(f"{field} of instance {new.id} was changed")

    def _check_status(self, key: str, old: Status | None, new: Status) -> None:
        instance = self.records[Instance].get(key)
        self._story.tell("status", id=new.instance, phase=new.phase, ready=new.ready, node=new.node, message=new.message)
        if instance is None:
            self._story.breaks(f"a status of {new.instance}, which is gone, was written")
        elif instance.node != new.node:
            self._story.breaks(f"{new.node} spoke of {new.instance}, which is on {instance.node}")
        forgot = instance is not None and instance.node is not None and self._machines[instance.node].disk.forgot
        if old is not None and new.phase not in _reachable(old.phase, forgot=forgot):
            self._story.breaks(f"{new.instance} went from {old.phase} to {new.phase}")
        if new.ready and new.phase is not Phase.RUNNING:
            self._story.breaks(f"{new.instance} is {new.phase} and ready")

    def _check_run(self, key: str) -> None:
        """A time of a schedule has one run, and each call for one has one."""
        if key in self._runs:
            self._story.breaks(f"the run {key} of a schedule was made again")
        self._runs.add(key)

    def _check_room(self, name: str) -> None:
        """A node never has more placed on it than it has."""
        node: Node | None = self.records[Node].get(name)
        if node is None:
            self._story.breaks(f"an instance was placed on {name}, which is not known")
            return
        cpu_milli = memory_bytes = 0
        grants: list[GpuGrant] = []
        for key, instance in self.records[Instance].items():
            status: Status | None = self.records[Status].get(key)
            if instance.node != name or (status is not None and status.phase.final):
                continue
            spec = self.spec_of(instance)
            if spec is not None:
                cpu_milli += spec.resources.cpu.milli
                memory_bytes += spec.resources.memory
                grants += instance.gpus
                if spec.resources.gpu is not None and not instance.gpus:
                    self._story.breaks(f"{instance.id} asks for a GPU and was placed on {name} without one")
        if why := overcommitted(grants):
            self._story.breaks(f"node {name} is over-committed: {why}")
        if cpu_milli > node.capacity.cpu_milli or memory_bytes > node.capacity.memory_bytes:
            self._story.breaks(f"node {name} is over-committed: {cpu_milli} milli-cores and {memory_bytes} bytes are placed there")

    def spec_of(self, instance: Instance) -> Workload | None:
        """Return the instance's spec, or that of the newest release if its own is gone."""
        if instance.owner_kind is OwnerKind.JOB:
            job: Job | None = self.records[Job].get(f"{instance.project}/{instance.owner}")
            return job.spec if job else None
        release: Release | None = self.records[Release].get(
            keys.release(instance.project, instance.owner, instance.release).removeprefix(keys.RELEASES)
        )
        return release.spec if release else None

    def routed(self, batch: RoutingBatch) -> None:
        """Check a batch before the ingress uses it."""
        for routing in batch.put:
            for endpoint in routing.endpoints:
                if self.stopped_at.get(endpoint.instance, batch.revision + 1) <= batch.revision:
                    self._story.breaks(f"{routing.app} is routed to {endpoint.instance}, which was told to stop")

    def started(self, machine: SimMachine, box: Box) -> None:
        """Check a process that is about to start."""
        now = asyncio.get_running_loop().time()
        for other in self._machines.values():
            if box.id in other.host.running():
                self._story.breaks(f"{box.id} starts on {machine.name} while it runs on {other.name}")
        instance = next((i for i in self.records[Instance].values() if i.id == box.id), None)
        said: Status | None = self.records[Status].get(f"{instance.project}/{box.id}") if instance is not None else None
        # Who has lost power may have forgotten what it told; it asks first, but does not wait for an answer for ever.
        asked = not machine.disk.forgot or now - machine.agent_since < HOLD_S
        if said is not None and said.phase.final and asked:
            self._story.breaks(f"{box.id} starts on {machine.name} after its end was reported: {said.phase}")
        if machine.disk.stopped.get(box.id, machine.life) is not machine.life and not machine.disk.forgot:
            # By this agent it may have been on its way already.
            self._story.breaks(f"{box.id} starts on {machine.name} though an agent before wrote down that it is to stop")
        if instance is not None and instance.node != machine.name:
            self._story.breaks(f"{box.id} starts on {machine.name}, but its node is {instance.node}")
        # What is no longer wanted at all does not count: a node that was given up runs it on until it hears of that.
        known = {i.id: i for i in self.records[Instance].values()}
        self._check_once(machine, box)
        running = Counter[str]()
        grants: list[GpuGrant] = []
        for id in (*machine.host.running(), box.id):
            if id in known:
                limits = box.limits if id == box.id else machine.host.processes[id].box.limits
                running["cpu"] += limits.cpu_milli
                running["memory"] += limits.memory_bytes
                grants += known[id].gpus
        if why := overcommitted(grants):
            self._story.breaks(f"{machine.name} runs more than it has: {why}")
        if running["cpu"] > machine.capacity[0] or running["memory"] > machine.capacity[1]:
            self._story.breaks(f"{machine.name} runs more than it has: {dict(running)}")

    def _check_once(self, machine: SimMachine, box: Box) -> None:
        """What must not run twice never does: who is replaced has ended, though its machine may be cut off."""
        owner = self.once.get(box.id)
        if owner is None:
            return
        for other in self._machines.values():
            for id in other.host.running():
                if other is not machine and self.once.get(id) == owner and self._given_up(other.name):
                    self._story.breaks(f"{box.id} starts on {machine.name} while {id}, which it replaces, runs on {other.name}")

    def _given_up(self, node: str) -> bool:
        """Whether a node has been lost for so long that it must have stopped such work by itself."""
        since = self.lost_at.get(node)
        return since is not None and asyncio.get_running_loop().time() - since > STOPPED_S

    def _check_lost(self, name: str) -> None:
        """A machine that is well, and that every server reaches, is not given up."""
        well_s = asyncio.get_running_loop().time() - self.unwell_at.get(name, 0.0)
        if well_s > WELL_S:
            self._story.breaks(f"node {name} was given up, though it has been well, and reached, for {well_s:.1f} s")


def _reachable(phase: Phase, *, forgot: bool) -> frozenset[Phase]:
    """Return where an instance may be at its node's next word: an agent reports only the newest, and one whose machine `forgot`
    the last of what it wrote when it lost power need not know that it had begun to stop."""
    found = {phase, Phase.RUNNING} if forgot and phase is Phase.STOPPING else {phase}
    grown = True
    while grown:
        more = found.union(*(TRANSITIONS[step] for step in found))
        grown = len(more) > len(found)
        found = more
    return frozenset(found)
