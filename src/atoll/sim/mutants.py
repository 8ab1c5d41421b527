"""Planted bugs, one at a time: what the simulator must notice, or it proves nothing.

Each is planted through a part of a run that a subclass replaces (a store, a machine, a server, an ingress, the members), or,
where the code has no port there, by setting a name for the length of one run (`patches`). Nothing of it is in the code that ships.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from msgspec import Struct

from atoll.api.service import reports
from atoll.control import apps, nodes, rollout_steps, shares
from atoll.control.detection.exchange import Exchange
from atoll.control.heir import Heir, Joins
from atoll.control.judging import Traffic
from atoll.control.leader import Term
from atoll.control.loop import Loop
from atoll.model.ports.store import Revision, Store
from atoll.node import agent
from atoll.sim import planted
from atoll.sim.clock import VirtualClock
from atoll.sim.faults import Profile
from atoll.sim.ingress import SimIngress
from atoll.sim.machine import SimMachine
from atoll.sim.members import Cluster
from atoll.sim.planted import Through
from atoll.sim.planted_parts import (
    BoastfulMachine,
    CarelessCluster,
    DeafIngress,
    DenyingMachine,
    EagerCluster,
    ForgetfulMachine,
    TwoHeadedMachine,
    UndeadMachine,
)
from atoll.sim.planted_parts import LeakyMachine as LeakyMachine
from atoll.sim.run import Outcome, run_seed
from atoll.sim.server import Server, Work, control
from atoll.sim.shapes import agents_die, leaders_change, nodes_cut_off, releases_share, servers_lag, words_late
from atoll.sim.shapes import gpus_fail as gpus_fail
from atoll.sim.shapes import members_fall as members_fall
from atoll.sim.shapes import rivalry as rivalry
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
        heir: Heir | None,
    ) -> None:
        # What is kept ready would have heard all the same: this one loads the cache as it finds it.
        await control(store, _Impatient(state), clock, choose, heard, term, detection, traffic)  # type: ignore[arg-type]

    return work


_take = Heir.take


async def _taken_as_it_is(heir: Heir, at: Revision) -> Joins:
    """Stands for `Heir.take`: what is kept ready is taken as far as it has come."""
    return await _take(heir, Revision(0))


def _all_alike(step: Any) -> Counter[int]:
    """Stands for `apps._Step._serving`: what is ready counts, whether it has requests or not."""
    return Counter(seen.instance.release for seen in (*step.ready_new, *step.old, *step.sick) if seen.ready)


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
        name="heir-not-awaited",
        what="what is kept ready to lead is used before it holds what the leader before wrote",
        patches=((Heir, "take", _taken_as_it_is),),
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
        name="shares-unheeded",
        what="old instances go for new ones that have no requests yet",
        shape=releases_share,
        patches=(
            (rollout_steps, "needed", lambda share, enough: 0),
            (shares, "may_go", lambda release, weights, ready_of, enough: True),
            (apps._Step, "_serving", _all_alike),
        ),
    ),
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
