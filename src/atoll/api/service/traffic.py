"""What the ingresses count of each release: in memory only, for the analysis of rollouts, for `GET /metrics`, for people."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping

from atoll.api.service.speakers import Speakers
from atoll.model.errors import Invalid, TooLarge
from atoll.model.ports.clock import Clock
from atoll.model.traffic import RELEASES_MAX, Counts, TrafficReport

RECENT_S = 60.0
"""What people are shown is of so long a time."""
POINTS_MAX = 64
"""Points in time that are kept of a release for it: one more than an ingress makes in that time."""
RELEASES_PER_APP_MAX = 64
APPS_MAX = 100_000
"""Apps of which anything is kept; which was told of longest ago goes first."""

AppKey = str
"""`project/app`."""


class Traffic:
    """Adds up what all ingresses say. Its counts begin with this server, and only grow."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._totals: dict[AppKey, dict[int, Counts]] = {}
        self._said: dict[tuple[str, AppKey], tuple[float, dict[int, Counts]]] = {}
        """(ingress, app) → when that ingress was started, and what it last said."""
        self._points: dict[AppKey, dict[int, deque[tuple[float, Counts]]]] = {}
        self._speakers = Speakers()

    def note(self, report: TrafficReport) -> None:
        """Take a report over; one that comes twice, or late, adds nothing. Raises TooLarge, Invalid."""
        if len(report.releases) > RELEASES_MAX:
            raise TooLarge(f"releases: {len(report.releases)} in one report; at most {RELEASES_MAX}", field="releases")
        now = self._clock.monotonic()
        if not self._speakers.hears(report.ingress, report.started, now):
            return
        for each in report.releases:
            if sum(each.counts.classes) < 0 or each.counts.errors > each.counts.requests:
                raise Invalid("releases.counts: more errors than requests", field="releases")
            key = f"{each.project}/{each.app}"
            started, said = self._said.get((report.ingress, key), (report.started, {}))
            if report.started != started:
                said = {}
            before = said.get(each.release, Counts())
            if each.counts.requests < before.requests:
                continue
            totals = self._totals.pop(key, {})
            totals[each.release] = totals.get(each.release, Counts()) + each.counts.since(before)
            said[each.release] = each.counts
            self._said[report.ingress, key] = (report.started, said)
            self._totals[key] = totals
            self._point(key, each.release, totals[each.release], now)
            self._bound(key)

    def totals(self) -> Mapping[AppKey, Mapping[int, Counts]]:
        """Return app → release → all that was counted; a live view for the analysis of rollouts."""
        return self._totals

    def by_ingress(self) -> dict[AppKey, dict[str, dict[int, Counts]]]:
        """Return app → ingress → release → what that ingress has counted since it was started."""
        found: dict[AppKey, dict[str, dict[int, Counts]]] = {}
        for (ingress, app), (_, said) in self._said.items():
            found.setdefault(app, {})[ingress] = dict(said)
        return found

    def recent(self, key: AppKey) -> dict[int, tuple[Counts, float]]:
        """Return release → what was counted in about the last `RECENT_S`, and in how many seconds."""
        now = self._clock.monotonic()
        found: dict[int, tuple[Counts, float]] = {}
        for release, points in self._points.get(key, {}).items():
            at, base = next(((at, counts) for at, counts in reversed(points) if now - at >= RECENT_S), points[0])
            found[release] = (points[-1][1].since(base), min(RECENT_S, max(1.0, now - at)))
        return found

    def forget(self, key: AppKey) -> None:
        """The app is gone."""
        self._totals.pop(key, None)
        self._points.pop(key, None)
        for pair in [pair for pair in self._said if pair[1] == key]:
            del self._said[pair]

    def _point(self, key: AppKey, release: int, counts: Counts, now: float) -> None:
        points = self._points.setdefault(key, {}).setdefault(release, deque([(now, Counts())], maxlen=POINTS_MAX))
        if points[-1][0] < now or len(points) == 1:
            points.append((now, counts))
        else:
            points[-1] = (now, counts)
        while len(points) > 2 and now - points[1][0] >= RECENT_S:
            points.popleft()

    def _bound(self, key: AppKey) -> None:
        while len(self._totals[key]) > RELEASES_PER_APP_MAX:
            oldest = min(self._totals[key])
            self._totals[key].pop(oldest)
            self._points[key].pop(oldest, None)
            for (_, app), (_, said) in self._said.items():
                if app == key:
                    said.pop(oldest, None)
        if len(self._totals) > APPS_MAX:
            self.forget(next(iter(self._totals)))
