"""How many instances each site should have for an app that is near its users. Pure: a question of arrays, an answer of numbers.

Two ways to answer: `quick` adds one by one where it saves most, at once and without a compiler; `world.choose` goes on from there
with swaps that are judged exactly (docs/placement.md). A replica is taken to serve `SLACK` times its even part of the requests.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from msgspec import Struct

from atoll.model.spec import ANY
from atoll.scheduling.demand import Demand
from atoll.scheduling.geography import Floats
from atoll.scheduling.groups import owner_of_group
from atoll.scheduling.interface import View
from atoll.scheduling.near import FAR_MS, bound_ms, site_names, sites_within, user_ms
from atoll.scheduling.placing import allowed
from atoll.scheduling.ranking import static_mask
from atoll.scheduling.snapshot import Bools, Ints
from atoll.scheduling.whereabouts import Layout

SLACK = 1.25
MOVE_MS = 5.0
"""What the requests of one replica must gain each, on average, for it to be worth moving."""
STEPS_MAX, STEPS_MIN = 64, 16
"""Steps of `quick`: of many replicas several are added at a time."""
PAIRS_MAX = 2_000_000
"""Pairs of a place and a site that are looked at in all steps together; with more, several replicas are added at a time."""
SITES_MAX = 2_000
COUNT_MAX = 100_000
UNSERVED_FACTOR = 100.0
"""As in `world.choose`."""


class Question(Struct, frozen=True, kw_only=True):
    """Sites that may have instances, and places with users. Requests are shares of all: they add up to 1."""

    sites: tuple[str, ...]
    latency_ms: Floats
    """(places, sites); `FAR_MS` where nobody knows."""
    demand: Floats
    room: Ints
    """How many each site can have, those that it has among them."""
    count: int
    current: Ints
    """How many each has."""
    site_cost: Floats
    """Above 0 for regions that are not the first choice."""
    latency_ms_max: float
    move_cost: float

    @property
    def replica_capacity(self) -> float:
        return SLACK * float(self.demand.sum()) / max(1, self.count)


def ask(view: View, group: str, demand: Demand, count: int, current: Mapping[str, int]) -> Question | None:
    """Return the question for `count` instances, of which `current` says how many each site has; None without users or sites.

    Of what runs, only that counts as staying which every rule still allows.
    """
    found, names = user_ms(view, group), site_names(view)
    if found is None or not 0 < count <= COUNT_MAX:
        return None
    ms, shares = found
    mask, room, _ = allowed(view, group, demand)
    column = view.nodes.label("site")
    rooms = np.bincount(column[mask], weights=np.minimum(room[mask], count), minlength=len(names)).astype(np.int64)
    stays = _stays(view, group, demand)
    now = np.array([current.get(name, 0) for name in names], dtype=np.int64)
    rooms = np.minimum(rooms + np.where(stays, now, 0), count)
    at = sorted(np.flatnonzero((rooms > 0) | (now > 0)).tolist(), key=lambda place: names[place])
    if not 0 < len(at) <= SITES_MAX:
        return None
    latency = np.minimum(ms[:, at], FAR_MS)
    return Question(
        sites=tuple(names[place] for place in at),
        latency_ms=latency,
        demand=shares,
        room=rooms[at],
        count=count,
        current=now[at],
        site_cost=_region_costs(view, demand, at, latency, shares),
        latency_ms_max=bound_ms(demand),
        move_cost=MOVE_MS * float(shares.sum()) / count,
    )


def quick(question: Question) -> list[int]:
    """Return replicas by site: those that there are, as far as they may stay, and the missing ones each where it saves most.

    Nothing is moved. The same question gives the same answer, in time that grows with sites, places and `STEPS_MAX`.
    """
    cost = np.where(question.latency_ms <= question.latency_ms_max, question.latency_ms, np.inf)
    room = np.where(np.isfinite(cost).any(axis=0), question.room, 0)
    replicas = np.minimum(question.current, room)
    while replicas.sum() > question.count:
        replicas[np.flatnonzero(replicas == replicas.max())[-1]] -= 1
    missing = int(min(question.count, room.sum()) - replicas.sum())
    finite = cost[np.isfinite(cost)]
    unserved = UNSERVED_FACTOR * (1.0 + float(finite.max(initial=0.0)))
    at_once = max(1, missing // min(STEPS_MAX, max(STEPS_MIN, PAIRS_MAX // cost.size)))
    open_ = np.flatnonzero(room > 0)
    ways = cost[:, open_]
    while missing > 0:
        # A few serve more each than many will: what comes first has its place in the middle of more.
        size = SLACK * float(question.demand.sum()) / min(question.count, int(replicas.sum()) + at_once)
        flow = _nearest_flow(question, replicas.tolist(), size)
        # What each place's requests cost on average; what nobody serves costs more than anything.
        left = np.maximum(question.demand - flow.sum(axis=1), 0.0)
        paid = ((flow * np.where(flow > 0, question.latency_ms, 0.0)).sum(axis=1) + left * unserved) / question.demand
        saves = np.clip(paid[:, None] - ways, 0.0, None)
        order = np.argsort(-saves, axis=0, kind="stable")
        many = np.minimum((room - replicas)[open_], min(at_once, missing))
        demand = question.demand[order]
        taken = np.clip(size * many[None, :] - (np.cumsum(demand, axis=0) - demand), 0.0, demand)
        gain = (taken * np.take_along_axis(saves, order, axis=0)).sum(axis=0) - question.site_cost[open_] * many
        best = int(np.where(many > 0, gain / np.maximum(many, 1), -np.inf).argmax())
        replicas[open_[best]] += many[best]
        missing -= int(many[best])
    answer: list[int] = replicas.tolist()
    return answer


def layout_of(question: Question, replicas: Sequence[int], flow: Floats | None = None) -> Layout:
    """Return the layout that `replicas` by site make. `flow` (places, sites) says who serves whom; without it, the nearest with
    room left, place by place."""
    served = _nearest_flow(question, replicas, question.replica_capacity) if flow is None else flow
    total, all_demand = float(served.sum()), float(question.demand.sum())
    weighted = float((served * np.where(served > 0, question.latency_ms, 0.0)).sum())
    return Layout(
        wanted={site: int(count) for site, count in zip(question.sites, replicas, strict=True) if count},
        latency_ms=round(weighted / total, 3) if total > 1e-9 else 0.0,
        unserved=round(max(0.0, 1.0 - total / all_demand), 6) if all_demand else 0.0,
    )


def lay_out(view: View, group: str, demand: Demand, count: int, current: Mapping[str, int]) -> Layout | None:
    """Return a layout at once; None where nothing is known of users, or nothing has room."""
    question = ask(view, group, demand, count, current)
    return layout_of(question, quick(question)) if question is not None else None


def sites_of(view: View, group: str) -> dict[str, int]:
    """Return how many instances of the group's owner each site has."""
    counts, column, names = view.owner_counts(owner_of_group(group)), view.nodes.label("site"), site_names(view)
    there = np.flatnonzero((counts > 0) & (column >= 0))
    found: dict[str, int] = {}
    for row in there.tolist():
        name = names[column[row]]
        found[name] = found.get(name, 0) + int(counts[row])
    return found


def _stays(view: View, group: str, demand: Demand) -> Bools:
    """Return the sites with a node that the facts allow and that are within the bound."""
    stays = np.zeros(len(site_names(view)), dtype=np.bool_)
    column = view.nodes.label("site")
    stays[np.unique(column[static_mask(view, demand)])] = True
    within = sites_within(view, group, demand)
    return stays if within is None else stays & within


def _region_costs(view: View, demand: Demand, sites: Sequence[int], latency_ms: Floats, shares: Floats) -> Floats:
    """Return costs by which an earlier region comes before any later one, whatever the latency."""
    listed = demand.placement.regions
    if len(listed) < 2:
        return np.zeros(len(sites))
    names = list(view.nodes.values("region"))
    region, site = view.nodes.label("region"), np.where(view.nodes.present[: view.size], view.nodes.label("site"), -1)
    ids, rows = np.unique(site, return_index=True)
    region_of = {id: names[region[row]] for id, row in zip(ids.tolist(), rows.tolist(), strict=True)}
    fallback = listed.index(ANY) if ANY in listed else len(listed)
    step = (float(latency_ms.max(initial=0.0)) + 1.0) * float(shares.sum() + 1.0)
    places = [region_of.get(site, "") for site in sites]
    return np.array([step * (listed.index(region) if region in listed else fallback) for region in places], dtype=np.float64)


def _nearest_flow(question: Question, replicas: Sequence[int], size: float) -> Floats:
    """Return (places, sites) who serves whom when the shortest ways are taken first, each replica serving up to `size`."""
    flow, left = np.zeros_like(question.latency_ms), question.demand.copy()
    there = np.flatnonzero(replicas)
    free = np.asarray(replicas, dtype=np.float64) * size
    ways = question.latency_ms[:, there]
    order = np.argsort(ways, axis=None, kind="stable")
    for place, column in zip(*(part.tolist() for part in np.unravel_index(order, ways.shape)), strict=True):
        site = int(there[column])
        if left[place] <= 0.0 or free[site] <= 0.0:
            continue
        if ways[place, column] > question.latency_ms_max:
            break
        amount = min(float(left[place]), float(free[site]))
        flow[place, site] = amount
        left[place] -= amount
        free[site] -= amount
    return flow
