"""The policies by name. A policy says how good a node is for a pod; `packer` picks the best, and breaks ties.

The first six are those of the FGD paper, as its published simulator scores them (whole numbers from 0 to 100, so that
small differences are ties on purpose).
"""

from __future__ import annotations

import enum

import numpy as np

from atoll.scheduling.compiled import compiled
from atoll.scheduling.gpu.demand import CPU, GPUS, MILLI
from atoll.scheduling.gpu.fleet import GPU_MILLI, Ints

CPU_SPEC_MILLI = 128_000
GPU_SPEC_MILLI = 8_000
"""The largest node, by which the published policies scale CPU and GPU."""

SCORE_TOLERANCE = 1e-9
"""A score this close below a whole number is that number: a gain of nothing is 50, whatever the rounding of sums."""


class Policy(enum.IntEnum):
    """`value` is what the kernels know it by."""

    RANDOM = 0
    DOT_PRODUCT = 1
    CLUSTERING = 2
    PACKING = 3
    BEST_FIT = 4
    FGD = 5
    FGD_EXACT = 6
    """FGD without rounding to whole scores."""
    ROLLOUT = 7
    """Ours: what the next pod could not use (as FGD, without rounding), and what would be left over in the end."""
    LEFTOVER = 8
    """The second half of ours alone, to show what each half does."""

    @property
    def label(self) -> str:
        return self.name.lower().replace("_", "-")


@compiled
def simple_score(policy: int, cpu_milli: int, gpu_milli: Ints, gpus: int, tenants: Ints, pod: Ints) -> float:
    """Return the score (higher is better) of a node that has room for `pod`, for the policies that look at nothing else."""
    free = 0
    untouched = 0
    for g in range(gpus):
        free += gpu_milli[g]
        untouched += gpu_milli[g] == GPU_MILLI
    demand = pod[GPUS] * pod[MILLI]
    if policy == 1:
        product = cpu_milli / CPU_SPEC_MILLI * (pod[CPU] / CPU_SPEC_MILLI) + free / GPU_SPEC_MILLI * (demand / GPU_SPEC_MILLI)
        return float(np.floor(100 * (1 - product / 2)))
    if policy == 4:
        rest = (cpu_milli - pod[CPU]) / CPU_SPEC_MILLI + (free - demand) / GPU_SPEC_MILLI
        return float(np.floor(100 * (1 - rest / 2)))
    if pod[GPUS] == 0 or policy == 0:
        return 0.0
    if policy == 2:
        return _clustering(free, tenants, 0 if pod[MILLI] < GPU_MILLI else pod[GPUS])
    return _packing(gpu_milli, gpus, untouched, pod)


@compiled
def _clustering(free: int, tenants: Ints, kind: int) -> float:
    """Pods of one kind (a part of a GPU, or n whole ones) together; among equals the node with the least free."""
    kinds = 0
    for k in range(len(tenants)):
        kinds += tenants[k] > 0
    tier = 0
    if tenants[kind] > 0:
        tier = 75 if kinds == 1 else 50
    elif kinds == 0:
        tier = 25
    return float(tier + max(0, 25 * (GPU_SPEC_MILLI - free)) // GPU_SPEC_MILLI)


@compiled
def _packing(gpu_milli: Ints, gpus: int, untouched: int, pod: Ints) -> float:
    """First GPUs that are shared already, then whole ones on nodes in use, then nodes that are empty."""
    if untouched == gpus:
        return float(max(33 - untouched, untouched))
    if pod[MILLI] < GPU_MILLI:
        tightest = GPU_MILLI
        for g in range(gpus):
            if pod[MILLI] <= gpu_milli[g] < tightest:
                tightest = gpu_milli[g]
        if tightest < GPU_MILLI:
            return float(max(100 - tightest * 100 // GPU_MILLI // 10, 50))
    return float(max(50 - pod[GPUS], 33))


@compiled
def rounded_gain(gain_milli: float) -> float:
    """Return FGD's published score of a gain: its logistic in GPUs, as a whole number of per cent."""
    return float(np.floor(100 / (1 + np.exp(-gain_milli / 1000)) + SCORE_TOLERANCE))
