"""What a replay is measured by: the cell at moments, and one report for each policy."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
from msgspec import Struct

from atoll.scheduling.demand import Demand
from atoll.scheduling.snapshot import CPU, GPU, MEMORY, Snapshot, Standing, amounts_of
from atoll.sim.replay_places import Places
from atoll.sim.replay_trace import Trace

SAMPLES = 240
"""Points in time at which the cell is looked at."""
TYPICAL_MAX = 24
"""Kinds of demand that fragmentation is measured by, the most frequent of the trace."""


class Sample(Struct, frozen=True, kw_only=True):
    """The cell at one moment. Shares are 0 to 1 of what is up."""

    at_s: float
    cpu: float
    memory: float
    gpu: float
    fragmentation: float
    """Of free GPUs (of cpu where there is none), the share that a typical instance cannot use where it lies."""
    waiting: int
    running: int
    oldest_s: float
    """How long the one that waits longest has waited."""
    latency_ms: float = 0.0
    """The round trip from where requests come from to the nearest instance, weighted by demand; 0 where nobody knows."""


class Spread(Struct, frozen=True, kw_only=True):
    """How long something took, over all times that it happened, in simulated seconds."""

    count: int
    p50_s: float
    p99_s: float
    max_s: float
    percentiles_s: tuple[float, ...]
    """Of 0, 1, 2 … 100 %."""


class Living(Struct, frozen=True, kw_only=True):
    """What only a replay through API, controllers and agents knows."""

    started: Spread | None
    """From arrival to running; None where nothing ran."""
    replaced: Spread | None
    """From the failure of its node to running again, there or elsewhere; None where nothing was lost."""
    found: Spread | None
    """From the failure of a node until it was given up; None where none was."""
    nodes_failed: int
    braked: int
    """How often so many nodes fell silent at once that none was given up for a while."""
    writes: int
    """Revisions of the store."""
    passed_s: float
    """Simulated time that was lived through, tick by tick; the rest, in which nothing happened, was passed over."""


class Report(Struct, frozen=True, kw_only=True):
    """One policy's replay. Waits are from arrival (or loss) to placement, in simulated seconds."""

    policy: str
    arrived: int
    placed: int
    ended: int
    lost: int
    """Placements undone by a failure."""
    never: int
    """Still without a node at the end."""
    wait_s_mean: float
    wait_s_p50: float
    wait_s_p99: float
    cpu_mean: float
    memory_mean: float
    gpu_mean: float
    fragmentation_mean: float
    waiting_max: int
    plans: int | None
    """Calls of the scheduler; None where they are not counted (through a whole cell)."""
    latency_ms_mean: float
    """Over the samples at which anything ran."""
    samples: tuple[Sample, ...]
    living: Living | None = None
    """None: of the scheduler alone."""


class Gauge:
    """Looks at one snapshot. Nothing of it is changed."""

    def __init__(self, trace: Trace, snapshot: Snapshot, places: Places) -> None:
        self._snapshot = snapshot
        self._places = places
        self._typical = Counter(task.demand for task in trace.tasks).most_common(TYPICAL_MAX)
        self.samples: list[Sample] = []

    def sample(self, now: float, *, waiting: int, running: int, since: float) -> None:
        """Note how it is at `now`; `since` is when the one that waits longest began to."""
        snapshot = self._snapshot
        up = snapshot.standing[: snapshot.size] == Standing.OPEN
        total, used = snapshot.total[:, : snapshot.size][:, up], snapshot.used[:, : snapshot.size][:, up]
        share = used.sum(axis=1) / np.maximum(total.sum(axis=1), 1)
        self.samples.append(
            Sample(
                at_s=now,
                cpu=float(share[CPU]),
                memory=float(share[MEMORY]),
                gpu=float(share[GPU]),
                fragmentation=self._fragmentation(total - used),
                waiting=waiting,
                running=running,
                oldest_s=now - since,
                latency_ms=self._places.latency_ms(),
            )
        )

    def _fragmentation(self, free: np.ndarray[Any, np.dtype[np.int64]]) -> float:
        which = GPU if free[GPU].any() or any(demand.gpu for demand, _ in self._typical) else CPU
        there = np.maximum(free[which], 0)
        if not there.sum():
            return 0.0
        lost = weight = 0.0
        for demand, count in self._kinds(which):
            fits = (free >= np.asarray(amounts_of(demand))[:, None]).all(axis=0)
            lost += count * float(there[~fits].sum())
            weight += count
        return lost / weight / float(there.sum()) if weight else 0.0

    def _kinds(self, which: int) -> list[tuple[Demand, int]]:
        """Return the typical demands that ask for the resource at all."""
        return [(demand, count) for demand, count in self._typical if amounts_of(demand)[which]]

    def report(
        self,
        policy: str,
        *,
        arrived: int,
        waits: Sequence[float],
        ended: int,
        lost: int,
        never: int,
        plans: int | None,
        living: Living | None = None,
    ) -> Report:
        """Sum up; at least one sample was taken."""
        waited = np.array(waits or [0.0])

        def mean(name: str) -> float:
            return float(np.mean([getattr(one, name) for one in self.samples]))

        return Report(
            policy=policy,
            arrived=arrived,
            placed=len(waits),
            ended=ended,
            lost=lost,
            never=never,
            wait_s_mean=float(waited.mean()),
            wait_s_p50=float(np.percentile(waited, 50)),
            wait_s_p99=float(np.percentile(waited, 99)),
            cpu_mean=mean("cpu"),
            memory_mean=mean("memory"),
            gpu_mean=mean("gpu"),
            fragmentation_mean=mean("fragmentation"),
            waiting_max=max(one.waiting for one in self.samples),
            plans=plans,
            latency_ms_mean=float(np.mean([one.latency_ms for one in self.samples if one.running] or [0.0])),
            samples=tuple(self.samples),
            living=living,
        )


def spread_of(spans_s: Sequence[float]) -> Spread | None:
    """Return how spans are spread; None for none."""
    if not spans_s:
        return None
    found = np.percentile(np.array(spans_s), np.arange(101))
    return Spread(
        count=len(spans_s),
        p50_s=float(found[50]),
        p99_s=float(found[99]),
        max_s=float(found[100]),
        percentiles_s=tuple(float(each) for each in found),
    )
