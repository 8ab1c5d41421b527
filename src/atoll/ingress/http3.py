"""HTTP/3 (RFC 9114) at the port where TLS is spoken, over UDP: one listener with a chain for each hostname that asks for it. Pure.

Envoy's way of asking for a certificate by the name that a client says is not there for QUIC, so each hostname has a chain of its
own, with one secret; no other's certificate can be shown for it, whatever names that one has in it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import envoy.config.trace.v3.opentelemetry_pb2
import envoy.extensions.access_loggers.file.v3.file_pb2
import envoy.extensions.common.matching.v3.extension_matcher_pb2
import envoy.extensions.filters.common.matcher.action.v3.skip_action_pb2
import envoy.extensions.filters.http.buffer.v3.buffer_pb2
import envoy.extensions.filters.http.header_mutation.v3.header_mutation_pb2
import envoy.extensions.filters.http.local_ratelimit.v3.local_rate_limit_pb2
import envoy.extensions.filters.http.on_demand.v3.on_demand_pb2
import envoy.extensions.filters.http.router.v3.router_pb2
import envoy.extensions.filters.http.stateful_session.v3.stateful_session_pb2
import envoy.type.matcher.v3.http_inputs_pb2  # noqa: F401  (all of these: for what Any holds)
from envoy.config.listener.v3 import listener_components_pb2, listener_pb2
from envoy.extensions.filters.network.http_connection_manager.v3 import http_connection_manager_pb2
from envoy.extensions.transport_sockets.quic.v3 import quic_transport_pb2
from google.protobuf import any_pb2, json_format

from atoll.ingress.listeners import take_at
from atoll.ingress.resources import BUFFER_BYTES, HTTP3_SECRET, STREAMS_MAX, WINDOW_BYTES, Kind, Resource, from_us, resource

HTTP3 = "https3"
"""The listener's name."""
HOSTS_MAX = 256
"""Hostnames that have HTTP/3 at an ingress; each has its own copy of how requests are treated, in Envoy's memory."""
MAX_AGE_S = 86_400
"""So long a client may come back by HTTP/3 without having been told again (RFC 7838)."""


class Http3:
    """`manager` is how requests are treated, as at the other listeners."""

    def __init__(self, address: str, port: int, manager: dict[str, Any], *, also: str = "") -> None:
        self._address, self._also = address, also
        self.port = port
        message = http_connection_manager_pb2.HttpConnectionManager()
        wanted = {key: value for key, value in manager.items() if key not in ("@type", "http2_protocol_options")}
        json_format.ParseDict(
            {**wanted, "codec_type": "HTTP3", "http3_protocol_options": {"allow_extended_connect": True}}, message
        )
        packed = any_pb2.Any()
        packed.Pack(message)
        self._manager = listener_components_pb2.Filter(name="envoy.filters.network.http_connection_manager", typed_config=packed)

    def listener(self, hosts: Iterable[str]) -> Resource:
        """Return the listener for these hostnames, wildcards among them; each has the secret of its name."""
        message = listener_pb2.Listener(name=HTTP3)
        take_at(message, self._address, self.port, also=self._also, udp=True)
        message.per_connection_buffer_limit_bytes.value = BUFFER_BYTES
        limits = message.udp_listener_config.quic_options.quic_protocol_options
        limits.max_concurrent_streams.value = STREAMS_MAX
        limits.initial_stream_window_size.value = limits.initial_connection_window_size.value = WINDOW_BYTES
        message.udp_listener_config.downstream_socket_config.prefer_gro.value = True
        for host in hosts:
            chain = message.filter_chains.add(name=host, filters=[self._manager])
            chain.filter_chain_match.server_names.append(host)
            transport = quic_transport_pb2.QuicDownstreamTransport()
            # Who has recorded a request of early data (0-RTT, RFC 8470) could have it done a second time.
            transport.enable_early_data.value = False
            transport.downstream_tls_context.common_tls_context.tls_certificate_sds_secret_configs.add(
                name=HTTP3_SECRET + host, sds_config=from_us()
            )
            chain.transport_socket.name = "envoy.transport_sockets.quic"
            chain.transport_socket.typed_config.Pack(transport)
        return resource(Kind.LISTENER, HTTP3, message)
