"""Gangs: equal instances that are placed all at once or not at all, and where the spec says so all in one place.

Nothing is held while a gang waits, so two gangs cannot wait for each other. The place is the best one, by its best node, of those
that hold all of it; `together = "nvlink"` is one node on which every two of all their devices are joined.
"""

from __future__ import annotations

import numpy as np
from msgspec import structs

from atoll.model.records import Rejection
from atoll.model.spec import NVLINK, Gpu, GpuTopology
from atoll.scheduling.demand import Demand
from atoll.scheduling.explain import reject
from atoll.scheduling.groups import owner_of_group
from atoll.scheduling.interface import View
from atoll.scheduling.placing import Grants, allowed, choose_rows, put
from atoll.scheduling.ranking import Ranking
from atoll.scheduling.scores import DOMAIN_SCORE
from atoll.scheduling.snapshot import Bools

CODE = "no-gang"
PLACES_MAX = 512
"""Places that are tried where rules about other instances make their room uncertain, the best first."""


def place_gang(view: View, group: str, demand: Demand, count: int) -> list[tuple[int, Grants]]:
    """Put `count` equal instances on `view`, and return the row and the devices of each; none of them where not all fit."""
    rows = choose_gang(view, group, demand, count)
    if not rows:
        return []
    return _put_joined(view, group, demand, rows) if _is_joined(demand) else put(view, group, demand, rows)


def choose_gang(view: View, group: str, demand: Demand, count: int) -> list[int]:
    """Return the rows that `count` equal instances would go to, none where not all fit; the view is left as it is."""
    label = demand.together
    if label is None:
        rows = choose_rows(view, group, demand, count)
        return rows if len(rows) == count else []
    column = view.nodes.label(label)
    for place in _places(view, group, demand, count, label)[0][:PLACES_MAX]:
        rows = choose_rows(view, group, demand, count, column == place)
        if len(rows) == count:
            return rows
    return []


def reject_gang(view: View, group: str, demand: Demand, count: int) -> Rejection:
    """Return why `count` do not fit at once: how many would, and why the next one does not."""
    rows, where = _most(view, group, demand, count)
    trial = view.fork()
    if rows and _is_joined(demand):
        _put_joined(trial, group, demand, rows)
    elif rows:
        put(trial, group, demand, rows)
    why = reject(trial, group, demand)
    total = int(view.nodes.present[: view.size].sum())
    rest = total - sum(why.failed.values())
    failed = {**why.failed, **({"together": why.failed.get("together", 0) + rest} if rest else {})}
    if count == 1 and not rest:
        return why
    parts = [why.message] if why.failed or not total else []
    if rest and demand.gpu is not None and _is_joined(demand):
        parts.append(f"{rest} without {count * int(demand.gpu.count)} free GPUs that are all joined by NVLink")
    most = str(len(rows)) if rows else "none"
    text = f"{count} go together or not at all, and {most} would fit{where}"
    mend = f"; or ask for at most {len(rows)} at once" if rows else ""
    return Rejection(
        code=CODE,
        message=": ".join([text, "; ".join(parts)] if parts else [text]),
        mend=f"{why.mend}{mend}".strip("; "),
        failed=failed,
    )


def _places(view: View, group: str, demand: Demand, count: int, label: str) -> tuple[list[int], dict[int, int]]:
    """Return the places that may hold `count`, best first, and how many each place that takes any has room for at most."""
    loose, _, _ = allowed(view, group, demand, count)
    mask, room, _ = allowed(view, group, demand, 1)
    if _is_joined(demand):
        mask = mask & _joinable(view, group, demand, count)
    column = view.nodes.label(label)
    there = np.flatnonzero(loose & (column >= 0))
    rooms = np.bincount(column[there], weights=np.minimum(room[there], count)).astype(np.int64)
    rows = np.flatnonzero(mask & (column >= 0))
    if not len(rows):
        return [], {}
    ranking = Ranking(view, group, demand, room)
    scores = ranking.totals(rows, np.zeros(len(rows), dtype=np.int64))
    by = DOMAIN_SCORE.label(demand)
    if by is not None:
        domains = ranking.domains(by)
        scores = scores + np.array([domains.score(domain) for domain in domains.of[rows].tolist()], dtype=np.int64)
    order = column[rows[np.lexsort((view.nodes.ranks()[rows], -scores))]]
    _, first = np.unique(order, return_index=True)
    places = order[np.sort(first)]
    return places[rooms[places] >= count].tolist(), {place: int(rooms[place]) for place in places.tolist()}


def _most(view: View, group: str, demand: Demand, count: int) -> tuple[list[int], str]:
    """Return rows for as many as would fit at once, and in words which place that is."""
    label = demand.together
    if label is None:
        return choose_rows(view, group, demand, count), ""
    column = view.nodes.label(label)
    best: list[int] = []
    if _is_joined(demand):
        low, high = 0, count - 1
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if _places(view, group, demand, middle, label)[0] else (low, middle - 1)
        if low:
            best = choose_rows(view, group, demand, low, column == _places(view, group, demand, low, label)[0][0])
    else:
        rooms = _places(view, group, demand, count, label)[1]
        for place in sorted(rooms, key=lambda place: -rooms[place])[:PLACES_MAX]:
            if rooms[place] <= len(best):
                break
            rows = choose_rows(view, group, demand, count, column == place)
            best = rows if len(rows) > len(best) else best
    return best, f" on {view.nodes.names[best[0]] if label == 'node' else f'one {label}'}" if best else ""


def _is_joined(demand: Demand) -> bool:
    return demand.placement.together == NVLINK


def _whole(demand: Demand, count: int) -> Gpu:
    """Return all devices of `count` instances as one wish."""
    gpu = demand.gpu or Gpu()
    return structs.replace(gpu, count=float(count * max(1, int(gpu.count))), topology=GpuTopology.NVLINK)


def _held(view: View, owner: str, row: int) -> frozenset[str]:
    """Return the devices of a row that others of the gang hold already."""
    there = view.nodes.allocations_on(view.nodes.names[row])
    return frozenset(grant.device for _, held in there if owner_of_group(held.group) == owner for grant in held.gpus)


def _joinable(view: View, group: str, demand: Demand, count: int) -> Bools:
    """Return the rows that have joined devices for all of `count`, joined to those of the ones that run there, too."""
    wish, owner = _whole(demand, count), owner_of_group(group)
    mask: Bools = view.devices.room(wish) > 0
    for row in np.flatnonzero(view.owner_counts(owner) > 0).tolist():
        mask[row] = view.devices.joined(row, wish, _held(view, owner, row)) is not None
    return mask


def _put_joined(view: View, group: str, demand: Demand, rows: list[int]) -> list[tuple[int, Grants]]:
    """Put instances on one row, with devices that are all joined."""
    row = rows[0]
    grants = view.devices.joined(row, _whole(demand, len(rows)), _held(view, owner_of_group(group), row)) or ()
    view.place(group, demand, (row,), (len(rows),))
    view.devices.hold(row, grants)
    each = len(grants) // len(rows)
    return [(row, grants[index * each : (index + 1) * each]) for index in range(len(rows))]
