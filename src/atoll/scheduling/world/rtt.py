"""Round-trip times between places: measured where they were measured, else from the distance by a fitted line.

    rtt_ms = BASE_MS + MS_PER_KM * great-circle km

Fitted by least mean relative error to the 361 pairs of different regions in `data/rtt.json`: half of them are within 16 %,
nine in ten within 42 % (docs/placement.md). Light in fibre needs 0.0098 ms per km there and back; the rest is that cables go
round about.
"""

from __future__ import annotations

import json
from functools import lru_cache
from importlib import resources

import numpy as np
from msgspec import Struct

from atoll.scheduling.geography import BASE_MS, MS_PER_KM, Floats, great_circle_km

NEAR_KM = 100.0
"""A place at most so far from a measured region counts as being there."""


class Place(Struct, frozen=True, kw_only=True):
    """Where demand comes from, or where a site is. Latitude and longitude in degrees."""

    name: str
    title: str = ""
    country: str = ""
    latitude: float
    longitude: float


@lru_cache(maxsize=1)
def demo_places() -> tuple[Place, ...]:
    """Return 351 real places of a content network (see the file for its source and licence), by name."""
    data = json.loads(_text("places.json"))
    return tuple(
        Place(name=name, title=title, country=country, latitude=latitude, longitude=longitude)
        for name, title, country, latitude, longitude in data["places"]
    )


def distances_km(origins: tuple[Place, ...], targets: tuple[Place, ...]) -> Floats:
    """Return great-circle distances by the haversine formula, (origins, targets)."""
    a, b = (np.array([[place.latitude, place.longitude] for place in side], dtype=np.float64) for side in (origins, targets))
    return great_circle_km(a, b)


def round_trips_ms(origins: tuple[Place, ...], targets: tuple[Place, ...], *, measured: bool = True) -> Floats:
    """Return the matrix (origins, targets) of round-trip times in ms.

    With `measured`, a pair of which both ends are near regions of one measured network takes that measurement, corrected
    for the ends' own way to the region; all others are `BASE_MS + MS_PER_KM * km`.
    """
    answer: Floats = BASE_MS + MS_PER_KM * distances_km(origins, targets)
    if measured:
        for regions, times_ms in reversed(_measured()):
            near_origin, way_origin_km = _nearest(origins, regions)
            near_target, way_target_km = _nearest(targets, regions)
            both = (way_origin_km[:, None] <= NEAR_KM) & (way_target_km[None, :] <= NEAR_KM)
            # Within one region the distance is what matters; the measurement there is between two machines of one hall.
            both &= near_origin[:, None] != near_target[None, :]
            known = times_ms[near_origin[:, None], near_target[None, :]]
            known = known + MS_PER_KM * (way_origin_km[:, None] + way_target_km[None, :])
            answer = np.where(both, known, answer)
    return answer


@lru_cache(maxsize=1)
def _measured() -> tuple[tuple[tuple[Place, ...], Floats], ...]:
    networks = []
    for network in json.loads(_text("rtt.json"))["networks"]:
        regions = tuple(
            Place(name=name, latitude=latitude, longitude=longitude) for name, latitude, longitude in network["regions"]
        )
        times = np.asarray(network["avg_ms"], dtype=np.float64)
        networks.append((regions, (times + times.T) / 2.0))
    return tuple(networks)


def _nearest(places: tuple[Place, ...], regions: tuple[Place, ...]) -> tuple[np.ndarray[tuple[int], np.dtype[np.int64]], Floats]:
    away = distances_km(places, regions)
    nearest = away.argmin(axis=1)
    return nearest, away[np.arange(len(places)), nearest]


def _text(name: str) -> str:
    return resources.files(__package__).joinpath("data", name).read_text(encoding="utf-8")
