"""Placements/s, planned only and also committed and observed; plan latency and memory as nodes grow to 100,000.

Every row says what it includes. The reference of the first rows is the floor that Kubernetes' own scheduler_perf tests hold in
CI for the like case; those bind through an API server and etcd, and so count commits and watches as ours do.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import multiprocessing
import resource
import shutil
import sys
import time
from collections.abc import Callable
from typing import Any

import structlog

from atoll.model import codec
from atoll.model.spec import AppSpec
from atoll.scheduling.demand import Pending, demand_of
from atoll.scheduling.plan import plan
from atoll.scheduling.snapshot import Snapshot
from bench.report import Report, Result, median, percentile
from bench.schedule_cell import ETCD, SQLITE, Cell, Wave, node

NODES = 5_000
INSTANCES = 50_000
APPS = 50
SITES = 350
NODES_MAX = 100_000
GROWTH = (1_000, 3_000, 10_000, 30_000, 100_000)
PLANNED = "planned only (snapshot in memory, nothing written)"
COMMITTED = "planned, durably committed ({}), seen by each node's agent; making the instance records included"

Case = dict[str, Any]
SELF = "self"
"""In a case, the name of the app itself."""
SIMPLE: Case = {}
CASES: dict[str, tuple[Case, float, str]] = {
    "simple": (SIMPLE, 810.0, ">= 10000"),
    "hard anti-affinity with itself over nodes": ({"placement": {"anti_affinity": [{"app": SELF}]}}, 60.0, ">= 5000"),
    "hard affinity with itself over regions": ({"placement": {"affinity": [{"app": SELF, "by": "region"}]}}, 35.0, ">= 5000"),
    "hard spread over sites, skew 1": ({"placement": {"spread": "site", "max_skew": 1}}, 460.0, ">= 5000"),
    "GPU (1 of 8 on each node)": ({"resources": {"gpu": {"count": 1}}}, 180.0, ">= 5000"),
}
"""What → the part of the spec that differs, Kubernetes' CI floor in 1/s, the goal in 1/s."""


def spec(name: str, replicas: int, more: Case) -> AppSpec:
    placement = {
        key: [{**rule, "app": name} for rule in value] if key in ("affinity", "anti_affinity") else value
        for key, value in more.get("placement", {}).items()
    }
    return codec.convert({"name": name, "image": "i", "scale": {"replicas": replicas}, **more, "placement": placement}, AppSpec)


def snapshot(nodes: int, sites: int = SITES, gpus: int = 0) -> Snapshot:
    made = Snapshot()
    for index in range(nodes):
        made.upsert_node(node(index, sites, gpus=gpus))
    return made


def pending(count: int, more: Case, apps: int = 1) -> list[Pending]:
    each = count // apps
    demands = [demand_of(spec(f"a{app}", each, more)) for app in range(apps)]
    return [
        Pending(id=f"default/a{app}-{index:06d}", group=f"app/default/a{app}/1/1", demand=demands[app], created_at=float(app))
        for app in range(apps)
        for index in range(each)
    ]


def planned(more: Case, nodes: int, count: int, rounds: int, gpus: int) -> list[float]:
    """Return placements/s of each round."""
    there = snapshot(nodes, gpus=gpus)
    rates = []
    for _ in range(rounds):
        waiting = pending(count, more, APPS)
        gc.collect()
        began = time.perf_counter()
        answer = plan(there, waiting)
        rates.append(count / (time.perf_counter() - began))
        if len(answer.placed) != count:
            raise RuntimeError(f"{count - len(answer.placed)} of {count} were not placed: {next(iter(answer.rejected.values()))}")
    return rates


def committed(more: Case, nodes: int, count: int, rounds: int, gpus: int, store: str) -> list[Wave]:
    """Return the waves of `rounds` cells, each begun empty."""

    structlog.configure(logger_factory=structlog.PrintLoggerFactory(sys.stderr))  # stdout is the report's

    async def one() -> Wave:
        async with Cell([node(index, SITES, gpus=gpus) for index in range(nodes)], store) as cell:
            return await cell.deploy([spec(f"a{app}", count // APPS, more) for app in range(APPS)])

    return [asyncio.run(one()) for _ in range(rounds)]


def latency(count: int, nodes: int, rounds: int) -> tuple[list[float], float]:
    """Return the milliseconds of each plan of `count` new instances, and the process's most memory in MiB.

    Each plan is of a release not planned before, so that no mask is kept from another, and what it placed is then counted.
    """
    there = snapshot(nodes)
    times: list[float] = []
    plan(there, pending(1, SIMPLE))
    for number in range(rounds):
        more = {"resources": {"cpu": 0.1 + number / 1000}}
        group, demand = f"g{number}", demand_of(spec("a", 1, more))
        waiting = [Pending(id=f"{number}/{index}", group=group, demand=demand) for index in range(count)]
        began = time.perf_counter()
        answer = plan(there, waiting)
        times.append((time.perf_counter() - began) * 1000)
        for placed in answer.placed:
            there.allocate(placed.id, placed.node, group, demand)
    return times, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def growth(nodes: int, rounds: int) -> float:
    """Return microseconds for each of 1,000 equal instances, planned at once."""
    there = snapshot(nodes)
    waiting = pending(1_000, SIMPLE)
    plan(there, waiting)
    times = []
    for _ in range(rounds):
        began = time.perf_counter()
        plan(there, waiting)
        times.append((time.perf_counter() - began) * 1e6 / len(waiting))
    return median(times)


def apart(work: Callable[..., Any], *arguments: Any) -> Any:
    """Run `work` in a fresh process, so that neither its memory nor what it left behind touches other rows."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(work, arguments)


def run(arguments: list[str]) -> Report:
    """Measure and return the report."""
    parser = argparse.ArgumentParser(prog="python -m bench schedule")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--instances", type=int, default=INSTANCES)
    parser.add_argument("--case", choices=sorted(CASES), action="append", help="only this one (may be repeated)")
    parser.add_argument("--only", choices=("rates", "latency"), help="a part of it")
    chosen = parser.parse_args(arguments)
    report = Report("schedule", notes=[f"medians of {chosen.rounds} rounds, each row in a process of its own, one core at work"])
    if chosen.only != "latency":
        _rates(report, chosen.rounds, chosen.instances, chosen.case or list(CASES))
    if chosen.only != "rates":
        _latencies(report)
    return report


def _rates(report: Report, rounds: int, count: int, cases: list[str]) -> None:
    for what in cases:
        more, floor, goal = CASES[what]
        gpus = 8 if "gpu" in more.get("resources", {}) else 0
        number = min(count, NODES * 8) if gpus else count
        size = f"{number:,} instances ({APPS} apps) on {NODES:,} nodes"
        _say(f"{what}: planned")
        rates = apart(planned, more, NODES, number, rounds, gpus)
        report.add(Result(f"{what}, {size}: {PLANNED}", median(rates), "1/s"))
        for store in (SQLITE, ETCD):
            _say(f"{what}: committed, {store}")
            name = f"{what}, {size}: {COMMITTED.format(store)}"
            if store == ETCD and shutil.which("etcd") is None:
                report.add(Result(name, None, "1/s", goal=goal, why="there is no etcd on this machine"))
                continue
            waves = apart(committed, more, NODES, number, rounds, gpus, store)
            rate = median([wave.instances / wave.observed_s for wave in waves])
            report.add(
                Result(
                    name,
                    rate,
                    "1/s",
                    goal=goal,
                    why="beside other load a process waits for its core: "
                    f"{median([wave.instances / wave.processor_s for wave in waves]):,.0f} for each second of processor time"
                    f"{' (ours, not the etcd process)' if store == ETCD else ''}. "
                    f"Kubernetes' CI floor for the like case is {floor:g}/s; ours is {rate / floor:.0f} times it",
                )
            )


def _latencies(report: Report) -> None:
    for count, rounds, goal in ((1, 200, "<= 20"), (1_000, 50, "<= 250")):
        _say(f"latency of {count}")
        times, memory = apart(latency, count, NODES_MAX, rounds)
        what = f"plan of {count:,} instance{'s' if count > 1 else ''}, {NODES_MAX:,} nodes in {SITES} sites, not planned before"
        report.add(Result(f"{what}, p50", median(times), "ms"))
        report.add(Result(f"{what}, p99", percentile(times, 99), "ms", goal=goal))
        report.add(Result(f"{what}: most memory of the process", memory, "MiB RSS", goal="<= 1024"))
    _say("growth")
    costs = {nodes: apart(growth, nodes, 9) for nodes in GROWTH}
    for nodes, cost in costs.items():
        report.add(Result(f"cost of each of 1,000 equal instances planned at once, {nodes:,} nodes", cost, "us"))
    first, last = GROWTH[0], GROWTH[-1]
    report.add(
        Result(
            f"growth of that cost from {first:,} to {last:,} nodes, beside linear",
            costs[last] / costs[first],
            "x",
            last / first,
            "< 1",
        )
    )


def _say(text: str) -> None:
    if sys.stderr.isatty():
        print(f"schedule: {text}", file=sys.stderr)
