"""From one app's routing to what Envoy is told: pure functions, with nothing of the control plane or of Envoy in them."""

from __future__ import annotations

import enum
import hashlib
import ipaddress
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from envoy.config.cluster.v3 import circuit_breaker_pb2, cluster_pb2
from envoy.config.core.v3 import address_pb2, base_pb2, config_source_pb2, health_check_pb2, protocol_pb2
from envoy.config.endpoint.v3 import endpoint_components_pb2, endpoint_pb2
from envoy.config.route.v3 import route_components_pb2, route_pb2
from envoy.extensions.upstreams.http.v3 import http_protocol_options_pb2
from google.protobuf import any_pb2, duration_pb2, wrappers_pb2
from msgspec import Struct

from atoll.model.records import Endpoint

ROUTE_CONFIG = "http"
"""The name of the one route configuration; virtual hosts are resources of their own, named `http/HOST`."""

CONNECT_TIMEOUT_S = 2
UPSTREAM_IDLE_S = 4
"""Below the 5 s after which common web servers close an idle connection, so that no request meets a closing one."""
STREAM_IDLE_S = 600
"""A request, stream or WebSocket on which nothing moves for so long is ended; nothing else limits its length."""
RETRIES = 4
OTHER_HOST_TRIES = 32
"""Draws for an instance that this request has not met yet. The one that just died has the fewest requests, so of two the
balancer draws it three times in four: with Envoy's usual three draws, one request in fifty met it at all five attempts."""
RETRY_BASE_MS = 25
RETRY_MAX_MS = 250
RETRY_ON = "connect-failure,refused-stream,reset-before-request"
"""Only what no instance has begun to work on, so that it is safe for every method; `bootstrap.RETRY_SAFE_ON` adds to it."""
BREAKER_MAX = 1_000_000
"""Envoy's own limits (1,024 requests, 3 retries) turn a stampede into 503s; instances protect themselves."""
BUFFER_BYTES = 256 << 10
SLOTS = 64
"""Envoy counts by zone, and each release has its own: as many as no two kept releases of an app share one (the API keeps 50). It
never forgets a zone's counts, so that one for each release there ever was would fill its memory."""
WHOLE = 10_000_000
"""Envoy takes from the weight of releases that drain, as if they could not bear it; with an overprovisioning factor as large as
this (in percent, 140 where it is left out) it does not, and weights are kept to."""
ASLEEP = "asleep"
"""The zone of the activator: what Envoy counts under it is no release's."""
PATH_BYTES_MAX = 1024
HOSTNAME = re.compile(r"(\*\.)?[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?(\.[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?)*")
PATH = re.compile(r"/[A-Za-z0-9\-._~!$&'()*+,;=:@/%]*")


class Kind(enum.StrEnum):
    """Envoy's type URLs, in the order in which a new app's resources must arrive."""

    CLUSTER = "type.googleapis.com/envoy.config.cluster.v3.Cluster"
    ENDPOINTS = "type.googleapis.com/envoy.config.endpoint.v3.ClusterLoadAssignment"
    ROUTES = "type.googleapis.com/envoy.config.route.v3.RouteConfiguration"
    HOST = "type.googleapis.com/envoy.config.route.v3.VirtualHost"


Name = tuple[Kind, str]
"""What tells one resource from all others."""


class Resource(NamedTuple):
    """One named thing that Envoy is told; the version is made of the content, so that it means the same after a restart."""

    kind: Kind
    name: str
    version: str
    body: bytes


class Target(Struct, frozen=True, order=True):
    """A port of an app, and how it is spoken to: what Envoy calls a cluster."""

    project: str
    app: str
    port: int
    http2: bool = False
    preview: bool = False
    """Of a release that does not have the app's requests yet."""

    @property
    def cluster(self) -> str:
        return f"{self.project}/{self.app}/{self.port}{'/h2' if self.http2 else ''}{'/preview' if self.preview else ''}"


class HostPath(Struct, frozen=True, order=True):
    """A place that an app can claim."""

    host: str
    path: str


class Problem(Struct, frozen=True):
    """Why part of an app's routing was left out."""

    app: str
    """`project/app`."""
    message: str


def resource(kind: Kind, name: str, message: cluster_pb2.Cluster) -> Resource:
    body = message.SerializeToString(deterministic=True)
    return Resource(kind, name, hashlib.blake2b(body, digest_size=9).hexdigest(), body)


def check_host_path(host: str, path: str) -> str | None:
    """Return why Envoy could not take this hostname and path, or None. What it cannot take, it refuses with all else."""
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


def cluster(target: Target) -> Resource:
    """Return how the instances of `target` are spoken to; their addresses come apart from it."""
    message = cluster_pb2.Cluster(
        name=target.cluster,
        type=cluster_pb2.Cluster.EDS,
        eds_cluster_config=cluster_pb2.Cluster.EdsClusterConfig(eds_config=_from_us()),
        connect_timeout=duration_pb2.Duration(seconds=CONNECT_TIMEOUT_S),
        lb_policy=cluster_pb2.Cluster.LEAST_REQUEST,
        per_connection_buffer_limit_bytes=wrappers_pb2.UInt32Value(value=BUFFER_BYTES),
    )
    # Without this, an app whose endpoints all drain would have its requests sent to them nevertheless.
    message.common_lb_config.healthy_panic_threshold.value = 0
    message.common_lb_config.locality_weighted_lb_config.SetInParent()
    breaker = circuit_breaker_pb2.CircuitBreakers.Thresholds()
    for limit in (breaker.max_connections, breaker.max_pending_requests, breaker.max_requests, breaker.max_retries):
        limit.value = BREAKER_MAX
    message.circuit_breakers.thresholds.append(breaker)
    options = http_protocol_options_pb2.HttpProtocolOptions()
    options.common_http_protocol_options.CopyFrom(
        protocol_pb2.HttpProtocolOptions(idle_timeout=duration_pb2.Duration(seconds=UPSTREAM_IDLE_S))
    )
    if target.http2:
        options.explicit_http_config.http2_protocol_options.allow_connect = True
    else:
        options.explicit_http_config.http_protocol_options.SetInParent()
    packed = any_pb2.Any()
    packed.Pack(options)
    message.typed_extension_protocol_options["envoy.extensions.upstreams.http.v3.HttpProtocolOptions"].CopyFrom(packed)
    return resource(Kind.CLUSTER, target.cluster, message)


def endpoints(
    target: Target, places: Iterable[Endpoint], weights: Mapping[int, int] = {}, *, activator: str | None = None
) -> Resource:
    """Return where the instances of `target` are, each release a locality of its own.

    A draining one gets no new request; one at a bad address is left out. A release gets requests by its weight, or without weights
    by how many of its instances serve; what of it cannot be had goes to the others that have a weight.
    `activator` is the socket that requests go to where there is no other place for them.
    """
    known: dict[str, Endpoint] = {}
    for place in places:
        before = known.get(place.address)
        if check_address(place.address) is None and (before is None or before.draining):
            known[place.address] = place
    message = endpoint_pb2.ClusterLoadAssignment(cluster_name=target.cluster)
    message.policy.overprovisioning_factor.value = WHOLE
    for release in sorted({place.release for place in known.values()}):
        own = {address: place for address, place in known.items() if place.release == release}
        group = message.endpoints.add()
        group.locality.zone = zone_of(release)
        weight = weights.get(release, 0) if weights else sum(not place.draining for place in own.values())
        if weight:
            group.load_balancing_weight.value = weight
        for address, place in sorted(own.items()):
            socket = address_pb2.SocketAddress(address=address, port_value=target.port)
            group.lb_endpoints.append(
                endpoint_components_pb2.LbEndpoint(
                    endpoint=endpoint_components_pb2.Endpoint(address=address_pb2.Address(socket_address=socket)),
                    health_status=health_check_pb2.DRAINING if place.draining else health_check_pb2.HEALTHY,
                )
            )
    if activator is not None:
        group = message.endpoints.add()
        group.locality.zone = ASLEEP
        group.load_balancing_weight.value = 1
        pipe = address_pb2.Address(pipe=address_pb2.Pipe(path=activator))
        group.lb_endpoints.append(
            endpoint_components_pb2.LbEndpoint(
                endpoint=endpoint_components_pb2.Endpoint(address=pipe), health_status=health_check_pb2.HEALTHY
            )
        )
    return resource(Kind.ENDPOINTS, target.cluster, message)


def zone_of(release: int) -> str:
    """Return what Envoy counts a release under."""
    return f"r{release % SLOTS}"


def virtual_host(host: str, routes: Sequence[tuple[str, Target]]) -> Resource:
    """Return what a hostname leads to; of several path prefixes that match, the longest wins."""
    name = f"{ROUTE_CONFIG}/{host}"
    ordered = sorted(routes, key=lambda route: (-len(route[0].rstrip("/")), route[0]))
    message = route_components_pb2.VirtualHost(name=name, domains=[host], routes=[_route(path, to) for path, to in ordered])
    message.include_request_attempt_count = False
    return resource(Kind.HOST, name, message)


def nobody() -> Resource:
    """Return a virtual host that no request can name. Without any, Envoy waits 15 s for one before it begins to listen."""
    name = f"{ROUTE_CONFIG}/nobody.invalid"
    route = route_components_pb2.Route(match=route_components_pb2.RouteMatch(prefix="/"))
    route.direct_response.status = 404
    return resource(Kind.HOST, name, route_components_pb2.VirtualHost(name=name, domains=["nobody.invalid"], routes=[route]))


def route_configuration() -> Resource:
    """Return the frame that the virtual hosts go into. It never changes."""
    message = route_pb2.RouteConfiguration(
        name=ROUTE_CONFIG,
        vhds=route_pb2.Vhds(config_source=_from_us()),
        # The Host header reaches the app with its port, as the client wrote it; only the choice of the app ignores it.
        ignore_port_in_host_matching=True,
        request_headers_to_remove=["x-envoy-external-address"],
    )
    for header, value in (("x-forwarded-host", "%REQ(:AUTHORITY)%"), ("x-forwarded-port", "%DOWNSTREAM_LOCAL_PORT%")):
        message.request_headers_to_add.append(
            base_pb2.HeaderValueOption(
                header=base_pb2.HeaderValue(key=header, value=value),
                append_action=base_pb2.HeaderValueOption.OVERWRITE_IF_EXISTS_OR_ADD,
            )
        )
    return resource(Kind.ROUTES, ROUTE_CONFIG, message)


def _route(path: str, target: Target) -> route_components_pb2.Route:
    """`/api` matches `/api` and `/api/…` but not `/apis`; `/api/` matches just what begins with it."""
    match = route_components_pb2.RouteMatch()
    if path.endswith("/"):
        match.prefix = path
    else:
        match.path_separated_prefix = path
    retry = route_components_pb2.RetryPolicy(
        retry_on=RETRY_ON,
        num_retries=wrappers_pb2.UInt32Value(value=RETRIES),
        host_selection_retry_max_attempts=OTHER_HOST_TRIES,
    )
    retry.retry_host_predicate.add(
        name="envoy.retry_host_predicates.previous_hosts"
    ).typed_config.type_url = "type.googleapis.com/envoy.extensions.retry.host.previous_hosts.v3.PreviousHostsPredicate"
    retry.retry_back_off.base_interval.FromMilliseconds(RETRY_BASE_MS)
    retry.retry_back_off.max_interval.FromMilliseconds(RETRY_MAX_MS)
    action = route_components_pb2.RouteAction(
        cluster=target.cluster,
        timeout=duration_pb2.Duration(),
        idle_timeout=duration_pb2.Duration(seconds=STREAM_IDLE_S),
        retry_policy=retry,
    )
    return route_components_pb2.Route(name=f"{target.project}/{target.app}", match=match, route=action)


def _from_us() -> config_source_pb2.ConfigSource:
    return config_source_pb2.ConfigSource(
        ads=config_source_pb2.AggregatedConfigSource(), resource_api_version=config_source_pb2.ApiVersion.V3
    )
