"""All nodes as columns, kept up to date change by change. A row is a node; a removed node's row is used again.

The numbers in a column are whole: cpu in thousandths of a core, memory and disk in bytes, GPUs in thousandths of
a device (which devices, and what is free of each, is `gpus`).
"""

from __future__ import annotations

import contextlib
import enum
from collections.abc import Container, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from atoll.model.devices import MILLI, GpuGrant, GpuHealth
from atoll.model.evacuation import Evacuation
from atoll.model.labels import OWN_LABELS, is_wish
from atoll.model.records import Node
from atoll.model.reservation import Reservation
from atoll.model.spec import Quota, RuntimeName
from atoll.scheduling.bookings import Booking
from atoll.scheduling.demand import Demand
from atoll.scheduling.geography import Geography
from atoll.scheduling.gpu.inventory import DevicesView, Holding, Inventory
from atoll.scheduling.groups import owner_of_group
from atoll.scheduling.ledger import Allocation as Allocation
from atoll.scheduling.ledger import Ledger
from atoll.scheduling.ledger import amounts_of as amounts_of
from atoll.scheduling.ledger import avoided as avoided
from atoll.scheduling.presence import IMAGES_MAX as IMAGES_MAX
from atoll.scheduling.presence import Presence
from atoll.scheduling.whereabouts import Whereabouts

Bools = npt.NDArray[np.bool_]
Ints = npt.NDArray[np.int64]

CPU, MEMORY, DISK, GPU = range(4)
"""Rows of the resource columns."""
ABSENT = -1
"""The value id of a label that a node does not have."""
AMOUNT_MAX = 1 << 60
"""More than this of anything counts as this much, so that sums stay within 64 bits."""
MASKS_MAX = 256
"""Masks of static filters kept between plans; each has one byte per node."""
_ROWS_AT_FIRST = 16
_RUNTIME_BIT = {name: 1 << index for index, name in enumerate(RuntimeName)}


class Standing(enum.IntEnum):
    """Whether a node takes new instances, and if not, why."""

    OPEN = 0
    CORDONED = 1
    UNREACHABLE = 2
    LOST = 3


def _offered(node: Node) -> int:
    return MILLI * sum(device.health is not GpuHealth.QUARANTINED for device in node.capacity.gpus)


class Snapshot:
    """The nodes and what is placed on them. Not for use from several threads.

    Allocations are kept by the node's name, so that those of a node that is gone, or not yet known, count when it comes.
    """

    def __init__(self) -> None:
        self.size = 0
        """Rows in use, holes among them; every column below is valid up to it."""
        self.facts = 0
        """Rises when anything but allocations changes."""
        self.names: list[str] = []
        self.nodes: dict[str, Node] = {}
        self.present: Bools = np.zeros(_ROWS_AT_FIRST, dtype=np.bool_)
        self.standing: Ints = np.zeros(_ROWS_AT_FIRST, dtype=np.int64)
        self.total: Ints = np.zeros((4, _ROWS_AT_FIRST), dtype=np.int64)
        self.used: Ints = np.zeros((4, _ROWS_AT_FIRST), dtype=np.int64)
        self.runtimes: Ints = np.zeros(_ROWS_AT_FIRST, dtype=np.int64)
        """One bit for each runtime that the node offers."""
        self.gpu_runtimes: Ints = np.zeros(_ROWS_AT_FIRST, dtype=np.int64)
        """Of those one for each that does not refuse to hand on the node's GPUs."""
        self.taints: dict[str, Bools] = {}
        """Those that close a node to what does not tolerate them."""
        self.shunned: dict[str, Bools] = {}
        """Taints that are wishes."""
        self.labels: dict[str, Ints] = {}
        """Label → for each node the id of its value."""
        self.masks: dict[tuple[Any, ...], Bools] = {}
        """What static filters said, until facts change. Owned by `View`."""
        self._values: dict[str, dict[str, int]] = {}
        self._rows: dict[str, int] = {}
        self._holes: list[int] = []
        self.ledger = Ledger()
        self._groups: dict[str, dict[int, int]] = {}
        self._owned: dict[str, set[str]] = {}
        """Owner → its groups that are placed somewhere."""
        self.quotas: dict[str, Quota] = {}
        """Project → its quota, of those that have one."""
        self.unread: frozenset[str] = frozenset()
        """Projects of which it cannot be read what their quota is: nothing new is placed for them."""
        self.reservations: dict[str, Reservation] = {}
        """By name."""
        self.bookings: tuple[Booking, ...] = ()
        """What was written down for the heads of the queue, in its order: for dry runs. The leader keeps its own."""
        self.now = 0.0
        """Seconds since the epoch, as whoever plans on it says."""
        self.homes: dict[str, tuple[str, ...]] = {}
        """Owner → names of the nodes that hold its volumes, beside those where it is placed."""
        self.evacuations: dict[str, Evacuation] = {}
        """Names of the nodes that instances are to leave → why, and until when."""
        self.whereabouts = Whereabouts()
        self._presence = Presence()
        self._machine_ports: dict[str, set[str]] = {}
        """Port → nodes of which a program of the machine has it."""
        self._ranks: Ints | None = None
        self._gpus = Inventory()
        self._stale: set[str] = set()
        """Nodes of which `_gpus` does not know yet what is held."""

    def __len__(self) -> int:
        return len(self._rows)

    def copy(self, like: Snapshot | None = None) -> Snapshot:
        """Return another that says the same, and changes by itself, as for a thread; quick, whatever there is. `like` is an earlier
        copy that nobody uses any more."""
        other = Snapshot()
        other.size, other.facts, other.now = self.size, self.facts, self.now
        other.names, other.nodes, other._rows, other._holes = (
            self.names.copy(),
            self.nodes.copy(),
            self._rows.copy(),
            self._holes.copy(),
        )
        for column in ("present", "standing", "total", "used", "runtimes", "gpu_runtimes"):
            setattr(other, column, getattr(self, column).copy())
        other.taints = {taint: bools.copy() for taint, bools in self.taints.items()}
        other.shunned = {taint: bools.copy() for taint, bools in self.shunned.items()}
        other.labels = {key: ids.copy() for key, ids in self.labels.items()}
        other._values = {key: values.copy() for key, values in self._values.items()}
        other.ledger = self.ledger.copy()
        other._groups = {group: rows.copy() for group, rows in self._groups.items()}
        other._owned = {owner: groups.copy() for owner, groups in self._owned.items()}
        other.quotas, other.reservations, other.bookings = self.quotas.copy(), self.reservations.copy(), self.bookings
        other.unread = self.unread
        other.homes, other.evacuations = self.homes.copy(), self.evacuations.copy()
        other.whereabouts, other._presence = self.whereabouts.copy(), self._presence.copy()
        other._machine_ports = {port: nodes.copy() for port, nodes in self._machine_ports.items()}
        other._ranks = self._ranks
        other._gpus = self._gpus.copy(like._gpus if like is not None else None)
        other._stale = self._stale.copy()
        return other

    def upsert_node(self, node: Node, standing: Standing = Standing.OPEN) -> None:
        """Add a node, or take over what it says of itself now."""
        row = self._rows.get(node.name)
        if row is not None and self.nodes[node.name] == node:
            if self.standing[row] != standing:
                self.standing[row] = standing
                self._facts_changed()
            return
        if row is None:
            row = self._new_row(node.name)
        self._set_machine_ports(node.name, node.ports_taken)
        self.nodes[node.name] = node
        self.present[row] = True
        self.standing[row] = standing
        capacity = node.capacity
        amounts = (capacity.cpu_milli, capacity.memory_bytes, capacity.disk_bytes, _offered(node))
        self.total[:, row] = [min(max(amount, 0), AMOUNT_MAX) for amount in amounts]
        self.runtimes[row] = sum(_RUNTIME_BIT[name] for name in set(node.runtimes))
        self.gpu_runtimes[row] = sum(_RUNTIME_BIT[name] for name in set(node.runtimes).difference(capacity.gpu_refusals))
        self._set_labels(row, node)
        for column in (*self.taints.values(), *self.shunned.values()):
            column[row] = False
        for taint in node.taints:
            columns = self.shunned if is_wish(taint) else self.taints
            if taint not in columns:
                columns[taint] = np.zeros(len(self.present), dtype=np.bool_)
            columns[taint][row] = True
        self._gpus.describe(row, capacity.gpus)
        if row in self._gpus.ids and self.ledger.holds_any(node.name):
            self._stale.add(node.name)
        self._facts_changed()

    def set_geography(self, geography: Geography) -> None:
        """Take over where sites are; a site's region goes before what its nodes say."""
        before, self.whereabouts.geography = self.whereabouts.geography, geography
        if before.sites or geography.sites:  # else every node is where it says; to find that out of thousands takes long
            for name, node in self.nodes.items():
                self._set_labels(self._rows[name], node)
        self._facts_changed()

    def remove_node(self, name: str) -> None:
        """Forget a node; what is allocated on it is remembered. An unknown name is no error."""
        row = self._rows.pop(name, None)
        if row is None:
            return
        for _, allocation in self.ledger.on(name):
            self._count(allocation, row, -1)
        self._set_machine_ports(name, ())
        del self.nodes[name]
        self.present[row] = False
        self.used[:, row] = 0
        self.total[:, row] = 0
        self._gpus.forget(row)
        self.names[row] = ""
        self._holes.append(row)
        self._ranks = None
        self._facts_changed()

    def allocate(
        self,
        id: str,
        node: str,
        group: str,
        demand: Demand,
        gpus: tuple[GpuGrant, ...] = (),
        ends_at: float | None = None,
        since: float = 0.0,
    ) -> None:
        """Count an instance, with the devices that it was granted and when it came and will be gone (`Allocation`), on its node.

        The same again changes nothing; another node or amount replaces the first. Where it asks for GPUs and was granted none (an
        older record), whole devices are counted.
        """
        away, priority = avoided(group, demand), demand.placement.priority
        allocation = Allocation(
            node, group, amounts_of(demand), away, priority, demand.gpu, gpus, ends_at, since, demand.host_ports, demand.devices
        )
        before = self.ledger.get(id)
        if before == allocation:
            return
        if before is not None:
            self.release(id)
        self._enter(id, allocation)

    def release(self, id: str) -> bool:
        """Give back what an instance holds; return whether it held anything."""
        allocation = self.ledger.remove(id)
        if allocation is None:
            return False
        if allocation.gpus or allocation.gpu is not None:
            self._stale.add(allocation.node)
        row = self._rows.get(allocation.node)
        if row is not None:
            self._count(allocation, row, -1)
        return True

    @contextlib.contextmanager
    def without(self, id: str) -> Iterator[None]:
        """Have an instance not count for a while; afterwards all is as it was."""
        allocation = self.ledger.get(id)
        self.release(id)
        try:
            yield
        finally:
            if allocation is not None:
                self._enter(id, allocation)

    def _enter(self, id: str, allocation: Allocation) -> None:
        self.ledger.add(id, allocation)
        if allocation.gpus or allocation.gpu is not None:
            self._stale.add(allocation.node)
        row = self._rows.get(allocation.node)
        if row is not None:
            self._count(allocation, row, 1)

    def project_use(self, project: str) -> list[int]:
        """As `Ledger.project_use`."""
        return self.ledger.project_use(project)

    def allocated(self, id: str) -> str | None:
        """Return the node that an instance is counted on."""
        allocation = self.ledger.get(id)
        return allocation.node if allocation else None

    def allocations_on(self, name: str) -> Iterator[tuple[str, Allocation]]:
        """Yield what is allocated on a node, by id, in no order."""
        return self.ledger.on(name)

    @property
    def has_gpus(self) -> bool:
        """Whether any node has a GPU, whoever holds it."""
        return bool(self._gpus.ids)

    def devices(self) -> DevicesView:
        """Return the devices of all nodes, with what is held of them, for a plan to change."""
        for name in self._stale:
            row = self._rows.get(name)
            if row is not None:
                self._gpus.hold(row, self.holdings_on(name))
        self._stale.clear()
        return self._gpus.view(self.size)

    def holdings_on(self, name: str, but: Container[str] = ()) -> Iterator[Holding]:
        """As `Ledger.holdings_on`."""
        return self.ledger.holdings_on(name, but)

    def lowest_priority(self) -> int | None:
        """As `Ledger.lowest_priority`."""
        return self.ledger.lowest_priority()

    def holds_below(self, name: str, priority: int) -> bool:
        """As `Ledger.holds_below`."""
        return self.ledger.holds_below(name, priority)

    def set_images(self, name: str, digests: tuple[str, ...]) -> None:
        """Take over which images a node has, whether it is known or not; of many, those that it names first."""
        self._presence.set(name, digests)

    def rows_with_image(self, digest: str) -> list[int]:
        """Return the rows of nodes that have an image."""
        return [row for name in self._presence.with_image(digest) if (row := self._rows.get(name)) is not None]

    def machines_with_port(self, port: str) -> set[str]:
        """Return the nodes on which a program of the machine listens on `port` (`tcp/22`)."""
        return self._machine_ports.get(port, set())

    def _set_machine_ports(self, name: str, ports: tuple[str, ...]) -> None:
        before = self.nodes[name].ports_taken if name in self.nodes else ()
        for port in set(before).difference(ports):
            self._machine_ports[port].discard(name)
            if not self._machine_ports[port]:
                del self._machine_ports[port]
        for port in ports:
            self._machine_ports.setdefault(port, set()).add(name)

    def row_of(self, name: str) -> int | None:
        return self._rows.get(name)

    def ranks(self) -> Ints:
        """Return each row's place among the sorted names: the last tie-break, whatever order nodes came in."""
        if self._ranks is None:
            ranks = np.zeros(len(self.present), dtype=np.int64)
            ranks[sorted(range(self.size), key=self.names.__getitem__)] = np.arange(self.size)
            self._ranks = ranks
        return self._ranks[: self.size]

    def count_by_row(self, group: str) -> dict[int, int]:
        """Return row → instances of `group` there."""
        return self._groups.get(group, {})

    def groups_of(self, owner: str) -> set[str]:
        """Return the owner's groups that are placed somewhere."""
        return self._owned.get(owner, set())

    def repelling(self, owner: str) -> dict[str, dict[str, int]] | None:
        """As `Ledger.repelling`."""
        return self.ledger.repelling(owner)

    def label(self, key: str) -> Ints:
        """Return for each row the id of the label's value, or ABSENT."""
        column = self.labels.get(key)
        return np.full(self.size, ABSENT, dtype=np.int64) if column is None else column[: self.size]

    def values(self, key: str) -> dict[str, int]:
        """Return value → id of a label, of all values that any node has had."""
        return self._values.get(key, {})

    def runtime_for(self, row: int, wanted: tuple[RuntimeName, ...], *, gpu: bool = False) -> RuntimeName:
        """Return the first of `wanted` that the node offers, with `gpu` for work that gets GPUs. Raises LookupError: none."""
        offered = int((self.gpu_runtimes if gpu else self.runtimes)[row])
        for name in wanted:
            if offered & _RUNTIME_BIT[name]:
                return name
        raise LookupError(f"{self.names[row]} offers none of {wanted}")

    def offers_any(self, wanted: tuple[RuntimeName, ...], *, gpu: bool = False) -> Bools:
        """Return which nodes offer one of `wanted`, with `gpu` for work that gets GPUs."""
        bits = sum(_RUNTIME_BIT[name] for name in set(wanted))
        column = self.gpu_runtimes if gpu else self.runtimes
        mask: Bools = (column[: self.size] & bits) != 0
        return mask

    def _count(self, allocation: Allocation, row: int, sign: int) -> None:
        self.used[:, row] += np.asarray(allocation.amounts, dtype=np.int64) * sign
        rows = self._groups.get(allocation.group)
        if rows is None:
            rows = self._groups[allocation.group] = {}
            self._owned.setdefault(owner_of_group(allocation.group), set()).add(allocation.group)
        rows[row] = rows.get(row, 0) + sign
        if rows[row] == 0:
            del rows[row]
            if not rows:
                del self._groups[allocation.group]
                owner = owner_of_group(allocation.group)
                self._owned[owner].discard(allocation.group)
                if not self._owned[owner]:
                    del self._owned[owner]

    def _new_row(self, name: str) -> int:
        if self._holes:
            row = self._holes.pop()
            self.names[row] = name
        else:
            row = self.size
            self.names.append(name)
            self.size += 1
            if self.size > len(self.present):
                self._grow()
        self._rows[name] = row
        self._ranks = None
        for _, allocation in self.ledger.on(name):
            self._count(allocation, row, 1)
        return row

    def _set_labels(self, row: int, node: Node) -> None:
        for column in self.labels.values():
            column[row] = ABSENT
        site = self.whereabouts.geography.sites.get(node.site)
        region = site.region if site is not None and site.region else node.region
        own = dict(zip(OWN_LABELS, (node.name, node.site, region, node.arch), strict=True))
        for key, value in (node.labels | own).items():
            if key not in self.labels:
                self.labels[key] = np.full(len(self.present), ABSENT, dtype=np.int64)
                self._values[key] = {}
            self.labels[key][row] = self._values[key].setdefault(value, len(self._values[key]))

    def _facts_changed(self) -> None:
        self.facts += 1
        self.masks.clear()

    def _grow(self) -> None:
        more = len(self.present)
        self.present = np.append(self.present, np.zeros(more, dtype=np.bool_))
        self.standing = np.append(self.standing, np.zeros(more, dtype=np.int64))
        self.runtimes = np.append(self.runtimes, np.zeros(more, dtype=np.int64))
        self.gpu_runtimes = np.append(self.gpu_runtimes, np.zeros(more, dtype=np.int64))
        self.total = np.append(self.total, np.zeros((4, more), dtype=np.int64), axis=1)
        self.used = np.append(self.used, np.zeros((4, more), dtype=np.int64), axis=1)
        for columns in (self.taints, self.shunned):
            for taint, bools in columns.items():
                columns[taint] = np.append(bools, np.zeros(more, dtype=np.bool_))
        for key, ids in self.labels.items():
            self.labels[key] = np.append(ids, np.full(more, ABSENT, dtype=np.int64))
