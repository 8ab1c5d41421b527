"""Where traces go: to an OpenTelemetry collector, by OTLP over HTTP; a trace goes on to the instance in `traceparent`. Pure."""

from __future__ import annotations

from typing import Any

from msgspec import Struct

from atoll.ingress.clusters import METADATA
from atoll.model.errors import Invalid
from atoll.model.urls import url_of

COLLECTOR = "collector"
TRACES_PATH = "/v1/traces"
TIMEOUT_S = 5
PATH_CHARS_MAX = 256
SPANS_KEPT_MAX = 4_096
"""While the collector does not take them; what is more is dropped."""
_TYPE = "@type"
_GOOGLE = "type.googleapis.com/envoy"
_MEND = "write for example http://collector.example:4318"


class Tracing(Struct, frozen=True, kw_only=True):
    """`percent` of the requests that bring no decision with them begin a trace; one that was begun elsewhere is gone on with."""

    host: str
    port: int
    tls: bool = False
    path: str = TRACES_PATH
    percent: float = 100.0


def tracing_of(url: str, percent: float = 100.0) -> Tracing | None:
    """Return what a collector's URL means; None for an empty one. Raises Invalid."""
    if not url:
        return None
    parts = url_of(url, what="--otlp", field="otlp", mend=_MEND)
    if not 0 <= percent <= 100:
        raise Invalid(f"--trace-percent: from 0 to 100, got {percent:g}", field="trace-percent")
    tls = parts.scheme == "https"
    path = parts.path.rstrip("/") or ""
    path = path if path.endswith(TRACES_PATH) else path + TRACES_PATH
    return Tracing(host=parts.host, port=parts.port or (443 if tls else 4318), tls=tls, path=path, percent=percent)


def tracer(tracing: Tracing, *, name: str) -> dict[str, Any]:
    """Return what a connection manager says of traces; spans have app, release, site and instance."""
    http = {
        "uri": f"{'https' if tracing.tls else 'http'}://{tracing.host}:{tracing.port}{tracing.path}",
        "cluster": COLLECTOR,
        "timeout": f"{TIMEOUT_S}s",
    }
    config = {
        _TYPE: f"{_GOOGLE}.config.trace.v3.OpenTelemetryConfig",
        "http_service": {"http_uri": http},
        "service_name": f"atoll-ingress-{name}",
        "max_cache_size": SPANS_KEPT_MAX,
    }
    tags: list[dict[str, Any]] = [{"tag": "atoll.app", "value": "%ROUTE_NAME%"}]
    for key in ("instance", "release", "site"):
        tags.append({"tag": f"atoll.{key}", "value": f"%UPSTREAM_METADATA({METADATA}:{key})%"})
    return {
        "provider": {"name": "envoy.tracers.opentelemetry", "typed_config": config},
        "random_sampling": {"value": tracing.percent},
        "max_path_tag_length": PATH_CHARS_MAX,
        "spawn_upstream_span": True,
        "custom_tags": tags,
    }


def collector(tracing: Tracing) -> dict[str, Any]:
    """Return the cluster of the collector; nothing waits for it, and requests go on without it."""
    address = {"socket_address": {"address": tracing.host, "port_value": tracing.port}}
    cluster: dict[str, Any] = {
        "name": COLLECTOR,
        "type": "STRICT_DNS",
        "connect_timeout": "2s",
        "load_assignment": {"cluster_name": COLLECTOR, "endpoints": [{"lb_endpoints": [{"endpoint": {"address": address}}]}]},
    }
    if tracing.tls:
        trust = {"trusted_ca": {"filename": "/etc/ssl/certs/ca-certificates.crt"}}
        names = {"match_typed_subject_alt_names": [{"san_type": "DNS", "matcher": {"exact": tracing.host}}]}
        cluster["transport_socket"] = {
            "name": "envoy.transport_sockets.tls",
            "typed_config": {
                _TYPE: f"{_GOOGLE}.extensions.transport_sockets.tls.v3.UpstreamTlsContext",
                "sni": tracing.host,
                "common_tls_context": {"validation_context": {**trust, **names}},
            },
        }
    return cluster
