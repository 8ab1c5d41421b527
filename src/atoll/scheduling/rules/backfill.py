"""What comes after a head of the queue keeps out of the room that is booked for it, unless it will be gone in time."""

from __future__ import annotations

from atoll.model.evacuation import in_words
from atoll.scheduling.demand import Demand
from atoll.scheduling.interface import Reason, View
from atoll.scheduling.ledger import SOME_DAY
from atoll.scheduling.rules.interface import Still
from atoll.scheduling.snapshot import Bools, Ints


class Backfill(Still):
    name = "booked"

    def wants(self, view: View, group: str, demand: Demand) -> bool:
        return view.bookings.any_holds_back(demand.placement.priority, view.ends_at)

    def passes(self, view: View, group: str, demand: Demand) -> Bools:
        mask: Bools = self._room(view, demand) > 0
        return mask

    def room(self, view: View, group: str, demand: Demand) -> Ints | None:
        return self._room(view, demand)

    def explain(self, view: View, group: str, demand: Demand, failed: Ints) -> Reason:
        holders = [kept.booking for kept in view.bookings.holders(failed, demand, view.ends_at)]
        waiting = sum(len(booking.ids) for booking in holders)
        soonest = min((booking.starts.at for booking in holders), default=SOME_DAY)
        first = "its turn" if waiting == 1 else "their turn"
        known = f", {in_words(soonest)} at the latest" if soonest < SOME_DAY else ""
        return Reason(
            f"booked for {waiting} before it in the queue whose room is not all free yet ({first}{known})",
            "it goes there if it ends before that: set a job's deadline; or raise placement.priority, or add a node",
        )

    def _room(self, view: View, demand: Demand) -> Ints:
        return view.bookings.room(view.size, demand, view.ends_at)
