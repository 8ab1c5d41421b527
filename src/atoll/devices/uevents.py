"""The kernel's own messages about devices that come and go (uevents), waited for on a netlink socket.

Protocol: NETLINK_KOBJECT_UEVENT, multicast group 1; a message is `ACTION@DEVPATH` and then `KEY=VALUE`, each ended by a zero byte.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Callable

from msgspec import Struct

_NETLINK_KOBJECT_UEVENT = 15
_KERNEL_GROUP = 1
_RECEIVE_BYTES = 1 << 20
MESSAGE_BYTES_MAX = 64 << 10


class Uevent(Struct, frozen=True):
    action: str
    """`add`, `remove`, `bind`, `unbind`, `change`; `lost` where messages were lost: look at everything anew."""
    path: str = ""
    """Below /sys."""
    properties: dict[str, str] = {}

    @property
    def subsystem(self) -> str:
        return self.properties.get("SUBSYSTEM", "")

    @property
    def pci(self) -> str:
        """Return the PCI address that the path leads to or through, the last one."""
        parts = [part for part in self.path.split("/") if len(part) >= 12 and part.count(":") == 2 and part[-2:-1] == "."]
        return self.properties.get("PCI_SLOT_NAME") or (parts[-1] if parts else "")


Uevents = Callable[[], AsyncIterator[Uevent]]


async def kernel_uevents() -> AsyncIterator[Uevent]:
    """Yield the kernel's messages for ever. Raises OSError where there is no such socket (another kernel, a sandbox)."""
    with socket.socket(
        socket.AF_NETLINK, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK, _NETLINK_KOBJECT_UEVENT
    ) as link:
        link.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _RECEIVE_BYTES)
        link.bind((0, _KERNEL_GROUP))
        loop, readable = asyncio.get_running_loop(), asyncio.Event()
        loop.add_reader(link, readable.set)
        try:
            while True:
                await readable.wait()
                readable.clear()
                with contextlib.suppress(BlockingIOError):
                    while True:
                        try:
                            data, (sender, _) = link.recvfrom(MESSAGE_BYTES_MAX)
                        except OSError as error:
                            if isinstance(error, BlockingIOError):
                                raise
                            yield Uevent("lost")  # ENOBUFS: more came than the socket holds
                            continue
                        event = parse(data)
                        if sender == 0 and event is not None:  # from the kernel itself, not from a program
                            yield event
        finally:
            loop.remove_reader(link)


def parse(data: bytes) -> Uevent | None:
    """Return a message; None for what is none."""
    head, *rest = data.decode("utf-8", "replace").rstrip("\0").split("\0")
    action, mark, path = head.partition("@")
    if not mark:
        return None
    return Uevent(action, path, dict(line.split("=", 1) for line in rest if "=" in line))
