"""`choose`: how many replicas each site gets, and which demand goes where.

    minimise   sum of flow * latency_ms  +  sum of replicas * cost  +  move_cost * replicas that leave their site
    such that  all demand is served (or counted as unserved, which costs more than anything)
               a site serves at most replicas * replica_capacity
               a site has at most `room` replicas; there are `count` of them
               a place is never served from a site that its rules forbid

It is a capacitated p-median problem with splittable demand. The answer is a local optimum of single swaps, found as `search` says.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from msgspec import Struct

from atoll.model.errors import Invalid
from atoll.scheduling.world.flow import EPSILON, Floats, Ints
from atoll.scheduling.world.search import greedy, improve

PLACES_MAX = 2_000
SITES_MAX = 2_000
COUNT_MAX = 100_000
WIDTH = 24
"""Openings tried before the search ends."""
UNSERVED_FACTOR = 100.0
"""How many times the dearest way of serving it unserved demand costs."""
_NUMBER_MAX = 1e12


class Problem(Struct, frozen=True, kw_only=True):
    """Places with demand, sites with room, and what may serve what. Units: demand in requests/s (any, if one throughout)."""

    latency_ms: Floats
    """(places, sites)."""
    demand: Floats
    room: Ints
    """Replicas that each site can take."""
    count: int
    """Replicas wanted; fewer are placed where there is no room."""
    replica_capacity: float
    """Demand that one replica serves."""
    site_cost: Floats | None = None
    """What a replica at each site costs, in demand * ms: what it must save to be worth it."""
    latency_ms_max: float = math.inf
    """A hard rule: no demand is served from farther away."""
    allowed: np.ndarray[tuple[int, int], np.dtype[np.bool_]] | None = None
    """(places, sites); false where data residency forbids it. A hard rule."""
    move_cost: float = 0.0
    """What a replica that leaves its site must gain, in demand * ms."""


class Choice(Struct, frozen=True, kw_only=True):
    """`flow[p, s]` is how much of place p's demand site s serves."""

    replicas: Ints
    flow: Floats
    unserved: float
    latency_ms: float
    """Mean over the demand that is served."""
    cost: float
    """What was minimised, but for what moving cost and for unserved demand."""
    moved: int
    """Replicas that left their site."""
    swaps: int


def choose(problem: Problem, current: Sequence[int] | Ints | None = None, *, width: int = WIDTH) -> Choice:
    """Return where the replicas should be, beginning from `current` (replicas by site) where there is one.

    The same input gives the same answer. With a `move_cost` above 0, an answer that is given back as `current` stays as it is.
    Raises Invalid for arrays that do not fit each other, and for numbers that are negative, huge or not numbers.
    """
    check(problem)
    places, sites = problem.latency_ms.shape
    permitted = problem.latency_ms <= problem.latency_ms_max
    if problem.allowed is not None:
        permitted &= problem.allowed
    finite = problem.latency_ms[permitted]
    unserved_cost = UNSERVED_FACTOR * (1.0 + float(finite.max(initial=0.0)))
    # What no place may use serves nobody: it never gets a replica.
    room = np.where(permitted.any(axis=0), problem.room, 0).astype(np.int64)
    cost = np.full((places, sites + 1), unserved_cost)
    cost[:, :sites] = np.where(permitted, problem.latency_ms, np.inf)
    fixed = np.zeros(sites) if problem.site_cost is None else np.asarray(problem.site_cost, dtype=np.float64)
    before = np.zeros(sites, dtype=np.int64)
    replicas = np.zeros(sites, dtype=np.int64)
    if current is not None:
        before = np.asarray(current, dtype=np.int64).copy()
        if before.shape != (sites,) or (before < 0).any():
            raise Invalid(f"current: one number of replicas, 0 or more, for each of {sites} sites", field="current")
        replicas = np.minimum(before, room)
        _shrink(replicas, problem.count)
    demand = np.ascontiguousarray(problem.demand, dtype=np.float64)
    size = float(problem.replica_capacity)
    greedy(cost, demand, size, room, fixed, replicas, problem.count)
    move = problem.move_cost if current is not None else 0.0
    x, swaps = improve(cost, demand, size, room, fixed, replicas, before, move, width)
    flow = np.ascontiguousarray(x[:sites].T)
    served = float(flow.sum())
    weighted = float((flow * np.where(permitted, problem.latency_ms, 0.0)).sum())
    return Choice(
        replicas=replicas,
        flow=flow,
        unserved=float(x[sites].sum()),
        latency_ms=weighted / served if served > EPSILON else 0.0,
        cost=weighted + float((fixed * replicas).sum()),
        moved=int(np.maximum(before - replicas, 0).sum()),
        swaps=int(swaps),
    )


def preferred(regions: Sequence[str], listed: Sequence[str], latency_ms: Floats, demand: Floats) -> Floats:
    """Return a site cost that makes `listed` regions come before the others, in order, wherever there is room.

    `regions` is each site's; `any` among the listed stands for all that are not. A later region costs more than any latency
    could make good.
    """
    fallback = listed.index("any") if "any" in listed else len(listed)
    step = float(latency_ms[np.isfinite(latency_ms)].max(initial=0.0) + 1.0) * float(demand.sum() + 1.0)
    return np.array([step * (listed.index(region) if region in listed else fallback) for region in regions])


def check(problem: Problem) -> None:
    """Raise Invalid for a problem that is none."""
    latency = problem.latency_ms
    if latency.ndim != 2 or latency.shape[0] > PLACES_MAX or latency.shape[1] > SITES_MAX:
        raise Invalid(f"latency_ms: at most {PLACES_MAX} places by {SITES_MAX} sites", field="latency_ms")
    places, sites = latency.shape
    shapes = [("demand", problem.demand, (places,)), ("room", problem.room, (sites,))]
    if problem.site_cost is not None:
        shapes.append(("site_cost", problem.site_cost, (sites,)))
    for name, array, shape in [*shapes, ("latency_ms", latency, latency.shape)]:
        if array.shape != shape:
            raise Invalid(f"{name}: expected shape {shape}, got {array.shape}", field=name)
        if not (np.isfinite(array).all() and (array >= 0).all() and (array <= _NUMBER_MAX).all()):
            raise Invalid(f"{name}: numbers from 0 to {_NUMBER_MAX:g} are wanted", field=name)
    if problem.allowed is not None and problem.allowed.shape != latency.shape:
        raise Invalid(f"allowed: expected shape {latency.shape}, got {problem.allowed.shape}", field="allowed")
    if not 0 <= problem.count <= COUNT_MAX:
        raise Invalid(f"count: from 0 to {COUNT_MAX}, got {problem.count}", field="count")
    for name, value in (("replica_capacity", problem.replica_capacity), ("move_cost", problem.move_cost)):
        if not 0 <= value <= _NUMBER_MAX:
            raise Invalid(f"{name}: a number from 0 to {_NUMBER_MAX:g} is wanted, got {value}", field=name)
    if problem.replica_capacity <= 0:
        raise Invalid("replica_capacity: must be above 0", field="replica_capacity")
    if not problem.latency_ms_max >= 0:
        raise Invalid("latency_ms_max: must be 0 or more", field="latency_ms_max")


def _shrink(replicas: Ints, count: int) -> None:
    """Take replicas away until there are `count`: from where there are most, the last such site first."""
    while replicas.sum() > count:
        most = np.flatnonzero(replicas == replicas.max())
        replicas[most[-1]] -= 1
