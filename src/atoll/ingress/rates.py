"""How many requests of each app come in here, as a smoothed rate. Pure: counters in, requests per second out."""

from __future__ import annotations

import heapq
from collections.abc import Mapping

HALF_LIFE_S = 300.0
"""What was so long ago counts half."""
RATE_MIN = 1e-4
"""Requests per second below which an app counts as having none."""
APPS_MAX = 10_000
"""Apps that are told of, those with most requests first."""


class Rates:
    """Counters since Envoy's start; one that falls has begun anew."""

    def __init__(self) -> None:
        self._before: dict[str, int] | None = None
        self._at = 0.0
        self._sums: dict[str, float] = {}
        self._weight = 0.0
        """Of all that was seen so far, up to 1: what came before the first look is unknown, not 0."""

    def add(self, counts: Mapping[str, int], now: float) -> None:
        """Take over what is counted at `now`, in monotonic seconds."""
        before, span_s = self._before, now - self._at
        if before is not None and span_s <= 0:
            return
        self._before, self._at = dict(counts), now
        if before is None:
            return
        share = 1.0 - 2.0 ** (-span_s / HALF_LIFE_S)
        self._weight += share * (1.0 - self._weight)
        for app in {*self._sums, *counts}:
            count, last = counts.get(app, 0), before.get(app, 0)
            fresh = count - last if count >= last else count
            value = self._sums.get(app, 0.0)
            self._sums[app] = value + share * (fresh / span_s - value)
        for app in [app for app, value in self._sums.items() if value < RATE_MIN * self._weight]:
            del self._sums[app]

    def per_s(self) -> dict[str, float]:
        """Return app → requests per second."""
        if not self._weight:
            return {}
        most = heapq.nlargest(APPS_MAX, self._sums.items(), key=lambda item: (item[1], item[0]))
        return {app: round(value / self._weight, 6) for app, value in sorted(most)}
