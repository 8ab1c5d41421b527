"""Fair shares between projects: among pending of equal priority, whose project holds least of what it holds most of goes first.

Dominant resource fairness (Ghodsi et al., NSDI 2011): a project's share is the largest of its parts of all cpu, memory and GPUs,
divided by its weight. Within a project, and where only one has something pending, older ones go first as ever.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Iterable, Iterator

from atoll.scheduling.demand import Demand, Pending
from atoll.scheduling.groups import project_of_group
from atoll.scheduling.interface import View
from atoll.scheduling.snapshot import CPU, GPU, MEMORY, amounts_of

TURNS = 16
"""A project with many pending takes at most about so many turns in one plan: each is placed in bulk. With up to twice as many
pending it is one by one."""
Class = list[Pending]
_COUNTED = (CPU, MEMORY, GPU)
_WORDS = {CPU: "cpu", MEMORY: "memory", GPU: "GPUs"}


class Shares:
    """What each project holds of all there is, placed by a plan or before it."""

    def __init__(self, view: View) -> None:
        nodes = view.nodes
        totals = nodes.total[:, : view.size].sum(axis=1).tolist()
        self._nodes = nodes
        self._totals = {resource: totals[resource] for resource in _COUNTED if totals[resource] > 0}
        self._use: dict[str, list[int]] = {}

    def of(self, project: str, amounts: tuple[int, ...] = (0, 0, 0, 0), count: int = 0) -> float:
        """Return the share, once the project holds `count` more of `amounts`."""
        use = self._held(project)
        quota = self._nodes.quotas.get(project)
        weight = quota.weight if quota is not None else 1
        return max(((use[r] + count * amounts[r]) / total for r, total in self._totals.items()), default=0.0) / weight

    def add(self, project: str, amounts: tuple[int, ...], count: int) -> None:
        use = self._held(project)
        for resource in _COUNTED:
            use[resource] += amounts[resource] * count

    def words(self, project: str) -> str:
        """Return the share in words; empty for a project that holds nothing."""
        use = self._held(project)
        part, resource = max(((use[r] / total, r) for r, total in self._totals.items()), default=(0.0, CPU))
        return f"project '{project}' holds {part:.1%} of all {_WORDS[resource]}" if part else ""

    def _held(self, project: str) -> list[int]:
        use = self._use.get(project)
        if use is None:
            use = self._use[project] = list(self._nodes.project_use(project))
        return use


class Turns:
    """Classes in the order in which they are placed. Say what was placed of each before the next is asked for."""

    def __init__(self, view: View, classes: Iterable[Class]) -> None:
        self._levels = list(_levels(classes))
        self._shares = Shares(view) if any(len(level) > 1 for level in self._levels) else None

    def placed(self, first: Pending, count: int) -> None:
        if self._shares is not None:
            self._shares.add(project_of_group(first.group), amounts_of(first.demand), count)

    def __iter__(self) -> Iterator[Class]:
        for level in self._levels:
            if len(level) > 1 and self._shares is not None:
                yield from _in_turn(level, self._shares)
            else:
                for classes in level.values():
                    yield from classes


def _levels(classes: Iterable[Class]) -> Iterator[dict[str, list[Class]]]:
    """Yield for each priority, highest first, its classes by project."""
    level: dict[str, list[Class]] = {}
    priority: int | None = None
    for members in classes:
        first = members[0]
        if first.demand.placement.priority != priority:
            if level:
                yield level
            level, priority = {}, first.demand.placement.priority
        level.setdefault(project_of_group(first.group), []).append(members)
    if level:
        yield level


def _in_turn(level: dict[str, list[Class]], shares: Shares) -> Iterator[Class]:
    queues = {project: deque(_joined(classes)) for project, classes in level.items()}
    least = {project: max(1, sum(map(len, queue)) // TURNS) for project, queue in queues.items()}
    heap = [(shares.of(project), queue[0][0].order, project) for project, queue in queues.items()]
    heapq.heapify(heap)
    while heap:
        project = heapq.heappop(heap)[2]
        queue = queues[project]
        members = queue.popleft()
        count = len(members)
        if heap and not members[0].demand.placement.gang:
            count = min(count, least[project])
            amounts = amounts_of(members[0].demand)
            other = heap[0][:2]
            while count < len(members) and (shares.of(project, amounts, count), members[count].order) < other:
                count += 1
            if count < len(members):
                queue.appendleft(members[count:])
        yield members[:count]
        if queue:
            heapq.heappush(heap, (shares.of(project), queue[0][0].order, project))


def _joined(classes: list[Class]) -> Iterator[Class]:
    """Yield a project's classes, equal neighbours as one: what stood between them was of another project."""
    last: Class = []
    for members in classes:
        if last and _same(last[0], members[0]):
            last.extend(members)
            continue
        if last:
            yield last
        last = list(members)
    if last:
        yield last


def _same(one: Pending, other: Pending) -> bool:
    demand: Demand = one.demand
    return not demand.placement.gang and one.group == other.group and one.ends_at == other.ends_at and demand == other.demand
