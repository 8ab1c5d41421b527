"""FGD's measure of a node's free GPUs: how much of them a pod drawn from the expected workload could not use.

Weng et al., "Beware of Fragmentation: Scheduling GPU-Sharing Workloads with Fragmentation Gradient Descent", USENIX
ATC'23, section 4.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from atoll.scheduling.compiled import compiled
from atoll.scheduling.gpu.demand import CPU, GPUS, MILLI, MODELS, Target
from atoll.scheduling.gpu.fleet import Fleet, Ints

Floats = NDArray[np.float64]


@compiled
def expected_fragment(cpu_milli: int, gpu_milli: Ints, gpus: int, model: int, pods: Ints, share: Floats) -> float:
    """Return F_n(M), in thousandths of a GPU: the mean, over pods of M, of the free GPU of node n that is lost to the pod.

    All of it is lost where the pod does not fit, or needs no GPU; else what lies on GPUs too full for it.
    """
    free = 0
    for g in range(gpus):
        free += gpu_milli[g]
    if free == 0:
        return 0.0
    expected = 0.0
    for p in range(len(share)):
        lost = free
        if pods[p, GPUS] > 0 and pods[p, CPU] <= cpu_milli and (pods[p, MODELS] >> model) & 1:
            usable = 0
            too_full = 0
            for g in range(gpus):
                if gpu_milli[g] >= pods[p, MILLI]:
                    usable += 1
                else:
                    too_full += gpu_milli[g]
            if usable >= pods[p, GPUS]:
                lost = too_full
        expected += share[p] * lost
    return expected


def fragments(fleet: Fleet, target: Target) -> Floats:
    """Return F_n(M) of every node, in thousandths of a GPU; their sum is the cluster's expected fragmentation."""
    nodes = fleet.nodes
    return np.array(
        [
            expected_fragment(nodes.cpu_milli[n], nodes.gpu_milli[n], nodes.gpus[n], nodes.model[n], target.pods, target.share)
            for n in range(len(nodes.gpus))
        ]
    )
