"""Planted bugs, one at a time: what the simulator must notice, or it proves nothing.

Each is planted through a part of a run that a subclass replaces (a store, a machine, a server, an ingress, the members), or,
where the code has no port there, by setting a name for the length of one run (`patches`). Nothing of it is in the code that ships.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from msgspec import Struct
from msgspec.structs import replace

from atoll.api.service import reports
from atoll.control import nodes
from atoll.control.detection.exchange import Exchange
from atoll.control.judging import Traffic
from atoll.control.leader import Term
from atoll.control.loop import Loop
from atoll.devices.node import NodeDevices
from atoll.model.devices import GpuDevice, GpuHealth
from atoll.model.ports.store import Store
from atoll.model.records import Assignment, Endpoint
from atoll.model.states import Desired
from atoll.network.fake import FakeNetwork
from atoll.node import agent
from atoll.node.fake import FakeMachine
from atoll.node.record import Entry
from atoll.node.transitions import State as NodeState
from atoll.sim import planted
from atoll.sim.clock import VirtualClock
from atoll.sim.faults import Profile
from atoll.sim.gpus import Rack
from atoll.sim.ingress import SimIngress
from atoll.sim.lives import SimNetwork
from atoll.sim.machine import SimMachine
from atoll.sim.members import Apply, Cluster, Member
from atoll.sim.planted import Through
from atoll.sim.record import SimRecord
from atoll.sim.run import Outcome, run_seed
from atoll.sim.server import Server, Work, control
from atoll.sim.world import Parts
from atoll.store.cache import State

SEEDS_MAX = 1_000
"""Seeds within which each must be caught."""


class Mutant(Struct, frozen=True, kw_only=True):
    name: str
    what: str
    parts: Callable[[], Parts] = Parts
    shape: Callable[[Profile], Profile] = lambda profile: profile
    """What a run is made of, where a run of everything would seldom come by."""
    patches: tuple[tuple[Any, str, Any], ...] = ()
    """(module or class, name, value) for the length of a run."""


class WithStore(Parts):
    def __init__(self, through: type[Through]) -> None:
        self.through = through

    def store(self, store: Store) -> Store:
        return self.through(store)


class WithMachine(Parts):
    def __init__(self, kind: type[SimMachine]) -> None:
        self.kind = kind

    def machine(self, name: str, **rest: Any) -> SimMachine:
        return self.kind(name, **rest)


class WithCluster(Parts):
    def __init__(self, kind: type[Cluster]) -> None:
        self.kind = kind

    def cluster(self, *arguments: Any, **rest: Any) -> Cluster:
        return self.kind(*arguments, **rest)


class WithIngress(Parts):
    def __init__(self, kind: type[SimIngress]) -> None:
        self.kind = kind

    def ingress(self, *arguments: Any) -> SimIngress:
        return self.kind(*arguments)


class WithWork(Parts):
    """Servers whose leader's loop does something else."""

    def __init__(self, work: Work) -> None:
        self.work = work

    def server(self, *arguments: Any, **rest: Any) -> Server:
        return Server(*arguments, **rest, work=self.work)


# The leader.


class _Impatient:
    """The cache as a leader sees it who does not wait for it at first."""

    def __init__(self, state: State) -> None:
        self._state = state
        self._asked = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._state, name)

    async def reach(self, revision: int) -> int:
        self._asked += 1
        if self._asked == 1:
            return self._state.revision
        return await self._state.reach(revision)  # type: ignore[arg-type]


async def _not_awaited(loop: Loop, revision: int) -> None:
    """Stands for `Loop._reach`."""


def _impatiently() -> Work:
    async def work(
        store: Store,
        state: State,
        clock: VirtualClock,
        choose: random.Random,
        heard: Mapping[str, float],
        term: Term,
        detection: Exchange | None,
        traffic: Traffic | None,
    ) -> None:
        await control(store, _Impatient(state), clock, choose, heard, term, detection, traffic)  # type: ignore[arg-type]

    return work


# The store's members.


class EagerCluster(Cluster):
    """Acknowledges what only its leader has."""

    async def led(self, member: Member) -> None:
        if not self.hears(member):
            await super().led(member)

    def propose(self, apply: Apply) -> Any:
        answer = super().propose(apply)
        leader = self.leader
        if leader is not None:
            self._commit(leader, len(leader.log))
        return answer


class CarelessCluster(Cluster):
    """Makes anyone leader, whatever it has missed."""

    def _age(self, member: Member) -> tuple[int, int]:
        return (0, 0)


# Machines.


class LeakyNetwork(SimNetwork):
    async def detach(self, id: str) -> None:
        """Forget to."""


class LeakyMachine(SimMachine):
    def make_network(self) -> FakeNetwork:
        return LeakyNetwork(self.links, self.life, self._faults, self._story)


class BoastfulMachine(SimMachine):
    """Says that it has more than it has."""

    def __init__(self, *arguments: Any, **rest: Any) -> None:
        super().__init__(*arguments, **rest)
        self._machine = FakeMachine(cpu_milli=8 * self.capacity[0], memory_bytes=8 * self.capacity[1])


class LostRecord(SimRecord):
    def load(self) -> list[Entry]:
        return []


class ForgetfulMachine(SimMachine):
    """Finds its record empty at every start."""

    def make_record(self) -> SimRecord:
        return LostRecord(self.disk, self.life)


class StaleRecord(SimRecord):
    """Keeps neither that an instance is to stop nor how far it came since it ran."""

    def put_assignment(self, assignment: Assignment) -> None:
        super().put_assignment(replace(assignment, instance=replace(assignment.instance, desired=Desired.RUN)))

    def put_state(self, id: str, state: NodeState) -> None:
        if state.desired is Desired.RUN and not state.phase.final:
            super().put_state(id, state)


class UndeadMachine(SimMachine):
    """Starts again what was to stop when its agent starts again."""

    def make_record(self) -> SimRecord:
        return StaleRecord(self.disk, self.life)


class TwoHeadedMachine(SimMachine):
    """Starts an agent beside the one that should have ended: both adopt what runs."""

    async def crash_agent(self) -> None:
        self._story.tell("the agent lives on beside the next", node=self.name)
        self.life = type(self.life)("nobody")
        self.life.end()
        self.agent = None


class Denying(NodeDevices):
    """Says of every device that it is well."""

    async def inventory(self) -> tuple[GpuDevice, ...]:
        return tuple(replace(each, health=GpuHealth.OK, present=True, reason="") for each in await super().inventory())


class DenyingRack(Rack):
    kind = Denying


class DenyingMachine(SimMachine):
    kind_of_rack = DenyingRack


# The ingress.


class DeafIngress(SimIngress):
    """Sends requests to what is draining."""

    def takes(self, endpoint: Endpoint) -> bool:
        return True


# What runs are made of.


def rivalry(profile: Profile) -> Profile:
    """Make a run of nothing but hanging stores and servers that stand for leader."""
    kinds = ("stall", "rival")
    return replace(profile, calm=False, span_s=60.0, chaos=kinds, chaos_every_s=2.5, latency_s=0.01, apps=3, nodes=2, servers=1)


def gpus_fail(profile: Profile) -> Profile:
    """Make a run of GPUs that vanish, break and fall silent."""
    chaos = ("gpu-vanish", "gpu-xid", "gpu-silent", "agent-crash", "machine-restart")
    return replace(profile, calm=False, gpus=True, chaos=chaos, chaos_every_s=4.0, latency_s=0.01, core_only=False)


def members_fall(profile: Profile) -> Profile:
    """Make a run of members of the store that are killed, stopped and cut off."""
    chaos = ("member-crash", "member-pause", "member-cut")
    return replace(profile, calm=False, members=3, chaos=chaos, chaos_every_s=2.0, latency_s=0.01)


def servers_lag(profile: Profile) -> Profile:
    """Make a run of several servers that hear late of what the others write."""
    return replace(
        profile, calm=False, servers=3, slow_watch=0.5, chaos=("stop-instance", "stop-instance", "server-crash"), chaos_every_s=0.7
    )


def leaders_change(profile: Profile) -> Profile:
    """Make a run of servers that stand still, crash and lag."""
    chaos = ("server-pause", "server-crash", "stall", "rival")
    return replace(profile, calm=False, servers=3, slow_watch=0.5, chaos=chaos, chaos_every_s=3.0, latency_s=0.01, nodes=2, apps=3)


def nodes_cut_off(profile: Profile) -> Profile:
    """Make a run of nodes that lose the servers for long."""
    chaos = ("partition", "one-way")
    calmer = replace(profile, calm=False, latency_s=0.01, lost=0.0, beats=True, once=1.0)
    return replace(calmer, span_s=150.0, chaos=chaos, chaos_every_s=15.0)


def words_late(profile: Profile) -> Profile:
    """Make a run of requests that arrive again, late."""
    return replace(profile, calm=False, repeated=0.5, latency_s=0.01, span_s=60.0)


def agents_die(profile: Profile) -> Profile:
    """Make a run of agents that are killed."""
    return replace(profile, calm=False, chaos=("agent-crash", "stop-instance"), chaos_every_s=1.5, latency_s=0.05)


MUTANTS = (
    Mutant(
        name="fence-dropped",
        what="a leader writes though another leads",
        parts=lambda: WithStore(planted.Unfenced),
        shape=rivalry,
    ),
    Mutant(
        name="revision-unchecked",
        what="writes ignore what has changed since it was read",
        parts=lambda: WithStore(planted.Unchecked),
        shape=servers_lag,
    ),
    Mutant(
        name="cache-not-awaited",
        what="the leader decides before it sees what it wrote",
        patches=((Loop, "_reach", _not_awaited),),
    ),
    Mutant(
        name="take-over-not-awaited",
        what="a new leader decides before it sees what the one before it wrote",
        parts=lambda: WithWork(_impatiently()),
        shape=leaders_change,
    ),
    Mutant(
        name="lost-too-early",
        what="nodes are given up after a second of silence",
        patches=((nodes, "UNREACHABLE_S", 0.5), (nodes, "LOST_S", 1.0)),
    ),
    Mutant(
        name="disconnect-ignored",
        what="a node that is cut off goes on with what must not run twice",
        shape=nodes_cut_off,
        patches=((agent, "overdue", lambda runners, cut_off_s: []),),
    ),
    Mutant(
        name="acknowledged-early",
        what="the store acknowledges before a majority has it",
        parts=lambda: WithCluster(EagerCluster),
        shape=members_fall,
    ),
    Mutant(
        name="votes-for-anyone",
        what="a member that has missed entries leads the store",
        parts=lambda: WithCluster(CarelessCluster),
        shape=members_fall,
    ),
    Mutant(
        name="write-lost", what="a change of an app is acknowledged and not written", parts=lambda: WithStore(planted.Forgetful)
    ),
    Mutant(name="request-key-ignored", what="a request that comes again is done again", parts=lambda: WithStore(planted.Repeating)),
    Mutant(name="release-changed", what="a release is changed after it was made", parts=lambda: WithStore(planted.Mutating)),
    Mutant(name="drain-skipped", what="instances are stopped without being drained", parts=lambda: WithStore(planted.Hasty)),
    Mutant(
        name="stop-taken-back",
        what="an instance is told to run after it was told to drain",
        parts=lambda: WithStore(planted.Wavering),
    ),
    Mutant(name="drained-served", what="the ingress sends requests to what is draining", parts=lambda: WithIngress(DeafIngress)),
    Mutant(
        name="late-word-counts",
        what="a report that comes late overwrites a newer one",
        shape=words_late,
        patches=((reports, "_is_late", lambda context, status: False),),
    ),
    Mutant(
        name="record-lost", what="an agent finds its record empty", parts=lambda: WithMachine(ForgetfulMachine), shape=agents_die
    ),
    Mutant(
        name="restart-after-stop",
        what="an agent starts again what was to stop",
        parts=lambda: WithMachine(UndeadMachine),
        shape=agents_die,
    ),
    Mutant(
        name="adopted-twice",
        what="two agents of one machine adopt the same processes",
        parts=lambda: WithMachine(TwoHeadedMachine),
        shape=agents_die,
    ),
    Mutant(name="link-leaked", what="a network link is not taken away", parts=lambda: WithMachine(LeakyMachine)),
    Mutant(name="room-boasted", what="a node says that it has more than it has", parts=lambda: WithMachine(BoastfulMachine)),
    Mutant(
        name="sick-device-denied",
        what="a device that has failed is called well",
        parts=lambda: WithMachine(DenyingMachine),
        shape=gpus_fail,
    ),
    Mutant(
        name="device-given-twice", what="one device is given to all", parts=lambda: WithStore(planted.Generous), shape=gpus_fail
    ),
)


@contextmanager
def patched(patches: Sequence[tuple[Any, str, Any]]) -> Iterator[None]:
    """Set the names for as long as this lasts."""
    before = [(where, name, getattr(where, name)) for where, name, _ in patches]
    for where, name, value in patches:
        setattr(where, name, value)
    try:
        yield
    finally:
        for where, name, value in before:
            setattr(where, name, value)


def catch(mutant: Mutant, seeds: int = SEEDS_MAX, first: int = 0) -> Outcome | None:
    """Return the first seed's run that notices the bug; None when none of `seeds` does."""
    with patched(mutant.patches):
        for seed in range(first, first + seeds):
            outcome = run_seed(seed, mutant.parts(), mutant.shape)
            if outcome.broken:
                return outcome
    return None
