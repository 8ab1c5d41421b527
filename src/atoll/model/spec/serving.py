"""How an app is reached: ports, routes, health and metrics."""

from __future__ import annotations

import enum
import re
from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated

from msgspec import Meta

from atoll.model.errors import Invalid
from atoll.model.names import Name, PortNumber, SpecRecord
from atoll.model.spec.ingress import HeaderEdit, check_edit, check_header, check_timeout, check_value
from atoll.model.spec.values import Argument, check_unique, default
from atoll.model.units import Seconds

if TYPE_CHECKING:
    from atoll.model.spec.app import AppSpec

Hostname = Annotated[
    str,
    Meta(
        pattern=r"^(\*\.)?[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?(\.[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?)*$(?!\n)",
        description="a hostname of lower-case letters, digits, '-' and '.', as www.example.com or *.example.com",
        max_length=253,
    ),
]
ROUTE_HEADERS_MAX = 16
METRIC_PATTERN = r"^[a-zA-Z_:][a-zA-Z0-9_:]{0,127}$(?!\n)"


class PortProtocol(enum.StrEnum):
    HTTP = "http"
    TCP = "tcp"
    UDP = "udp"


class Port(SpecRecord, frozen=True, kw_only=True):
    """A port that the instance listens on. Nothing else of it can be reached."""

    name: Name = "http"
    port: PortNumber
    protocol: PortProtocol = PortProtocol.HTTP
    http2: bool = False
    """The instance speaks HTTP/2 without TLS (gRPC)."""
    host: PortNumber | None = None
    """The port is published as this one of its node's addresses, for anyone; no other instance of the node can have it."""


HOST_PORT_MIN = 1024
"""The lowest host port that a project may publish where its quota says nothing."""


def host_ports(ports: Iterable[Port]) -> tuple[str, ...]:
    """Return the ports of the node that `ports` are published on, as `tcp/8053`."""
    return tuple(f"{'udp' if port.protocol is PortProtocol.UDP else 'tcp'}/{port.host}" for port in ports if port.host is not None)


class Route(SpecRecord, frozen=True, kw_only=True):
    """A hostname and path that lead to the app's port."""

    host: Hostname
    path: Annotated[str, Meta(pattern=r"^/", max_length=1024, description="a path that begins with '/'")] = "/"
    port: Name | None = None
    """The name of the port; the first `http` port where absent."""
    headers: dict[str, Annotated[str, Meta(max_length=1024)]] = {}
    """Only requests with all of these; `*` for any value. Of two routes the one with more of them comes first."""
    timeout: Seconds | None = None
    """Instead of `ingress.timeout`."""
    retries: Annotated[int, Meta(ge=0, le=10)] | None = None
    """Instead of `ingress.retries`."""
    request_headers: HeaderEdit | None = None
    """After `ingress.request_headers`."""
    response_headers: HeaderEdit | None = None

    @property
    def place(self) -> str:
        """What no other route of the app may have: `/api/` and `/api` are one path."""
        wanted = "".join(f" {name}={value}" for name, value in sorted(self.headers.items()))
        return f"{self.host}{normal_path(self.path)}{wanted}"


def normal_path(path: str) -> str:
    """`/api/` and `/api` are one place."""
    return path.rstrip("/") or "/"


def check_route(field: str, route: Route) -> None:
    """Raise Invalid for what Envoy could not take of a route."""
    if len(route.headers) > ROUTE_HEADERS_MAX:
        raise Invalid(f"{field}.headers: at most {ROUTE_HEADERS_MAX}", field=f"{field}.headers")
    for name, value in route.headers.items():
        check_header(f"{field}.headers", name)
        check_value(f"{field}.headers", name, value)
    check_timeout(f"{field}.timeout", route.timeout)
    check_edit(f"{field}.request_headers", route.request_headers)
    check_edit(f"{field}.response_headers", route.response_headers)


class HealthKind(enum.StrEnum):
    HTTP = "http"
    TCP = "tcp"
    EXEC = "exec"


class Health(SpecRecord, frozen=True, kw_only=True):
    """When an instance counts as ready, and when it is restarted."""

    kind: HealthKind = HealthKind.TCP
    port: Name | None = None
    path: Annotated[str, Meta(pattern=r"^/", max_length=1024, description="a path that begins with '/'")] = "/"
    command: tuple[Argument, ...] = ()
    start: Seconds = default(Seconds(60))
    """How long it may take until the first success; failures before that do not count."""
    interval: Seconds = default(Seconds(5))
    timeout: Seconds = default(Seconds(2))
    retries: Annotated[int, Meta(ge=1, le=100)] = 3


class Metrics(SpecRecord, frozen=True, kw_only=True):
    """Where the node asks each ready instance for its metrics (Prometheus text), along with each heartbeat."""

    port: Name | None = None
    """The name of the port; the first `http` port where absent."""
    path: Annotated[str, Meta(pattern=r"^/", max_length=1024, description="a path that begins with '/'")] = "/metrics"
    names: Annotated[tuple[Annotated[str, Meta(max_length=128)], ...], Meta(max_length=16)] = ()
    """Those that are shown and kept, beside the one that `scale` names."""


def check_metrics(spec: AppSpec, metrics: Metrics) -> None:
    """Raise Invalid for metrics that no port of `spec` can give."""
    port = spec.port_named(metrics.port)
    if port is None or port.protocol is not PortProtocol.HTTP:
        raise Invalid(
            f"metrics.port: no http port {metrics.port or ''}".rstrip(),
            field="metrics.port",
            mend="add it to ports with protocol = 'http'",
        )
    if port.http2:
        raise Invalid(
            f"metrics.port: '{port.name}' speaks HTTP/2 only, and metrics are asked for in HTTP/1.1",
            field="metrics.port",
            mend="give the metrics away on an http port of their own, without http2",
        )
    for index, name in enumerate(metrics.names):
        if re.fullmatch(METRIC_PATTERN, name) is None:
            raise Invalid(
                f"metrics.names[{index}]: {name[:60]!r} is no metric's name",
                field=f"metrics.names[{index}]",
                mend="write it as the app gives it away, without labels: letters, digits, '_' and ':'",
            )
    check_unique(list(metrics.names), "metrics.names", "name")
