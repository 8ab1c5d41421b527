"""A guest's network card: a tap in the instance's namespace, joined to its link frame by frame.

The namespace stays as the node's network made it. What comes in on `eth0` goes out on the tap and the other way round, by two
filters of the kernel (tc's u32 and mirred), so that the guest has the instance's address, with the hardware address that the node
knows for it. No bridge, no routing, no second address. The tap ends with the namespace. Blocking: call it from threads.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import socket
import struct
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from msgspec import Struct

from atoll.model.errors import RuntimeFailed
from atoll.runtimes.mounts import descriptor

LINK, TAP = "eth0", "tap0"
_CLONE_NEWNET = 0x40000000
_TUNSETIFF, _TUNSETPERSIST = 0x400454CA, 0x400454CB
_IFF_TAP, _IFF_NO_PI, _IFF_VNET_HDR = 0x0002, 0x1000, 0x4000
_SIOCGIFADDR, _SIOCGIFHWADDR, _SIOCGIFMTU = 0x8915, 0x8927, 0x8921
_SIOCSIFMTU, _SIOCGIFFLAGS, _SIOCSIFFLAGS, _IFF_UP = 0x8922, 0x8913, 0x8914, 1
_NLM_REQUEST, _NLM_ACK, _NLM_EXCL, _NLM_CREATE = 0x1, 0x4, 0x200, 0x400
_RTM_NEWQDISC, _RTM_DELQDISC, _RTM_NEWTFILTER = 36, 37, 44
_TC_H_INGRESS, _INGRESS_PARENT = 0xFFFFFFF1, 0xFFFF0000
_TCA_KIND, _TCA_OPTIONS = 1, 2
_U32_SELECTOR, _U32_ACT = 5, 7
_U32_TERMINAL = 1
_ACT_KIND, _ACT_OPTIONS, _MIRRED_PARMS = 1, 2, 2
_ACT_STOLEN, _EGRESS_REDIRECT = 4, 1
_ETH_P_ALL = 3
_NESTED = 0x8000

_libc = ctypes.CDLL(None, use_errno=True)
T = TypeVar("T")


class GuestLink(Struct, frozen=True):
    """What the guest's card must be."""

    address: str
    mac: str
    mtu: int
    ipv6: str = ""
    """Empty where the link has none."""
    outward: bool = False
    """That IPv6 leads to everywhere, and not to the cell alone."""


def connect(netns: Path) -> GuestLink | None:
    """Make the tap of the namespace and join it to the link. Safe to repeat. None where there is no link with an address.

    Raises RuntimeFailed.
    """
    try:
        return inside(netns, _connect)
    except OSError as error:
        if not netns.exists():
            raise RuntimeFailed(f"there is no network namespace {netns}", mend="the node's network made none, or lost it") from None
        raise RuntimeFailed(
            f"cannot make the guest's network card: {error}", mend="modprobe -a tun cls_u32 act_mirred sch_ingress"
        ) from None


def inside(netns: Path, work: Callable[[], T]) -> T:
    """Return what `work` returns in a network namespace, on a thread that ends with it. Raises what it raises."""
    results: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            with descriptor(os.open(netns, os.O_RDONLY | os.O_CLOEXEC)) as fd:
                if _libc.setns(fd, _CLONE_NEWNET) != 0:
                    number = ctypes.get_errno()
                    raise OSError(number, os.strerror(number), str(netns))
            results.append(work())
        except BaseException as error:  # noqa: BLE001 - handed to the caller's thread, where it is raised
            errors.append(error)

    thread = threading.Thread(target=run, name="atoll-tap")
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
    return results[0]


def _connect() -> GuestLink | None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking:
        try:
            address = socket.inet_ntoa(_ask(asking, _SIOCGIFADDR, LINK)[20:24])
        except OSError:
            return None
        mac = _ask(asking, _SIOCGIFHWADDR, LINK)[18:24]
        (mtu,) = struct.unpack_from("i", _ask(asking, _SIOCGIFMTU, LINK), 16)
        _make_tap()
        _set(asking, _SIOCSIFMTU, TAP, struct.pack("i", mtu))
        (flags,) = struct.unpack_from("h", _ask(asking, _SIOCGIFFLAGS, TAP), 16)
        _set(asking, _SIOCSIFFLAGS, TAP, struct.pack("h", flags | _IFF_UP))
    link, tap = socket.if_nametoindex(LINK), socket.if_nametoindex(TAP)
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.NETLINK_ROUTE) as netlink:
        netlink.bind((0, 0))
        for source, target in ((link, tap), (tap, link)):
            _request(netlink, _RTM_DELQDISC, _qdisc(source))  # an earlier one, with its filters
            _request(netlink, _RTM_NEWQDISC, _qdisc(source))
            _request(netlink, _RTM_NEWTFILTER, _redirect(source, target))
    return GuestLink(address, mac.hex(":"), mtu, _ipv6(), _outward())


def _ipv6() -> str:
    """Return the link's address of the cell's network, by /proc/net/if_inet6: address, index, length, scope, flags, name."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/thread-self/net/if_inet6").read_text().splitlines():
            address, _, _, scope, _, name = line.split()
            if name == LINK and scope == "00":
                return socket.inet_ntop(socket.AF_INET6, bytes.fromhex(address))
    return ""


def _outward() -> bool:
    """Return whether the link has a route to everywhere, by /proc/net/ipv6_route: destination, its length, …, flags, name."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/thread-self/net/ipv6_route").read_text().splitlines():
            destination, length, *_, name = line.split()
            if name == LINK and length == "00" and not destination.strip("0"):
                return True
    return False


def _make_tap() -> None:
    with descriptor(os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC)) as fd:
        fcntl.ioctl(fd, _TUNSETIFF, struct.pack("16sH22x", TAP.encode(), _IFF_TAP | _IFF_NO_PI | _IFF_VNET_HDR))
        fcntl.ioctl(fd, _TUNSETPERSIST, 1)


def _ask(asking: socket.socket, number: int, interface: str) -> bytes:
    return fcntl.ioctl(asking, number, struct.pack("16s24x", interface.encode()))


def _set(asking: socket.socket, number: int, interface: str, value: bytes) -> None:
    fcntl.ioctl(asking, number, struct.pack("16s24s", interface.encode(), value))


def _attribute(kind: int, data: bytes) -> bytes:
    length = 4 + len(data)
    return struct.pack("HH", length, kind) + data + bytes(-length % 4)


def _qdisc(index: int) -> bytes:
    message = struct.pack("BxxxiIII", 0, index, _INGRESS_PARENT, _TC_H_INGRESS, 0)
    return message + _attribute(_TCA_KIND, b"ingress\0")


def _redirect(source: int, target: int) -> bytes:
    """tc filter add dev SOURCE ingress u32 match u32 0 0 action mirred egress redirect dev TARGET."""
    information = (1 << 16) | socket.htons(_ETH_P_ALL)  # priority, protocol
    message = struct.pack("BxxxiIII", 0, source, 0, _INGRESS_PARENT, information)
    parameters = struct.pack("IIiiiiI", 0, 0, _ACT_STOLEN, 0, 0, _EGRESS_REDIRECT, target)
    action = _attribute(_ACT_KIND, b"mirred\0") + _attribute(_ACT_OPTIONS | _NESTED, _attribute(_MIRRED_PARMS, parameters))
    everything = struct.pack("BBBxHHhhI", _U32_TERMINAL, 0, 1, 0, 0, 0, 0, 0) + bytes(16)
    options = _attribute(_U32_SELECTOR, everything) + _attribute(_U32_ACT | _NESTED, _attribute(1 | _NESTED, action))
    return message + _attribute(_TCA_KIND, b"u32\0") + _attribute(_TCA_OPTIONS | _NESTED, options)


def _request(netlink: socket.socket, kind: int, body: bytes) -> None:
    """Send one request and read its answer; that there is nothing to remove is no error."""
    flags = _NLM_REQUEST | _NLM_ACK | _NLM_CREATE | _NLM_EXCL
    netlink.send(struct.pack("IHHII", 16 + len(body), kind, flags, 1, 0) + body)
    answer = netlink.recv(1 << 16)
    (code,) = struct.unpack_from("i", answer, 16)
    if code != 0 and kind != _RTM_DELQDISC:
        raise OSError(-code, os.strerror(-code))
