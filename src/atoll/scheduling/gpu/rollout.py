"""Our measure of a node's free GPUs: how much of them is left over after futures drawn from the expected workload.

FGD looks one pod ahead, so it calls a GPU usable down to the last thousandth as long as one pod still fits, and does not
see that eight pods with a lot of CPU leave six GPUs without a core. A rollout fills the node with pods in random order,
each on the fullest GPU that has room, as an overloaded cluster would, and counts what nobody could use. All nodes and
all choices see the same futures (common random numbers), so that differences between them are no chance.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from atoll.scheduling.compiled import compiled
from atoll.scheduling.gpu.demand import CPU, GPUS, MILLI, MODELS, Target
from atoll.scheduling.gpu.fleet import GPU_MILLI, Ints

FUTURES = 64
"""How many futures a value is the mean of."""

HORIZON = 2.0
"""A future ends when it has offered a node this many times the GPUs that it has in total."""

POD_DRAWS_MAX = 4096
"""Bound on a future's length, where nearly no expected pod needs a GPU."""


class Futures(NamedTuple):
    pods: Ints
    """(future, step, column of a pod)"""
    offered_milli: Ints
    """(future, step): GPU demand that the future has offered before this step."""
    horizon_milli: int
    """What is offered to a node, for every one of its GPUs."""
    least_cpu_milli: int
    """No pod that needs a GPU asks for less CPU: a node with less is done."""


def draw_futures(target: Target, *, gpus_max: int, futures: int = FUTURES, horizon: float = HORIZON, seed: int = 0) -> Futures:
    """Draw futures for nodes of up to `gpus_max` GPUs. The same arguments give the same futures."""
    random = np.random.default_rng(seed)
    demand = target.pods[:, GPUS] * target.pods[:, MILLI]
    needed = horizon * gpus_max * GPU_MILLI
    steps = 1
    mean_milli = float(demand @ target.share)
    if mean_milli > 0:
        steps = min(POD_DRAWS_MAX, int(2 * needed / mean_milli) + 2)
    drawn = random.choice(len(target.share), size=(futures, steps), p=target.share)
    offered = np.cumsum(demand[drawn], axis=1) - demand[drawn]
    used = int(np.argmax(offered >= needed, axis=1).max()) + 1
    if not (offered[:, -1] >= needed).all():
        used = steps
    return Futures(
        pods=np.ascontiguousarray(target.pods[drawn[:, :used]]),
        offered_milli=np.ascontiguousarray(offered[:, :used]),
        horizon_milli=int(horizon * GPU_MILLI),
        least_cpu_milli=int(target.pods[demand > 0, CPU].min(initial=np.iinfo(np.int64).max)),
    )


@compiled
def expected_leftover(cpu_milli: int, gpu_milli: Ints, gpus: int, model: int, futures: Futures) -> float:
    """Return the mean of what is free of the node's GPUs at the end of each future, in thousandths of a GPU."""
    free = 0
    for g in range(gpus):
        free += gpu_milli[g]
    if free == 0:
        return 0.0
    room = np.empty(gpus, np.int64)
    pods = futures.pods
    total = 0
    for future in range(pods.shape[0]):
        room[:] = gpu_milli[:gpus]
        cpu = cpu_milli
        left = free
        for step in range(pods.shape[1]):
            if left == 0 or cpu < futures.least_cpu_milli or futures.offered_milli[future, step] >= futures.horizon_milli * gpus:
                break
            if pods[future, step, CPU] > cpu or not (pods[future, step, MODELS] >> model) & 1:
                continue
            count = pods[future, step, GPUS]
            milli = pods[future, step, MILLI]
            if count == 1:
                tightest = -1
                for g in range(gpus):
                    if room[g] >= milli and (tightest < 0 or room[g] < room[tightest]):
                        tightest = g
                if tightest < 0:
                    continue
                room[tightest] -= milli
            elif count > 1:
                whole = 0
                for g in range(gpus):
                    whole += room[g] == GPU_MILLI
                if whole < count:
                    continue
                whole = count
                for g in range(gpus):
                    if whole > 0 and room[g] == GPU_MILLI:
                        room[g] = 0
                        whole -= 1
            cpu -= pods[future, step, CPU]
            left -= count * milli
        total += left
    return float(total / pods.shape[0])
