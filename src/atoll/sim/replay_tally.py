"""Who of a trace runs where, as the cell's records show it: each piece of work is matched to an instance of its owner.

A job has one piece of work. The replicas of an app are alike: whichever is there does the work that has waited longest, and where
one is taken away that is still needed, the work goes on with one that is left over.
"""

from __future__ import annotations

from collections.abc import Callable

from atoll.control.making import UNPLACED_MAX
from atoll.model.records import Brake, Instance, JobStatus, NodeHealth, NodeLiveness, OwnerKind, Status
from atoll.model.states import Desired, Phase
from atoll.scheduling.assembly import group_of, holds_room, standing_of
from atoll.scheduling.demand import Demand
from atoll.scheduling.snapshot import Snapshot
from atoll.sim.replay_cell import Cell
from atoll.sim.replay_places import Places
from atoll.sim.replay_trace import Task
from atoll.store.cache import Delta

QUIET_S = 1.5
"""So long nothing has changed before a time may be passed over: longer than the leader's tick and its pause between two plans."""
RESTLESS_MAX_S = 700.0
"""What has not come to rest by then will not: it is longer than the longest time for which the brake holds."""

Owner = tuple[OwnerKind, str]
"""Kind and name."""


class Held:
    """What is known of one owner."""

    def __init__(self, demand: Demand) -> None:
        self.demand = demand
        self.waiting: dict[str, None] = {}
        """Names of the tasks that no instance does, in their order."""
        self.spare: dict[str, None] = {}
        """Placed instances that do none."""
        self.rejected: set[str] = set()
        """Instances that have no node and were told why."""


class Tally:
    """`runs(task)` is called when a task's process runs, the first time and after each loss."""

    def __init__(self, cell: Cell, snapshot: Snapshot, places: Places, runs: Callable[[Task], None]) -> None:
        self._cell = cell
        self._snapshot = snapshot
        self._places = places
        self._runs = runs
        self._owners: dict[Owner, Held] = {}
        self._owner_of: dict[str, Owner] = {}
        self._tasks: dict[str, Task] = {}
        """Those that have arrived and not ended."""
        self._task_of: dict[str, str] = {}
        """Instance → the task that it does."""
        self._key_of: dict[str, str] = {}
        """The other way round."""
        self._node_of: dict[str, str] = {}
        self._on: dict[str, dict[str, None]] = {}
        """Node → instances placed there."""
        self._leaving: set[str] = set()
        self._orphans: dict[str, float] = {}
        """Instances whose node failed under them → when."""
        self._lost_at: dict[str, float] = {}
        """Task → when its node failed, until it runs again."""
        self._failed: dict[str, float] = {}
        """Node → when it failed, while nobody has noticed."""
        self._down: dict[str, float] = {}
        """Node → when it failed, until it is back."""
        self._returning: set[str] = set()
        self._started: set[str] = set()
        """Tasks that have run before."""
        self._changed_at = self._rested_at = cell.clock.monotonic()
        self.waiting: dict[str, float] = {}
        """Task → since when it has no node."""
        self.running: set[str] = set()
        self.finished: list[str] = []
        """Jobs that are over, for whoever deletes them."""
        self.waits: list[float] = []
        self.starts: list[float] = []
        self.replaced: list[float] = []
        self.found: list[float] = []
        self.ended = self.lost = self.braked = 0

    async def follow(self) -> None:
        """Take over every change of the cell, for ever."""
        async for deltas in self._cell.state.changes():
            for delta in deltas.deltas:
                self._apply(delta)

    # What the trace brings.

    def arrive(self, task: Task, owner: Owner, demand: Demand) -> None:
        self._owner_of[task.name] = owner
        self._tasks[task.name] = task
        held = self._owners.setdefault(owner, Held(demand))
        self._wait(task.name, held, self._cell.now_s())

    def depart(self, name: str) -> Owner:
        """Let a task be done whose owner is an app; return that, which is to have one instance less."""
        owner = self._owner_of[name]
        key = self._key_of.get(name)
        if key is not None:
            self._release_task(key)
        self._end(name)
        if key is not None:
            self._assign(key, self._owners[owner])
            self._runs_now(key)
        return owner

    def node_failed(self, node: str) -> None:
        now = self._cell.now_s()
        self._failed[node] = self._down[node] = now
        self._returning.discard(node)
        for key in list(self._on.get(node, ())):
            self._orphans[key] = now
            name = self._release_task(key)
            if name is not None:
                self.lost += 1
                self._lost_at.setdefault(name, now)
                self._wait(name, self._owners[self._owner_of[name]], now)
        self.touch()

    def node_returned(self, node: str) -> None:
        self._failed.pop(node, None)
        self._down.pop(node, None)
        liveness = self._cell.state.get(NodeLiveness, node)
        if liveness is not None and liveness.record.health is not NodeHealth.READY:
            self._returning.add(node)
        self.touch()

    def at_rest(self) -> bool:
        """Whether nothing will change until the trace brings something; or nothing has for too long."""
        now = self._cell.clock.monotonic()
        if now - self._changed_at < QUIET_S:
            return False
        if self._settled():
            self._rested_at = now
            return True
        return now - max(self._changed_at, self._rested_at) > RESTLESS_MAX_S

    def _settled(self) -> bool:
        leaving = self._leaving - self._orphans.keys()  # the records of those stay as long as their machine is away
        busy = leaving or self.finished or self._failed or self._returning or len(self._task_of) != len(self.running)
        if busy:
            return False
        owners = {self._owner_of[name] for name in self.waiting}
        return all(len(held.rejected) >= min(len(held.waiting), UNPLACED_MAX) for held in (self._owners[each] for each in owners))

    # What the cell makes of it.

    def _apply(self, delta: Delta) -> None:
        if delta.kind is Instance:
            if delta.new is None:
                self._gone(delta.key, delta.old.record)  # type: ignore[union-attr]  # one of the two is there
            else:
                self._instance(delta.key, delta.new.record)
        elif delta.kind is Status and delta.new is not None:
            self._status(delta.key, delta.new.record)
        elif delta.kind is JobStatus and delta.new is not None and delta.new.record.phase.final:
            if delta.old is None or not delta.old.record.phase.final:
                self.finished.append(delta.new.record.name)
                self.touch()
        elif delta.kind is NodeLiveness and delta.new is not None:
            self._node(delta.new.record)
        elif delta.kind is Brake and delta.new is not None and delta.old is None:
            self.braked += 1

    def _instance(self, key: str, instance: Instance) -> None:
        held = self._owners[(instance.owner_kind, instance.owner)]
        if instance.node is None:
            if instance.rejection is not None and key not in held.rejected:
                held.rejected.add(key)
                self.touch()
            return
        if key not in self._node_of and key not in self._leaving:
            self.touch()
            held.rejected.discard(key)
            self._node_of[key] = instance.node
            self._on.setdefault(instance.node, {})[key] = None
            self._snapshot.allocate(key, instance.node, group_of(instance), held.demand, instance.gpus)
            if instance.node in self._down:
                self._orphans[key] = self._down[instance.node]
            self._assign(key, held)
        if instance.desired is not Desired.RUN and key not in self._leaving:
            self.touch()
            status = self._cell.state.get(Status, key)
            if status is None or not status.record.phase.final:
                self._leaving.add(key)
            self._leave(key, held)

    def _gone(self, key: str, instance: Instance) -> None:
        self.touch()
        held = self._owners[(instance.owner_kind, instance.owner)]
        held.rejected.discard(key)
        self._leaving.discard(key)
        self._orphans.pop(key, None)
        self._leave(key, held)
        self._snapshot.release(key)
        node = self._node_of.pop(key, None)
        if node is not None:
            del self._on[node][key]

    def _leave(self, key: str, held: Held) -> None:
        """An instance does nothing any more: what it did goes on elsewhere."""
        held.spare.pop(key, None)
        ran = self._task_of.get(key) in self.running
        name = self._release_task(key)
        if name is None:
            return
        if not held.spare:
            self._wait(name, held, self._cell.now_s())
            return
        other = next(iter(held.spare))
        del held.spare[other]
        self._take(other, name)
        status = self._cell.state.get(Status, other)
        if status is not None and status.record.ready and ran:
            self.running.add(name)
        elif status is not None and status.record.ready:
            self._runs_now(other)

    def _assign(self, key: str, held: Held) -> None:
        """Let a placed instance do what has waited longest."""
        if not held.waiting:
            held.spare[key] = None
            return
        name = next(iter(held.waiting))
        del held.waiting[name]
        since = self.waiting.pop(name)
        self.waits.append(self._cell.now_s() - since)
        self._take(key, name)

    def _take(self, key: str, name: str) -> None:
        self._task_of[key], self._key_of[name] = name, key
        self._places.count(self._tasks[name].owner, self._node_of[key], 1)

    def _release_task(self, key: str) -> str | None:
        """Take away from an instance what it does; return that, if it is not done."""
        name = self._task_of.pop(key, None)
        if name is None:
            return None
        del self._key_of[name]
        self._places.count(self._tasks[name].owner, self._node_of[key], -1)
        self.running.discard(name)
        return name

    def _wait(self, name: str, held: Held, now: float) -> None:
        held.waiting[name] = None
        self.waiting[name] = now
        self.touch()

    def _end(self, name: str) -> None:
        self.ended += 1
        self.waiting.pop(name, None)
        self._owners[self._owner_of.pop(name)].waiting.pop(name, None)
        self._lost_at.pop(name, None)
        self._started.discard(name)
        del self._tasks[name]
        self.touch()

    def _status(self, key: str, status: Status) -> None:
        if not holds_room(status):
            self._snapshot.release(key)
            self._leaving.discard(key)
        if status.phase is Phase.RUNNING and status.ready:
            self._ready(key, status)
        elif status.phase is Phase.SUCCEEDED:
            name = self._release_task(key)
            if name is not None:
                self._end(name)

    def _ready(self, key: str, status: Status) -> None:
        held = self._owners.get(self._owner_by_instance(key))
        if held is None or key in self._leaving:
            return
        if key in self._orphans and (status.started_at or 0.0) - self._cell.began_at > self._orphans[key]:
            # Its machine was back before anybody had given it up.
            del self._orphans[key]
            if key not in self._task_of:
                self._assign(key, held)
        self._runs_now(key)

    def _runs_now(self, key: str) -> None:
        name = self._task_of.get(key)
        if name is None or name in self.running:
            return
        self.running.add(name)
        self.touch()
        now = self._cell.now_s()
        if name in self._lost_at:
            self.replaced.append(now - self._lost_at.pop(name))
        elif name not in self._started:
            self.starts.append(now - self._tasks[name].arrive_s)
        self._started.add(name)
        self._runs(self._tasks[name])

    def _owner_by_instance(self, key: str) -> Owner:
        held = self._cell.state.get(Instance, key)
        return (held.record.owner_kind, held.record.owner) if held is not None else (OwnerKind.APP, "")

    def _node(self, liveness: NodeLiveness) -> None:
        node = self._snapshot.nodes.get(liveness.name)
        if node is not None:
            self._snapshot.upsert_node(node, standing_of(None, liveness))
        if liveness.health is NodeHealth.LOST and liveness.name in self._failed:
            self.found.append(self._cell.now_s() - self._failed.pop(liveness.name))
        if liveness.health is NodeHealth.READY:
            self._returning.discard(liveness.name)
        self.touch()

    def touch(self) -> None:
        """Something has happened: it takes a while until all is at rest again."""
        self._changed_at = self._cell.clock.monotonic()
