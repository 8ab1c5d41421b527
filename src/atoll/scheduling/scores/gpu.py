"""GPUs: work without one keeps off the nodes that have some; work with one goes where the least is lost to the next."""

from __future__ import annotations

import numpy as np

from atoll.scheduling.demand import Demand
from atoll.scheduling.interface import Floats, View
from atoll.scheduling.snapshot import CPU, GPU, MEMORY, Ints, amounts_of


class SparesGpus:
    """Work without a GPU: minus a half where a node has GPUs, down to minus one where all of them are free.

    Up to nine instances of one group share a node without GPUs before the next goes to one that has some.
    """

    name = "gpu-spared"
    weight = 100

    def wants(self, view: View, demand: Demand) -> bool:
        return demand.gpu is None and view.nodes.has_gpus

    def score(self, view: View, demand: Demand, counts: Ints, rows: Ints, extra: Ints) -> Floats:
        total = view.nodes.total[GPU][rows]
        free = np.clip(view.free[GPU][rows], 0, total)
        return -np.where(total > 0, 1.0 + free / np.maximum(total, 1), 0.0) / 2.0


class KeepsGpusWhole:
    """Minus the devices' worth that the instance takes from the next ones, and a little for free devices without cores.

    What is lost is FGD's measure over a fixed workload (`gpu/usable.py`), of partitions the larger ones that become impossible.
    Devices that are joined by NVLink, or on one switch, count in favour where one instance gets several.
    """

    name = "gpu"
    weight = 30

    def wants(self, view: View, demand: Demand) -> bool:
        return demand.gpu is not None

    def score(self, view: View, demand: Demand, counts: Ints, rows: Ints, extra: Ints) -> Floats:
        if demand.gpu is None:
            return np.zeros(len(rows), dtype=np.float64)
        return view.devices.gains(rows, extra, demand.gpu) - _stranded(view, demand, rows, extra)


def _stranded(view: View, demand: Demand, rows: Ints, extra: Ints) -> Floats:
    """Return the share of a node's GPUs for which no cpu, or no memory, will be left in proportion."""
    amounts = amounts_of(demand)
    left = []
    for resource in (GPU, CPU, MEMORY):
        total = np.maximum(view.nodes.total[resource][rows], 1)
        left.append((view.free[resource][rows] - (extra + 1) * amounts[resource]) / total)
    stranded: Floats = np.clip(left[0] - np.minimum(left[1], left[2]), 0.0, 1.0)
    return stranded
