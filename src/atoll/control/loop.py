"""The leader's one loop: changes in, decisions out, written in one go.

A wake looks at the owners that have changed, decides about each, plans what has no node (what was decided into being a moment ago
too), and commits all of it together, so that a new app costs one transaction from its record to instances with nodes. The next
wake waits until the cache shows what this one wrote; nothing is counted twice, and nothing depends on having seen every change.
"""

from __future__ import annotations

import asyncio
import math
import random
from collections.abc import Iterable, Iterator
from itertools import islice

import structlog

from atoll.control.actions import Action, Create, Decision, Remove, Seen, Update
from atoll.control.apps import decide_app
from atoll.control.dates import Dates
from atoll.control.detection.exchange import Exchange
from atoll.control.disruptions import take_away
from atoll.control.emptying import Emptying
from atoll.control.gc import GC_BEHIND_S, GC_S, REMOVED_AT_ONCE_MAX, decide_gc
from atoll.control.heir import Joins
from atoll.control.jobs import decide_job, decide_orphans
from atoll.control.judging import Judging, Traffic
from atoll.control.layouts import IngressHeartbeats, Layouts
from atoll.control.leader import Term
from atoll.control.nodes import LastSeen
from atoll.control.optimiser import Optimiser, QuickOptimiser
from atoll.control.prefetch import Prefetching
from atoll.control.quarrels import Quarrels
from atoll.control.queries import Ask, Queries
from atoll.control.readings import Heartbeats, Readings
from atoll.control.sleeping import Demand, NoDemand, Sleeping
from atoll.control.timers import Timers
from atoll.control.watching import NodeWatch
from atoll.control.world import Owner
from atoll.control.writer import Unit, Writer, unit_of, units_of
from atoll.model.errors import Compacted, OutcomeUnknown, Unavailable
from atoll.model.ports.clock import Clock
from atoll.model.ports.store import Revision, Store
from atoll.model.records import Instance, OwnerKind, suffix_of
from atoll.store.cache import Deltas, State

OWNERS_PER_WAKE_MAX = 500
"""Owners decided about before what was decided is written and the event loop gets its turn."""
INSTANCES_PER_WAKE = 10_000
"""Instances of the owners that a wake has looked at, after which it looks at no further owner; as below."""
LATER_PER_WAKE = 500
"""The same of the instances of owners that nothing is known to have changed for: the others, and the API, come between them."""
ACTIONS_PER_WAKE = 8_000
"""Actions after which a wake looks at no further owner: deciding, planning and encoding more at a time holds up the event loop
for so long that, on a busy machine, the leader's own lease runs out."""
REACH_S = 5.0
"""A wait of so long for the cache to show what was written is told; after a failure it is tried again."""
TICK_S = 1.0
"""How often nodes are looked at, and a part of all owners, whatever has happened."""
TICKS_PER_ROUND = 60
"""Ticks in which every owner has been looked at once."""
LARGE_OWNER = 200
"""Instances from which on an owner is not decided about at every change."""
PAUSE_S_PER_INSTANCE = 10e-6
"""Its pause between two decisions, for each of its instances."""
SUFFIX_BITS = 30
"""Random bits in an id that is given out."""
LOSS_SLACK_S = 0.05
ERROR_PAUSE_MIN_S = 0.1
ERROR_PAUSE_MAX_S = 5.0
PLACED_EVENTS_MAX = 100
"""Events about single placements in one wake; beyond it there is none, and the owners' own events say how many."""

log = structlog.get_logger()


class Loop:
    """One term of leading. `run` never returns by itself."""

    def __init__(
        self,
        store: Store,
        state: State,
        clock: Clock,
        chance: random.Random,
        last_seen: LastSeen,
        term: Term,
        heartbeats: Heartbeats | None = None,
        detection: Exchange | None = None,
        ingresses: IngressHeartbeats | None = None,
        optimiser: Optimiser | None = None,
        traffic: Traffic | None = None,
        demand: Demand | None = None,
        ask: Ask | None = None,
        joins: Joins | None = None,
    ) -> None:
        """`joins`, where they are whole, must hold what was written before this term; without them they are made by `run`."""
        self._store = store
        self._clock = clock
        self._chance = chance
        self._writer = Writer(store, term)
        self._begins_at = Revision(int(term.fence.expected))
        self._joins = joins or Joins(state, clock)
        self._world, self._placement = self._joins.world, self._joins.placement
        self._emptying = Emptying(self._world, self._placement)
        self._detection = detection
        self._nodes = NodeWatch(self._world, clock, last_seen, detection)
        self._heartbeats: Heartbeats = heartbeats if heartbeats is not None else {}
        self._judging = Judging(self._world, clock, traffic if traffic is not None else {})
        self._demand = demand or NoDemand()
        self._queries = Queries(self._world, clock, ask)
        self._readings = Readings(self._world, clock, self._heartbeats, self._demand, self._queries)
        self._sleeping = Sleeping(self._demand, clock)
        self._prefetching = Prefetching(self._world, self._placement, clock, heartbeats if heartbeats is not None else {})
        self._layouts = Layouts(
            self._world,
            self._placement,
            clock,
            ingresses if ingresses is not None else {},
            optimiser or QuickOptimiser(),
            self._changed_owner,
        )
        self._prefetch_due = False
        self._changed = asyncio.Event()
        self._timers = Timers()
        self._dates = Dates(clock.now())
        self._round: list[Owner] = []
        self._share = 0
        self._quarrels = Quarrels()
        self._given: set[str] = set()
        """Ids given out in this wake."""
        self._decided_at: dict[Owner, float] = {}
        self._tick_at = 0.0
        self._gc_at = clock.now() + GC_S

    async def run(self) -> None:
        """Raises Fenced when another leads. What the store cannot do for a while is tried again."""
        if not self._joins.whole:
            # The leader before this one wrote until this term began; decided without its last writes, a node is given away twice.
            # Without a deadline: the term ends when its lease does.
            await self._world.state.reach(self._begins_at)
            # Before anything is decided: joins that are still empty would make an app that is being deleted look empty, too.
            await self._joins.begin()
        self._joins.told = self._told
        self._layouts.rebuild()
        self._changed.set()
        self._demand.changed = self._woken
        if self._detection is not None:
            self._detection.lead(True)
            self._detection.changed = self._look_at_nodes
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._follow(), name="control: follow")
                tasks.create_task(self._work(), name="control: work")
                tasks.create_task(self._layouts.run(), name="control: layouts")
                tasks.create_task(self._queries.run(), name="control: queries")
        finally:
            self._demand.changed = lambda app: None
            if self._detection is not None:
                self._detection.lead(False)
                self._detection.changed = lambda: None

    def _changed_owner(self, owner: Owner) -> None:
        """Decide about an owner soon: something that is not in the store has changed for it."""
        self._world.dirty[owner] = None
        self._changed.set()

    def _woken(self, app: str) -> None:
        """Decide at once: an ingress has a request for `app`."""
        self._changed_owner((OwnerKind.APP, app))

    def _look_at_nodes(self) -> None:
        """Wake at once: the detection says that a node has fallen silent, or is heard again."""
        self._nodes.tick_due = True
        self._changed.set()

    async def _follow(self) -> None:
        while True:
            try:
                await self._joins.follow()
            except Compacted:
                log.info("control fell behind the cache and starts afresh")
                self._rebuild()

    def _told(self, deltas: Deltas) -> None:
        self._layouts.apply(deltas)
        self._changed.set()

    def _rebuild(self) -> None:
        """Take everything as it is now."""
        self._joins.rebuild()
        self._layouts.rebuild()
        self._changed.set()

    async def _work(self) -> None:
        pause_s = ERROR_PAUSE_MIN_S
        while True:
            await self._wait()
            try:
                await self._wake()
                pause_s = ERROR_PAUSE_MIN_S
            except (Unavailable, OutcomeUnknown, TimeoutError) as error:
                log.warning("a wake could not be written; all is decided again", cause=str(error) or "timeout", retry_s=pause_s)
                await asyncio.sleep(pause_s)
                pause_s = min(ERROR_PAUSE_MAX_S, 2 * pause_s)
                await self._catch_up()

    async def _wait(self) -> None:
        """Return when there is something to decide."""
        delay = self._next() - self._clock.now()
        if not self._changed.is_set() and delay > 0:
            try:
                # No longer than to the next tick, though the date may have been set back since that was set.
                async with asyncio.timeout(min(delay, TICK_S)):
                    await self._changed.wait()
            except TimeoutError:
                pass
        self._changed.clear()

    def _next(self) -> float:
        """Return when to wake though nothing happens."""
        others = (self._timers.next(), self._placement.due(self._clock.now()))
        return min([self._tick_at, *(at for at in others if at is not None)])

    async def _wake(self) -> None:
        units = self._decide()
        if self._world.dirty or self._world.later:
            self._changed.set()  # what is left comes with the next wake
        await asyncio.sleep(0)  # others are to have their turn before that, however soon it is
        if not units:
            return
        outcome = await self._writer.commit(units)
        await self._reach(outcome.revision)
        for source in outcome.refused:
            if isinstance(source, tuple):
                self._timers.set(source, self._clock.now() + ERROR_PAUSE_MAX_S)
        conflicts = set(outcome.conflicts)
        self._quarrels.settled(unit.source for unit in units if unit.source not in conflicts)
        if conflicts:
            # Decided again at once, from what was in the way: first the cache must have it.
            await self._reach(await self._store.revision())
            for source in conflicts:
                self._again(source)
            self._changed.set()
        if self._world.dirty:
            self._changed.set()

    def _again(self, source: object) -> None:
        """Have decided again what could not be written; where that goes on and on, ever later, so that no quarrel is a hot loop."""
        delay_s = self._quarrels.delay_s(source)
        at = self._clock.now() + delay_s
        match source:
            case tuple() if delay_s:
                self._timers.set_sooner(source, at)
            case tuple():
                self._world.dirty[source] = None
            case str():
                self._placement.again([source], at)
            case frozenset():
                self._placement.again(source, at)
            case _:
                pass

    async def _reach(self, revision: Revision) -> None:
        """Return when the joins hold what is written up to `revision`, however long that takes, or the term ends.

        To give up and look at everything afresh would be no help: what is missing is missing then, too. And where the cache is
        late because this process is busy, it would be the later for it.
        """
        if self._world.revision >= revision:
            return
        while self._world.revision < revision:
            try:
                async with asyncio.timeout(REACH_S):
                    await self._world.state.reach(revision)
                    while self._world.revision < revision:
                        # The cache has it; `_follow` takes it over in its next turn.
                        await self._changed.wait()
                        self._changed.clear()
            except TimeoutError:
                log.warning("the cache is late; nothing is decided before it shows what was written", waits_for=revision)
        self._changed.set()

    async def _catch_up(self) -> None:
        """After a failure: see all that may have been written, then look at everything.

        It is tried until it succeeds or the term ends: decided without what may have been written, a node is given away twice.
        """
        while True:
            try:
                async with asyncio.timeout(REACH_S):
                    await self._world.state.reach(await self._store.revision())
                break
            except (Unavailable, TimeoutError):
                log.warning("the store does not answer", retry_s=ERROR_PAUSE_MIN_S)
                await asyncio.sleep(ERROR_PAUSE_MIN_S)
        self._rebuild()

    def _decide(self) -> list[Unit]:
        now = self._clock.now()
        self._dates.look(now)
        self._given.clear()
        self._wake_due(now)
        self._emptying.look(now)
        units: list[Unit] = []
        decided: list[tuple[Owner, Decision]] = []
        actions = 0
        for owner in self._next_owners():
            self._world.take(owner)
            if self._too_soon(owner, now):
                continue
            decision = self._decide_safely(owner, now)
            if decision.actions:
                decided.append((owner, decision))
                actions += len(decision.actions)
                if actions >= ACTIONS_PER_WAKE:
                    break
        self._placement.suspect(self._nodes.suspects)
        placed_units = self._place(decided, now)
        for owner, decision in decided:
            units.extend(units_of(owner, decision.actions, self._world.state))
        return [*units, *placed_units, *self._node_units(now), *self._prefetch_units(), *self._gc_units(now)]

    def _next_owners(self) -> Iterator[Owner]:
        """Yield whom to decide about in this wake: who has changed, then some of those that must be looked at all the same."""
        for owners, most in ((self._world.dirty, INSTANCES_PER_WAKE), (self._world.later, LATER_PER_WAKE)):
            instances = 0
            for owner in list(islice(owners, OWNERS_PER_WAKE_MAX)):
                if instances >= most:
                    break
                instances += len(self._world.owned.get(owner, ()))
                yield owner

    def _wake_due(self, now: float) -> None:
        if now >= self._tick_at or self._tick_at > now + 2 * TICK_S:
            # The second case: the clock was set back.
            self._tick_at = now + TICK_S
            self._nodes.tick_due = True
            self._world.stale = True
            self._readings.look()
            self._judging.look()
            self._placement.look(self._heartbeats)
            self._layouts.look()
            self._prefetch_due = True
            if not self._round:
                self._round = self._world.owners()
                self._share = -(-len(self._round) // TICKS_PER_ROUND)
            for owner in self._round[: self._share]:
                self._world.later[owner] = None
            del self._round[: self._share]
        for owner in self._timers.take(now):
            self._world.dirty[owner] = None

    def _too_soon(self, owner: Owner, now: float) -> bool:
        """Put off a large owner that has just been decided about, so that it is not gone through for each of its instances."""
        count = len(self._world.owned.get(owner, ()))
        if count < LARGE_OWNER:
            self._decided_at.pop(owner, None)
            return False
        at = self._decided_at.get(owner, 0.0) + count * PAUSE_S_PER_INSTANCE
        if now < at <= now + 2 * count * PAUSE_S_PER_INSTANCE:
            self._timers.set_sooner(owner, at)
            return True
        self._decided_at[owner] = now
        return False

    def _decide_safely(self, owner: Owner, now: float) -> Decision:
        """Decide about one owner; where that fails, nothing is done about it for a while, and the others go on."""
        try:
            return self._decide_owner(owner, now)
        except Exception:  # the edge of one owner's part of the loop: see above
            log.exception("deciding about one owner failed", kind=owner[0], owner=owner[1])
            self._timers.set(owner, now + ERROR_PAUSE_MAX_S)
            return Decision(now, self._suffix)

    def _decide_owner(self, owner: Owner, now: float) -> Decision:
        decision = Decision(now, self._suffix, self._world.ids, self._given, forward_since=self._dates.forward_since)
        kind, key = owner
        if self._world.damaged(owner):
            return decision
        match kind:
            case OwnerKind.APP:
                app = self._world.app_facts(key)
                if app is not None:
                    _await_loss(app.instances, decision)
                    app = self._readings.join(self._sleeping.join(app, decision), decision)
                    decide_app(self._judging.join(self._layouts.join(app)), decision)
                else:
                    decide_orphans(self._world.instances(owner), decision)
            case OwnerKind.JOB:
                job = self._world.job_facts(key, now)
                if job is not None:
                    _await_loss(job.instances, decision)
                    decide_job(job, decision)
                else:
                    decide_orphans(self._world.instances(owner), decision)
        self._timers.set(owner, decision.again_at)
        return decision

    def _place(self, decided: list[tuple[Owner, Decision]], now: float) -> list[Unit]:
        """Give nodes to what waits, and to what was just decided into being, in place."""
        created: list[tuple[Decision, int]] = []
        touched: set[str] = set()
        for _, decision in decided:
            for index, action in enumerate(decision.actions):
                if isinstance(action, Create):
                    created.append((decision, index))
                elif isinstance(action, (Update, Remove)):
                    touched.add(f"{action.instance.project}/{action.instance.id}")
        if not created and self._placement.due(now) is None:
            return []
        fresh = [_created(decision.actions[index]) for decision, index in created]
        placed, waiting = self._placement.place(fresh, touched, now)
        quiet = len(placed) + len(waiting) > PLACED_EVENTS_MAX
        for (decision, index), instance in zip(created, placed, strict=True):
            decision.actions[index] = Create(instance)
            if not quiet:
                _tell(decision, instance)
        units = []
        gangs: dict[str, list[Action]] = {}
        """What is written at once, by group."""
        for instance, revision in waiting:
            decision = Decision(now, self._suffix)
            decision.do(Update(instance, revision))
            before = self._world.state.get(Instance, f"{instance.project}/{instance.id}")
            if not quiet and not (before and _same_reason(before.record, instance)):
                _tell(decision, instance)
            gang = self._placement.gangs.get(f"{instance.project}/{instance.id}")
            if gang is not None:
                gangs.setdefault(gang, []).extend(decision.actions)
            else:
                units.extend(units_of(f"{instance.project}/{instance.id}", decision.actions, self._world.state))
        for gang, actions in gangs.items():
            members = frozenset(key for key, group in self._placement.gangs.items() if group == gang)
            units.append(unit_of(members, actions, self._world.state))
        for key, urgent in self._placement.victims.items():
            decision = Decision(now, self._suffix)
            take_away(self._world, key, f"{urgent}, which has a higher priority, needs its place", decision)
            units.extend(units_of(key, decision.actions, self._world.state))
        return units

    def _node_units(self, now: float) -> list[Unit]:
        decision = Decision(now, self._suffix)
        self._emptying.tell(decision)
        self._nodes.decide(decision)
        return units_of("nodes", decision.actions, self._world.state)

    def _prefetch_units(self) -> list[Unit]:
        """Predict where images will be needed; not while there is anything else to do."""
        if not self._prefetch_due or self._world.dirty or self._world.later:
            return []
        self._prefetch_due = False
        actions = self._prefetching.tick()
        return [unit for action in actions for unit in units_of("prefetch", [action], self._world.state)]

    def _gc_units(self, now: float) -> list[Unit]:
        if self._gc_at <= now or self._gc_at > now + 2 * GC_S:
            actions = decide_gc(self._world, now)
            self._gc_at = now + (GC_BEHIND_S if len(actions) >= REMOVED_AT_ONCE_MAX else GC_S)
            return [unit for action in actions for unit in units_of("gc", [action], self._world.state)]
        return []

    def _suffix(self) -> str:
        return suffix_of(self._chance.getrandbits(SUFFIX_BITS))


def _await_loss(instances: Iterable[Seen], decision: Decision) -> None:
    """Decide again when the patience with what is on a lost node ends."""
    for seen in instances:
        if seen.lost_in_s is not None and not math.isinf(seen.lost_in_s):
            # A little later, so that what is left then is nothing for certain: two clocks are at work.
            decision.wake(decision.now + seen.lost_in_s + LOSS_SLACK_S)


def _created(action: Action) -> Instance:
    if not isinstance(action, Create):
        raise TypeError(f"not a creation: {action}")
    return action.instance


def _same_reason(before: Instance, after: Instance) -> bool:
    """Whether only the words of a rejection have changed."""
    return before.rejection is not None and after.rejection is not None and before.rejection.code == after.rejection.code


def _tell(decision: Decision, instance: Instance) -> None:
    subject = f"instance/{instance.id}"
    if instance.node is not None:
        text = f"placed on {instance.node} with {instance.runtime}"
        decision.tell(instance.project, subject, "instance-placed", text, node=instance.node)
    elif instance.rejection is not None:
        decision.tell(instance.project, subject, "rejected", instance.rejection.message, mend=instance.rejection.mend)
