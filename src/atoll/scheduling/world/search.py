"""The search for where replicas should be: a greedy start by regret, then relocations and swaps, each judged by exact flow.

A swap opens one replica and closes another. Bounds from the prices of the assignment (`bounds`) say which cannot pay,
so that only few are tried; what is tried is assigned exactly, from the assignment before it. All is deterministic.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from atoll.scheduling.compiled import compiled
from atoll.scheduling.world.bounds import knapsack, least_loss, swap_bound, two_best
from atoll.scheduling.world.flow import (
    EPSILON,
    Floats,
    Ints,
    assign,
    give_out,
    opened,
    prices,
    renew_hops,
    take_in,
    total_cost,
)

TRIED_MAX = 4
"""Closings tried exactly for one opening, the most promising first."""


@compiled
def greedy(cost: Floats, demand: Floats, size: float, room: Ints, fixed: Floats, replicas: Ints, count: int) -> None:
    """Add to `replicas` until there are `count`: each where it saves most beside what its demand would cost elsewhere.

    What a place would cost elsewhere is its distance to about the number of sites that one replica stands for, so that
    lonely places are not left for last.
    """
    places, sites = cost.shape[0], cost.shape[1] - 1
    usable = 0
    for s in range(sites):
        usable += room[s] > 0
    rank = min(max(0, usable - 1), 2 * usable // max(1, count) + 1)
    regret = np.empty(places)
    for p in range(places):
        reach = np.sort(cost[p, :sites][room > 0])
        regret[p] = 0.0
        for i in range(rank + 1):
            if i < reach.shape[0] and reach[i] < np.inf:
                regret[p] = reach[i]
    left = demand.copy()
    order = np.empty((sites, places), dtype=np.int64)
    for s in range(sites):
        order[s] = np.argsort(cost[:, s])
    placed = 0
    for s in range(sites):
        take_nearest(s, cost, order, left, size * replicas[s])
        placed += replicas[s]
    for _ in range(count - placed):
        best, best_gain = -1, -np.inf
        for s in range(sites):
            if replicas[s] >= room[s]:
                continue
            gain, free = -fixed[s], size
            for p in order[s]:
                if free <= 0.0 or cost[p, s] == np.inf:
                    break
                taken = min(free, left[p])
                gain += taken * (regret[p] - cost[p, s])
                free -= taken
            if gain > best_gain:
                best, best_gain = s, gain
        if best < 0:
            return
        replicas[best] += 1
        take_nearest(best, cost, order, left, size)


@compiled
def take_nearest(s: int, cost: Floats, order: Ints, left: Floats, free: float) -> None:
    """Take the demand nearest to site `s` out of `left`."""
    for p in order[s]:
        if free <= 0.0 or cost[p, s] == np.inf:
            return
        taken = min(free, left[p])
        left[p] -= taken
        free -= taken


@compiled
def upkeep(replicas: Ints, fixed: Floats, before: Ints, move: float) -> float:
    """Return what replicas cost wherever demand comes from: their sites' cost, and that of moving those that left."""
    total = 0.0
    for s in range(replicas.shape[0]):
        total += fixed[s] * replicas[s] + move * max(0, before[s] - replicas[s])
    return total


@compiled
def open_one(
    b: int, size: float, cost: Floats, x: Floats, capacity: Floats, load: Floats, hop: Floats, via: Ints, replicas: Ints
) -> None:
    """Open one replica at `b` and keep the assignment optimal."""
    replicas[b] += 1
    capacity[b] = size * replicas[b]
    take_in(b, cost, x, capacity, load, hop, via, opened(capacity))


@compiled
def copy_rows(source: Floats, target: Floats, rows: Ints) -> None:
    for s in rows:
        target[s] = source[s]


@compiled
def close(
    a: int,
    size: float,
    cost: Floats,
    x: Floats,
    capacity: Floats,
    load: Floats,
    hop: Floats,
    via: Ints,
    replicas: Ints,
    budget: float,
    step: Floats,
) -> bool:
    """Close one replica at `a` and keep the assignment optimal; False, and the assignment broken, if that costs over `budget`."""
    replicas[a] -= 1
    open_sites = opened(capacity)
    capacity[a] = size * replicas[a]
    return give_out(a, cost, x, capacity, load, hop, via, open_sites, budget, step)


@compiled
def improve(
    cost: Floats, demand: Floats, size: float, room: Ints, fixed: Floats, replicas: Ints, before: Ints, move: float, width: int
) -> tuple[Floats, int]:
    """Change `replicas` while a swap lowers the whole cost; return the assignment and the number of swaps.

    `width` is how many openings are tried before giving up.
    """
    places, sites = cost.shape
    real = sites - 1
    x, load, capacity = np.zeros((sites, places)), np.zeros(sites), np.zeros(sites)
    hop, via = np.full((sites, sites), np.inf), np.full((sites, sites), -1)
    for s in range(real):
        capacity[s] = size * replicas[s]
    capacity[real] = demand.sum() * 2.0 + 1.0
    assign(cost, demand, capacity, x, load, hop, via)
    now = total_cost(cost, x) + upkeep(replicas, fixed, before, move)
    swaps = 0
    swaps_max = 4 * (replicas.sum() + 8)
    failed, stale = np.zeros(real, dtype=np.bool_), False
    failed_at = np.full(real, -1)
    tried = np.zeros((sites, sites), dtype=np.bool_)
    while swaps < swaps_max:
        # Relocations: the same demand served from another site.
        best_a, best_b, best_gain = -1, -1, EPSILON * (1.0 + abs(now))
        for a in range(real):
            if replicas[a] == 0 or (replicas[a] > 1 and load[a] > EPSILON):
                continue
            for b in range(real):
                if replicas[b] >= room[b] or b == a or tried[a, b]:
                    continue
                gain = fixed[a] - fixed[b]
                gain += move * (max(0, before[b] - replicas[b]) - max(0, before[b] - replicas[b] - 1))
                gain -= move * (max(0, before[a] - replicas[a] + 1) - max(0, before[a] - replicas[a]))
                for p in range(places):
                    if x[a, p] > 0.0:
                        gain += x[a, p] * (cost[p, a] - cost[p, b])
                if gain > best_gain:
                    best_a, best_b, best_gain = a, b, gain
        if best_a >= 0:
            tried[best_a, best_b] = True
            kept = (x.copy(), load.copy(), capacity.copy(), replicas.copy())
            open_one(best_b, size, cost, x, capacity, load, hop, via, replicas)
            close(best_a, size, cost, x, capacity, load, hop, via, replicas, np.inf, np.zeros(places))
            after = total_cost(cost, x) + upkeep(replicas, fixed, before, move)
            if after < now - EPSILON * (1.0 + abs(now)):
                now = after
                swaps += 1
                tried[:] = False
            else:
                x[:], load[:], capacity[:], replicas[:] = kept
            continue
        after = try_swaps(
            cost,
            demand,
            size,
            room,
            fixed,
            replicas,
            before,
            move,
            width,
            x,
            capacity,
            load,
            hop,
            via,
            now,
            failed,
            failed_at,
            swaps,
        )
        if after >= now:
            if not stale:
                break
            # What failed before the last swaps may pay now.
            failed[:] = False
            stale = False
            continue
        stale = True
        now = after
        swaps += 1
        tried[:] = False
    return x, swaps


@compiled
def try_swaps(
    cost: Floats,
    demand: Floats,
    size: float,
    room: Ints,
    fixed: Floats,
    replicas: Ints,
    before: Ints,
    move: float,
    width: int,
    x: Floats,
    capacity: Floats,
    load: Floats,
    hop: Floats,
    via: Ints,
    now: float,
    failed: npt.NDArray[np.bool_],
    failed_at: Ints,
    swaps: int,
) -> float:
    """Make the first swap that pays, and return the whole cost then; `now` where none of those tried does.

    Openings in `failed` are left out, and those that fail are entered there; `failed_at` says before which swap.
    """
    sites = cost.shape[1]
    real = sites - 1
    enough = now - EPSILON * (1.0 + abs(now))
    open_sites = opened(capacity)
    for s in open_sites:
        renew_hops(s, cost, x, open_sites, hop, via)
    price = prices(capacity, load, hop, open_sites)
    first, second, best = two_best(cost, price, open_sites)
    worth = 0.0
    for s in open_sites:
        worth += price[s] * capacity[s]
    kept_x, opened_x, step = np.empty_like(x), np.empty_like(x), np.zeros_like(x)
    kept_up = upkeep(replicas, fixed, before, move)
    pays = np.zeros(sites, dtype=np.bool_)
    gain = np.full(real, -np.inf)
    for b in range(real):
        if replicas[b] < room[b] and not failed[b]:
            gain[b] = knapsack(b, cost, demand, first, size) - fixed[b] + move * (before[b] > replicas[b])
    for b in np.argsort(-gain, kind="mergesort")[:width]:
        if gain[b] == -np.inf:
            break
        failed[b] = True
        if failed_at[b] == swaps:
            continue
        failed_at[b] = swaps
        pays[:] = False
        for a in open_sites:
            if a < real and a != b and replicas[a] > 0:
                rest = fixed[b] - fixed[a] + move * (int(before[a] >= replicas[a]) - int(before[b] > replicas[b]))
                limit = enough - kept_up - rest
                pays[a] = swap_bound(a, b, size, cost, demand, capacity, price, first, second, best, worth, limit) < limit
        if not pays.any():
            continue
        kept = (load.copy(), capacity.copy(), replicas.copy())
        copy_rows(x, kept_x, open_sites)
        open_one(b, size, cost, x, capacity, load, hop, via, replicas)
        with_b = total_cost(cost, x) + upkeep(replicas, fixed, before, move)
        with_sites = opened(capacity)
        with_price = prices(capacity, load, hop, with_sites)
        loss = np.full(real, np.inf)
        for a in with_sites:
            if a < real and a != b and replicas[a] > 0:
                excess = max(0.0, load[a] - capacity[a] + size)
                loss[a] = (
                    least_loss(a, cost, x, with_price, with_sites, excess, step[a]) - fixed[a] + move * (before[a] >= replicas[a])
                )
        opened_state = (load.copy(), capacity.copy(), replicas.copy())
        copy_rows(x, opened_x, with_sites)
        for a in np.argsort(loss, kind="mergesort")[:TRIED_MAX]:
            if not with_b + loss[a] < enough:
                break
            if not pays[a]:
                continue
            saved = fixed[a] - move * (before[a] >= replicas[a])
            if close(a, size, cost, x, capacity, load, hop, via, replicas, enough - with_b + saved, step[a]):
                after = total_cost(cost, x) + upkeep(replicas, fixed, before, move)
                if after < enough:
                    failed[b] = False
                    return after
            copy_rows(opened_x, x, with_sites)
            load[:], capacity[:], replicas[:] = opened_state
        x[b] = 0.0
        copy_rows(kept_x, x, open_sites)
        load[:], capacity[:], replicas[:] = kept
    return now
