"""Where sites are, and how far from each other."""

from __future__ import annotations

from atoll.model.records.basis import Record


class Site(Record, frozen=True, kw_only=True):
    """A place where nodes stand, as operators describe it. Writer: API.

    Without the record a site's nodes run as before, but nobody knows where they are.
    """

    name: str
    region: str = ""
    """That of all its nodes, whatever they say; empty for what each says itself."""
    country: str = ""
    """Two letters of ISO 3166-1."""
    latitude: float | None = None
    longitude: float | None = None
    """In degrees, both or neither."""
    round_trips_ms: dict[str, float] = {}
    """To other sites, where operators know them. What ingresses measure comes first."""
    note: str = ""


class RoundTrips(Record, frozen=True, kw_only=True):
    """What an ingress measures to the other sites' ingresses. Writer: that ingress, through the API, which writes it rarely."""

    ingress: str
    site: str
    ms: dict[str, float]
    """Site → smoothed round trip."""
    at: float


INGRESS_PROBLEM = "ingress"
"""What no app's key is: it has no `/`."""


class IngressHeartbeat(Record, frozen=True, kw_only=True):
    """An ingress's sign of life: who asks here, and how far the other sites are. Never stored."""

    ingress: str
    site: str = "local"
    at: float
    requests: dict[str, float] = {}
    """`PROJECT/APP` → requests per second that come in here, smoothed over minutes; not all where they are many."""
    round_trips_ms: dict[str, float] = {}
    """Other site → smoothed round trip, of those that answer."""
    problems: dict[str, str] = {}
    """`PROJECT/APP` → what of its routing is left out here, and why, in words; at most 100.

    `INGRESS_PROBLEM` → what is wrong with the ingress itself.
    """
