"""What every placed instance holds, by instance, by node and by project; whether its node is known is the snapshot's matter."""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Iterable, Iterator

from msgspec import Struct

from atoll.model.devices import GpuGrant
from atoll.model.spec import Gpu
from atoll.scheduling.demand import Demand
from atoll.scheduling.gpu.inventory import Holding
from atoll.scheduling.groups import owners_named, project_of_group

Amounts = tuple[int, int, int, int]
"""Cpu in thousandths of a core, memory and disk in bytes, thousandths of GPUs."""
SOME_DAY = float("inf")
"""The end of work that ends, nobody knows when: a job without a deadline. What may run for ever has no end (None)."""


class Allocation(Struct, frozen=True):
    """What an instance holds on a node."""

    node: str
    group: str
    amounts: Amounts
    avoids: tuple[tuple[str, str], ...] = ()
    """Owners that must stay away from it, each with the label that says what near is."""
    priority: int = 50
    gpu: Gpu | None = None
    gpus: tuple[GpuGrant, ...] = ()
    ends_at: float | None = None
    """When it will be gone at the latest (`SOME_DAY`: not known when); None where it may stay for ever."""
    since: float = 0.0
    """When it was placed."""
    host_ports: tuple[str, ...] = ()
    """Ports of the node, as `tcp/8053`."""
    devices: tuple[str, ...] = ()
    """Of CDI specs, by their full names."""


def amounts_of(demand: Demand) -> Amounts:
    """Return the demand as a column: cpu, memory, disk, thousandths of GPUs."""
    return (demand.cpu_milli, demand.memory_bytes, demand.disk_bytes, demand.gpu_milli)


def avoided(group: str, demand: Demand) -> tuple[tuple[str, str], ...]:
    """Return what `demand` keeps away by hard anti-affinity: (owner, label)."""
    wishes = demand.placement.anti_affinity
    if not wishes:
        return ()
    return tuple((owner, wish.by) for wish in wishes if wish.weight is None for owner in owners_named(group, wish.app))


class Ledger:
    """All allocations. Those of a node that is gone, or not yet known, are kept: they count when it comes."""

    def __init__(self) -> None:
        self._allocations: dict[str, Allocation] = {}
        self._on: dict[str, set[str]] = {}
        self._repelled: dict[str, dict[str, dict[str, int]]] = {}
        """Owner → group that it must stay away from → label → how many instances say so."""
        self._priorities: Counter[int] = Counter()
        self._project_use: dict[str, list[int]] = {}
        """Project → what its instances hold: the four resources (GPUs in thousandths), and how many they are."""
        self._on_port: dict[str, Counter[str]] = {}
        """Port of the node → node → how many have it there."""
        self._ending: dict[str, float] = {}
        """Instance → when it ends, of those that do."""

    def copy(self) -> Ledger:
        """Return another that says the same, and changes by itself."""
        other = Ledger()
        other._allocations = self._allocations.copy()
        other._on = {node: ids.copy() for node, ids in self._on.items()}
        other._repelled = {
            owner: {group: labels.copy() for group, labels in groups.items()} for owner, groups in self._repelled.items()
        }
        other._priorities = self._priorities.copy()
        other._project_use = {project: use.copy() for project, use in self._project_use.items()}
        other._on_port = {port: nodes.copy() for port, nodes in self._on_port.items()}
        other._ending = self._ending.copy()
        return other

    def get(self, id: str) -> Allocation | None:
        return self._allocations.get(id)

    def add(self, id: str, allocation: Allocation) -> None:
        """Count an instance that does not count yet."""
        self._allocations[id] = allocation
        self._priorities[allocation.priority] += 1
        self._use(allocation, 1)
        for owner, label in allocation.avoids:
            labels = self._repelled.setdefault(owner, {}).setdefault(allocation.group, {})
            labels[label] = labels.get(label, 0) + 1
        self._on.setdefault(allocation.node, set()).add(id)
        if allocation.ends_at is not None:
            self._ending[id] = allocation.ends_at
        for port in allocation.host_ports:
            self._on_port.setdefault(port, Counter())[allocation.node] += 1

    def remove(self, id: str) -> Allocation | None:
        """Return what an instance held until now; None for one that did not count."""
        allocation = self._allocations.pop(id, None)
        if allocation is None:
            return None
        on = self._on[allocation.node]
        on.discard(id)
        if not on:
            del self._on[allocation.node]
        self._ending.pop(id, None)
        for port in allocation.host_ports:
            self._on_port[port] -= Counter({allocation.node: 1})
            if not self._on_port[port]:
                del self._on_port[port]
        self._repel_no_more(allocation)
        self._priorities[allocation.priority] -= 1
        self._use(allocation, -1)
        return allocation

    def _repel_no_more(self, allocation: Allocation) -> None:
        for owner, label in allocation.avoids:
            groups = self._repelled[owner]
            labels = groups[allocation.group]
            labels[label] -= 1
            if not labels[label]:
                del labels[label]
            if not labels:
                del groups[allocation.group]
            if not groups:
                del self._repelled[owner]

    def _use(self, allocation: Allocation, sign: int) -> None:
        project = project_of_group(allocation.group)
        use = self._project_use.setdefault(project, [0] * 5)
        cpu, memory, disk, gpu = allocation.amounts
        use[0] += sign * cpu
        use[1] += sign * memory
        use[2] += sign * disk
        use[3] += sign * gpu
        use[4] += sign
        if not use[4]:
            del self._project_use[project]

    def on(self, node: str) -> Iterator[tuple[str, Allocation]]:
        """Yield what is allocated on a node, by id, in no order."""
        for id in self._on.get(node, ()):
            yield id, self._allocations[id]

    def holds_any(self, node: str) -> bool:
        return node in self._on

    def holdings_on(self, node: str, but: Container[str] = ()) -> Iterator[Holding]:
        """Yield what instances hold of a node's devices, those in `but` left out, in no order."""
        for id, held in self.on(node):
            if (held.gpus or held.gpu is not None) and id not in but:
                yield Holding(id, held.gpus, held.gpu)

    def nodes_with_port(self, port: str) -> Iterable[str]:
        """Return the nodes on which an instance has `port`."""
        return self._on_port.get(port, ())

    def ending(self) -> Iterator[tuple[str, Allocation, float]]:
        """Yield what will end, and when, in no order."""
        for id, at in self._ending.items():
            yield id, self._allocations[id], at

    @property
    def ends_any(self) -> bool:
        return bool(self._ending)

    def lowest_priority(self) -> int | None:
        """Return the lowest priority of all that is placed."""
        return min((priority for priority, count in self._priorities.items() if count > 0), default=None)

    def holds_below(self, node: str, priority: int) -> bool:
        """Return whether a node has something of a lower priority."""
        return any(self._allocations[id].priority < priority for id in self._on.get(node, ()))

    def project_use(self, project: str) -> list[int]:
        """Return what a project's instances hold: cpu, memory, disk, GPUs, and how many they are."""
        return self._project_use.get(project, [0] * 5)

    def repelling(self, owner: str) -> dict[str, dict[str, int]] | None:
        """Return the groups that `owner` must stay away from by their wish, each with the labels that say what near is."""
        return self._repelled.get(owner)
