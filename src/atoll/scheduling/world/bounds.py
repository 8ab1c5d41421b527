"""What a swap must cost, before it is tried: lower bounds from the prices of the assignment, by weak duality.

`price[s]` is what a unit of capacity at site `s` is worth now. Any prices give a bound: all demand goes where latency and price
together are least, less what the capacity is worth at those prices. What a bound rules out need not be assigned.
"""

from __future__ import annotations

import numpy as np

from atoll.scheduling.compiled import compiled
from atoll.scheduling.world.flow import EPSILON, Floats, Ints

PRICES_TRIED = 5
"""Prices tried for what a swap opens, by halving: each costs one pass over the places."""


@compiled
def knapsack(s: int, cost: Floats, demand: Floats, worth: Floats, size: float) -> float:
    """Return the most that one more replica at `s` could save, when each place pays `worth` now."""
    count = 0
    gains = np.empty(demand.shape[0])
    sizes = np.empty(demand.shape[0])
    for p in range(demand.shape[0]):
        gain = worth[p] - cost[p, s]
        if gain > 0.0:
            gains[count] = gain
            sizes[count] = demand[p]
            count += 1
    total, free = 0.0, size
    for i in np.argsort(-gains[:count]):
        taken = min(free, sizes[i])
        total += taken * gains[i]
        free -= taken
        if free <= 0.0:
            break
    return total


@compiled
def least_loss(s: int, cost: Floats, x: Floats, price: Floats, open_sites: Ints, excess: float, step: Floats) -> float:
    """Return a lower bound of what moving `excess` away from site `s` costs; `step[p]` becomes that of one unit of place `p`'s."""
    count = 0
    steps = np.empty(x.shape[1])
    sizes = np.empty(x.shape[1])
    for p in range(x.shape[1]):
        if x[s, p] > 0.0:
            other = np.inf
            for t in open_sites:
                if t != s:
                    other = min(other, cost[p, t] + price[t])
            steps[count] = other - cost[p, s]
            step[p] = steps[count]
            sizes[count] = x[s, p]
            count += 1
    total, left = 0.0, excess
    for i in np.argsort(steps[:count]):
        if left <= 0.0:
            break
        taken = min(left, sizes[i])
        total += taken * steps[i]
        left -= taken
    return total


@compiled
def two_best(cost: Floats, price: Floats, open_sites: Ints) -> tuple[Floats, Floats, Ints]:
    """Return what a unit of each place's demand costs, prices counted, at its best open site and at the next, and the best site."""
    places = cost.shape[0]
    first, second, best = np.full(places, np.inf), np.full(places, np.inf), np.full(places, -1)
    for p in range(places):
        for s in open_sites:
            pays = cost[p, s] + price[s]
            if pays < first[p]:
                second[p], first[p], best[p] = first[p], pays, s
            elif pays < second[p]:
                second[p] = pays
    return first, second, best


@compiled
def swap_bound(
    a: int,
    b: int,
    size: float,
    cost: Floats,
    demand: Floats,
    capacity: Floats,
    price: Floats,
    first: Floats,
    second: Floats,
    best: Ints,
    worth: float,
    enough: float,
) -> float:
    """Return a lower bound of the assignment's cost once a replica is opened at `b` and one closed at `a`.

    `first`, `second` and `best` are those of `two_best`; `worth` is what all capacity is worth at its prices. No better bound than
    `enough` is looked for: the best price at `b` is where what would come there just fills it.
    """
    gone = capacity[a] - size <= EPSILON
    others = worth - price[a] * (capacity[a] if gone else size)
    least = np.empty(demand.shape[0])
    low, high, filled = 0.0, 0.0, capacity[b] + size
    for p in range(demand.shape[0]):
        least[p] = second[p] if gone and best[p] == a else first[p]
        high = max(high, least[p] - cost[p, b])
    if capacity[b] > 0.0:  # a higher price than it has now would not be what `first` counts with
        others -= price[b] * capacity[b]
        high = price[b]
    bound = -np.inf
    for _ in range(PRICES_TRIED):
        pay = 0.5 * (low + high)
        total, taken = -others - filled * pay, 0.0
        for p in range(demand.shape[0]):
            here = cost[p, b] + pay
            if here < least[p]:
                taken += demand[p]
                total += demand[p] * here
            else:
                total += demand[p] * least[p]
        bound = max(bound, total)
        if bound >= enough:
            break
        if taken > filled:
            low = pay
        else:
            high = pay
    return bound
