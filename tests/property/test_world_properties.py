"""Whatever the problem: capacity and hard rules hold, the answer is no worse than its start, and it stays as it is."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import structs

from atoll.scheduling.world import Problem, choose
from atoll.scheduling.world.search import greedy

pytestmark = pytest.mark.timeout(400)  # kernels compile at their first use, which takes a busy machine minutes


@st.composite
def problems(draw: st.DrawFn, places_max: int = 12, sites_max: int = 8) -> Problem:
    chance = np.random.default_rng(draw(st.integers(0, 1 << 30)))
    places, sites = draw(st.integers(1, places_max)), draw(st.integers(1, sites_max))
    demand = np.where(chance.random(places) < 0.2, 0.0, chance.uniform(0.1, 10.0, places))
    count = draw(st.integers(0, 6))
    return Problem(
        latency_ms=chance.integers(0, 200, (places, sites)).astype(float),
        demand=demand,
        room=chance.integers(0, 3, sites),
        count=count,
        replica_capacity=float((demand.sum() + 0.1) / max(1, count) * draw(st.sampled_from([0.7, 1.05, 2.0]))),
        site_cost=chance.uniform(0, 50, sites) if draw(st.booleans()) else None,
        latency_ms_max=draw(st.sampled_from([np.inf, 150.0, 60.0])),
        allowed=chance.random((places, sites)) < 0.8 if draw(st.booleans()) else None,
        move_cost=draw(st.sampled_from([0.5, 20.0])),
    )


@settings(max_examples=150, deadline=None)
@given(problems())
def test_capacity_room_and_hard_rules_hold_and_all_demand_is_accounted_for(problem: Problem) -> None:
    choice = choose(problem)
    assert (choice.replicas >= 0).all()
    assert (choice.replicas <= problem.room).all()
    assert choice.replicas.sum() <= problem.count
    assert (choice.flow >= 0).all()
    assert (choice.flow.sum(axis=0) <= choice.replicas * problem.replica_capacity + 1e-6).all()
    assert np.allclose(choice.flow.sum(axis=1).sum() + choice.unserved, problem.demand.sum())
    assert choice.flow[problem.latency_ms > problem.latency_ms_max].sum() == 0
    if problem.allowed is not None:
        assert choice.flow[~problem.allowed].sum() == 0


@settings(max_examples=100, deadline=None)
@given(problems())
def test_the_same_problem_has_the_same_answer_which_stays_as_it_is(problem: Problem) -> None:
    first, second = choose(problem), choose(problem)
    assert first.replicas.tolist() == second.replicas.tolist()
    settled = choose(problem, first.replicas)
    again = choose(problem, settled.replicas)
    assert again.moved == 0
    assert again.replicas.tolist() == settled.replicas.tolist()


@settings(max_examples=100, deadline=None)
@given(problems())
def test_the_search_is_never_worse_than_its_start(problem: Problem) -> None:
    free = structs.replace(problem, latency_ms_max=np.inf, allowed=None)
    start = np.zeros(len(free.room), dtype=np.int64)
    cost = np.hstack([free.latency_ms, np.full((len(free.demand), 1), 1e5)])
    fixed = np.zeros(len(free.room)) if free.site_cost is None else free.site_cost
    greedy(cost, free.demand, free.replica_capacity, free.room.astype(np.int64), fixed, start, free.count)
    begun = choose(structs.replace(free, move_cost=1e12), start)
    found = choose(free)
    unserved_cost = 100.0 * (1.0 + free.latency_ms.max())
    assert found.cost + found.unserved * unserved_cost <= begun.cost + begun.unserved * unserved_cost + 1e-6


@settings(max_examples=40, deadline=None)
@given(problems(places_max=8, sites_max=5))
def test_small_answers_are_close_to_the_best_of_all(problem: Problem) -> None:
    problem = structs.replace(problem, count=min(problem.count, 3))
    found = choose(problem)
    permitted = problem.latency_ms <= problem.latency_ms_max
    if problem.allowed is not None:
        permitted &= problem.allowed
    unserved_cost = 100.0 * (1.0 + problem.latency_ms[permitted].max(initial=0.0))
    total = int(found.replicas.sum())
    best = min(
        (
            (one := choose(structs.replace(problem, move_cost=1e12), replicas)).cost + one.unserved * unserved_cost
            for replicas in itertools.product(*(range(int(room) + 1) for room in np.minimum(problem.room, total)))
            if sum(replicas) == total
        ),
        default=0.0,
    )
    assert found.cost + found.unserved * unserved_cost <= best * 1.1 + 1e-6
