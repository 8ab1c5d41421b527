"""Requests under way and requests per second of each app that scales by them, averaged over windows, from what ingresses say."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

from msgspec import Struct

from atoll.control.pressure import PANIC_SHARE, Pressure
from atoll.control.sleeping import FRESH_S, Demand
from atoll.control.world import World
from atoll.model.ports.clock import Clock
from atoll.model.records import OwnerKind
from atoll.model.spec import Scale
from atoll.model.traffic import Load

POINTS = 60
"""Moments in a stable window that are kept of an app at each ingress."""
COVERED = 0.9
"""A window counts as watched from this share of it on."""


class Means(Struct, frozen=True):
    """Over a window: how many requests were under way, how many came in a second."""

    concurrency: float
    rps: float


class Track:
    """What one ingress has said of one app, as far back as the window goes. Pure."""

    def __init__(self, load: Load, window_s: float, now: float) -> None:
        self.last = load
        self.heard = now
        self.window_s = window_s
        self._points: deque[Load] = deque([load])

    def add(self, load: Load, now: float) -> None:
        """Take over what it says now; an ingress that has begun anew is watched anew."""
        if load.started != self.last.started or load.uptime_s < self.last.uptime_s:
            self._points.clear()
        points = self._points
        if len(points) > 1 and load.uptime_s - points[-2].uptime_s < self.window_s / POINTS:
            points.pop()
        points.append(load)
        self.last, self.heard = load, now
        while len(points) > 2 and points[1].uptime_s <= load.uptime_s - self.window_s:
            points.popleft()

    def means(self, window_s: float) -> Means | None:
        """Return what the last `window_s` had, or as much of it as was watched; None before a second word."""
        base = self._points[0]
        for point in reversed(self._points):
            if point.uptime_s <= self.last.uptime_s - window_s:
                base = point
                break
        span = self.last.uptime_s - base.uptime_s
        if span <= 0:
            return None
        return Means((self.last.request_s - base.request_s) / span, (self.last.requests - base.requests) / span)

    @property
    def covered(self) -> bool:
        """Whether a whole window has been watched."""
        return self.last.uptime_s - self._points[0].uptime_s >= COVERED * self.window_s


class Loads:
    """Takes in what ingresses say at each tick, and marks the apps of which they say something new."""

    def __init__(self, world: World, clock: Clock, demand: Demand) -> None:
        self._world = world
        self._clock = clock
        self._demand = demand
        self._tracks: dict[str, dict[str, Track]] = {}
        """App → ingress → its track."""
        self._windows: dict[str, float] = {}

    def look(self) -> None:
        scaling, now = self._world.scaling, self._clock.monotonic()
        for gone in self._tracks.keys() - scaling:
            del self._tracks[gone]
            self._windows.pop(gone, None)
        for ingress, loads in self._demand.loads.items():
            for app, load in loads.items():
                if app not in scaling:
                    continue
                tracks = self._tracks.setdefault(app, {})
                track = tracks.get(ingress)
                if track is None:
                    tracks[ingress] = Track(load, self._windows.get(app, 0.0), now)
                elif track.last is not load:
                    track.add(load, now)
                else:
                    continue
                self._world.dirty[(OwnerKind.APP, app)] = None

    def pressures(self, app: str, scale: Scale, ingresses: Iterable[str]) -> tuple[tuple[Pressure, ...], bool]:
        """Return what requests ask for of `app`, summed up over all ingresses, and whether all of `ingresses` were heard of for a
        whole window. What an ingress says that is silent now counts as nothing, and is not known."""
        window_s, now = float(scale.stable), self._clock.monotonic()
        self._windows[app] = window_s
        tracks = self._tracks.get(app, {})
        for gone in tracks.keys() - set(ingresses):
            del tracks[gone]
        stable, panic, known = Means(0.0, 0.0), Means(0.0, 0.0), True
        for ingress in ingresses:
            track = tracks.get(ingress)
            if track is None or now - track.heard > FRESH_S:
                known = False
                continue
            track.window_s = window_s
            known = known and track.covered
            stable, panic = _plus(stable, track.means(window_s)), _plus(panic, track.means(window_s * PANIC_SHARE))
        found = []
        if scale.concurrency is not None:
            found.append(
                Pressure(name="requests under way", target=scale.concurrency, stable=stable.concurrency, panic=panic.concurrency)
            )
        if scale.rps is not None:
            found.append(Pressure(name="requests a second", target=scale.rps, stable=stable.rps, panic=panic.rps))
        return tuple(found), known


def _plus(one: Means, other: Means | None) -> Means:
    return one if other is None else Means(one.concurrency + other.concurrency, one.rps + other.rps)
