"""Demand-weighted latency of replicas over real places, capacity-tight, beside the integer optimum by HiGHS.

Demand comes from 351 places with random (log-normal) weights. The solver is given the same problem as one mixed-integer program;
it uses one thread, as ours does. Where it does not finish, its own lower bound is the reference, and the row says so.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from atoll.scheduling.world import Choice, Problem, choose, demo_places, round_trips_ms
from bench.report import Report, Result, median

SEEDS = 3
TIGHT = 1.05
"""Capacity of all replicas together, beside all demand."""
SOLVER_S = 120.0
REPEATS = 9


@dataclass
class Solved:
    cost: float
    bound: float
    used_s: float
    optimal: bool


def instance(seed: int, sites: int, count: int) -> Problem:
    """Return a problem with demand from every place and room for replicas at `sites` of them."""
    chance = np.random.default_rng(seed)
    places = demo_places()
    weights = chance.lognormal(0.0, 1.2, len(places))
    demand = weights * 1000.0 / weights.sum()
    chosen = np.sort(chance.choice(len(places), sites, replace=False))
    return Problem(
        latency_ms=round_trips_ms(places, tuple(places[index] for index in chosen)),
        demand=demand,
        room=chance.integers(1, 4, sites),
        count=count,
        replica_capacity=TIGHT * float(demand.sum()) / count,
    )


def timed(problem: Problem) -> tuple[Choice, float]:
    """Return the answer and the median seconds that it takes, compiled already."""
    answer = choose(problem)
    times = []
    for _ in range(REPEATS):
        began = time.process_time()
        answer = choose(problem)
        times.append(time.process_time() - began)
    return answer, median(times)


def solve(problem: Problem, limit_s: float) -> Solved:
    """Return the optimum by HiGHS: flow in [0, demand], whole replicas in [0, room], capacity and count as rows."""
    import highspy

    places, sites = problem.latency_ms.shape
    flows, infinite = places * sites, highspy.kHighsInf
    program = highspy.HighsLp()
    program.num_col_, program.num_row_ = flows + sites, places + sites + 1
    program.col_cost_ = np.concatenate([problem.latency_ms.ravel(), np.zeros(sites)])
    program.col_lower_ = np.zeros(flows + sites)
    program.col_upper_ = np.concatenate([np.repeat(problem.demand, sites), problem.room.astype(float)])
    program.row_lower_ = np.concatenate([problem.demand, np.full(sites, -infinite), [problem.count]])
    program.row_upper_ = np.concatenate([problem.demand, np.zeros(sites), [problem.count]])
    place, site = np.divmod(np.arange(flows), sites)
    rows = np.stack([place, places + site], axis=1).ravel()
    replica_rows = np.stack([places + np.arange(sites), np.full(sites, places + sites)], axis=1).ravel()
    program.a_matrix_.format_ = highspy.MatrixFormat.kColwise
    program.a_matrix_.start_ = (np.arange(flows + sites + 1) * 2).astype(np.int32)
    program.a_matrix_.index_ = np.concatenate([rows, replica_rows]).astype(np.int32)
    program.a_matrix_.value_ = np.concatenate([np.ones(2 * flows), np.tile([-problem.replica_capacity, 1.0], sites)])
    whole, real = highspy.HighsVarType.kInteger, highspy.HighsVarType.kContinuous
    program.integrality_ = [real] * flows + [whole] * sites
    with _quiet():
        return _solved(program, limit_s)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """HiGHS writes a banner to stdout whatever its options say, and stdout is the report's."""
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)


def _solved(program: Any, limit_s: float) -> Solved:
    import highspy

    solver = highspy.Highs()
    for option, value in (("output_flag", False), ("threads", 1), ("time_limit", limit_s), ("mip_rel_gap", 1e-4)):
        solver.setOptionValue(option, value)
    solver.passModel(program)
    began = time.process_time()
    solver.run()
    used_s = time.process_time() - began
    info = solver.getInfo()
    optimal = solver.getModelStatus() == highspy.HighsModelStatus.kOptimal
    return Solved(info.objective_function_value, info.mip_dual_bound, used_s, optimal)


def run(arguments: list[str]) -> Report:
    """Measure and return the report."""
    parser = argparse.ArgumentParser(prog="python -m bench placement")
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--sites", type=int, default=30, help="sites that may hold replicas")
    parser.add_argument("--count", type=int, default=10, help="replicas")
    parser.add_argument("--solver-s", type=float, default=SOLVER_S)
    parser.add_argument("--large", action="store_true", help="also all 351 places as sites, which the solver cannot finish")
    chosen = parser.parse_args(arguments)
    report = Report(
        "placement",
        notes=[
            f"demand from 351 places, capacity {TIGHT:g} times the demand; ours compiled already, median of {REPEATS}; "
            "solver: HiGHS, one thread, relative gap 1e-4; times are processor time of either"
        ],
    )
    shapes = [(seed, chosen.sites, chosen.count) for seed in range(1, chosen.seeds + 1)]
    shapes += [(1, len(demo_places()), 60)] if chosen.large else []
    worst: list[float] = []
    speeds: list[float] = []
    for seed, sites, count in shapes:
        if sys.stderr.isatty():
            print(f"placement: seed {seed}, {sites} sites, {count} replicas", file=sys.stderr)
        row = _one(report, seed, sites, count, chosen.solver_s)
        if row is not None:
            worst.append(row[0])
            speeds.append(row[1])
    if worst:
        report.add(Result("latency beside the optimum, worst of the seeds that it solved", max(worst), "x", 1.0, "<= 1.02"))
        report.add(Result("times faster than the solver, median of these", median(speeds), "x", goal=">= 1000"))
    return report


def _one(report: Report, seed: int, sites: int, count: int, limit_s: float) -> tuple[float, float] | None:
    problem = instance(seed, sites, count)
    answer, ours_s = timed(problem)
    demand = float(problem.demand.sum())
    what = f"{count} replicas at {sites} sites, seed {seed}"
    try:
        best = solve(problem, limit_s)
    except ImportError:
        report.add(Result(f"{what}: mean latency", answer.latency_ms, "ms", goal="<= 1.02", why="highspy is not installed"))
        return None
    reference = best.cost if best.optimal else best.bound
    why = (
        None
        if best.optimal
        else f"the solver did not finish; the reference is its lower bound (its best: {best.cost / demand:.2f} ms)"
    )
    report.add(Result(f"{what}: mean latency", answer.cost / demand, "ms", reference / demand, "<= 1.02", why))
    report.add(Result(f"{what}: time", ours_s * 1000, "ms", best.used_s * 1000))
    return (answer.cost / best.cost, best.used_s / ours_s) if best.optimal else None
