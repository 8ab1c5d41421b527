"""How the log of a store of several members comes to count: at a majority, on disk, from one leader. Part of `members`.

A subclass says who leads, and calls what is here when something has changed.
"""

from __future__ import annotations

import asyncio
import contextvars
import math
import random
from collections.abc import Callable
from typing import Any

from msgspec import Struct

from atoll.model.errors import AtollError, OutcomeUnknown, Unavailable
from atoll.model.ports.clock import Clock
from atoll.sim.member import Apply, Entry, Machine, Member, now
from atoll.sim.net import Net
from atoll.sim.story import Story

FSYNC_S = 0.005
"""The longest that a disk usually takes."""
SLOW_FSYNC_S = 0.4
SLOW_FSYNC_SHARE = 0.01
HOP_S = 0.002
"""The longest that a message between members takes, on average links."""
PATIENCE_S = 2.0
"""How long a member looks for a leader before it says that there is none."""
LEASE_LOOK_S = 0.05


class Figures(Struct):
    """What the model did, for the marks."""

    terms: int = 0
    entries: int = 0


class Replication:
    """The members, their logs, and what of these counts."""

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
        self._expires_at = math.inf

    @property
    def quorum(self) -> int:
        return len(self.members) // 2 + 1

    def _voters(self, candidate: Member) -> list[Member]:
        return [
            member
            for member in self.members.values()
            if member.up and not member.learning and (member is candidate or self._net.talk(candidate.name, member.name))
        ]

    @property
    def committed_in_term(self) -> bool:
        """Whether an entry of this term counts; in the first one there is nothing that could be unknown."""
        leader = self.leader
        return self.term == 1 or bool(leader and self.committed and leader.log[self.committed - 1].term == self.term)

    def leads(self, member: Member) -> bool:
        """Whether `member` leads, and a majority hears it."""
        return member is self.leader and member.up and len(self._voters(member)) >= self.quorum

    def hears(self, member: Member) -> bool:
        leader = self.leader
        return member.up and leader is not None and (member is leader or self._net.talk(member.name, leader.name))

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

    def _refuse(self, entry: Entry) -> None:
        if entry.answer is not None and not entry.answer.done():
            self._story.mark("store: outcome unknown, the leader has changed")
            entry.answer.set_exception(OutcomeUnknown("the store's leader has changed"))
            entry.answer = None

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
