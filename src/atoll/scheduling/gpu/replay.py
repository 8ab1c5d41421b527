"""Replays a pod list on an empty fleet as the FGD paper does, to compare policies like with like."""

from __future__ import annotations

import gzip
from dataclasses import dataclass
from importlib import resources
from io import StringIO

import numpy as np

from atoll.scheduling.gpu.demand import PodList, arrivals, read_pods, typical
from atoll.scheduling.gpu.fleet import Fleet, Ints, read_fleet
from atoll.scheduling.gpu.packer import NONE, Packer, Placed
from atoll.scheduling.gpu.policies import Policy
from atoll.scheduling.gpu.rollout import Futures

LOAD_MAX = 1.3
"""Arrivals end when they have asked for this many times the fleet's GPUs."""


@dataclass(frozen=True)
class Replay:
    """Running totals after every arrival, in thousandths of a GPU, and what the fleet looks like at the end."""

    capacity_gpu_milli: int
    arrived_gpu_milli: Ints
    allocated_gpu_milli: Ints
    dropped: int
    placed: Placed
    fleet: Fleet

    def allocated_percent(self, load_percent: int) -> float:
        """Return the share of all GPUs that is allocated when arrivals first reach `load_percent`, or at their end."""
        reached = np.searchsorted(self.arrived_gpu_milli * 100, load_percent * self.capacity_gpu_milli)
        return float(100 * self.allocated_gpu_milli[min(int(reached), len(self.arrived_gpu_milli) - 1)] / self.capacity_gpu_milli)


def replay(
    fleet: Fleet, pods: PodList, policy: Policy, *, seed: int, random_ties: bool = False, futures: Futures | None = None
) -> Replay:
    """Place the arrivals of `seed` by `policy` on a copy of `fleet`; nobody departs, what does not fit is dropped.

    Ties go to the first node by name, where names begin with a number shuffled by the seed, as in the published
    simulator; or, with `random_ties`, to any of them.
    """
    fleet = fleet.copy()
    sequence = arrivals(pods, capacity_gpu_milli=fleet.total_gpu_milli, load=LOAD_MAX, seed=seed)
    order = np.random.default_rng([seed, 1]).permutation(len(fleet.names))
    packer = Packer(fleet, pods.classes, typical(pods), policy, order=order, random_ties=random_ties, seed=seed, futures=futures)
    placed = packer.place(sequence)
    demand = pods.gpu_milli[sequence]
    return Replay(
        capacity_gpu_milli=fleet.total_gpu_milli,
        arrived_gpu_milli=np.cumsum(demand),
        allocated_gpu_milli=np.cumsum(np.where(placed.node == NONE, 0, demand)),
        dropped=int((placed.node == NONE).sum()),
        placed=placed,
        fleet=fleet,
    )


def demo_fleet() -> Fleet:
    """Return the 1,213 GPU nodes of the openb cluster (attribution: `data/SOURCE.md`)."""
    return read_fleet(StringIO(_data("openb_node_list_gpu_node.csv.gz")))


def demo_pods(fleet: Fleet) -> PodList:
    """Return the 8,152 pods of the openb cluster's default list."""
    return read_pods(StringIO(_data("openb_pod_list_default.csv.gz")), fleet)


def _data(name: str) -> str:
    return gzip.decompress((resources.files("atoll.scheduling.gpu") / "data" / name).read_bytes()).decode()
