"""Room that is set aside for instances that wait while what is in its way leaves: preemption, seen from the leader's loop."""

from __future__ import annotations

from collections.abc import Container, Sequence

from msgspec import Struct, structs

from atoll.control.disruptions import Disruptions
from atoll.control.picture import Picture
from atoll.control.world import World
from atoll.model.records import Instance, Rejection
from atoll.model.states import Desired
from atoll.scheduling.demand import Pending
from atoll.scheduling.interface import View
from atoll.scheduling.plan import Plan
from atoll.scheduling.preemption import preempt
from atoll.scheduling.quotas import CODE as OVER_QUOTA

PREEMPTIONS_MAX = 20
"""Instances for which victims are looked for in one plan; the others wait for the next."""
CLAIM_S = 900.0
"""The longest wait for what has to leave; after it the instance that waits is planned afresh."""


class Claim(Struct, frozen=True):
    """Room on a node that is set aside for a pending instance while what is in its way leaves."""

    node: str
    waits_for: frozenset[str]
    until: float


class Claims:
    """By the key of the instance that waits."""

    def __init__(self, world: World, picture: Picture) -> None:
        self._world = world
        self._picture = picture
        self._claims: dict[str, Claim] = {}
        self.victims: dict[str, str] = {}
        """Instances that the last `make` found must leave → for which one."""

    def __contains__(self, key: str) -> bool:
        return key in self._claims

    def clear(self) -> None:
        self._claims.clear()

    def forget(self, key: str) -> None:
        """Drop a claim; what is set aside for it is the caller's matter."""
        self._claims.pop(key, None)

    def set_back(self, by_s: float) -> None:
        """Have all end so much sooner: the date was set back."""
        self._claims = {key: structs.replace(claim, until=claim.until - by_s) for key, claim in self._claims.items()}

    def any_settled(self, now: float) -> bool:
        return any(self._settled(claim, now) for claim in self._claims.values())

    def settle(self, now: float) -> list[str]:
        """Give back the room of those that have nothing to wait for any more, and return them: they are to be planned again."""
        settled = [key for key, claim in self._claims.items() if self._settled(claim, now)]
        for key in settled:
            del self._claims[key]
            self._picture.snapshot.release(key)
        return settled

    def make(self, pending: Sequence[Pending], answer: Plan, fresh: Container[str], skip: set[str], now: float) -> None:
        """Find what must leave (`victims`) for those that fit nowhere, and set its room aside until then."""
        self.victims = {}
        urgent = self._urgent(pending, answer)
        if not urgent:
            return
        # What is not in the store yet can wait for room only once it is.
        self._picture.room |= any(item.id in fresh for item in urgent)
        view = self._after(pending, answer)
        snapshot = self._picture.snapshot
        victims = Disruptions(self._world, skip, self.victims)
        for item in sorted((item for item in urgent if item.id not in fresh), key=lambda item: item.order)[:PREEMPTIONS_MAX]:
            found = preempt(view, item, victims.evictable, victims.leaving, victims.budget)
            row = snapshot.row_of(found.node) if found else None
            if found is None or row is None:
                continue
            self.victims.update((victim, item.id.rsplit("/", 1)[-1]) for victim in found.victims)
            leaving = frozenset(id for id, _ in snapshot.allocations_on(found.node) if victims.leaving(id))
            if not leaving:
                # Room was not what it lacked; waiting for nothing would be a loop without an end.
                continue
            self._claims[item.id] = Claim(found.node, leaving, now + CLAIM_S)
            snapshot.allocate(item.id, found.node, item.group, item.demand, found.gpus)
            view.place(item.group, item.demand, (row,), (1,))
            view.devices.hold(row, found.gpus)

    def _urgent(self, pending: Sequence[Pending], answer: Plan) -> list[Pending]:
        lowest = self._picture.snapshot.lowest_priority()
        return [
            item
            for item in pending
            if _lacks_room(answer.rejected.get(item.id))
            and lowest is not None
            and item.demand.placement.priority > lowest
            # A gang makes nobody leave: room for a part of it would be held for nothing.
            and not item.demand.placement.gang
        ]

    def _after(self, pending: Sequence[Pending], answer: Plan) -> View:
        """Return a view on which all that was placed stands."""
        snapshot = self._picture.snapshot
        view = View(snapshot)
        by_id = {item.id: item for item in pending}
        for placed in answer.placed:
            row = snapshot.row_of(placed.node)
            if row is not None:
                view.place(by_id[placed.id].group, by_id[placed.id].demand, (row,), (1,))
                view.devices.hold(row, placed.gpus)
        return view

    def _settled(self, claim: Claim, now: float) -> bool:
        """Whether there is nothing to wait for: all is gone, or something stays after all, or it takes too long."""
        snapshot = self._picture.snapshot
        held = [self._world.state.get(Instance, key) for key in claim.waits_for if snapshot.allocated(key) == claim.node]
        return now >= claim.until or not held or any(one is not None and one.record.desired is Desired.RUN for one in held)


def _lacks_room(rejection: Rejection | None) -> bool:
    """Whether others' leaving might help: what is over its project's quota is not theirs to mend."""
    return rejection is not None and rejection.code != OVER_QUOTA
