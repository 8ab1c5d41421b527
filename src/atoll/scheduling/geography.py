"""Where sites are, and how long a round trip between two of them takes: measured, else known to operators, else from the distance.

    rtt_ms = BASE_MS + MS_PER_KM * great-circle km

The line is fitted to measured pairs of cloud regions (docs/placement.md). What no site record places has no known distance to
anything but itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt

from atoll.model.records import RoundTrips, Site

Floats = npt.NDArray[np.float64]

EARTH_KM = 6371.0088
"""Mean radius (IUGG)."""
BASE_MS = 3.0
MS_PER_KM = 0.0154
LOCAL_MS = 0.5
"""Within one site."""
UNKNOWN = float("inf")
ROUND_TRIP_MS_MAX = 10_000.0
"""Longer ones are not believed."""


def great_circle_km(origins: Floats, targets: Floats) -> Floats:
    """Return distances by the haversine formula, (origins, targets), of rows of latitude and longitude in degrees."""
    a, b = np.radians(origins.reshape(-1, 2)), np.radians(targets.reshape(-1, 2))
    latitude = np.sin((a[:, None, 0] - b[None, :, 0]) / 2) ** 2
    longitude = np.sin((a[:, None, 1] - b[None, :, 1]) / 2) ** 2
    chord = latitude + np.cos(a[:, None, 0]) * np.cos(b[None, :, 0]) * longitude
    answer: Floats = 2 * EARTH_KM * np.arcsin(np.sqrt(np.clip(chord, 0.0, 1.0)))
    return answer


class Geography:
    """What is known of sites. Never changes: build a new one."""

    def __init__(self, sites: Iterable[Site] = (), measured: Iterable[RoundTrips] = ()) -> None:
        self.sites = {site.name: site for site in sites}
        measured = list(measured)
        names = sorted({*self.sites, *(one.site for one in measured)})
        self._index = {name: place for place, name in enumerate(names)}
        self._points = np.array([_point(self.sites.get(name)) for name in names], dtype=np.float64).reshape(-1, 2)
        ms = BASE_MS + MS_PER_KM * great_circle_km(self._points, self._points)
        self._ms: Floats = np.where(np.isnan(ms), UNKNOWN, ms)
        self._told((site.name, site.round_trips_ms) for site in self.sites.values())
        self._told((one.site, one.ms) for one in measured)
        np.fill_diagonal(self._ms, LOCAL_MS)

    def _told(self, rows: Iterable[tuple[str, dict[str, float]]]) -> None:
        """Take over what is known of pairs, in place of what was there; of several words on a pair the mean."""
        total, count = np.zeros_like(self._ms), np.zeros_like(self._ms)
        for name, row in rows:
            here = self._index[name]
            for other, ms in row.items():
                there = self._index.get(other)
                if there is not None and 0 < ms <= ROUND_TRIP_MS_MAX:
                    total[here, there] += ms
                    count[here, there] += 1
        total, count = total + total.T, count + count.T
        known = count > 0
        self._ms[known] = total[known] / count[known]

    def round_trips_ms(self, origins: Sequence[str], targets: Sequence[str]) -> Floats:
        """Return the matrix (origins, targets) in ms; `UNKNOWN` where nobody knows."""
        rows, columns = self._places(origins), self._places(targets)
        if len(self._ms):
            found = self._ms[rows[:, None], columns[None, :]]
            known = (rows[:, None] >= 0) & (columns[None, :] >= 0)
            answer: Floats = np.where(known, found, UNKNOWN)
        else:
            answer = np.full((len(rows), len(columns)), UNKNOWN)
        same = np.array(origins, dtype=object)[:, None] == np.array(targets, dtype=object)[None, :]
        answer[same.astype(np.bool_)] = LOCAL_MS
        return answer

    def from_point_ms(self, latitude: float, longitude: float, targets: Sequence[str]) -> Floats:
        """Return the round trips from a point on earth, estimated; `UNKNOWN` where a site has no coordinates."""
        ms = BASE_MS + MS_PER_KM * great_circle_km(np.array([latitude, longitude]), self._points)[0]
        places = self._places(targets)
        padded = np.append(np.where(np.isnan(ms), UNKNOWN, ms), UNKNOWN)
        answer: Floats = padded[places]
        return answer

    def _places(self, names: Sequence[str]) -> npt.NDArray[np.int64]:
        return np.fromiter((self._index.get(name, -1) for name in names), dtype=np.int64, count=len(names))


def _point(site: Site | None) -> tuple[float, float]:
    if site is None or site.latitude is None or site.longitude is None:
        return (np.nan, np.nan)
    return (site.latitude, site.longitude)
