"""The solver's short cuts are exact: a bound is never above the truth, and hops kept step by step are those computed anew."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from atoll.scheduling.world.bounds import swap_bound, two_best
from atoll.scheduling.world.flow import assign, opened, prices, renew_hops, total_cost
from atoll.scheduling.world.search import close, open_one

pytestmark = pytest.mark.timeout(400)  # kernels compile at their first use, which takes a busy machine minutes

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


class Assigned:
    """Demand assigned to replicas at sites; the last site is nowhere."""

    def __init__(self, cost: Floats, demand: Floats, size: float, replicas: Ints) -> None:
        self.cost, self.demand, self.size, self.replicas = cost, demand, size, replicas.copy()
        sites = cost.shape[1]
        self.x, self.load = np.zeros((sites, len(demand))), np.zeros(sites)
        self.hop, self.via = np.full((sites, sites), np.inf), np.full((sites, sites), -1)
        self.capacity = np.append(size * replicas, demand.sum() * 2.0 + 1.0)
        assign(cost, demand, self.capacity, self.x, self.load, self.hop, self.via)

    def total(self) -> float:
        return float(total_cost(self.cost, self.x))

    def swap(self, a: int, b: int) -> None:
        arrays = (self.x, self.capacity, self.load, self.hop, self.via, self.replicas)
        open_one(b, self.size, self.cost, *arrays)
        assert close(a, self.size, self.cost, *arrays, np.inf, np.zeros(len(self.demand)))


@st.composite
def assigned(draw: st.DrawFn) -> Assigned:
    chance = np.random.default_rng(draw(st.integers(0, 1 << 30)))
    places, sites = draw(st.integers(1, 12)), draw(st.integers(2, 6))
    latency = chance.integers(0, draw(st.sampled_from([3, 200])), (places, sites)).astype(float)
    cost = np.hstack([np.where(chance.random((places, sites)) < 0.9, latency, np.inf), np.full((places, 1), 1e4)])
    demand = np.where(chance.random(places) < 0.2, 0.0, chance.uniform(0.1, 10.0, places))
    replicas = chance.integers(0, 3, sites)
    size = float((demand.sum() + 0.1) / max(1, replicas.sum()) * draw(st.sampled_from([0.7, 1.05, 2.0])))
    return Assigned(cost, demand, size, replicas)


@settings(max_examples=150, deadline=None)
@given(assigned())
def test_no_swap_costs_less_than_its_bound(now: Assigned) -> None:
    open_sites = opened(now.capacity)
    for s in open_sites:
        renew_hops(s, now.cost, now.x, open_sites, now.hop, now.via)
    price = prices(now.capacity, now.load, now.hop, open_sites)
    best = two_best(now.cost, price, open_sites)
    worth = float(sum(price[s] * now.capacity[s] for s in open_sites))
    for a in np.flatnonzero(now.replicas):
        for b in range(len(now.replicas)):
            if a == b:
                continue
            bound = swap_bound(a, b, now.size, now.cost, now.demand, now.capacity, price, *best, worth, np.inf)
            changed = now.replicas.copy()
            changed[a] -= 1
            changed[b] += 1
            exact = Assigned(now.cost, now.demand, now.size, changed).total()
            assert bound <= exact + 1e-6 * (1.0 + exact)


@settings(max_examples=150, deadline=None)
@given(assigned(), st.data())
def test_an_assignment_changed_step_by_step_is_the_one_made_anew(now: Assigned, data: st.DataObject) -> None:
    for _ in range(3):
        used = [int(a) for a in np.flatnonzero(now.replicas)]
        if not used:
            return
        a = data.draw(st.sampled_from(used))
        b = data.draw(st.sampled_from([b for b in range(len(now.replicas)) if b != a]))
        now.swap(a, b)
        anew = Assigned(now.cost, now.demand, now.size, now.replicas).total()
        assert abs(now.total() - anew) <= 1e-6 * (1.0 + anew)
        assert np.allclose(now.x.sum(axis=0), now.demand)
        open_sites = opened(now.capacity)
        for s in open_sites:
            hops = now.hop.copy(), now.via.copy()
            renew_hops(s, now.cost, now.x, open_sites, *hops)
            assert np.array_equal(now.hop[s][open_sites], hops[0][s][open_sites])
