"""When and where what does not fit now can be placed first, as others end.

Only room comes back in this future; rules about where instances are look at the present. Work that may stay for ever stays. Work
that ends some day, nobody knows when, is taken to end after all whose end is known, the oldest first: what comes later is younger,
so that from plan to plan the head never waits for more.
"""

from __future__ import annotations

import numpy as np

from atoll.scheduling.bookings import Booking, Bookings, Ints, Moment
from atoll.scheduling.demand import Demand, Pending
from atoll.scheduling.gangs import choose_gang
from atoll.scheduling.interface import View
from atoll.scheduling.ledger import Allocation
from atoll.scheduling.placing import choose_rows

TRIES_MAX = 8
"""Heads for which a place in the future is looked for in one plan."""


class Future:
    """What ends on the nodes of one view, in order. Made once for a plan, at its first head."""

    def __init__(self, view: View) -> None:
        self._view = view
        self._tries = 0
        nodes = view.nodes
        found: list[tuple[float, float, str, int, Allocation]] = []
        for id, held, at in nodes.ledger.ending():
            row = nodes.row_of(held.node)
            if row is not None:
                found.append((at, held.since, id, row, held))
        found.sort(key=lambda one: one[:3])
        self._found = found
        self._rows = np.fromiter((one[3] for one in found), dtype=np.int64, count=len(found))
        self._amounts = np.array([one[4].amounts for one in found], dtype=np.int64).reshape(-1, 4).T
        moments = [(one[0], one[1] if one[0] == np.inf else 0.0) for one in found]
        self._steps = [place for place, moment in enumerate(moments[1:], 1) if moments[place - 1] != moment]
        if moments:
            self._steps.append(len(moments))
        """How many are gone, at each moment at which some go."""

    def book(self, members: list[Pending], count: int) -> Booking | None:
        """Return where and when `count` of `members` (equal; a gang, or one) can be placed first; None where it cannot be said.

        Nothing is booked yet.
        """
        if not self._steps or self._tries >= TRIES_MAX:
            return None
        self._tries += 1
        first = members[0]
        if (rows := self._rows_when(self._steps[-1], first.group, first.demand, count)) is None:
            return None
        low, high = 0, len(self._steps) - 1
        while low < high:
            middle = (low + high) // 2
            sooner = self._rows_when(self._steps[middle], first.group, first.demand, count)
            low, high, rows = (low, middle, sooner) if sooner is not None else (middle + 1, high, rows)
        at, since = self._found[self._steps[low] - 1][:2]
        names = self._view.nodes.names
        places: dict[str, int] = {}
        for row in rows:
            places[names[row]] = places.get(names[row], 0) + 1
        return Booking(
            ids=tuple(member.id for member in members[:count]),
            priority=first.demand.placement.priority,
            demand=first.demand,
            nodes=places,
            starts=Moment(at, since if at == np.inf else np.inf),
            created_at=first.created_at,
        )

    def _rows_when(self, gone: int, group: str, demand: Demand, count: int) -> list[int] | None:
        """Return the rows that `count` would go to once the first `gone` have ended; None where they have no room then."""
        view = self._view.fork()
        for resource in range(4):
            view.free[resource] += self._freed(resource, gone)
        view.bookings.set_aside(view.free, demand.gpu is not None)
        view.bookings = Bookings()
        if demand.gpu is not None:
            self._free_devices(view, gone)
        choose = choose_gang if demand.placement.gang else choose_rows
        rows = choose(view, group, demand, count)
        return rows if len(rows) == count else None

    def _freed(self, resource: int, gone: int) -> Ints:
        # Exact: amounts are below 2⁶⁰, so not added up in floating point as `bincount` does.
        freed = np.zeros(self._view.size, dtype=np.int64)
        np.add.at(freed, self._rows[:gone], self._amounts[resource, :gone])
        return freed

    def _free_devices(self, view: View, gone: int) -> None:
        by_row: dict[int, set[str]] = {}
        for _, _, id, row, held in self._found[:gone]:
            if held.gpus or held.gpu is not None:
                by_row.setdefault(row, set()).add(id)
        for row, ids in by_row.items():
            view.devices.hold_only(row, view.nodes.holdings_on(view.nodes.names[row], ids))
