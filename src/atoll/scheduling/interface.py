"""What a filter and a score are, and the view of the snapshot that they see while a plan grows."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from msgspec import Struct
from msgspec.structs import replace

from atoll.scheduling.bookings import Booking, Bookings
from atoll.scheduling.demand import Demand
from atoll.scheduling.gpu.inventory import DevicesView
from atoll.scheduling.groups import owner_of_group, project_of_group
from atoll.scheduling.reserved import Reserved
from atoll.scheduling.snapshot import MASKS_MAX, Bools, Ints, Snapshot, amounts_of, avoided

Floats = npt.NDArray[np.float64]


class View:
    """A snapshot together with what the plan has put on it so far. Changing it leaves the snapshot as it is."""

    def __init__(self, nodes: Snapshot) -> None:
        self.nodes = nodes
        self.size = nodes.size
        self.free: Ints = nodes.total[:, : nodes.size] - nodes.used[:, : nodes.size]
        """By resource and row; below 0 where a node has shrunk under what it holds."""
        self._devices: DevicesView | None = None
        self._added: dict[str, dict[int, int]] = {}
        self._owned: dict[str, set[str]] = {}
        self._on_device: dict[str, set[int]] = {}
        self._project_use: dict[str, list[int]] = {}
        self._repelled: dict[str, dict[str, dict[str, int]]] = {}
        self.now = nodes.now
        self.bookings = Bookings()
        self._on_port: dict[str, set[int]] = {}
        self._reserved: Reserved | None = None
        self.ends_at: float | None = None
        """When the instances that are being placed will have ended at the latest (as `Allocation.ends_at`)."""

    def fork(self) -> View:
        """Return a view that stands where this one does, to try something out on."""
        other = View(self.nodes)
        other.free = self.free.copy()
        other._devices = self._devices.fork() if self._devices is not None else None
        other._added = {group: dict(rows) for group, rows in self._added.items()}
        other._owned = {owner: set(groups) for owner, groups in self._owned.items()}
        other._on_device = {device: set(rows) for device, rows in self._on_device.items()}
        other._project_use = {project: list(use) for project, use in self._project_use.items()}
        other._repelled = {owner: dict(groups) for owner, groups in self._repelled.items()}
        other.now, other.ends_at = self.now, self.ends_at
        other.bookings = self.bookings.fork()
        other._on_port = {port: set(rows) for port, rows in self._on_port.items()}
        other._reserved = self._reserved.fork() if self._reserved is not None else None
        return other

    @property
    def devices(self) -> DevicesView:
        """The GPUs of all rows, as the plan has left them."""
        if self._devices is None:
            self._devices = self.nodes.devices()
        return self._devices

    @property
    def reserved(self) -> Reserved:
        """What reservations leave to others, as the plan has left it."""
        if self._reserved is None:
            self._reserved = Reserved(self.nodes, self.nodes.reservations, self.now)
        return self._reserved

    def rows_with_port(self, port: str) -> set[int]:
        """Return the rows on which an instance has `port` of its node."""
        nodes = self.nodes
        before = {row for name in nodes.ledger.nodes_with_port(port) if (row := nodes.row_of(name)) is not None}
        return before | self._on_port.get(port, set())

    def rows_with_device(self, name: str) -> set[int]:
        """Return the rows on which the plan has given a device of a CDI spec to an instance."""
        return self._on_device.get(name, set())

    def counts(self, group: str) -> Ints:
        """Return how many instances of `group` each row has."""
        counts = np.zeros(self.size, dtype=np.int64)
        for source in (self.nodes.count_by_row(group), self._added.get(group, {})):
            if source:
                counts[list(source)] += np.fromiter(source.values(), dtype=np.int64, count=len(source))
        return counts

    def owner_counts(self, owner: str) -> Ints:
        """Return how many instances of an app or job, of whatever release, each row has."""
        counts = np.zeros(self.size, dtype=np.int64)
        for group in self.nodes.groups_of(owner) | self._owned.get(owner, set()):
            counts += self.counts(group)
        return counts

    def repelling(self, owner: str) -> dict[str, dict[str, int]] | None:
        """As `Snapshot.repelling`, with what the plan has placed."""
        before, added = self.nodes.repelling(owner), self._repelled.get(owner)
        return {**added, **before} if before and added else before or added

    def project_use(self, project: str) -> list[int]:
        """As `Snapshot.project_use`, with what the plan has placed of a project that has a quota."""
        added = self._project_use.get(project, [0] * 5)
        return [held + more for held, more in zip(self.nodes.project_use(project), added, strict=True)]

    def place(self, group: str, demand: Demand, rows: Iterable[int], times: Iterable[int]) -> None:
        """Take `times` instances' worth of each of `rows` (each named once); of GPUs, `devices` is told apart."""
        added = self._added.get(group)
        if added is None:
            added = self._added[group] = {}
            self._owned.setdefault(owner_of_group(group), set()).add(group)
            for owner, label in avoided(group, demand):
                self._repelled.setdefault(owner, {}).setdefault(group, {})[label] = 1
        at = np.fromiter(rows, dtype=np.int64)
        by = np.fromiter(times, dtype=np.int64)
        project = project_of_group(group)
        if project in self.nodes.quotas:
            use = self._project_use.setdefault(project, [0] * 5)
            for place, amount in enumerate((*amounts_of(demand), 1)):
                use[place] += amount * int(by.sum())
        self.free[:, at] -= np.outer(np.asarray(amounts_of(demand), dtype=np.int64), by)
        for row, count in zip(at.tolist(), by.tolist(), strict=True):
            added[row] = added.get(row, 0) + count
        for port in demand.host_ports:
            self._on_port.setdefault(port, set()).update(at.tolist())
        for device in demand.devices:
            self._on_device.setdefault(device, set()).update(at.tolist())
        if self.nodes.reservations:
            self.reserved.place(group, at.tolist(), by.tolist(), amounts_of(demand))
        if len(self.bookings):
            self.bookings.take(at.tolist(), by.tolist(), amounts_of(demand), demand.placement.priority, self.ends_at)

    def book(self, booking: Booking) -> None:
        """Keep room for a head of the queue; on nodes that are gone there is none."""
        rows = {node: row for node in booking.nodes if (row := self.nodes.row_of(node)) is not None}
        if len(rows) < len(booking.nodes):
            booking = replace(booking, nodes={node: times for node, times in booking.nodes.items() if node in rows})
        at = np.fromiter(rows.values(), dtype=np.int64, count=len(rows))
        self.bookings.add(booking, at, self.free[:, at], self.nodes.ledger)

    def kept(self, key: tuple[Any, ...], make: Callable[[], Bools]) -> Bools:
        """Return the mask under `key`, made once until facts about nodes change."""
        masks = self.nodes.masks
        mask = masks.get(key)
        if mask is None:
            if len(masks) >= MASKS_MAX:
                del masks[next(iter(masks))]
            mask = masks[key] = make()
        return mask


class Reason(Struct, frozen=True):
    """Why a filter turned nodes away, and what would change that, in words."""

    message: str
    mend: str = ""


class Filter(Protocol):
    """A hard rule that depends on facts about nodes only, not on what is placed on them."""

    name: str

    def wants(self, demand: Demand) -> bool:
        """Return whether the rule can turn anything away for this demand; if not it is skipped."""
        ...

    def passes(self, view: View, demand: Demand) -> Bools:
        """Return for every row whether the rule lets the demand on it."""
        ...

    def explain(self, view: View, demand: Demand, failed: Ints) -> Reason:
        """Say why the rows `failed`, which all filters before this one let pass, were turned away."""
        ...


class Limit(Protocol):
    """A hard rule that depends on what is placed already. Each instance placed on a node takes one from its room there."""

    name: str

    def wants(self, demand: Demand) -> bool: ...

    def room(self, view: View, demand: Demand) -> Ints:
        """Return for every row how many instances with this demand still fit (0 or less: none)."""
        ...

    def explain(self, view: View, demand: Demand, failed: Ints) -> Reason: ...


class Score(Protocol):
    """A wish. The node with the greatest sum of weighted scores is chosen; a tie goes to the smaller name."""

    name: str
    weight: int

    def wants(self, view: View, demand: Demand) -> bool:
        """Return whether the score can differ between nodes for this demand; if not it is skipped."""
        ...

    def score(self, view: View, demand: Demand, counts: Ints, rows: Ints, extra: Ints) -> Floats:
        """Return how good one more instance on each of `rows` is, greater is better, exact to 1e-6 (it is rounded).

        `extra` is how many equal instances the class has already put on the row beyond what `view` shows; `counts` is how many
        of its group the view shows there. It must depend on nothing else of the plan, or bulk placement would differ from
        placing one by one.
        """
        ...


class GroupScore(Protocol):
    """A wish that depends on where other apps are, or on what nodes are, but not on how the class itself is placed."""

    name: str
    weight: int

    def wants(self, demand: Demand) -> bool: ...

    def score(self, view: View, group: str, demand: Demand) -> Floats:
        """Return how good each row is, greater is better, exact to 1e-6. Asked once for a class."""
        ...


class DomainScore(Protocol):
    """A wish about a whole site or region: every node of one has the same score, which falls with each instance there."""

    name: str
    layout_name: str

    def label(self, demand: Demand) -> str | None:
        """Return the label whose values are the domains; None where the wish is not made."""
        ...

    def score(self, count: int) -> int:
        """Return what one more is worth, weighted, where there are `count`; never more than with fewer there."""
        ...

    def layout_score(self, count: int, wanted: int) -> int:
        """As `score`, for a site that should have `wanted`."""
        ...
