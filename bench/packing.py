"""GPU packing: how much of a cluster's GPUs each policy allocates, on pod lists of the openb format.

Goals: FGD re-run here is within 0.4 points of what was published (lists with published results); our policy allocates
at least 0.5 points more than FGD, mean of lists and seeds, under either tie-break.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from atoll.scheduling.gpu.demand import PodList, read_pods, typical
from atoll.scheduling.gpu.fleet import Fleet, read_fleet
from atoll.scheduling.gpu.policies import Policy
from atoll.scheduling.gpu.replay import demo_fleet, demo_pods, replay
from atoll.scheduling.gpu.rollout import FUTURES, HORIZON, draw_futures
from bench.report import Report, Result

LOADS = (100, 130)
FIRST_SEED = 42
TIES = {False: "first name", True: "random"}
OURS = Policy.ROLLOUT
SHOWN = tuple(policy for policy in Policy if policy not in (Policy.FGD_EXACT, Policy.LEFTOVER))

Shares = dict[tuple[str, Policy, bool], dict[int, float]]


def run(arguments: list[str]) -> Report:
    options = _parser().parse_args(arguments)
    fleet, lists = _inputs(options.lists, options.only)
    policies = [policy for policy in Policy if policy.label in options.policies]
    shares: Shares = {}
    report = Report("packing")
    for done, (name, pods) in enumerate(lists.items(), 1):
        for policy in policies:
            for ties in TIES:
                began = time.perf_counter()
                shares[name, policy, ties] = _shares(fleet, pods, policy, ties, options)
                took = (time.perf_counter() - began) / options.seeds
                print(
                    f"[{done}/{len(lists)}] {name} {policy.label}, {TIES[ties]} ties: {shares[name, policy, ties][130]:.2f} % "
                    f"({took:.2f} s a replay)",
                    file=sys.stderr,
                    flush=True,
                )
    for row in _rows(shares, list(lists), policies):
        report.add(row)
    report.notes += [
        f"Mean of {options.seeds} seeds (from {FIRST_SEED}); {fleet.total_gpu_milli // 1000:,} GPUs in {len(fleet.names):,} nodes.",
        "Reference: the published mean of 10 seeds, where there is one; a goal's row compares points, not ratios.",
        "First name: as in the published simulator, names begin with a number shuffled by the seed. Random: any of the best.",
    ]
    return report


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench packing", description=__doc__)
    parser.add_argument("--lists", type=Path, help="folder of *pod_list*.csv, and *node_list*.csv if it is not openb's cluster")
    parser.add_argument("--only", action="append", help="name of a list in that folder (again for more)")
    parser.add_argument("--seeds", type=int, default=10, help="replays per list and policy (10)")
    parser.add_argument("--futures", type=int, default=FUTURES, help=f"futures of the rollout policy ({FUTURES})")
    parser.add_argument("--horizon", type=float, default=HORIZON, help=f"how many times its own GPUs a node is offered ({HORIZON})")
    parser.add_argument(
        "--policies", nargs="+", default=[policy.label for policy in SHOWN], choices=[policy.label for policy in Policy]
    )
    return parser


def _inputs(folder: Path | None, only: list[str] | None) -> tuple[Fleet, dict[str, PodList]]:
    """Return the nodes and the pod lists of a folder, or those that come with the package."""
    if folder is None:
        fleet = demo_fleet()
        return fleet, {"openb_pod_list_default": demo_pods(fleet)}
    nodes = sorted(folder.glob("*node_list_gpu*.csv")) or sorted(folder.glob("*node_list*.csv"))
    fleet = demo_fleet()
    if nodes:
        with nodes[0].open() as file:
            fleet = read_fleet(file)
    lists = {}
    for path in sorted(folder.glob("*pod_list*.csv")):
        if only is None or path.stem in only:
            with path.open() as file:
                lists[path.stem] = read_pods(file, fleet)
    if not lists:
        raise SystemExit(f"no *pod_list*.csv in {folder}")
    return fleet, lists


def _shares(fleet: Fleet, pods: PodList, policy: Policy, random_ties: bool, options: argparse.Namespace) -> dict[int, float]:
    """Return the mean allocated per cent at every load."""
    most = int(fleet.nodes.gpus.max())
    futures = draw_futures(typical(pods), gpus_max=most, futures=options.futures, horizon=options.horizon)
    seeds = range(FIRST_SEED, FIRST_SEED + options.seeds)
    replays = [replay(fleet, pods, policy, seed=seed, random_ties=random_ties, futures=futures) for seed in seeds]
    return {load: statistics.fmean(each.allocated_percent(load) for each in replays) for load in LOADS}


def _rows(shares: Shares, lists: list[str], policies: list[Policy]) -> Iterator[Result]:
    published = json.loads((Path(__file__).parent / "packing_published.json").read_text())
    for (name, policy, ties), by_load in shares.items():
        known = published.get(name, {}).get(policy.label) if not ties else None
        for at, load in enumerate(LOADS):
            what = f"{name}: {policy.label}, {TIES[ties]} ties, {load} % arrived"
            yield Result(what, by_load[load], "% of GPUs", reference=known[at] if known else None)
    if Policy.FGD not in policies:
        return
    for name in lists:
        if name in published:
            apart = abs(shares[name, Policy.FGD, False][130] - published[name]["fgd"][1])
            yield Result(f"{name}: FGD here and published, apart", apart, "points", goal="<= 0.4")
    if OURS not in policies:
        return
    for ties, words in TIES.items():
        for load in LOADS:
            gains = [shares[name, OURS, ties][load] - shares[name, Policy.FGD, ties][load] for name in lists]
            goal = ">= 0.5" if load == 130 else None
            least = f"least on one list {min(gains):.2f}"
            what = f"{OURS.label} above FGD, {words} ties, {load} % arrived, mean of {len(lists)} lists"
            yield Result(what, statistics.fmean(gains), "points", goal=goal, why=least)
