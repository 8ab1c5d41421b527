"""A model of a replicated store of several members, in the way of Raft, under our store's contract.

What is concrete: each member's log, how much of it is on its disk, terms, who may become leader (only one whose log is at least as
new as those of a majority), that an entry counts once a majority has it on disk, and that an old leader's tail is thrown away. What
is abstract: elections take a drawn time and no messages, and nothing is sent while nothing happens, so that a quiet store costs
nothing. Source: Ongaro and Ousterhout, "In Search of an Understandable Consensus Algorithm" (2014), sections 5.2 to 5.4.

A member that crashes keeps what is on its disk, and of what was not yet any part (a torn tail is found by its checksum, as etcd's
log does). One whose disk lied comes back empty and votes only once it has caught up: that is what operators do, since a member that
has forgotten what it had promised makes no store safe. One whose disk is full takes nothing more; a leader gives up then.
"""

from __future__ import annotations

import asyncio
import contextvars
import math
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from typing import Any, TypeVar

from msgspec import Struct

from atoll.model.errors import AtollError, OutcomeUnknown, Unavailable
from atoll.model.ports.clock import Clock
from atoll.model.ports.store import (
    RANGE_LIMIT_MAX,
    Compare,
    Delete,
    KeyValue,
    Lease,
    LeaseId,
    Op,
    Put,
    Range,
    Revision,
    TxnResult,
    WatchBatch,
)
from atoll.sim.net import Net
from atoll.sim.story import Story
from atoll.store.memory import MemoryStore
from atoll.store.transaction import Transaction, check_transaction

T = TypeVar("T")
ELECTION_S = 1.0
"""The shortest time without a leader until another is chosen; up to twice that."""
FSYNC_S = 0.005
"""The longest that a disk usually takes."""
SLOW_FSYNC_S = 0.4
SLOW_FSYNC_SHARE = 0.01
HOP_S = 0.002
"""The longest that a message between members takes, on average links."""
PATIENCE_S = 2.0
"""How long a member looks for a leader before it says that there is none."""
LEASE_LOOK_S = 0.05
DEAF_LOOK_S = 0.5
DEAF_LOOKS_MAX = 6
"""A watch at a member that hears no leader is silent for so many looks, then it ends."""


def now(coroutine: Coroutine[Any, Any, T]) -> T:
    """Run to its end what never waits, as a memory store's calls do not."""
    try:
        coroutine.send(None)
    except StopIteration as end:
        value: T = end.value
        return value
    raise AssertionError("it waits")


class Machine(MemoryStore):
    """What the log means. Leases end only when the log says so: without a majority nobody's lease runs out."""

    def _begin_expiry(self) -> None: ...

    @property
    def newest(self) -> Revision:
        return self._window.newest

    def forget(self) -> None:
        """End all watches: what they tell of is no longer so."""
        self._window.close("the store has forgotten")

    def ends(self) -> dict[LeaseId, float]:
        """Return lease → when it ends, by the leader's clock."""
        return self._ends

    async def expire(self, at: float) -> None:
        """Remove the leases that were over `at`, unless they have been renewed since."""
        for lease in [lease for lease, end in self._ends.items() if end <= at]:
            await self.lease_revoke(lease)

    def renew_leases(self) -> None:
        """Give every lease its whole time again, as a new leader does."""
        for id, lease in self._leases.items():
            self._ends[id] = self._clock.monotonic() + lease.ttl_s


Apply = Callable[[Machine], Coroutine[Any, Any, Any]]


class Entry:
    """One change in the log. `answer` is who asked for it, as long as its leader leads."""

    __slots__ = ("answer", "apply", "term")

    def __init__(self, term: int, apply: Apply, answer: asyncio.Future[Any] | None) -> None:
        self.term = term
        self.apply = apply
        self.answer = answer


class Member:
    def __init__(self, name: str) -> None:
        self.name = name
        self.alive = True
        self.paused = False
        self.full = False
        self.learning = False
        """It has lost its disk, and may not vote until it has caught up."""
        self.log: list[Entry] = []
        self.durable = 0
        """How many entries are on its disk."""
        self.life = 1
        self.heard = True
        """Whether it hears the leader."""
        self.seen = Revision(0)
        """The revision that it had heard of when it last did."""

    @property
    def up(self) -> bool:
        return self.alive and not self.paused


class Figures(Struct):
    """What the model did, for the marks."""

    terms: int = 0
    entries: int = 0


class Cluster:
    """The store of a cell. Servers come in by `door(member)`. A subclass that breaks a rule is a planted bug."""

    def __init__(
        self, clock: Clock, net: Net, choose: random.Random, story: Story, *, members: int, site_of: Callable[[str, int], str]
    ) -> None:
        self._clock = clock
        self._net = net
        self._choose = choose
        self._story = story
        self._loop = asyncio.get_running_loop()
        self._context = contextvars.copy_context()
        self.machine = Machine(clock)
        self.members = {f"m{n}": Member(f"m{n}") for n in range(members)}
        for number, name in enumerate(self.members):
            net.place(name, site_of(name, number))
        self.leader: Member | None = next(iter(self.members.values()))
        self.term = 1
        self.committed = 0
        self.figures = Figures()
        self._electing = False
        self._leader_found: list[asyncio.Future[None]] = []
        self._expires_at = math.inf
        net.changed.append(self.look)

    @property
    def quorum(self) -> int:
        return len(self.members) // 2 + 1

    def door(self, member: str) -> Door:
        return Door(self, self.members[member])

    # What happens to members.

    def crash(self, name: str, *, disk_lost: bool = False) -> None:
        """Kill a member. What was on its disk stays, unless `disk_lost`; of the rest any part may."""
        member = self.members[name]
        if not member.alive:
            return
        self._story.tell("a member of the store is killed", member=name, leads=member is self.leader, disk_lost=disk_lost)
        self._story.mark("store: leader killed" if member is self.leader else "store: follower killed")
        if member is self.leader:
            # Also one that is back at once begins as a follower: others may have what it had not on its disk yet.
            self._step_down(member)
            self.leader = None
        member.alive = False
        member.life += 1
        if disk_lost:
            member.log, member.durable, member.learning = [], 0, True
        else:
            kept = self._choose.randint(member.durable, len(member.log))
            if kept < len(member.log):
                self._story.mark("store: tail lost")
            del member.log[kept:]
            member.durable = kept
        self.look()

    def start(self, name: str) -> None:
        member = self.members[name]
        if not member.alive:
            member.alive = True
            member.full = False
            self._story.tell("a member of the store starts", member=name, entries=len(member.log))
            self.look()

    def pause(self, name: str, paused: bool) -> None:
        self.members[name].paused = paused
        self._story.tell("a member of the store is stopped" if paused else "a member of the store goes on", member=name)
        self.look()

    def fill(self, name: str) -> None:
        """Let a member's disk be full: it takes nothing more, and ends as its own log cannot be written."""
        self.members[name].full = True
        self._story.mark("store: disk full")
        if self.members[name] is self.leader:
            self.crash(name)

    def heal(self, names: Sequence[str]) -> None:
        for name in names:
            self.members[name].paused = False
            self.members[name].full = False
            self.start(name)
        self.look()

    def can_lose(self, name: str) -> bool:
        """Whether losing the disk of `name` leaves a majority that knows everything."""
        well = [m for m in self.members.values() if m.name != name and m.alive and not m.learning and m.durable >= self.committed]
        return len(well) >= self.quorum

    # Who leads.

    def _voters(self, candidate: Member) -> list[Member]:
        return [
            member
            for member in self.members.values()
            if member.up and not member.learning and (member is candidate or self._net.talk(candidate.name, member.name))
        ]

    def leads(self, member: Member) -> bool:
        """Whether `member` leads, and a majority hears it."""
        return member is self.leader and member.up and len(self._voters(member)) >= self.quorum

    def look(self) -> None:
        """Something has changed: see whether there is a leader, and bring up to date who fell behind."""
        leader = self.leader
        for member in self.members.values():
            heard = self.hears(member)
            if member.heard and not heard:
                member.seen = self.machine.newest
            member.heard = heard
        if leader is not None and self.leads(leader):
            for member in self.members.values():
                behind = len(member.log) < len(leader.log) or member.durable < len(member.log) or member.learning
                if behind and member is not leader and member.up and self._net.talk(leader.name, member.name):
                    self._send(leader, member)
            if leader.durable < len(leader.log):
                self._later(self._fsync_s(), self._on_disk, leader, leader.life, len(leader.log), self.term)
            self._count(leader)
            self._found()
            return
        if not self._electing:
            self._electing = True
            self._later(ELECTION_S * (1 + self._choose.random()), self._elect)

    def _elect(self) -> None:
        self._electing = False
        old = self.leader
        if old is not None and self.leads(old):
            self.look()
            return
        able = [m for m in self.members.values() if m.up and not m.full and not m.learning]
        able = [m for m in able if len(voters := self._voters(m)) >= self.quorum and self._age(m) >= max(map(self._age, voters))]
        if not able:
            # Nobody: until something changes, which `look` hears of.
            self._step_down(old)
            self.leader = None
            self._story.mark("store: nobody can lead")
            return
        self._lead(self._choose.choice(able), old)

    def _age(self, member: Member) -> tuple[int, int]:
        """Return how new its log is: what votes are given by."""
        return (member.log[-1].term if member.log else 0, len(member.log))

    def _step_down(self, old: Member | None) -> None:
        if old is None:
            return
        for entry in old.log[self.committed :]:
            self._refuse(entry)

    def _refuse(self, entry: Entry) -> None:
        if entry.answer is not None and not entry.answer.done():
            self._story.mark("store: outcome unknown, the leader has changed")
            entry.answer.set_exception(OutcomeUnknown("the store's leader has changed"))
            entry.answer = None

    def _lead(self, leader: Member, old: Member | None) -> None:
        self._step_down(old)
        self.term += 1
        self.figures.terms += 1
        self.leader = leader
        self._story.tell("the store has a new leader", member=leader.name, term=self.term, entries=len(leader.log))
        self._story.mark("store: new leader")
        if leader.log[: self.committed] and len(leader.log) < self.committed:
            self._story.mark("store: acknowledged entries are missing")
        self._rebuild_if_forgotten(leader)
        self.machine.renew_leases()
        # An entry of its own term: only with it does what earlier leaders left behind count.
        leader.log.append(Entry(self.term, _nothing, None))
        self._replicate(leader)
        self._found()

    def _rebuild_if_forgotten(self, leader: Member) -> None:
        """Where a leader lacks what had counted (which only a broken store brings about), the past is what it has."""
        if len(leader.log) >= self.committed:
            return
        self._story.tell("the store has forgotten", entries=self.committed - len(leader.log))
        self.committed = len(leader.log)
        self._replay(leader)

    def _replay(self, leader: Member) -> None:
        old, self.machine = self.machine, Machine(self._clock)
        for entry in leader.log[: self.committed]:
            try:
                now(entry.apply(self.machine))
            except AtollError:
                continue
        old.forget()

    # What counts.

    def _later(self, delay_s: float, callback: Callable[..., object], *arguments: Any) -> None:
        # In a context of its own: a timer of the store does not stop with the server that asked.
        self._loop.call_later(delay_s, callback, *arguments, context=self._context)

    def _fsync_s(self) -> float:
        most = SLOW_FSYNC_S if self._choose.random() < SLOW_FSYNC_SHARE else FSYNC_S
        return self._choose.random() * most

    def propose(self, apply: Apply) -> asyncio.Future[Any]:
        """Append a change at the leader; the future has its outcome once it counts. Raises Unavailable without a leader."""
        leader = self.leader
        if leader is None or not leader.up:
            raise Unavailable("the store has no leader")
        answer: asyncio.Future[Any] = self._loop.create_future()
        leader.log.append(Entry(self.term, apply, answer))
        self.figures.entries += 1
        self._replicate(leader)
        return answer

    def _replicate(self, leader: Member) -> None:
        self._later(self._fsync_s(), self._on_disk, leader, leader.life, len(leader.log), self.term)
        for member in self.members.values():
            if member is not leader:
                self._send(leader, member)

    def _send(self, leader: Member, member: Member) -> None:
        if member.up and not member.full and self._net.reaches(leader.name, member.name):
            self._later(self._choose.random() * HOP_S, self._receive, leader, member, member.life, len(leader.log), self.term)

    def _receive(self, leader: Member, member: Member, life: int, count: int, term: int) -> None:
        """A follower gets the leader's log up to `count`, and begins to write it down."""
        if leader is not self.leader or term != self.term or not member.up or member.life != life or count > len(leader.log):
            return
        log = leader.log
        if len(member.log) < count or member.log[count - 1] is not log[count - 1]:
            same = _common(member.log, log)
            if same < len(member.log):
                self._story.mark("store: divergent tail thrown away")
                for entry in member.log[same:]:
                    self._refuse(entry)
                del member.log[same:]
                member.durable = min(member.durable, same)
            member.log.extend(log[len(member.log) : count])
        self._later(self._fsync_s() + self._choose.random() * HOP_S, self._on_disk, member, life, count, term)

    def _on_disk(self, member: Member, life: int, count: int, term: int) -> None:
        """`count` entries of the leader of `term` are on this member's disk, and the leader hears of it if it can."""
        if not member.up or member.life != life or term != self.term or count > len(member.log):
            return
        member.durable = max(member.durable, count)
        leader = self.leader
        if leader is None or not leader.up or not self._net.reaches(member.name, leader.name):
            return
        if member.learning and member.durable >= self.committed:
            member.learning = False
            self._story.tell("a member of the store has caught up", member=member.name)
        self._count(leader)

    def _count(self, leader: Member) -> None:
        """Let count what a majority has on disk, up to the newest entry of this term."""
        reached = sorted((m.durable for m in self.members.values() if not m.learning), reverse=True)
        if len(reached) < self.quorum:
            return
        most = min(reached[self.quorum - 1], len(leader.log))
        if most > self.committed and leader.log[most - 1].term == self.term:
            self._commit(leader, most)

    def _commit(self, leader: Member, count: int) -> None:
        for entry in leader.log[self.committed : count]:
            self.committed += 1
            answer, entry.answer = entry.answer, None
            try:
                result = now(entry.apply(self.machine))
            except AtollError as error:
                if answer is not None and not answer.done():
                    answer.set_exception(error)
            else:
                if answer is not None and not answer.done():
                    answer.set_result(result)
        self._look_at_leases()

    # Leases.

    def _look_at_leases(self) -> None:
        """See to it that somebody looks when the next lease may be over."""
        end = min(self.machine.ends().values(), default=math.inf)
        if end < self._expires_at:
            self._expires_at = end
            self._later(max(LEASE_LOOK_S, end - self._clock.monotonic()), self._expire, end)

    def _expire(self, at: float) -> None:
        if at != self._expires_at:
            return  # an earlier end came up, which has been looked at since
        self._expires_at = math.inf
        leader = self.leader
        now_s = self._clock.monotonic()
        over = any(end <= now_s for end in self.machine.ends().values())
        if over and leader is not None and self.leads(leader):
            leader.log.append(Entry(self.term, lambda machine: machine.expire(now_s), None))
            self._replicate(leader)
        else:
            self._look_at_leases()

    # Finding a leader.

    def _found(self) -> None:
        waiting, self._leader_found = self._leader_found, []
        for waiter in waiting:
            if not waiter.done():
                waiter.set_result(None)

    async def led(self, member: Member) -> None:
        """Wait until `member` hears a leader that a majority hears. Raises Unavailable after `PATIENCE_S`."""
        deadline = self._loop.time() + PATIENCE_S
        while True:
            leader = self.leader
            if leader is not None and self.hears(member) and self.leads(leader):
                return
            left_s = deadline - self._loop.time()
            if not member.alive or left_s <= 0:
                raise Unavailable(f"{member.name} is away" if not member.alive else f"{member.name} finds no leader")
            waiter: asyncio.Future[None] = self._loop.create_future()
            self._leader_found.append(waiter)
            try:
                async with asyncio.timeout(min(left_s, 0.5)):
                    await waiter
            except TimeoutError:
                pass

    def hears(self, member: Member) -> bool:
        leader = self.leader
        return member.up and leader is not None and (member is leader or self._net.talk(member.name, leader.name))


async def _nothing(machine: Machine) -> None:
    """A new leader's first entry."""


def _common(one: list[Entry], other: list[Entry]) -> int:
    """Return how long the two logs are the same: terms and places agree there, so that entries are shared."""
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        if one[middle - 1] is other[middle - 1]:
            low = middle
        else:
            high = middle - 1
    return low


class Door:
    """The store through one of its members. Implements `Store`; the way there is the caller's to model."""

    def __init__(self, cluster: Cluster, member: Member) -> None:
        self.cluster = cluster
        self.member = member

    async def _ask(self, apply: Apply) -> Any:
        await self.cluster.led(self.member)
        return await self._outcome(self.cluster.propose(apply))

    async def _outcome(self, answer: Awaitable[T]) -> T:
        try:
            async with asyncio.timeout(5 * PATIENCE_S):
                return await answer
        except TimeoutError:
            raise OutcomeUnknown("the store did not say in time") from None

    async def revision(self) -> Revision:
        await self.cluster.led(self.member)
        return await self.cluster.machine.revision()

    async def get(self, key: str) -> KeyValue | None:
        await self.cluster.led(self.member)
        return await self.cluster.machine.get(key)

    async def range(self, prefix: str, *, after: str = "", limit: int = RANGE_LIMIT_MAX, at: Revision | None = None) -> Range:
        await self.cluster.led(self.member)
        return await self.cluster.machine.range(prefix, after=after, limit=limit, at=at)

    async def put(self, key: str, value: bytes, *, lease: LeaseId = LeaseId(0)) -> Revision:
        return (await self.txn((), (Put(key, value, lease),))).revision

    async def delete(self, key: str) -> Revision:
        return (await self.txn((), (Delete(key),))).revision

    async def txn(self, compare: Sequence[Compare], then: Sequence[Op], otherwise: Sequence[Op] = ()) -> TxnResult:
        check_transaction(Transaction(compare, then, otherwise))
        result: TxnResult = await self._ask(lambda machine: machine.txn(compare, then, otherwise))
        return result

    async def watch(self, prefix: str, *, start: Revision) -> AsyncIterator[WatchBatch]:
        life = self.member.life
        async for batch in self.cluster.machine.watch(prefix, start=start):
            waits = 0
            while batch.revision > self.member.seen and not self.cluster.hears(self.member):
                self._check(life)
                if waits == DEAF_LOOKS_MAX:
                    raise Unavailable(f"{self.member.name} hears no leader")
                waits += 1
                await asyncio.sleep(DEAF_LOOK_S)
            self._check(life)
            yield batch

    def _check(self, life: int) -> None:
        if self.member.life != life:
            raise Unavailable(f"{self.member.name} was killed")

    async def lease_grant(self, ttl_s: float) -> Lease:
        lease: Lease = await self._ask(lambda machine: machine.lease_grant(ttl_s))
        return lease

    async def lease_keep_alive(self, lease: LeaseId) -> None:
        await self.cluster.led(self.member)
        await self.cluster.machine.lease_keep_alive(lease)

    async def lease_revoke(self, lease: LeaseId) -> None:
        await self._ask(lambda machine: machine.lease_revoke(lease))

    async def compact(self, revision: Revision) -> None:
        await self._ask(lambda machine: machine.compact(revision))

    async def close(self) -> None: ...
