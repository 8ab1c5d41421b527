"""What reservations leave to others on each node, while a plan grows."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
import numpy.typing as npt

from atoll.model.devices import MILLI
from atoll.model.maintenance import terms
from atoll.model.reservation import Reservation
from atoll.scheduling.groups import project_of_group
from atoll.scheduling.ledger import Amounts
from atoll.scheduling.snapshot import CPU, GPU, MEMORY, Bools, Ints, Snapshot

Lefts = npt.NDArray[np.int64]


class Kept:
    """One reservation on the rows of a view: `left` is what its project does not hold yet of what is kept for it, by resource."""

    def __init__(self, reservation: Reservation, rows: Ints, left: Lefts) -> None:
        self.reservation = reservation
        self.rows = rows
        self.left = left

    def concerns(self, project: str, ends_at: float | None) -> bool:
        """Return whether work of `project` keeps out: it is another's, and is not known to be gone when it begins."""
        gone = ends_at is not None and ends_at < np.inf and ends_at <= self.reservation.start
        return project != self.reservation.spec.project and not gone


class Reserved:
    """The reservations that are not over at `now`."""

    def __init__(self, snapshot: Snapshot, reservations: Mapping[str, Reservation], now: float) -> None:
        self.kept = [
            _kept(snapshot, held, rows)
            for _, held in sorted(reservations.items())
            if held.spec.end > now and len(rows := rows_of(snapshot, held))
        ]

    def fork(self) -> Reserved:
        other = Reserved.__new__(Reserved)
        other.kept = [Kept(kept.reservation, kept.rows, kept.left.copy()) for kept in self.kept]
        return other

    def concerns(self, project: str, ends_at: float | None) -> bool:
        return any(kept.concerns(project, ends_at) for kept in self.kept)

    def place(self, group: str, rows: Iterable[int], times: Iterable[int], amounts: Amounts) -> None:
        """Count what has been placed: a project uses up what is kept for it."""
        project = project_of_group(group)
        for kept in self.kept:
            if kept.reservation.spec.project == project and not kept.reservation.spec.whole:
                places = {row: place for place, row in enumerate(kept.rows.tolist())}
                for row, count in zip(rows, times, strict=True):
                    if row in places:
                        kept.left[:, places[row]] -= np.asarray(amounts, dtype=np.int64) * count


def rows_of(snapshot: Snapshot, reservation: Reservation) -> Ints:
    """Return the rows of the nodes that are reserved."""
    spec = reservation.spec
    mask: Bools = snapshot.present[: snapshot.size].copy()
    for label, equal, value in terms(spec.nodes):
        id = snapshot.values(label).get(value)
        there = np.zeros(snapshot.size, dtype=np.bool_) if id is None else snapshot.label(label) == id
        mask &= there if equal else ~there
    rows = np.flatnonzero(mask)
    if spec.count is not None and spec.count < len(rows):
        rows = np.sort(rows[np.argsort(snapshot.ranks()[rows])[: spec.count]])
    return rows


def _kept(snapshot: Snapshot, reservation: Reservation, rows: Ints) -> Kept:
    spec = reservation.spec
    left = np.zeros((4, len(rows)), dtype=np.int64)
    if not spec.whole:
        left[CPU] = spec.cpu.milli if spec.cpu is not None else 0
        left[MEMORY] = int(spec.memory) if spec.memory is not None else 0
        left[GPU] = MILLI * (spec.gpu or 0)
        for place, row in enumerate(rows.tolist()):
            for _, held in snapshot.allocations_on(snapshot.names[row]):
                if project_of_group(held.group) == spec.project:
                    left[:, place] -= np.asarray(held.amounts, dtype=np.int64)
    return Kept(reservation, rows, left)
