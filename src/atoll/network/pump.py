"""The ends of a trial: a process that sends, one that receives, and one that hands frames from card to card as a monitor would.

`python -m atoll.network.pump sink|source|patch …`; each enters the namespaces that it is given, says `ready` when it is, and then
what it counted. Alone in its process, so that trials measure the kernel and not how threads of Python wait for each other.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import select
import socket
import struct
import sys
import time
from collections.abc import Sequence

PORT = 5201
CHUNK_BYTES = 1 << 18
FRAME_BYTES_MAX = (1 << 16) + 64
IDLE_S_MAX = 20.0
"""An end that hears nothing for so long ends itself."""
FRAMES_AT_ONCE = 64
_CLONE_NEWNET = 0x40000000
_TUNSETIFF, _TUNSETOFFLOAD = 0x400454CA, 0x400454D0
_IFF_TAP, _IFF_NO_PI, _IFF_VNET_HDR, _IFF_MULTI_QUEUE = 0x0002, 0x1000, 0x4000, 0x0100
OFFLOADS = 0x01 | 0x02
"""Checksums and TCP segments are left to whoever takes the frame (TUN_F_CSUM, TUN_F_TSO4)."""
_libc = ctypes.CDLL(None, use_errno=True)


def enter(netns: str) -> None:
    """Move this process, which has one thread, into a namespace. Raises OSError."""
    descriptor = os.open(netns, os.O_RDONLY | os.O_CLOEXEC)
    try:
        if _libc.setns(descriptor, _CLONE_NEWNET) != 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number), netns)
    finally:
        os.close(descriptor)


def sink(netns: str, flows: int) -> None:
    """Take `flows` connections to their ends, and say how many bytes came in how many seconds."""
    enter(netns)
    buffer = bytearray(CHUNK_BYTES)
    with contextlib.closing(socket.create_server(("", PORT), backlog=flows)) as server:
        print("ready", flush=True)
        server.settimeout(IDLE_S_MAX)
        taken = [server.accept()[0] for _ in range(flows)]
    began = time.perf_counter()
    total = 0
    open_ends = {one.fileno(): one for one in taken}
    while open_ends:
        ready, _, _ = select.select(list(open_ends), (), (), IDLE_S_MAX)
        if not ready:
            break
        for number in ready:
            count = open_ends[number].recv_into(buffer)
            total += count
            if not count:
                open_ends.pop(number).close()
    print(f"{total} {time.perf_counter() - began}", flush=True)


def source(netns: str, address: str, flows: int, seconds: float, congestion: str) -> None:
    """Send as much as goes into `flows` connections."""
    enter(netns)
    chunk = bytes(CHUNK_BYTES)
    ends = []
    for _ in range(flows):
        one = socket.socket()
        if congestion:
            one.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, congestion.encode())
        one.settimeout(IDLE_S_MAX)
        one.connect((address, PORT))
        one.setblocking(False)
        ends.append(one)
    print("ready", flush=True)
    deadline = time.perf_counter() + seconds
    while time.perf_counter() < deadline:
        _, ready, _ = select.select((), ends, (), 0.05)
        for one in ready:
            with contextlib.suppress(BlockingIOError):
                one.send(chunk)
    for one in ends:
        one.close()
    print("0 0", flush=True)


def open_tap(netns: str, name: str, *, offloads: bool, queues: bool) -> int:
    """Return one queue of a tap of a namespace, which is made if it is not there."""
    enter(netns)
    tap = os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
    flags = _IFF_TAP | _IFF_NO_PI | _IFF_VNET_HDR | (_IFF_MULTI_QUEUE if queues else 0)
    fcntl.ioctl(tap, _TUNSETIFF, struct.pack("16sH22x", name.encode(), flags))
    fcntl.ioctl(tap, _TUNSETOFFLOAD, OFFLOADS if offloads else 0)
    return tap


def patch(one: str, other: str, tap: str, offloads: bool, queues: bool) -> None:
    """Hand every frame from one namespace's tap to the other's, until the end of the input."""
    home = os.getpid()
    ends = (
        open_tap(one, tap, offloads=offloads, queues=queues),
        open_tap(other, tap, offloads=offloads, queues=queues),
    )
    print(f"ready {home}", flush=True)
    across = {ends[0]: ends[1], ends[1]: ends[0]}
    while True:
        ready, _, _ = select.select((*ends, sys.stdin), (), (), IDLE_S_MAX)
        if not ready or sys.stdin in ready:
            return
        for end in ready:
            if isinstance(end, int):
                _hand_over(end, across[end])


def _hand_over(end: int, other: int) -> None:
    for _ in range(FRAMES_AT_ONCE):
        try:
            frame = os.read(end, FRAME_BYTES_MAX)
        except OSError:
            return  # there is no more
        with contextlib.suppress(OSError):  # the other is not up yet, or full: a frame is lost, as on any wire
            os.write(other, frame)


def main(words: Sequence[str]) -> int:
    match list(words):
        case ["sink", netns, flows]:
            sink(netns, int(flows))
        case ["source", netns, address, flows, seconds, congestion]:
            source(netns, address, int(flows), float(seconds), congestion)
        case ["patch", one, other, tap, offloads, queues]:
            patch(one, other, tap, offloads == "1", queues == "1")
        case _:
            return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
