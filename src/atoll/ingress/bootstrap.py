"""What Envoy starts with: its listener, its limits, and where to ask for everything else. Pure."""

from __future__ import annotations

from typing import Any

from msgspec import Struct

from atoll.ingress import tls
from atoll.ingress.clusters import METADATA
from atoll.ingress.hosts import BODY_FILTER, RATE_FILTER, STICKY_FILTER
from atoll.ingress.http3 import Http3
from atoll.ingress.resources import ACCESS_LOG as ACCESS_LOG
from atoll.ingress.resources import (
    BREAKER_MAX,
    BUFFER_BYTES,
    RETRIES,
    RETRY_ON,
    ROUTE_CONFIG,
    STREAM_IDLE_S,
    STREAMS_MAX,
    WINDOW_BYTES,
)
from atoll.ingress.tracing import Tracing, collector, tracer
from atoll.model.spec import BODY_BYTES_MAX
from atoll.model.traffic import BOUNDS_MS
from atoll.model.worker import SERVICE_HEADER, SERVICES, SERVICES_SOCKET

ADMIN_SOCKET = "admin.sock"
ADS_SOCKET = "ads.sock"
"""Both, and the access log, in the ingress's directory, which is Envoy's working directory: a unix socket's path must be short."""

HEADERS_TIMEOUT_S = 15
"""From the first byte of a request to the end of its headers: who is slower than that is an attacker."""
IDLE_CONNECTION_S = 300
HEADERS_KB_MAX = 60
HEADERS_MAX = 100
RECONNECT_BASE_MS = 50
RECONNECT_MAX_MS = 500
"""After this process was restarted, Envoy is back within so long; its own default is up to 30 s."""

SAFE_METHODS = ("GET", "HEAD", "OPTIONS")
"""Methods that promise to change nothing (RFC 9110, 9.2.1): what an instance had begun of them, another may do again."""
RETRY_SAFE_ON = "reset"
"""On top of every route's own conditions, for safe methods: the connection broke before the first byte of an answer."""

RETRY_AFTER = (("retry-after", "1"),)
"""Buckets are filled every second."""
ZONE = "here"
"""Envoy's own zone: from it to that of an endpoint, which names the release, it counts requests."""
COUNTED = r"upstream_rq_(completed|5xx|time)"
ON_DEMAND_FILTER = "envoy.filters.http.on_demand"
PLACE_BYTES_MAX = 253 + len(":65535")
"""Of a hostname and its port. What a Host header has beyond that is not asked for: Envoy keeps each name, and tells all of them to
whoever it connects to."""
_TYPE = "@type"
_GOOGLE = "type.googleapis.com/envoy"


class Listener(Struct, frozen=True, kw_only=True):
    """Where requests come in; `connections_max` bounds what clients may hold open."""

    address: str
    also: str = ""
    """Another address with the same ports, of the other version of IP; empty for none."""
    port: int
    connections_max: int
    tls_port: int = 0
    """Where they come in over TLS; 0 for nowhere."""
    tracing: Tracing | None = None
    stream_idle_s: float = STREAM_IDLE_S
    """A request or stream on which nothing moves for so long is ended."""


def bootstrap(listener: Listener, *, name: str) -> dict[str, Any]:
    """Return Envoy's bootstrap as plain data, ready for JSON."""
    return {
        "node": {"id": name, "cluster": "ingress", "locality": {"zone": ZONE}},
        "admin": {"address": {"pipe": {"path": ADMIN_SOCKET, "mode": 0o600}}},
        "dynamic_resources": {
            "ads_config": {
                "api_type": "DELTA_GRPC",
                "transport_api_version": "V3",
                "grpc_services": [{"envoy_grpc": {"cluster_name": "control", "retry_policy": {"retry_back_off": _reconnect()}}}],
                "set_node_on_first_message_only": True,
            },
            "cds_config": _from_us(),
            "lds_config": _from_us(),
        },
        "static_resources": {"listeners": [*_listeners(listener, name), _services(listener)], "clusters": _clusters(listener)},
        "cluster_manager": {"enable_deferred_cluster_creation": True},
        "deferred_stat_options": {"enable_deferred_creation_stats": True},
        # What is kept is what is read: 10,000 apps with all of Envoy's statistics cost 300 MB.
        "stats_config": {
            "stats_matcher": {
                "inclusion_list": {
                    "patterns": [
                        {"prefix": prefix}
                        for prefix in ("server.", "http.ingress.", "http.services.", "listener.", "control_plane.")
                    ]
                    + [
                        {"safe_regex": {"regex": r"cluster\.[^.]*\.upstream_rq_(total|active|pending_active|retry|5xx)"}},
                        {"safe_regex": {"regex": r"cluster\.[^.]*\.upstream_cx_none_healthy"}},
                        {"safe_regex": {"regex": r"cluster\.[^.]*\.udp\.sess_(rx|tx)_datagrams"}},
                        {"safe_regex": {"regex": rf"cluster\.[^.]*\.zone\.{ZONE}\.[^.]*\.{COUNTED}"}},
                    ]
                }
            },
            "histogram_bucket_settings": [{"match": {"prefix": "cluster."}, "buckets": list(BOUNDS_MS)}],
        },
        # Histograms are brought up to date when they are asked for, which the meter does as often as it needs them.
        "stats_flush_on_admin": True,
        "overload_manager": {
            "resource_monitors": [
                {
                    "name": "envoy.resource_monitors.global_downstream_max_connections",
                    "typed_config": {
                        _TYPE: f"{_GOOGLE}.extensions.resource_monitors.downstream_connections.v3.DownstreamConnectionsConfig",
                        "max_active_downstream_connections": listener.connections_max,
                    },
                }
            ]
        },
    }


def http3(listener: Listener, name: str) -> Http3 | None:
    """Return how HTTP/3 is served at the port for TLS; None where there is none."""
    if not listener.tls_port:
        return None
    return Http3(listener.address, listener.tls_port, _traced(_connection_manager(listener), listener, name), also=listener.also)


def _clusters(listener: Listener) -> list[dict[str, Any]]:
    return [_control(), *([collector(listener.tracing)] if listener.tracing is not None else [])]


def _control() -> dict[str, Any]:
    options = {
        _TYPE: f"{_GOOGLE}.extensions.upstreams.http.v3.HttpProtocolOptions",
        "explicit_http_config": {
            "http2_protocol_options": {"connection_keepalive": {"interval": "10s", "timeout": "5s"}},
        },
    }
    endpoint = {"endpoint": {"address": {"pipe": {"path": ADS_SOCKET}}}}
    return {
        "name": "control",
        "type": "STATIC",
        "connect_timeout": "1s",
        "typed_extension_protocol_options": {"envoy.extensions.upstreams.http.v3.HttpProtocolOptions": options},
        "load_assignment": {"cluster_name": "control", "endpoints": [{"lb_endpoints": [endpoint]}]},
        "circuit_breakers": {"thresholds": [{"max_retries": BREAKER_MAX}]},
    }


def _listener(listener: Listener, name: str) -> dict[str, Any]:
    return {
        "name": "http",
        **_places(listener, listener.port),
        "per_connection_buffer_limit_bytes": BUFFER_BYTES,
        "filter_chains": _filter_chains(_traced(_connection_manager(listener), listener, name)),
    }


def _places(listener: Listener, port: int) -> dict[str, Any]:
    first, *more = [{"socket_address": {"address": each, "port_value": port}} for each in (listener.address, listener.also) if each]
    return {"address": first, **({"additional_addresses": [{"address": each} for each in more]} if more else {})}


def _traced(manager: dict[str, Any], listener: Listener, name: str) -> dict[str, Any]:
    return {**manager, "tracing": tracer(listener.tracing, name=name)} if listener.tracing is not None else manager


def _listeners(listener: Listener, name: str) -> list[dict[str, Any]]:
    plain = _listener(listener, name)
    if not listener.tls_port:
        return [plain]
    manager = _traced(_connection_manager(listener), listener, name)
    places = _places(listener, listener.tls_port)
    return [plain, tls.listener(places, manager, buffer_bytes=BUFFER_BYTES, source=_from_us())]


def _services(listener: Listener) -> dict[str, Any]:
    """Return the listener by which this node's workers reach other apps: a header names the cluster, and the host means nothing."""
    route = {
        "name": "service",
        "match": {"prefix": "/"},
        "request_headers_to_remove": [SERVICE_HEADER],
        "route": {
            "cluster_header": SERVICE_HEADER,
            "timeout": "0s",
            "idle_timeout": f"{listener.stream_idle_s}s",
            "retry_policy": {"retry_on": RETRY_ON, "num_retries": RETRIES},
        },
    }
    manager = _connection_manager(listener)
    del manager["rds"]
    manager["http_filters"] = [each for each in manager["http_filters"] if each["name"] != ON_DEMAND_FILTER]
    manager["stat_prefix"] = "services"
    manager["route_config"] = {"name": "services", "virtual_hosts": [{"name": "services", "domains": ["*"], "routes": [route]}]}
    return {
        "name": "services",
        # Whoever can see it may use it: it is shown to workers alone.
        "address": {"pipe": {"path": f"{SERVICES}/{SERVICES_SOCKET}", "mode": 0o666}},
        "per_connection_buffer_limit_bytes": BUFFER_BYTES,
        "filter_chains": _filter_chains(manager),
    }


def _filter_chains(manager: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"filters": [{"name": "envoy.filters.network.http_connection_manager", "typed_config": manager}]}]


def _connection_manager(listener: Listener) -> dict[str, Any]:
    router = {
        _TYPE: f"{_GOOGLE}.extensions.filters.http.router.v3.Router",
        "suppress_envoy_headers": True,
    }
    return {
        _TYPE: f"{_GOOGLE}.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager",
        "stat_prefix": "ingress",
        "codec_type": "AUTO",
        "rds": {"route_config_name": ROUTE_CONFIG, "config_source": _from_us()},
        "http_filters": [
            {"name": ON_DEMAND_FILTER, "typed_config": _on_demand()},
            {
                "name": RATE_FILTER,
                "disabled": True,
                "config_discovery": {
                    "config_source": _from_us(),
                    "type_urls": ["type.googleapis.com/envoy.extensions.filters.http.local_ratelimit.v3.LocalRateLimit"],
                },
            },
            {"name": BODY_FILTER, "disabled": True, "typed_config": _body()},
            {
                "name": STICKY_FILTER,
                "disabled": True,
                "typed_config": {_TYPE: f"{_GOOGLE}.extensions.filters.http.stateful_session.v3.StatefulSession"},
            },
            {"name": "retry-safe", "typed_config": _retry_safe()},
            {"name": "envoy.filters.http.router", "typed_config": router},
        ],
        "upgrade_configs": [{"upgrade_type": "websocket"}],
        "use_remote_address": True,
        "server_header_transformation": "PASS_THROUGH",
        "normalize_path": True,
        "request_headers_timeout": f"{HEADERS_TIMEOUT_S}s",
        "stream_idle_timeout": f"{listener.stream_idle_s}s",
        "common_http_protocol_options": {"idle_timeout": f"{IDLE_CONNECTION_S}s", "max_headers_count": HEADERS_MAX},
        "max_request_headers_kb": HEADERS_KB_MAX,
        "http2_protocol_options": {
            "allow_connect": True,
            "max_concurrent_streams": STREAMS_MAX,
            "initial_stream_window_size": WINDOW_BYTES,
            "initial_connection_window_size": WINDOW_BYTES,
        },
        "access_log": [{"name": "envoy.access_loggers.file", "typed_config": _access_log()}],
        "local_reply_config": _local_replies(),
    }


def _body() -> dict[str, Any]:
    return {_TYPE: f"{_GOOGLE}.extensions.filters.http.buffer.v3.Buffer", "max_request_bytes": BODY_BYTES_MAX}


def _on_demand() -> dict[str, Any]:
    """Return the filter that asks for a hostname that Envoy does not know; what cannot be one is nobody's, and not asked for."""
    short = {"safe_regex": {"google_re2": {}, "regex": rf"[!-~]{{1,{PLACE_BYTES_MAX}}}"}}
    long = {"not_matcher": {"single_predicate": {"input": _header(":authority"), "value_match": short}}}
    return _unless(long, ON_DEMAND_FILTER, {_TYPE: f"{_GOOGLE}.extensions.filters.http.on_demand.v3.OnDemand"})


def _retry_safe() -> dict[str, Any]:
    """Return the filter that adds to what requests of a safe method are retried on.

    It is one for all: a second route for each path would double what 10,000 apps cost. The router takes the header away
    again, and what a client sends under its name has gone before.
    """
    value = {"key": "x-envoy-retry-on", "value": RETRY_SAFE_ON}
    mutation = {"append": {"header": value, "append_action": "OVERWRITE_IF_EXISTS_OR_ADD"}}
    safe = [{"single_predicate": {"input": _header(":method"), "value_match": {"exact": name}}} for name in SAFE_METHODS]
    config = {
        _TYPE: f"{_GOOGLE}.extensions.filters.http.header_mutation.v3.HeaderMutation",
        "mutations": {"request_mutations": [mutation]},
    }
    return _unless({"not_matcher": {"or_matcher": {"predicate": safe}}}, "envoy.filters.http.header_mutation", config)


def _header(name: str) -> dict[str, Any]:
    config = {_TYPE: "type.googleapis.com/envoy.type.matcher.v3.HttpRequestHeaderMatchInput", "header_name": name}
    return {"name": name.strip(":"), "typed_config": config}


def _unless(predicate: dict[str, Any], name: str, config: dict[str, Any]) -> dict[str, Any]:
    """Return a filter that requests go past for which `predicate` holds."""
    skip = {"name": "skip", "typed_config": {_TYPE: f"{_GOOGLE}.extensions.filters.common.matcher.action.v3.SkipFilter"}}
    return {
        _TYPE: f"{_GOOGLE}.extensions.common.matching.v3.ExtensionWithMatcher",
        "extension_config": {"name": name, "typed_config": config},
        "xds_matcher": {"matcher_list": {"matchers": [{"predicate": predicate, "on_match": {"action": skip}}]}},
    }


def _access_log() -> dict[str, Any]:
    fields = {
        "at": "%START_TIME%",
        "method": "%REQ(:METHOD)%",
        "host": "%REQ(:AUTHORITY)%",
        "path": "%PATH(NQ:PATH)%",  # without the query, which holds secrets often enough
        "protocol": "%PROTOCOL%",
        "tls": "%DOWNSTREAM_TLS_VERSION%",
        "status": "%RESPONSE_CODE%",
        "flags": "%RESPONSE_FLAGS%",
        "why": "%RESPONSE_CODE_DETAILS%",
        "app": "%ROUTE_NAME%",
        "broke": "%UPSTREAM_TRANSPORT_FAILURE_REASON%",
        "release": f"%UPSTREAM_METADATA({METADATA}:release)%",
        "site": f"%UPSTREAM_METADATA({METADATA}:site)%",
        "instance": f"%UPSTREAM_METADATA({METADATA}:instance)%",
        "upstream": "%UPSTREAM_HOST%",
        "attempts": "%UPSTREAM_REQUEST_ATTEMPT_COUNT%",
        "duration_ms": "%DURATION%",
        "received_bytes": "%BYTES_RECEIVED%",
        "sent_bytes": "%BYTES_SENT%",
        "client": "%DOWNSTREAM_REMOTE_ADDRESS_WITHOUT_PORT%",
        "agent": "%REQ(USER-AGENT):256%",
        "request": "%REQ(X-REQUEST-ID):64%",
    }
    return {
        _TYPE: f"{_GOOGLE}.extensions.access_loggers.file.v3.FileAccessLog",
        "path": ACCESS_LOG,
        "log_format": {"json_format": fields},
    }


def _local_replies() -> dict[str, Any]:
    """What Envoy answers by itself, in the form of every error of Atoll."""
    place = "%REQ(:AUTHORITY):253%"
    return {
        "mappers": [
            _as_it_is(200),
            _as_it_is(308),
            _reply(["NR"], "not-found", f"no app is served at {place} under this path", "see `atoll apps` for what is"),
            _reply(["UH", "NC"], "unavailable", f"the app at {place} has no instance that is ready", "see `atoll ps`; retry soon"),
            _answer(
                429, "too-many-requests", f"more requests for {place} than its rate allows", "retry after a second", RETRY_AFTER
            ),
            _answer(404, "not-found", f"no app is served at {place} under this path", "see `atoll apps` for what is"),
            _answer(413, "too-large", f"a request for {place} has a larger body than its app takes", "send less at once"),
            _reply(["UO"], "unavailable", f"the app at {place} has as many requests under way as its limits allow", "retry soon"),
            _reply(
                ["UPE"],
                "bad-gateway",
                f"what an instance of the app at {place} says is not HTTP as its port is declared to speak",
                "its port may need `http2`, or lead elsewhere",
            ),
            _reply(["UF", "UC", "UR", "URX"], "unavailable", f"an instance of the app at {place} broke the connection", ""),
            _reply(["UMSDR", "UT", "SI"], "deadline-exceeded", f"the app at {place} did not answer in time", ""),
        ],
        "body_format": {"json_format": _error("ingress", "%LOCAL_REPLY_BODY%", "")},
    }


def _reply(flags: list[str], code: str, message: str, mend: str) -> dict[str, Any]:
    return {
        "filter": {"response_flag_filter": {"flags": flags}},
        "body_format_override": {"json_format": _error(code, message, mend)},
    }


def _as_it_is(status: int) -> dict[str, Any]:
    """What answers of this status say goes out as the route says it: to certificate authorities, and nothing beside a way on."""
    comparison = {"op": "EQ", "value": {"default_value": status, "runtime_key": "never"}}
    return {
        "filter": {"status_code_filter": {"comparison": comparison}},
        "body_format_override": {"text_format_source": {"inline_string": "%LOCAL_REPLY_BODY%"}, "content_type": "text/plain"},
    }


def _answer(status: int, code: str, message: str, mend: str, headers: tuple[tuple[str, str], ...] = ()) -> dict[str, Any]:
    comparison = {"op": "EQ", "value": {"default_value": status, "runtime_key": "never"}}
    return {
        "filter": {"status_code_filter": {"comparison": comparison}},
        "body_format_override": {"json_format": _error(code, message, mend)},
        "headers_to_add": [{"header": {"key": key, "value": value}} for key, value in headers],
    }


def _error(code: str, message: str, mend: str) -> dict[str, Any]:
    return {"error": {"code": code, "message": message, **({"mend": mend} if mend else {})}}


def _from_us() -> dict[str, Any]:
    # Waits for ever: a listener that opens with no routes would answer 404 for apps that exist.
    return {"ads": {}, "resource_api_version": "V3", "initial_fetch_timeout": "0s"}


def _reconnect() -> dict[str, Any]:
    return {"base_interval": f"{RECONNECT_BASE_MS / 1000}s", "max_interval": f"{RECONNECT_MAX_MS / 1000}s"}
