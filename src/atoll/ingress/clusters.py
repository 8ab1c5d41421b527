"""How the instances of an app are spoken to, and where they are: Envoy's clusters and endpoints. Pure."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable, Mapping, Sequence

from envoy.config.cluster.v3 import circuit_breaker_pb2, cluster_pb2, outlier_detection_pb2
from envoy.config.core.v3 import address_pb2, health_check_pb2, protocol_pb2, socket_option_pb2
from envoy.config.endpoint.v3 import endpoint_components_pb2, endpoint_pb2
from envoy.config.route.v3 import route_components_pb2
from envoy.extensions.retry.priority.previous_priorities.v3 import previous_priorities_config_pb2
from envoy.extensions.upstreams.http.v3 import http_protocol_options_pb2
from google.protobuf import any_pb2, duration_pb2, wrappers_pb2
from msgspec import Struct

from atoll.ingress import tls
from atoll.ingress.resources import (
    BREAKER_MAX,
    BUFFER_BYTES,
    RETRY_ON,
    Kind,
    Resource,
    Target,
    check_address,
    from_us,
    resource,
    written,
    zone_of,
)
from atoll.model.fabric import DOMAIN
from atoll.model.records import Endpoint
from atoll.model.spec import IngressRules

CONNECT_TIMEOUT_S = 2
WAKE_MARGIN_S = 5
"""Beyond the longest wait for an app to wake: the activator says first that it has not."""
UPSTREAM_IDLE_S = 4
"""Below the 5 s after which common web servers close an idle connection, so that no request meets a closing one."""
OTHER_HOST_TRIES = 32
"""Draws for an instance that this request has not met yet. The one that just died has the fewest requests, so of two the
balancer draws it three times in four: with Envoy's usual three draws, one request in fifty met it at all five attempts."""
RETRY_BASE_MS = 25
RETRY_MAX_MS = 250
WHOLE = 10_000_000
"""Envoy takes from the weight of releases that drain, as if they could not bear it; with an overprovisioning factor as large as
this (in percent, 140 where it is left out) it does not, and weights are kept to."""
SPILL = 140
"""Percent: while fewer than 100 of 140 of a site's instances are well, requests go on to the next site in that measure."""
ASLEEP = "asleep"
"""The zone of the activator: what Envoy counts under it is no release's."""
LEVELS_MAX = 4
"""Sites that are tried one after the other; those that are farther away count as one."""
METADATA = "atoll"
"""Under which an endpoint says its instance, release and site, for the access log."""

AWAY_CONNECT_MS = 600
"""To connect, for an app at several sites: a site that has gone dark is left for the next one in less than a second."""
AWAY_FAILURES = 2
"""Connections in a row that fail, after which an instance is left out."""
UDP_SESSIONS_MAX = 4_096
"""Clients of a UDP port at a time, each an address and a port, which anybody can make up, and a socket of Envoy's for `UDP_IDLE_S`.
Those that are more have their datagrams dropped."""
UDP_CLIENTS_MAX = 65_536
"""Of all UDP ports of an ingress together."""
RAW_SHARE = 50
"""Percent of the instances of a TCP port that may be left out at a time."""
AWAY_EJECT_MS, AWAY_EJECT_MAX_MS = 1_000, 5_000
"""For how long; then it is tried again. The control plane takes what is lost away after some 4 s."""
AWAY_UNACKNOWLEDGED_MS = 2_000
"""A connection on which the other side's kernel says nothing for so long has broken; one lost packet over an ocean is no break."""
CLOSER, CLOSER_MS = 0.85, 1.0
"""A site comes before another when it is nearer by so much."""
_TCP, _TCP_USER_TIMEOUT = 6, 18
_FAR = float("inf")


class Nearness(Struct, frozen=True):
    """How far the sites are from this ingress; of its own it is 0, and others that nobody knows are farthest."""

    site: str = "local"
    ms: dict[str, float] = {}

    def of(self, site: str) -> float:
        return 0.0 if site == self.site else self.ms.get(site, _FAR)

    def holds(self, ms: Mapping[str, float]) -> bool:
        """Whether the order of the sites is still so by these round trips; what is about as far changes nothing."""
        if self.ms.keys() != ms.keys():
            return False
        order = sorted(self.ms, key=lambda site: (self.ms[site], site))
        return not any(ms[later] < ms[sooner] * CLOSER - CLOSER_MS for sooner, later in itertools.pairwise(order))


def cluster(target: Target, rules: IngressRules | None = None, *, sites: bool = False, wake_s: float = 0.0) -> Resource:
    """Return how the instances of `target` are spoken to; their addresses come apart from it.

    `sites`: they are, or were, at several sites. Envoy counts requests of a cluster that changes anew, so this stays once it is so.
    `wake_s` is the longest wait for the app to wake, 0 for one that never sleeps.
    """
    internal = f"{target.app}.{target.project}.{DOMAIN}"
    if rules is None:
        rest = _usual(target.http2, target.raw, sites)
    else:
        rest = _cluster(rules, target.http2, target.raw, sites, internal, 0.0 if target.preview else wake_s)
    # Messages that follow one another on the wire are one.
    return written(Kind.CLUSTER, target.cluster, cluster_pb2.Cluster(name=target.cluster).SerializeToString() + rest)


@functools.cache
def _usual(http2: bool, raw: str, sites: bool) -> bytes:
    """All clusters without rules differ by their names alone, and there are thousands of them."""
    return _cluster(IngressRules(), http2, raw, sites)


def _cluster(rules: IngressRules, http2: bool, raw: str, sites: bool, internal: str = "", wake_s: float = 0.0) -> bytes:
    message = cluster_pb2.Cluster(
        type=cluster_pb2.Cluster.EDS,
        eds_cluster_config=cluster_pb2.Cluster.EdsClusterConfig(eds_config=from_us()),
        connect_timeout=duration_pb2.Duration(seconds=CONNECT_TIMEOUT_S),
        lb_policy=cluster_pb2.Cluster.LEAST_REQUEST,
        per_connection_buffer_limit_bytes=wrappers_pb2.UInt32Value(value=BUFFER_BYTES),
    )
    # Without this, an app whose endpoints all drain would have its requests sent to them nevertheless.
    message.common_lb_config.healthy_panic_threshold.value = 0
    message.common_lb_config.locality_weighted_lb_config.SetInParent()
    message.circuit_breakers.thresholds.append(_breaker(rules, udp=raw == "udp"))
    if rules.outliers is not None or sites or raw:
        message.outlier_detection.CopyFrom(_outliers(rules, sites=sites, raw=bool(raw)))
    if sites:
        message.connect_timeout.FromMilliseconds(AWAY_CONNECT_MS)
    shaking_s = wake_s + WAKE_MARGIN_S if wake_s and not raw and rules.instance_tls is not None else 0.0
    if shaking_s:
        # It covers the handshake, which begins at the activator and which only an instance can end.
        message.connect_timeout.FromMilliseconds(round(shaking_s * 1000))
    if (sites and raw != "udp") or shaking_s:
        # A machine that is away answers nothing at all, and is given up long before a handshake that an instance may still end.
        message.upstream_bind_config.socket_options.add(
            description="TCP_USER_TIMEOUT",
            level=_TCP,
            name=_TCP_USER_TIMEOUT,
            int_value=AWAY_UNACKNOWLEDGED_MS,
            state=socket_option_pb2.SocketOption.STATE_PREBIND,
        )
    if not raw:
        _speak_http(message, rules, http2, sites=sites, internal=internal)
    body: bytes = message.SerializeToString(deterministic=True)
    return body


def _speak_http(message: cluster_pb2.Cluster, rules: IngressRules, http2: bool, *, sites: bool, internal: str) -> None:
    options = http_protocol_options_pb2.HttpProtocolOptions(retry_policy=tries(rules, sites=sites))
    options.common_http_protocol_options.CopyFrom(
        protocol_pb2.HttpProtocolOptions(idle_timeout=duration_pb2.Duration(seconds=UPSTREAM_IDLE_S))
    )
    if rules.instance_tls is not None:
        message.transport_socket.CopyFrom(tls.to_instances(rules.instance_tls, http2=http2, internal=internal))
    if http2:
        options.explicit_http_config.http2_protocol_options.allow_connect = True
    else:
        options.explicit_http_config.http_protocol_options.SetInParent()
    packed = any_pb2.Any()
    packed.Pack(options)
    message.typed_extension_protocol_options["envoy.extensions.upstreams.http.v3.HttpProtocolOptions"].CopyFrom(packed)


def _breaker(rules: IngressRules, *, udp: bool) -> circuit_breaker_pb2.CircuitBreakers.Thresholds:
    breaker = circuit_breaker_pb2.CircuitBreakers.Thresholds()
    for limit in (breaker.max_connections, breaker.max_pending_requests, breaker.max_requests, breaker.max_retries):
        limit.value = BREAKER_MAX
    limits = rules.limits
    if limits is not None:
        if limits.connections is not None:
            breaker.max_connections.value = limits.connections
        if limits.requests is not None:
            breaker.max_requests.value = limits.requests
        if limits.pending is not None:
            breaker.max_pending_requests.value = limits.pending
    if udp:
        breaker.max_connections.value = udp_clients(rules)
    return breaker


def udp_clients(rules: IngressRules | None) -> int:
    """Return how many clients a UDP port of an app with these rules may have at a time."""
    wanted = rules.limits.connections if rules is not None and rules.limits is not None else None
    return UDP_SESSIONS_MAX if wanted is None else min(wanted, UDP_SESSIONS_MAX)


def _outliers(rules: IngressRules, *, sites: bool, raw: bool) -> outlier_detection_pb2.OutlierDetection:
    """Connections that fail and answers that are errors are counted apart: the one is of the way, the other of the app."""
    detection = outlier_detection_pb2.OutlierDetection(split_external_local_origin_errors=True)
    detection.interval.FromMilliseconds(250)
    detection.enforcing_success_rate.value = 0
    detection.enforcing_local_origin_success_rate.value = 0
    detection.enforcing_consecutive_gateway_failure.value = 0
    own = rules.outliers
    if own is not None:
        detection.consecutive_5xx.value = own.failures
        detection.base_ejection_time.FromMilliseconds(round(own.eject * 1000))
        detection.max_ejection_time.FromMilliseconds(max(300_000, round(own.eject * 1000)))
        detection.max_ejection_percent.value = own.share
        detection.always_eject_one_host.value = True
    else:
        detection.enforcing_consecutive_5xx.value = 0
        detection.base_ejection_time.FromMilliseconds(AWAY_EJECT_MS)
        detection.max_ejection_time.FromMilliseconds(AWAY_EJECT_MAX_MS)
    if sites:
        detection.max_ejection_percent.value = 100
        detection.consecutive_local_origin_failure.value = AWAY_FAILURES
    elif own is not None:
        detection.consecutive_local_origin_failure.value = own.failures
    elif raw:
        # A connection has no memory of where it was tried; an app's only instance is never left out.
        detection.max_ejection_percent.value = RAW_SHARE
        detection.consecutive_local_origin_failure.value = AWAY_FAILURES
    return detection


def tries(rules: IngressRules, *, sites: bool) -> route_components_pb2.RetryPolicy:
    """It belongs to the cluster and not to routes, of which ten thousand are made anew whenever one changes."""
    conditions = [RETRY_ON, *(["retriable-status-codes"] if rules.retry_statuses else [])]
    retry = route_components_pb2.RetryPolicy(
        retry_on=",".join(conditions),
        num_retries=wrappers_pb2.UInt32Value(value=rules.retries),
        retriable_status_codes=rules.retry_statuses,
        host_selection_retry_max_attempts=OTHER_HOST_TRIES,
    )
    retry.retry_host_predicate.add(
        name="envoy.retry_host_predicates.previous_hosts"
    ).typed_config.type_url = "type.googleapis.com/envoy.extensions.retry.host.previous_hosts.v3.PreviousHostsPredicate"
    if rules.try_timeout is not None:
        retry.per_try_timeout.FromMilliseconds(round(rules.try_timeout * 1000))
    if sites:
        # The next try is at the next site: the one that this instance is at may be gone with all that is there.
        retry.retry_priority.name = "envoy.retry_priorities.previous_priorities"
        retry.retry_priority.typed_config.Pack(previous_priorities_config_pb2.PreviousPrioritiesConfig(update_frequency=1))
    retry.retry_back_off.base_interval.FromMilliseconds(RETRY_BASE_MS)
    retry.retry_back_off.max_interval.FromMilliseconds(RETRY_MAX_MS)
    return retry


def endpoints(
    target: Target,
    places: Iterable[Endpoint],
    weights: Mapping[int, int] = {},
    *,
    activator: str | int | None = None,
    near: Nearness = Nearness(),
    wide: int = 1,
) -> Resource:
    """Return where the instances of `target` are, each release of each level of sites a locality of its own.

    A draining one gets no new request; one at a bad address is left out. A release gets requests by its weight, or without weights
    by how many of its instances serve; what of it cannot be had goes to the others that have a weight. Requests go to the nearest
    level, and to the next where that has none that is well; the first `wide` levels count as one. `activator` is the socket that
    requests go to where there is no other place for them; a number is a UDP port of the loopback address.
    """
    known: dict[str, Endpoint] = {}
    for place in places:
        before = known.get(place.address)
        if check_address(place.address) is None and (before is None or before.draining):
            known[place.address] = place
    levels = levels_of(known.values(), weights, near)
    levels = [[place for level in levels[:wide] for place in level], *levels[wide:]]
    message = endpoint_pb2.ClusterLoadAssignment(cluster_name=target.cluster)
    message.policy.overprovisioning_factor.value = SPILL if len(levels) > 1 and not weights else WHOLE
    for priority, level in enumerate(levels):
        for release in sorted({place.release for place in level}):
            own = sorted((place for place in level if place.release == release), key=lambda place: place.address)
            group = message.endpoints.add()
            group.priority = priority
            group.locality.zone = zone_of(release)
            weight = weights.get(release, 0) if weights else sum(not place.draining for place in own)
            if weight:
                group.load_balancing_weight.value = weight
            for place in own:
                group.lb_endpoints.append(_endpoint(place, target.port))
    if activator is not None:
        group = message.endpoints.add()
        group.locality.zone = ASLEEP
        group.load_balancing_weight.value = 1
        if isinstance(activator, int):
            place = address_pb2.Address(socket_address=address_pb2.SocketAddress(address="127.0.0.1", port_value=activator))
        else:
            place = address_pb2.Address(pipe=address_pb2.Pipe(path=activator))
        group.lb_endpoints.append(
            endpoint_components_pb2.LbEndpoint(
                endpoint=endpoint_components_pb2.Endpoint(address=place), health_status=health_check_pb2.HEALTHY
            )
        )
    return resource(Kind.ENDPOINTS, target.cluster, message)


def levels_of(
    places: Iterable[Endpoint], weights: Mapping[int, int], near: Nearness, levels_max: int = LEVELS_MAX
) -> Sequence[Sequence[Endpoint]]:
    """Return the endpoints in levels of sites, the nearest first; what drains is in its site's.

    A level has as many sites as it takes for every release with a weight to serve there, so that shares are kept to at each level,
    and without weights for one instance to serve. A last level that does not get so far belongs to the one before it.
    """
    sites: dict[str, list[Endpoint]] = {}
    for place in places:
        sites.setdefault(place.site, []).append(place)
    if len(sites) == 1 or levels_max <= 1:
        return [[place for group in sites.values() for place in group]] if sites else []
    serving = {place.release for group in sites.values() for place in group if not place.draining}
    needed = {release for release in serving if weights.get(release, 0) > 0} if weights else set()
    levels: list[list[Endpoint]] = []
    level: list[Endpoint] = []
    distance = 0.0
    for site in sorted(sites, key=lambda name: (near.of(name), name)):
        enough = {place.release for place in level if not place.draining}
        same = level and near.of(site) == distance == _FAR
        if enough and enough >= needed and not same and len(levels) < levels_max - 1:
            levels.append(level)
            level = []
        level.extend(sites[site])
        distance = near.of(site)
    enough = {place.release for place in level if not place.draining}
    if levels and not (enough and enough >= needed):
        levels[-1].extend(level)
    else:
        levels.append(level)
    return levels


def _endpoint(place: Endpoint, port: int) -> endpoint_components_pb2.LbEndpoint:
    socket = address_pb2.SocketAddress(address=place.address, port_value=port)
    found = endpoint_components_pb2.LbEndpoint(
        endpoint=endpoint_components_pb2.Endpoint(address=address_pb2.Address(socket_address=socket)),
        health_status=health_check_pb2.DRAINING if place.draining else health_check_pb2.HEALTHY,
    )
    fields = found.metadata.filter_metadata[METADATA].fields
    fields["instance"].string_value = place.instance
    fields["release"].string_value = str(place.release)
    fields["site"].string_value = place.site
    return found
