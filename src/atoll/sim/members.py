"""A model of a replicated store of several members, in the way of Raft, under our store's contract.

What is concrete: each member's log, how much of it is on its disk, terms, who may become leader (only one whose log is at least as
new as those of a majority), that an entry counts once a majority has it on disk, and that an old leader's tail is thrown away. What
is abstract: elections take a drawn time and no messages, and nothing is sent while nothing happens, so that a quiet store costs
nothing. Source: Ongaro and Ousterhout, "In Search of an Understandable Consensus Algorithm" (2014), sections 5.2 to 5.4 and 8.

A member that crashes keeps what is on its disk, and of what was not yet any part (a torn tail is found by its checksum, as etcd's
log does). One whose disk lied comes back empty and votes only once it has caught up: that is what operators do, since a member that
has forgotten what it had promised makes no store safe. One whose disk is full takes nothing more; a leader gives up then.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Sequence

from atoll.model.errors import AtollError, Unavailable
from atoll.model.ports.clock import Clock
from atoll.sim.door import Door as Door
from atoll.sim.member import Apply as Apply
from atoll.sim.member import Entry, Machine, now
from atoll.sim.member import Member as Member
from atoll.sim.net import Net
from atoll.sim.replication import PATIENCE_S, Replication
from atoll.sim.story import Story

ELECTION_S = 1.0
"""The shortest time without a leader until another is chosen; up to twice that."""


class Cluster(Replication):
    """The store of a cell. Servers come in by `door(member)`. A subclass that breaks a rule is a planted bug."""

    def __init__(
        self, clock: Clock, net: Net, choose: random.Random, story: Story, *, members: int, site_of: Callable[[str, int], str]
    ) -> None:
        super().__init__(clock, net, choose, story, members=members, site_of=site_of)
        self._electing = False
        self._leader_found: list[asyncio.Future[None]] = []
        net.changed.append(self.look)

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

    # Finding a leader.

    def _commit(self, leader: Member, count: int) -> None:
        super()._commit(leader, count)
        self._found()

    def _found(self) -> None:
        waiting, self._leader_found = self._leader_found, []
        for waiter in waiting:
            if not waiter.done():
                waiter.set_result(None)

    async def led(self, member: Member, *, to_read: bool = False) -> None:
        """Wait until `member` hears a leader that a majority hears. Raises Unavailable after `PATIENCE_S`.

        `to_read`: and until that leader knows what counts of what earlier ones left behind, as an entry of its own does (section 8
        of the source): a read before it could miss a write that is told of later.
        """
        deadline = self._loop.time() + PATIENCE_S
        while True:
            leader = self.leader
            known = not to_read or self.committed_in_term
            if leader is not None and known and self.hears(member) and self.leads(leader):
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


async def _nothing(machine: Machine) -> None:
    """A new leader's first entry."""
