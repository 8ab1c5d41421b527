"""What pods ask for, as classes of equal pods; the published way to make arrivals; the typical pods of FGD."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TextIO

import numpy as np
from numpy.typing import NDArray

from atoll.model.errors import Invalid
from atoll.scheduling.gpu.fleet import GPU_MILLI, Fleet, Ints, integer, read_rows

CPU, MEMORY, GPUS, MILLI, MODELS = range(5)
"""Columns of a pod: cpu_milli, memory_mib, number of GPUs, thousandths of each, bits of the models that will do."""

TYPICAL_SHARE = 0.95
"""The most frequent pods that together are this share of a list are its typical ones (as published)."""


@dataclass(frozen=True)
class PodList:
    """Pods in order of name: `classes` (class, column) and for every pod its class."""

    classes: Ints
    pods: Ints

    @property
    def gpu_milli(self) -> Ints:
        """GPU demand of every class."""
        return np.asarray(self.classes[:, GPUS] * self.classes[:, MILLI])


@dataclass(frozen=True)
class Target:
    """The workload that is expected: pods (memory unknown, as published), and the share of each; shares add up to 1."""

    pods: Ints
    share: NDArray[np.float64]


def pod_row(cpu_milli: int, memory_mib: int, gpus: int, milli: int, models: int) -> tuple[int, int, int, int, int]:
    """Return a pod's columns. Raises Invalid: several GPUs of which not each is whole, or no part of one."""
    if gpus == 0:
        return cpu_milli, memory_mib, 0, 0, models
    if not 0 < milli <= GPU_MILLI or (gpus > 1 and milli != GPU_MILLI):
        raise Invalid(f"{gpus} GPUs of {milli} thousandths: only one GPU can be asked for in part")
    return cpu_milli, memory_mib, gpus, milli, models


def build_pods(rows: Iterable[tuple[int, int, int, int, int]]) -> PodList:
    """Make a list of pods from their columns, in the order given."""
    index: dict[tuple[int, int, int, int, int], int] = {}
    pods = [index.setdefault(row, len(index)) for row in rows]
    return PodList(np.array(list(index), dtype=np.int64).reshape(-1, 5), np.array(pods, dtype=np.int64))


def read_pods(file: TextIO, fleet: Fleet) -> PodList:
    """Read an openb pod list (`name,cpu_milli,memory_mib,num_gpu,gpu_milli[,gpu_spec,…]`), whatever the pods' phase.

    Raises Invalid: a column is missing or no number, or a pod asks for what cannot be.
    """
    rows = sorted(read_rows(file, "num_gpu"), key=lambda row: row["name"])
    return build_pods(
        pod_row(
            integer(row, "cpu_milli"),
            integer(row, "memory_mib"),
            integer(row, "num_gpu"),
            integer(row, "gpu_milli"),
            fleet.mask(row.get("gpu_spec") or ""),
        )
        for row in rows
    )


def typical(pods: PodList) -> Target:
    """Return the typical pods of a list: the most frequent by all but memory, until they make up TYPICAL_SHARE of it."""
    counts = Counter((int(cpu), 0, int(gpus), int(milli), int(models)) for cpu, _, gpus, milli, models in pods.classes[pods.pods])
    ordered = sorted(counts.items(), key=lambda item: (item[1], item[0]), reverse=True)
    reached = np.cumsum([count for _, count in ordered])
    kept = ordered[: int(np.searchsorted(reached, TYPICAL_SHARE * len(pods.pods))) + 1]
    share = np.array([count for _, count in kept], dtype=np.float64)
    return Target(np.array([pod for pod, _ in kept], dtype=np.int64), share / share.sum())


def arrivals(pods: PodList, *, capacity_gpu_milli: int, load: float, seed: int) -> Ints:
    """Return classes in order of arrival: the list shuffled, then drawn from with replacement while demand is within `load`.

    The protocol of the FGD paper (USENIX ATC'23, section 6): a list that is already above `load` is kept whole.
    Raises Invalid: the list asks for no GPU at all, so that no load is ever reached.
    """
    if not pods.gpu_milli[pods.pods].any():
        raise Invalid("no pod of the list asks for a GPU")
    random = np.random.default_rng(seed)
    shuffled = random.permutation(pods.pods)
    demand = int(pods.gpu_milli[shuffled].sum())
    limit = load * capacity_gpu_milli
    more = []
    while demand <= limit:
        pod = int(pods.pods[random.integers(len(pods.pods))])
        demand += int(pods.gpu_milli[pod])
        if demand <= limit:
            more.append(pod)
    return np.concatenate([shuffled, np.array(more, dtype=np.int64)])
