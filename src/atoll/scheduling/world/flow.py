"""Which demand goes to which site: the cheapest assignment within the sites' capacities, kept optimal change by change.

Arrays are shared by all functions here. `cost[p, s]` is what one unit of place `p`'s demand costs at site `s`; `x[s, p]` is how
much of it goes there; `capacity[s]` and `load[s]` are in units of demand. The last site stands for "served nowhere": it has
room for everything at a cost above every other. A unit of demand moves along a chain of sites (from a full one to the next, which
hands on something of its own), and `hop[s, t]` is the least that handing one unit from `s` to `t` costs, by the place `via[s, t]`.
Each change sends demand along the cheapest chain first, so that the assignment stays optimal (successive shortest paths:
Ahuja, Magnanti, Orlin, Network Flows, 1993, chapter 9).
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from atoll.scheduling.compiled import compiled

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

EPSILON = 1e-9
"""Amounts and gains below this are rounding."""


@compiled
def renew_hops(s: int, cost: Floats, x: Floats, open_sites: Ints, hop: Floats, via: Ints) -> None:
    """Compute again what site `s` can hand on to the open sites, after its share of demand has changed."""
    for t in open_sites:
        hop[s, t] = np.inf
        via[s, t] = -1
    for p in range(x.shape[1]):
        if x[s, p] > EPSILON:
            here = cost[p, s]
            for t in open_sites:
                step = cost[p, t] - here
                if step < hop[s, t]:
                    hop[s, t] = step
                    via[s, t] = p
    hop[s, s] = np.inf


@compiled
def learn(s: int, p: int, cost: Floats, open_sites: Ints, hop: Floats, via: Ints) -> None:
    """Take into the hops of site `s` that it now has something of place `p`."""
    here = cost[p, s]
    for t in open_sites:
        step = cost[p, t] - here
        if t != s and (step < hop[s, t] or (step == hop[s, t] and p < via[s, t])):
            hop[s, t] = step
            via[s, t] = p


@compiled
def forget(s: int, p: int, cost: Floats, x: Floats, open_sites: Ints, hop: Floats, via: Ints) -> None:
    """Take into the hops of site `s` that it has nothing of place `p` any more."""
    for t in open_sites:
        if t != s and via[s, t] == p:
            hop[s, t] = np.inf
            via[s, t] = -1
            for q in range(x.shape[1]):
                if x[s, q] > EPSILON and cost[q, t] - cost[q, s] < hop[s, t]:
                    hop[s, t] = cost[q, t] - cost[q, s]
                    via[s, t] = q


@compiled
def shortest_from(start: Floats, open_sites: Ints, hop: Floats, best: Floats, before: Ints) -> None:
    """Fill `best` with the least cost of reaching each open site when entering at `s` costs `start[s]`; `before` is the way."""
    count = open_sites.shape[0]
    for i in range(count):
        best[open_sites[i]] = start[open_sites[i]]
        before[open_sites[i]] = -1
    for _ in range(count):
        changed = False
        for i in range(count):
            s = open_sites[i]
            reach = best[s]
            if reach == np.inf:
                continue
            for j in range(count):
                t = open_sites[j]
                if reach + hop[s, t] < best[t] - EPSILON:
                    best[t] = reach + hop[s, t]
                    before[t] = s
                    changed = True
        if not changed:
            return


@compiled
def send(
    end: int,
    limit: float,
    cost: Floats,
    x: Floats,
    open_sites: Ints,
    load: Floats,
    hop: Floats,
    via: Ints,
    before: Ints,
) -> float:
    """Send up to `limit` along the chain that ends at site `end`, and return how much it was. The start's load is the caller's."""
    amount = limit
    t = end
    steps = 0
    while before[t] >= 0 and steps <= x.shape[0]:
        amount = min(amount, x[before[t], via[before[t], t]])
        t = before[t]
        steps += 1
    t = end
    steps = 0
    while before[t] >= 0 and steps <= x.shape[0]:
        # Backwards: what a step changes in the hops of its two ends, no later step uses.
        s = before[t]
        p = via[s, t]
        x[s, p] -= amount
        if x[s, p] < EPSILON:
            x[s, p] = 0.0
            forget(s, p, cost, x, open_sites, hop, via)
        x[t, p] += amount
        learn(t, p, cost, open_sites, hop, via)
        t = s
        steps += 1
    load[end] += amount
    return amount


@compiled
def opened(capacity: Floats) -> Ints:
    """Return the sites with any capacity."""
    return np.flatnonzero(capacity > 0.0)


@compiled
def assign(cost: Floats, demand: Floats, capacity: Floats, x: Floats, load: Floats, hop: Floats, via: Ints) -> None:
    """Assign all demand from nothing, optimally. All outputs are overwritten."""
    sites = capacity.shape[0]
    x[:] = 0.0
    load[:] = 0.0
    open_sites = opened(capacity)
    for s in open_sites:
        renew_hops(s, cost, x, open_sites, hop, via)
    best = np.full(sites, np.inf)
    before = np.full(sites, -1)
    start = np.full(sites, np.inf)
    for p in range(demand.shape[0]):
        left = demand[p]
        while left > EPSILON:
            nearest = open_sites[0]
            for s in open_sites:
                start[s] = cost[p, s]
                if cost[p, s] < cost[p, nearest]:
                    nearest = s
            if capacity[nearest] - load[nearest] > EPSILON:
                before[nearest] = -1
                amount = min(left, capacity[nearest] - load[nearest])
                load[nearest] += amount
                x[nearest, p] += amount
                renew_hops(nearest, cost, x, open_sites, hop, via)
                left -= amount
                continue
            shortest_from(start, open_sites, hop, best, before)
            end = -1
            for s in open_sites:
                if capacity[s] - load[s] > EPSILON and (end < 0 or best[s] < best[end]):
                    end = s
            first = end
            while before[first] >= 0:
                first = before[first]
            # It enters at `first`; what that site hands on leaves from there in the same step.
            x[first, p] += left
            amount = send(end, min(left, capacity[end] - load[end]), cost, x, open_sites, load, hop, via, before)
            x[first, p] -= left - amount
            if x[first, p] < EPSILON:
                x[first, p] = 0.0
            renew_hops(first, cost, x, open_sites, hop, via)
            left -= amount


@compiled
def take_in(site: int, cost: Floats, x: Floats, capacity: Floats, load: Floats, hop: Floats, via: Ints, open_sites: Ints) -> None:
    """Fill new capacity at `site`: chains that end there, the greatest saving first, until none saves anything."""
    sites = capacity.shape[0]
    best = np.full(sites, np.inf)
    before = np.full(sites, -1)
    for s in open_sites:
        renew_hops(s, cost, x, open_sites, hop, via)
    start = np.full(sites, np.inf)
    while capacity[site] - load[site] > EPSILON:
        for s in open_sites:
            start[s] = 0.0 if s != site and load[s] > EPSILON else np.inf
        shortest_from(start, open_sites, hop, best, before)
        if not best[site] < -EPSILON:
            return
        first = site
        while before[first] >= 0:
            first = before[first]
        amount = send(site, capacity[site] - load[site], cost, x, open_sites, load, hop, via, before)
        load[first] -= amount
        if amount <= EPSILON:
            return


@compiled
def give_out(
    site: int,
    cost: Floats,
    x: Floats,
    capacity: Floats,
    load: Floats,
    hop: Floats,
    via: Ints,
    open_sites: Ints,
    budget: float,
    step: Floats,
) -> bool:
    """Send away what `site` holds beyond its capacity, by the cheapest chains; False (and half done) if that costs over `budget`.

    `step[p]` is the least that a unit of place p's demand costs which leaves the site; zeros say nothing.
    """
    sites = capacity.shape[0]
    best = np.full(sites, np.inf)
    before = np.full(sites, -1)
    start = np.full(sites, np.inf)
    for s in open_sites:
        renew_hops(s, cost, x, open_sites, hop, via)
    start[site] = 0.0
    while load[site] - capacity[site] > EPSILON:
        shortest_from(start, open_sites, hop, best, before)
        end = -1
        for s in open_sites:
            if s != site and capacity[s] - load[s] > EPSILON and (end < 0 or best[s] < best[end]):
                end = s
        # Chains only get dearer.
        floor = best[end] * (load[site] - capacity[site])
        if capacity[site] <= 0.0:
            for p in range(x.shape[1]):
                if x[site, p] > 0.0 and step[p] > best[end]:
                    floor += x[site, p] * (step[p] - best[end])
        if floor > budget:
            return False
        limit = min(load[site] - capacity[site], capacity[end] - load[end])
        amount = send(end, limit, cost, x, open_sites, load, hop, via, before)
        load[site] -= amount
        budget -= best[end] * amount
        if amount <= EPSILON:
            return False
    return budget >= 0.0


@compiled
def prices(capacity: Floats, load: Floats, hop: Floats, open_sites: Ints) -> Floats:
    """Return what one more unit of capacity at each open site would save (0 where there is room); infinite at closed ones.

    These are the optimal dual prices: the cheapest chain from a site to one with room, over which a unit can leave.
    """
    sites = capacity.shape[0]
    answer = np.full(sites, np.inf)
    for s in open_sites:
        answer[s] = 0.0 if capacity[s] - load[s] > EPSILON else np.inf
    for _ in range(open_sites.shape[0]):
        changed = False
        for s in open_sites:
            for t in open_sites:
                if hop[s, t] + answer[t] < answer[s] - EPSILON:
                    answer[s] = hop[s, t] + answer[t]
                    changed = True
        if not changed:
            break
    return answer


@compiled
def total_cost(cost: Floats, x: Floats) -> float:
    total = 0.0
    for s in range(x.shape[0]):
        for p in range(x.shape[1]):
            if x[s, p] > 0.0:
                total += x[s, p] * cost[p, s]
    return total
