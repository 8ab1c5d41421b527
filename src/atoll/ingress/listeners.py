"""Ports of the ingress that lead to an app whatever is said on them: Envoy's listeners for TCP and UDP. Pure."""

from __future__ import annotations

from envoy.config.accesslog.v3 import accesslog_pb2
from envoy.config.core.v3 import address_pb2
from envoy.config.listener.v3 import listener_components_pb2, listener_pb2
from envoy.extensions.access_loggers.file.v3 import file_pb2
from envoy.extensions.filters.network.tcp_proxy.v3 import tcp_proxy_pb2
from envoy.extensions.filters.udp.udp_proxy.v3 import route_pb2, udp_proxy_pb2
from google.protobuf import any_pb2
from google.protobuf.message import Message

from atoll.ingress.clusters import METADATA, RETRY_BASE_MS, RETRY_MAX_MS
from atoll.ingress.resources import ACCESS_LOG, BUFFER_BYTES, RETRIES, Kind, Resource, Target, resource

TCP_IDLE_S = 3_600
"""A connection on which nothing moves for so long is ended."""
UDP_IDLE_S = 60
"""What comes from one address and port goes to one instance until nothing has come for so long."""
_LOGGED = {
    "at": "%START_TIME%",
    "flags": "%RESPONSE_FLAGS%",
    "release": f"%UPSTREAM_METADATA({METADATA}:release)%",
    "site": f"%UPSTREAM_METADATA({METADATA}:site)%",
    "instance": f"%UPSTREAM_METADATA({METADATA}:instance)%",
    "upstream": "%UPSTREAM_HOST%",
    "duration_ms": "%DURATION%",
    "received_bytes": "%BYTES_RECEIVED%",
    "sent_bytes": "%BYTES_SENT%",
    "client": "%DOWNSTREAM_REMOTE_ADDRESS_WITHOUT_PORT%",
}


def listener(name: str, address: str, public: tuple[str, int], target: Target, *, also: str = "") -> Resource:
    """Return what takes connections or datagrams at `public`, a protocol and a port of `address` and, where it is said, of `also`,
    and leads them to `target`.

    Who connects is the ingress for the instance. Nothing is sent again that an instance may have seen.
    """
    protocol, port = public
    message = listener_pb2.Listener(name=name)
    take_at(message, address, port, also=also, udp=protocol == "udp")
    (_udp if protocol == "udp" else _tcp)(message, target)
    return resource(Kind.LISTENER, name, message)


def take_at(message: listener_pb2.Listener, address: str, port: int, *, also: str, udp: bool) -> None:
    """Say where a listener listens: at a port of one address, and of another where there is one."""
    places = [message.address, *([message.additional_addresses.add().address] if also else [])]
    for place, each in zip(places, (address, also), strict=False):
        protocol = address_pb2.SocketAddress.UDP if udp else address_pb2.SocketAddress.TCP
        place.socket_address.protocol, place.socket_address.address, place.socket_address.port_value = protocol, each, port


def _tcp(message: listener_pb2.Listener, target: Target) -> None:
    proxy = tcp_proxy_pb2.TcpProxy(stat_prefix="tcp", cluster=target.cluster)
    proxy.idle_timeout.FromSeconds(TCP_IDLE_S)
    proxy.max_connect_attempts.value = RETRIES + 1
    proxy.backoff_options.base_interval.FromMilliseconds(RETRY_BASE_MS)
    proxy.backoff_options.max_interval.FromMilliseconds(RETRY_MAX_MS)
    proxy.access_log.append(_log(message.name, target))
    message.per_connection_buffer_limit_bytes.value = BUFFER_BYTES
    proxied = listener_components_pb2.Filter(name="envoy.filters.network.tcp_proxy", typed_config=_packed(proxy))
    message.filter_chains.append(listener_components_pb2.FilterChain(filters=[proxied]))


def _udp(message: listener_pb2.Listener, target: Target) -> None:
    message.udp_listener_config.SetInParent()
    proxy = udp_proxy_pb2.UdpProxyConfig(stat_prefix="udp")
    proxy.idle_timeout.FromSeconds(UDP_IDLE_S)
    action = proxy.matcher.on_no_match.action
    action.name = "route"
    action.typed_config.Pack(route_pb2.Route(cluster=target.cluster))
    proxy.access_log.append(_log(message.name, target))
    message.listener_filters.append(
        listener_components_pb2.ListenerFilter(name="envoy.filters.udp_listener.udp_proxy", typed_config=_packed(proxy))
    )


def _log(name: str, target: Target) -> accesslog_pb2.AccessLog:
    file = file_pb2.FileAccessLog(path=ACCESS_LOG)
    fields = file.log_format.json_format.fields
    for key, value in {**_LOGGED, "place": name, "app": f"{target.project}/{target.app}"}.items():
        fields[key].string_value = value
    return accesslog_pb2.AccessLog(name="envoy.access_loggers.file", typed_config=_packed(file))


def _packed(message: Message) -> any_pb2.Any:
    packed = any_pb2.Any()
    packed.Pack(message)
    return packed
