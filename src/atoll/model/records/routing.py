"""What ingresses serve, and what they say of it."""

from __future__ import annotations

from atoll.model.records.basis import Record
from atoll.model.spec import AppSpec, PortProtocol


class Drained(Record, frozen=True, kw_only=True):
    """An ingress has no active request to a draining instance and sends it no more. Writer: that ingress."""

    instance: str
    ingress: str
    at: float


class Ingress(Record, frozen=True, kw_only=True):
    """An ingress that serves. Writer: the ingress, on registration."""

    name: str
    site: str = "local"
    http_port: int
    https_port: int = 0
    """Where it speaks TLS; 0 for nowhere."""
    domain: str = "localhost"
    address: str = ""
    """Where other sites reach it at `http_port`; empty where nobody knows."""
    registered_at: float = 0.0


class RouteClaim(Record, frozen=True, kw_only=True):
    """Which app owns a hostname and path, so that no two do; all of one hostname are of one project. Writer: API."""

    project: str
    app: str


class RouteHost(Record, frozen=True, kw_only=True):
    """Written with each new claim on a hostname, so that of two projects that claim paths of it at once one does. Writer: API."""

    project: str


class Endpoint(Record, frozen=True, kw_only=True):
    """A place where requests for an app may go."""

    instance: str
    node: str
    site: str = "local"
    address: str
    draining: bool = False
    release: int = 0
    """What it runs; 0 where that was not told."""


class Preview(Record, frozen=True, kw_only=True):
    """A release at a hostname of its own, on the app's first `http` port."""

    host: str
    release: int
    port: int
    http2: bool = False
    endpoints: tuple[Endpoint, ...] = ()


class Rule(Record, frozen=True, kw_only=True):
    """A place that only requests with certain headers are led by; it goes before what `Routing.hosts` says of the place."""

    host: str
    path: str
    port: int
    http2: bool = False
    headers: dict[str, str]
    """Name → value; `*` for any."""


class Listening(Record, frozen=True, kw_only=True):
    """A port of the ingress that leads to a port of the app's instances, whatever is said on it."""

    public: int
    protocol: PortProtocol
    port: int


class Routing(Record, frozen=True, kw_only=True):
    """All that an ingress needs for one app. `routes` are complete: the default hostname is among them."""

    project: str
    app: str
    spec: AppSpec
    hosts: tuple[tuple[str, str, int, bool], ...]
    """(hostname, path prefix, port number, HTTP/2 to the instance)."""
    rules: tuple[Rule, ...] = ()
    endpoints: tuple[Endpoint, ...] = ()
    weights: dict[int, int] = {}
    """Release → percent of the requests, 100 in all, however many endpoints it has; empty: to every endpoint alike."""
    preview: Preview | None = None
    """Where a release answers before it gets the app's requests."""
    wakes: bool = False
    """A request that finds no endpoint waits while the ingress has the app woken (`ControlPlane.demand`)."""
    starting: tuple[Endpoint, ...] = ()
    """Of an app that wakes, has no health check and no endpoint: where instances will be that have an address already. One is
    ready when it takes a connection, which who waits for it may find out by himself."""
    canary: int = 0
    """The release that requests which `spec.ingress.canary` chooses go to; 0 while there is none."""
    listens: tuple[Listening, ...] = ()
    """Where the ingress takes TCP connections and UDP datagrams for it."""
    project_rate: int | None = None
    """Requests per second that each ingress lets through to all apps of the project together; None for no limit."""
