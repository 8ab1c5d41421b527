"""TLS on both sides of Envoy: the listener for clients, as a part of its bootstrap, and the way to instances. Pure.

Of certificates the listener knows nothing: for each name that a client says (SNI) Envoy asks for a secret of that name on the
stream that it has with us, keeps it, and takes each newer one for the connections that come after it. So a certificate costs
nothing until it is used, and an open connection never notices a change. A name that has no certificate is refused at once.
"""

from __future__ import annotations

from typing import Any

from envoy.config.core.v3 import base_pb2
from envoy.extensions.transport_sockets.tls.v3 import common_pb2, tls_pb2

from atoll.ingress.resources import SHOWN, from_us
from atoll.model.spec import InstanceTls

ALPN = ("h2", "http/1.1")
NO_NAME = "-"
"""What is asked for where a client says no name; no hostname is called so."""
HANDSHAKE_S = 10
"""From the connection to the end of its handshake. Without it a client for whose name nobody answers would wait for ever."""
HELLO_S = 5
"""Until the client has said its name."""
SHOWN_WAIT_S = 1
"""How long Envoy, when it starts, waits for what it shows to instances; then it serves all others, and those get no request yet."""
_TYPE = "@type"
_EXTENSIONS = "type.googleapis.com/envoy.extensions"


def listener(places: dict[str, Any], manager: dict[str, Any], *, buffer_bytes: int, source: dict[str, Any]) -> dict[str, Any]:
    """Return the listener; `places` are its addresses, `manager` is how HTTP is served once the handshake is done, `source` where
    secrets come from."""
    return {
        "name": "https",
        **places,
        "per_connection_buffer_limit_bytes": buffer_bytes,
        "listener_filters": [
            {
                "name": "envoy.filters.listener.tls_inspector",
                "typed_config": {_TYPE: f"{_EXTENSIONS}.filters.listener.tls_inspector.v3.TlsInspector"},
            }
        ],
        "listener_filters_timeout": f"{HELLO_S}s",
        "filter_chains": [
            {
                "filters": [{"name": "envoy.filters.network.http_connection_manager", "typed_config": manager}],
                "transport_socket": {"name": "envoy.transport_sockets.tls", "typed_config": _socket(source)},
                "transport_socket_connect_timeout": f"{HANDSHAKE_S}s",
            }
        ],
    }


def to_instances(wanted: InstanceTls, *, http2: bool, internal: str) -> base_pb2.TransportSocket:
    """Return how instances are spoken to that speak TLS: whoever is not the one that the app names gets no request.

    `internal` is the app's name within its project. With `mutual`, what is shown to instances is asked for as `SHOWN`, so that a
    newer one touches neither the cluster nor connections that are open; without one none is made.
    """
    name = wanted.name or (internal if wanted.mutual and wanted.ca else None)
    context = tls_pb2.UpstreamTlsContext(sni=name or "")
    common = context.common_tls_context
    common.tls_params.tls_minimum_protocol_version = common_pb2.TlsParameters.TLSv1_2
    common.alpn_protocols.append("h2" if http2 else "http/1.1")
    if wanted.ca:
        common.validation_context.trusted_ca.inline_string = wanted.ca
    if wanted.mutual:
        source = from_us()
        source.initial_fetch_timeout.FromSeconds(SHOWN_WAIT_S)
        common.tls_certificate_sds_secret_configs.add(name=SHOWN, sds_config=source)
        # A session that is resumed would go past what is shown now.
        context.max_session_keys.value = 0
    if name is not None:
        match = common.validation_context.match_typed_subject_alt_names.add()
        match.san_type = common_pb2.SubjectAltNameMatcher.DNS
        match.matcher.exact = name
    common.validation_context.verify_certificate_spki.extend(wanted.pins)
    socket = base_pb2.TransportSocket(name="envoy.transport_sockets.tls")
    socket.typed_config.Pack(context)
    return socket


def _socket(source: dict[str, Any]) -> dict[str, Any]:
    sockets = f"{_EXTENSIONS}.transport_sockets.tls"
    mapper = {_TYPE: f"{sockets}.cert_mappers.sni.v3.SNI", "default_value": NO_NAME}
    selector = {
        _TYPE: f"{sockets}.cert_selectors.on_demand_secret.v3.Config",
        "config_source": source,
        "certificate_mapper": {"name": "sni", "typed_config": mapper},
    }
    return {
        _TYPE: f"{sockets}.v3.DownstreamTlsContext",
        "common_tls_context": {
            "tls_params": {"tls_minimum_protocol_version": "TLSv1_2"},
            "alpn_protocols": list(ALPN),
            "custom_tls_certificate_selector": {"name": "on-demand", "typed_config": selector},
        },
        # A session that is resumed goes past the choice of the certificate, and so past its withdrawal.
        "disable_stateless_session_resumption": True,
        "disable_stateful_session_resumption": True,
    }
