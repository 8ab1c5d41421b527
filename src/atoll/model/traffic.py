"""What an ingress counts of the requests to each release of each app. It travels beside heartbeats and is never stored."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import zip_longest
from typing import Annotated

from msgspec import Meta, Struct

from atoll.model.names import Name

BOUNDS_MS = (
    *(1, 2, 3, 5, 7, 10, 15, 20, 30, 40, 50, 75, 100, 125, 150, 200, 250, 300, 400, 500, 600, 800),
    *(1_000, 1_500, 2_000, 3_000, 5_000, 7_500, 10_000, 15_000, 30_000, 60_000),
)
"""Upper bounds of the classes of the latency histogram; a last class has what took longer."""
CLASSES = len(BOUNDS_MS) + 1
DEMAND_APPS_MAX = 10_000
"""Apps in one report of what is to be awake."""
RELEASES_MAX = 20_000
"""Releases in one report."""


class Counts(Struct, frozen=True, array_like=True):
    """Requests that have been answered, those of them with 500 to 599, and how many fell into each class of `BOUNDS_MS`."""

    requests: Annotated[int, Meta(ge=0)] = 0
    errors: Annotated[int, Meta(ge=0)] = 0
    classes: Annotated[tuple[Annotated[int, Meta(ge=0)], ...], Meta(max_length=CLASSES)] = ()

    def __add__(self, other: Counts) -> Counts:
        classes = tuple(a + b for a, b in zip_longest(self.classes, other.classes, fillvalue=0))
        return Counts(self.requests + other.requests, self.errors + other.errors, classes)

    def since(self, before: Counts) -> Counts:
        """Return what came after `before`; all of it where the count has begun anew."""
        classes = tuple(a - b for a, b in zip_longest(self.classes, before.classes, fillvalue=0))
        requests, errors = self.requests - before.requests, self.errors - before.errors
        if requests < 0 or errors < 0 or any(count < 0 for count in classes):
            return self
        return Counts(requests, errors, classes)

    @property
    def error_rate(self) -> float:
        return self.errors / self.requests if self.requests else 0.0

    def quantile_s(self, share: float) -> float | None:
        """Return the time within which `share` of the requests were answered, even within a class; None without any."""
        return quantile_s(self.classes, share)


class ReleaseTraffic(Struct, frozen=True, kw_only=True):
    """Since the ingress was started."""

    project: Name
    app: Name
    release: Annotated[int, Meta(ge=1)]
    counts: Counts


class TrafficReport(Struct, frozen=True, kw_only=True):
    """What has changed since the last report of this ingress; with `started` (seconds since the epoch) all counts begin at 0."""

    ingress: str
    started: float
    releases: Annotated[tuple[ReleaseTraffic, ...], Meta(max_length=RELEASES_MAX)] = ()


class AppLoad(Struct, frozen=True, array_like=True):
    """What one ingress has had to do for an app since the report's `started`."""

    app: str
    """`project/app`."""
    requests: Annotated[int, Meta(ge=0)] = 0
    request_s: Annotated[float, Meta(ge=0, le=1e15)] = 0.0
    """Seconds that requests were under way, added up: its growth over a time, divided by that time, is their mean number."""


class DemandReport(Struct, frozen=True, kw_only=True):
    """Apps (`project/app`) for which an ingress has had something to do since its last complete report.

    With `complete`, every other app that sleeps has had no request there since then; else it is only to wake these. `loads` are of
    apps that scale by their requests; a report without some says nothing of them.
    """

    ingress: str
    apps: Annotated[tuple[str, ...], Meta(max_length=DEMAND_APPS_MAX)] = ()
    complete: bool = False
    started: float = 0.0
    """Since when `loads` are counted, in seconds since the epoch."""
    uptime_s: Annotated[float, Meta(ge=0, le=1e12)] = 0.0
    """For how long, by a clock that only goes forward."""
    loads: Annotated[tuple[AppLoad, ...], Meta(max_length=DEMAND_APPS_MAX)] = ()


class Load(Struct, frozen=True):
    """An app's load at an ingress, at one moment of it; see `DemandReport`."""

    started: float
    uptime_s: float
    requests: int
    request_s: float


def total(counts: Iterable[Counts]) -> Counts:
    return sum(counts, Counts())


def quantile_s(classes: Sequence[int], share: float) -> float | None:
    """As `Counts.quantile_s`. What took longer than the last bound counts as that bound."""
    rank = share * sum(classes)
    if not rank:
        return None
    below = 0
    for index, count in enumerate(classes):
        if count and below + count >= rank:
            low = BOUNDS_MS[index - 1] if index else 0
            high = BOUNDS_MS[min(index, len(BOUNDS_MS) - 1)]
            return (low + (high - low) * (rank - below) / count) / 1000
        below += count
    return BOUNDS_MS[-1] / 1000
