"""The rtnetlink messages that tunnels need, beside those of `netlink`; by <linux/if_link.h> and <linux/neighbour.h>."""

from __future__ import annotations

import errno
import ipaddress
import socket
import struct

from atoll.network.netlink import Request, attribute, packed

_IFINFO = struct.Struct("=BxHiII")
_NEIGHBOUR = struct.Struct("=BxxxiHBB")
_ROUTE = struct.Struct("=BBBBBBBBI")
_NEWLINK, _DELLINK, _NEWROUTE, _DELROUTE, _NEWNEIGH, _DELNEIGH = 16, 17, 24, 25, 28, 29
_CREATE, _EXCLUSIVE, _REPLACE, _APPEND = 0x400, 0x200, 0x100, 0x800
_NESTED = 0x8000
_PERMANENT, _SELF = 0x80, 0x02
_TABLE_MAIN, _PROTOCOL_STATIC, _UNICAST = 254, 4, 1
_SCOPE_UNIVERSE, _SCOPE_LINK = 0, 253
_ONLINK = 4


def _number(kind: int, value: int) -> bytes:
    return attribute(kind, struct.pack("=I", value))


def add_vxlan(name: str, *, number: int, port: int, local: str, mac: bytes, mtu: int, alias: str) -> Request:
    """Make a VXLAN that learns nothing by itself: what is not told it does not reach."""
    data = _number(1, number) + attribute(4, socket.inet_aton(local))
    data += attribute(7, b"\0") + attribute(15, struct.pack("!H", port))  # no learning; the port
    info = attribute(1, b"vxlan\0") + attribute(2 | _NESTED, data)
    body = _IFINFO.pack(socket.AF_UNSPEC, 0, 0, 0, 0) + attribute(3, name.encode() + b"\0") + attribute(1, mac)
    body += _number(4, mtu) + attribute(20, alias.encode() + b"\0") + attribute(18 | _NESTED, info)
    return Request(_NEWLINK, body, f"make the VXLAN {name}", flags=_CREATE | _EXCLUSIVE)


def add_wireguard(name: str, *, mtu: int) -> Request:
    info = attribute(1, b"wireguard\0")
    body = _IFINFO.pack(socket.AF_UNSPEC, 0, 0, 0, 0) + attribute(3, name.encode() + b"\0") + _number(4, mtu)
    return Request(_NEWLINK, body + attribute(18 | _NESTED, info), f"make the WireGuard {name}", flags=_CREATE | _EXCLUSIVE)


def set_mtu(index: int, mtu: int) -> Request:
    return Request(_NEWLINK, _IFINFO.pack(socket.AF_UNSPEC, 0, index, 0, 0) + _number(4, mtu), "set a link's MTU")


def delete_link(index: int) -> Request:
    return Request(_DELLINK, _IFINFO.pack(socket.AF_UNSPEC, 0, index, 0, 0), "remove a link", ignore=(errno.ENODEV,))


def add_forwarding(index: int, mac: bytes, endpoint: str) -> Request:
    """Have the VXLAN send what is for `mac` to the machine at `endpoint`."""
    return Request(_NEWNEIGH, _forwarding(index, mac, endpoint), f"lead to {endpoint}", flags=_CREATE | _REPLACE)


def delete_forwarding(index: int, mac: bytes, endpoint: str) -> Request:
    return Request(_DELNEIGH, _forwarding(index, mac, endpoint), f"forget {endpoint}", ignore=(errno.ENOENT, errno.ENODEV))


def _forwarding(index: int, mac: bytes, endpoint: str) -> bytes:
    body = _NEIGHBOUR.pack(socket.AF_BRIDGE, index, _PERMANENT, _SELF, 0)
    return body + attribute(2, mac) + attribute(1, socket.inet_aton(endpoint))


def add_way(index: int, network: str, *, gateway: str | None = None, source: str) -> Request:
    """Lead `network` into the link, to `gateway` where the link needs one; `source` is the node's own address on that way."""
    return Request(_NEWROUTE, _way(index, network, gateway, source), f"lead {network}", flags=_CREATE | _REPLACE)


def delete_way(index: int, network: str) -> Request:
    body = _way(index, network, None, None)
    return Request(_DELROUTE, body, f"forget the way to {network}", ignore=(errno.ESRCH, errno.ENODEV))


def _way(index: int, network: str, gateway: str | None, source: str | None) -> bytes:
    net = ipaddress.ip_network(network)
    if source is None:
        scope, protocol = 255, 0  # whatever it is
    else:
        scope, protocol = _SCOPE_UNIVERSE if gateway else _SCOPE_LINK, _PROTOCOL_STATIC
    flags = _ONLINK if gateway else 0
    family = socket.AF_INET if net.version == 4 else socket.AF_INET6
    body = _ROUTE.pack(family, net.prefixlen, 0, 0, _TABLE_MAIN, protocol, scope, _UNICAST, flags)
    body += attribute(1, net.network_address.packed) + _number(4, index)
    if gateway:
        body += attribute(5, packed(gateway)[2])
    if source:
        body += attribute(7, packed(source)[2])
    return body
