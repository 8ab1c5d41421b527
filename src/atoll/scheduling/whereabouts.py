"""What a snapshot knows of places: where sites are, where requests come from, and how many instances each site should have."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

import numpy as np
from msgspec import Struct

from atoll.model.records import IngressHeartbeat, OwnerKind
from atoll.scheduling.geography import Floats, Geography

TRAFFIC_MIN = 0.01
"""Requests per second of an app, all sites together, below which it counts as having none yet."""


class Layout(Struct, frozen=True, kw_only=True):
    """How many instances of an app each site should have, for those who use it to wait least."""

    wanted: dict[str, int]
    latency_ms: float = 0.0
    """Mean round trip over all requests that are served, were it so."""
    unserved: float = 0.0
    """The share of requests from places that no site may serve: too far away, or without room."""

    @property
    def count(self) -> int:
        return sum(self.wanted.values())


class Users(Struct, frozen=True):
    """Where an app's requests come from: sites, by name, and what each has of all."""

    sites: tuple[str, ...]
    shares: Floats
    known: bool
    """False where nothing has been counted yet: then every site with an ingress counts the same."""


class Whereabouts:
    """Owned by the snapshot; replaced part by part."""

    def __init__(self) -> None:
        self.geography = Geography()
        self.entrances: tuple[str, ...] = ()
        """Sites with an ingress."""
        self.traffic: Mapping[str, Mapping[str, float]] = {}
        """Owner → site → requests per second that come in there."""
        self.layouts: dict[str, Layout] = {}
        """Owner → where its instances should be."""

    def copy(self) -> Whereabouts:
        """Return another that says the same, and changes by itself."""
        other = Whereabouts()
        other.geography, other.entrances, other.traffic = self.geography, self.entrances, self.traffic
        other.layouts = dict(self.layouts)
        return other

    def users(self, owner: str) -> Users:
        """Return where the owner's requests come from; no sites where there is no ingress either."""
        traffic = self.traffic.get(owner, {})
        total = sum(traffic.values())
        if total >= TRAFFIC_MIN:
            sites = tuple(sorted(site for site, rate in traffic.items() if rate > 0))
            return Users(sites, np.array([traffic[site] for site in sites], dtype=np.float64) / total, True)
        sites = tuple(sorted(set(self.entrances)))
        return Users(sites, np.full(len(sites), 1.0 / max(1, len(sites))), False)


def traffic_of(beats: Iterable[IngressHeartbeat], apps: Collection[str] | None = None) -> dict[str, dict[str, float]]:
    """Return owner → site → requests per second, as ingresses say; only of `apps` (`PROJECT/NAME`) where they are given."""
    traffic: dict[str, dict[str, float]] = {}
    for beat in beats:
        keys = beat.requests.keys() if apps is None else [key for key in apps if key in beat.requests]
        for key in keys:
            rates = traffic.setdefault(f"{OwnerKind.APP}/{key}", {})
            rates[beat.site] = rates.get(beat.site, 0.0) + beat.requests[key]
    return traffic
