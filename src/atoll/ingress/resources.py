"""From one app's routing to what Envoy is told: pure functions, with nothing of the control plane or of Envoy in them."""

from __future__ import annotations

import enum
import hashlib
import ipaddress
import re
from typing import NamedTuple

from envoy.config.core.v3 import config_source_pb2
from google.protobuf.message import Message
from msgspec import Struct

ROUTE_CONFIG = "http"
"""The name of the one route configuration; virtual hosts are resources of their own, named `http/HOST`."""
NOBODY = f"{ROUTE_CONFIG}/nobody.invalid"
"""A virtual host that no request can name."""
ANY = f"{ROUTE_CONFIG}/*"
"""A virtual host that answers for every name that has none of its own."""

ACCESS_LOG = "access.log"
STREAM_IDLE_S = 600
"""A request, stream or WebSocket on which nothing moves for so long is ended; nothing else limits its length."""
RETRIES = 4
RETRY_ON = "connect-failure,refused-stream,reset-before-request"
"""Only what no instance has begun to work on, so that it is safe for every method; `bootstrap.RETRY_SAFE_ON` adds to it."""
BREAKER_MAX = 1_000_000
"""Envoy's own limits (1,024 requests, 3 retries) turn a stampede into 503s; instances protect themselves."""
BUFFER_BYTES = 256 << 10
STREAMS_MAX = 256
"""HTTP/2 and HTTP/3 requests side by side on one connection."""
WINDOW_BYTES = 1 << 20
"""What a client may send of one of them, and of all on one connection, before Envoy has passed it on."""
SLOTS = 64
"""Envoy counts by zone, and each release has its own: as many as no two kept releases of an app share one (the API keeps 50). It
never forgets a zone's counts, so that one for each release there ever was would fill its memory."""
PATH_BYTES_MAX = 1024
HOSTNAME = re.compile(r"(\*\.)?[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?(\.[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?)*")
HTTP3_SECRET = "HTTP3/"  # noqa: S105 (a name)
"""Before a hostname: the secret that HTTP/3 shows for it. Under one name Envoy would tell the second who asks for it nothing."""
SHOWN = "to-instances/" + "-" * 256
"""The secret that the ingress shows to instances. No client can say a name of over 255 bytes (BoringSSL ends such a handshake), and
so none can have it shown to itself."""
PUBLIC = re.compile(r"(tcp|udp):([1-9][0-9]{0,4})")
"""A place that is a port of the ingress and no hostname."""
PATH = re.compile(r"/[A-Za-z0-9\-._~!$&'()*+,;=:@/%]*")


class Kind(enum.StrEnum):
    """Envoy's type URLs, in the order in which a new app's resources must arrive."""

    CLUSTER = "type.googleapis.com/envoy.config.cluster.v3.Cluster"
    ENDPOINTS = "type.googleapis.com/envoy.config.endpoint.v3.ClusterLoadAssignment"
    ROUTES = "type.googleapis.com/envoy.config.route.v3.RouteConfiguration"
    HOST = "type.googleapis.com/envoy.config.route.v3.VirtualHost"
    LISTENER = "type.googleapis.com/envoy.config.listener.v3.Listener"
    FILTER = "type.googleapis.com/envoy.config.core.v3.TypedExtensionConfig"
    SECRET = "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.Secret"  # noqa: S105 (a type)
    """Of a name that a client has said: asked for one by one, and answered also where there is none."""


Name = tuple[Kind, str]
"""What tells one resource from all others."""


class Resource(NamedTuple):
    """One named thing that Envoy is told; the version is made of the content, so that it means the same after a restart."""

    kind: Kind
    name: str
    version: str
    body: bytes
    ahead: bool = False
    """A virtual host that Envoy must have before the first request for it."""


class Target(Struct, frozen=True, order=True):
    """A port of an app, and how it is spoken to: what Envoy calls a cluster."""

    project: str
    app: str
    port: int
    http2: bool = False
    preview: bool = False
    """Of a release that does not have the app's requests yet."""
    raw: str = ""
    """`tcp` or `udp` where what is said on it is not HTTP, or nobody's matter."""

    @property
    def cluster(self) -> str:
        marks = ("h2" if self.http2 else "", "preview" if self.preview else "", self.raw)
        return "/".join((self.project, self.app, str(self.port), *filter(None, marks)))


class HostPath(Struct, frozen=True, order=True):
    """A place that an app can claim."""

    host: str
    path: str


class Problem(Struct, frozen=True):
    """Why part of an app's routing was left out."""

    app: str
    """`project/app`."""
    message: str


def resource(kind: Kind, name: str, message: Message, *, ahead: bool = False) -> Resource:
    return written(kind, name, message.SerializeToString(deterministic=True), ahead=ahead)


def written(kind: Kind, name: str, body: bytes, *, ahead: bool = False) -> Resource:
    """Return the resource whose message is `body` on the wire."""
    return Resource(kind, name, hashlib.blake2b(body, digest_size=9).hexdigest(), body, ahead)


def said(secret: str) -> str:
    """Return the hostname that a secret is for."""
    return secret.removeprefix(HTTP3_SECRET).lower()


def public_of(host: str) -> tuple[str, int] | None:
    """Return the protocol and the port of a place that is a port of the ingress; None for a hostname."""
    found = PUBLIC.fullmatch(host)
    return (found[1], int(found[2])) if found is not None and int(found[2]) < 65_536 else None


def check_host_path(host: str, path: str) -> str | None:
    """Return why Envoy could not take this hostname and path, or None. What it cannot take, it refuses with all else."""
    if path == "/" and public_of(host) is not None:
        return None
    if len(host) > 253 or HOSTNAME.fullmatch(host) is None or host.endswith(".invalid"):
        return f"{host[:80]!r} is not a hostname"
    if len(path) > PATH_BYTES_MAX or PATH.fullmatch(path) is None:
        return f"{path[:80]!r} is not a path prefix"
    return None


def check_address(address: str) -> str | None:
    """Return why no request can be sent to `address`, or None."""
    try:
        ip = ipaddress.ip_address(address)
    except ValueError:
        return f"{address[:80]!r} is not an IP address"
    return f"{address} is no instance's address" if ip.is_multicast or ip.is_unspecified else None


def zone_of(release: int) -> str:
    """Return what Envoy counts a release under."""
    return f"r{release % SLOTS}"


def from_us() -> config_source_pb2.ConfigSource:
    return config_source_pb2.ConfigSource(
        ads=config_source_pb2.AggregatedConfigSource(), resource_api_version=config_source_pb2.ApiVersion.V3
    )
