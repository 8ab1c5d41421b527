"""Room that is booked for the heads of the queue, and what those behind them may still use of it (backfill).

EASY backfill (Lifka, JSSPP 1995), with a few heads instead of one: who does not fit is booked the nodes on which it can be first,
by what is known of when others end (`future`). Who comes after it may use a booked node's room if it will be gone by then, and
what the head will not need otherwise.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt
from msgspec import Struct

from atoll.model.records import Booked
from atoll.scheduling.demand import Demand
from atoll.scheduling.ledger import SOME_DAY, Allocation, Amounts, Ledger, amounts_of

Ints = npt.NDArray[np.int64]

BOOKINGS_MAX = 4
"""Heads that have room booked at the same time."""
NO_LIMIT = np.iinfo(np.int64).max


class Moment(Struct, frozen=True, order=True):
    """Everything that ends by `at` is gone; of what ends at the same time (some day), what runs since `since` or longer."""

    at: float
    since: float

    def after(self, held: Allocation) -> bool:
        """Return whether what is held will be gone by then."""
        return held.ends_at is not None and (held.ends_at, held.since) <= (self.at, self.since)


class Booking(Struct, frozen=True, kw_only=True):
    """Where, and at the latest when, those that wait will have room."""

    ids: tuple[str, ...]
    """A gang's, or one instance's."""
    priority: int
    demand: Demand
    nodes: dict[str, int]
    """Node → how many of them."""
    starts: Moment
    created_at: float = 0.0
    """Of the first of `ids`."""

    @property
    def order(self) -> tuple[int, float, str]:
        """Where its head is in the queue, as `Pending.order`."""
        return (-self.priority, self.created_at, self.ids[0])

    def written(self) -> Booked:
        """Return what is written down of it, with its head."""
        known = self.starts.at < SOME_DAY
        return Booked(nodes=self.nodes, at=self.starts.at if known else None, since=0.0 if known else self.starts.since)


def read(booked: Booked, ids: tuple[str, ...], demand: Demand, created_at: float) -> Booking:
    """Return the booking that was written down for `ids`."""
    return Booking(
        ids=ids,
        priority=demand.placement.priority,
        demand=demand,
        nodes=booked.nodes,
        starts=Moment(SOME_DAY, booked.since) if booked.at is None else Moment(booked.at, SOME_DAY),
        created_at=created_at,
    )


class Kept:
    """A booking on the rows of one view."""

    def __init__(self, booking: Booking, rows: Ints, left: Ints) -> None:
        self.booking = booking
        self.rows = rows
        self.left = left
        """By resource and place in `rows`: what will be free when the booking starts and is not part of it."""

    def holds_back(self, priority: int, ends_at: float | None) -> bool:
        """Return whether work may be in the way: it comes after the head, and is not known to be gone when that starts."""
        starts_at = self.booking.starts.at
        return priority <= self.booking.priority and not (ends_at is not None and ends_at < np.inf and ends_at <= starts_at)


class Bookings:
    """The bookings that a plan has made, or been given."""

    def __init__(self) -> None:
        self._kept: list[Kept] = []

    def __len__(self) -> int:
        return len(self._kept)

    def fork(self) -> Bookings:
        other = Bookings()
        other._kept = [Kept(kept.booking, kept.rows, kept.left.copy()) for kept in self._kept]
        return other

    def add(self, booking: Booking, rows: Ints, free: Ints, ledger: Ledger) -> None:
        """Keep `booking`, whose nodes are at `rows`, and of which `free` (by resource and place) is free now."""
        left = free.copy()
        needs = np.asarray(amounts_of(booking.demand), dtype=np.int64)
        for place, (node, times) in enumerate(booking.nodes.items()):
            left[:, place] -= needs * times
            for _, held in ledger.on(node):
                if booking.starts.after(held):
                    left[:, place] += np.asarray(held.amounts, dtype=np.int64)
        self._kept.append(Kept(booking, rows, left))

    def all(self) -> tuple[Booking, ...]:
        return tuple(kept.booking for kept in self._kept)

    def any_holds_back(self, priority: int, ends_at: float | None) -> bool:
        return any(kept.holds_back(priority, ends_at) for kept in self._kept)

    def room(self, size: int, demand: Demand, ends_at: float | None) -> Ints:
        """Return for each row how many of `demand` are in nobody's way."""
        room = np.full(size, NO_LIMIT, dtype=np.int64)
        amounts = amounts_of(demand)
        for kept in self._kept:
            if kept.holds_back(demand.placement.priority, ends_at):
                here = np.full(len(kept.rows), NO_LIMIT, dtype=np.int64)
                for resource in (0, 1):
                    if amounts[resource] > 0:
                        np.minimum(here, np.maximum(kept.left[resource], 0) // amounts[resource], out=here)
                if demand.gpu is not None and kept.booking.demand.gpu is not None:
                    # Which devices the head will get is not known before: none of the others may make them another's.
                    here[:] = 0
                room[kept.rows] = np.minimum(room[kept.rows], here)
        return room

    def holders(self, rows: Ints, demand: Demand, ends_at: float | None) -> list[Kept]:
        """Return the bookings that hold `demand` back on any of `rows`."""
        return [
            kept for kept in self._kept if kept.holds_back(demand.placement.priority, ends_at) and np.isin(kept.rows, rows).any()
        ]

    def take(self, rows: Iterable[int], times: Iterable[int], amounts: Amounts, priority: int, ends_at: float | None) -> None:
        """Count what has been placed and will still be there when a booking starts."""
        for kept in self._kept:
            if kept.holds_back(priority, ends_at):
                places = {row: place for place, row in enumerate(kept.rows.tolist())}
                for row, count in zip(rows, times, strict=True):
                    if row in places:
                        kept.left[:, places[row]] -= np.asarray(amounts, dtype=np.int64) * count

    def set_aside(self, free: Ints, gpu: bool) -> None:
        """Take all that is booked out of `free`, whenever it starts; for a demand with `gpu` whole nodes, where GPUs are booked."""
        for kept in self._kept:
            needs = np.asarray(amounts_of(kept.booking.demand), dtype=np.int64)
            free[:, kept.rows] -= np.outer(needs, np.fromiter(kept.booking.nodes.values(), dtype=np.int64))
            if gpu and kept.booking.demand.gpu is not None:
                free[:, kept.rows] = -1
