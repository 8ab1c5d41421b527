"""What each feature of the network is worth on this machine, measured: the same way with it and without, in turn, in namespaces
that are made for it and removed. For `atoll doctor --network`. Blocking; takes some seconds a feature."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import secrets
import socket
import statistics
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

from msgspec import Struct

from atoll.model.errors import AtollError, RuntimeFailed
from atoll.network import namespaces, netlink

ROUNDS = 3
SECONDS = 0.5
"""Of each run."""
COMMAND_S = 30.0
HELPS = 1.05
"""A feature helps that makes what goes at least so many times as much."""
MTU = 1500
ADDRESSES = ("198.18.0.1", "198.18.0.2")
TAP = "trial0"
VHOST = Path("/dev/vhost-net")
_SIOCETHTOOL = 0x8946
_SET_TSO, _SET_GSO = 0x1F, 0x24

Progress = Callable[[str], None]


class Trial(Struct, frozen=True, kw_only=True):
    """One feature. Figures are Gbit/s that arrived; None where it cannot be tried here."""

    feature: str
    without: float | None = None
    with_it: float | None = None
    used: str
    """Whether and where Atoll uses it."""
    said: str
    """What follows from the measurement."""

    @property
    def ratio(self) -> float | None:
        return self.with_it / self.without if self.with_it is not None and self.without else None


def measure(progress: Progress = lambda _: None, *, rounds: int = ROUNDS, seconds: float = SECONDS) -> tuple[Trial, ...]:
    """Return a trial of every feature; what this machine does not let be tried says why. Leaves nothing."""
    found = []
    for trial in (_segments, _congestion, _offloads, _queues, _vhost):
        try:
            found.append(trial(progress, rounds, seconds))
        except (AtollError, OSError, subprocess.SubprocessError) as error:
            found.append(Trial(feature=_NAMES[trial], used="–", said=f"could not be tried: {error}"))
    return tuple(found)


def _segments(progress: Progress, rounds: int, seconds: float) -> Trial:
    """Frames of 64 KiB on links, cut where they leave the machine, if at all."""
    with _pair(progress) as (one, other):
        with _veth(one, other):

            def run(on: bool) -> float:
                for netns in (one, other):
                    namespaces.run_inside(netns, lambda on=on: _ethtool("eth0", on))  # type: ignore[misc]
                return _throughput(one, other, seconds)

            without, with_it = _compared(progress, _NAMES[_segments], run, rounds)
    return Trial(
        feature=_NAMES[_segments],
        without=without,
        with_it=with_it,
        used="on, as the kernel makes links",
        said=_verdict(without, with_it, "ethtool -K of the uplink shows whether it leaves the machine so, too"),
    )


def _congestion(progress: Progress, rounds: int, seconds: float) -> Trial:
    """The machine's default of TCP congestion control beside cubic."""
    default = Path("/proc/sys/net/ipv4/tcp_congestion_control").read_text().strip()
    if default == "cubic":
        return Trial(feature=_NAMES[_congestion], used="cubic is this machine's default", said="nothing to be compared")
    with _pair(progress) as (one, other):
        with _veth(one, other):

            def run(on: bool) -> float:
                return _throughput(one, other, seconds, congestion="cubic" if on else default)

            without, with_it = _compared(progress, _NAMES[_congestion], run, rounds)
    helps = with_it > without * HELPS
    return Trial(
        feature=_NAMES[_congestion],
        without=without,
        with_it=with_it,
        used=f"{default} is this machine's default, and instances have that",
        said="sysctl -w net.ipv4.tcp_congestion_control=cubic gives more within a site"
        if helps
        else f"{default} costs nothing here",
    )


def _offloads(progress: Progress, rounds: int, seconds: float) -> Trial:
    """Checksums and segments left to the node by a machine's card."""
    with _pair(progress) as (one, other):

        def run(on: bool) -> float:
            with _patched(one, other, offloads=on, queues=1):
                return _throughput(one, other, seconds)

        without, with_it = _compared(progress, _NAMES[_offloads], run, rounds)
    return Trial(
        feature=_NAMES[_offloads],
        without=without,
        with_it=with_it,
        used="on: every machine's card offers them to its guest",
        said=_verdict(without, with_it, "a guest's kernel can turn them off by itself"),
    )


def _queues(progress: Progress, rounds: int, seconds: float) -> Trial:
    """A second pair of queues of a machine's card, with a process of its own."""
    with _pair(progress) as (one, other):

        def run(on: bool) -> float:
            with _patched(one, other, offloads=True, queues=2 if on else 1):
                return _throughput(one, other, seconds, flows=4)

        without, with_it = _compared(progress, _NAMES[_queues], run, rounds)
    return Trial(
        feature=_NAMES[_queues],
        without=without,
        with_it=with_it,
        used="off: QEMU's own thread serves all queues where the kernel has no vhost-net",
        said=_verdict(without, with_it, f"{os.cpu_count()} processors"),
    )


def _vhost(progress: Progress, rounds: int, seconds: float) -> Trial:
    """The kernel itself as the other end of a machine's card."""
    there = VHOST.exists()
    said = "the kernel has it; only a guest could measure it" if there else "this kernel has none (modprobe vhost_net)"
    return Trial(feature=_NAMES[_vhost], used="off: not used by this version", said=said)


_NAMES = {
    _segments: "links: large segments (TSO, GSO)",
    _congestion: "links: cubic for congestion control",
    _offloads: "machines: checksum and TSO offloads",
    _queues: "machines: two queues",
    _vhost: "machines: vhost-net",
}


def _verdict(without: float, with_it: float, more: str) -> str:
    ratio = with_it / without
    if ratio >= HELPS:
        return f"helps: {ratio:.2f} times as much"
    return f"costs: {ratio:.2f} times as much; {more}" if ratio < 1 / HELPS else f"makes no difference; {more}"


def _compared(progress: Progress, feature: str, run: Callable[[bool], float], rounds: int) -> tuple[float, float]:
    """Run without and with the feature in turn; return the medians."""
    found: dict[bool, list[float]] = {False: [], True: []}
    for number in range(rounds):
        for on in (False, True) if number % 2 == 0 else (True, False):
            progress(f"{feature}, {'with' if on else 'without'}, run {number + 1} of {rounds}")
            found[on].append(run(on))
    return statistics.median(found[False]), statistics.median(found[True])


@contextlib.contextmanager
def _pair(progress: Progress) -> Iterator[tuple[Path, Path]]:
    """Two namespaces that are gone afterwards."""
    progress("making namespaces")
    tag = secrets.token_hex(4)
    paths = tuple(namespaces.DIRECTORY / f"atoll-trial-{tag}-{end}" for end in "ab")
    try:
        for path in paths:
            namespaces.create(path, _bring_up_loopback)
        yield paths[0], paths[1]
    finally:
        for path in paths:
            namespaces.remove(path)


def _bring_up_loopback() -> None:
    with netlink.RouteSocket() as routes:
        routes.send(netlink.set_up(1))


@contextlib.contextmanager
def _veth(one: Path, other: Path) -> Iterator[None]:
    """Join two namespaces by links called eth0; they end with the namespaces."""
    descriptor = os.open(other, os.O_RDONLY | os.O_CLOEXEC)

    def make() -> None:
        macs = [bytes.fromhex(f"0261c612000{number}") for number in (1, 2)]
        with netlink.RouteSocket() as routes:
            routes.send(netlink.add_veth("eth0", mac=macs[0], peer="eth0", peer_mac=macs[1], peer_netns=descriptor, mtu=MTU))

    try:
        namespaces.run_inside(one, make)
    finally:
        os.close(descriptor)
    for at, netns in enumerate((one, other)):
        namespaces.run_inside(netns, lambda at=at: _address("eth0", at))  # type: ignore[misc]
    yield


@contextlib.contextmanager
def _patched(one: Path, other: Path, *, offloads: bool, queues: int) -> Iterator[None]:
    """Join two namespaces by taps, with a process for each queue that hands frames over, as a monitor's does."""
    with contextlib.ExitStack() as stack:
        for _ in range(queues):
            words = ("patch", str(one), str(other), TAP, str(int(offloads)), str(int(queues > 1)))
            stack.enter_context(_process(*words))
        for at, netns in enumerate((one, other)):
            namespaces.run_inside(netns, lambda at=at: _address(TAP, at))  # type: ignore[misc]
        yield


def _address(name: str, at: int) -> None:
    with netlink.RouteSocket() as routes:
        index = socket.if_nametoindex(name)
        routes.send(netlink.set_up(index), netlink.add_address(index, ADDRESSES[at]), netlink.add_route(index, ADDRESSES[1 - at]))


def _ethtool(name: str, on: bool) -> None:
    """Turn large segments on or off; the request of this ioctl holds a pointer."""
    with contextlib.closing(socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) as asking:
        for command in (_SET_TSO, _SET_GSO):
            value = ctypes.create_string_buffer(struct.pack("=II", command, int(on)))
            fcntl.ioctl(asking, _SIOCETHTOOL, struct.pack("16sP16x", name.encode(), ctypes.addressof(value)))


def _throughput(one: Path, other: Path, seconds: float, *, flows: int = 1, congestion: str = "") -> float:
    """Return the Gbit/s that arrive in `other` of what is sent in `one`."""
    with _process("sink", str(other), str(flows)) as taken:
        with _process("source", str(one), ADDRESSES[1], str(flows), str(seconds), congestion) as sent:
            sent.readline()
        total, took = taken.readline().split()
    if not float(took):
        raise RuntimeFailed("nothing arrived")
    return int(total) * 8 / float(took) / 1e9


@contextlib.contextmanager
def _process(*words: str) -> Iterator[IO[str]]:
    """A process of `pump`, when it is ready; what it says is read from what is yielded. It ends with the block."""
    command = [sys.executable, "-m", "atoll.network.pump", *words]
    made = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert made.stdout is not None  # noqa: S101 - a pipe
    assert made.stdin is not None  # noqa: S101 - likewise
    try:
        if not made.stdout.readline().startswith("ready"):
            raise RuntimeFailed(f"the {words[0]} of a trial could not begin", mend="modprobe tun; run as root")
        yield made.stdout
    finally:
        made.stdin.close()
        try:
            made.wait(timeout=2 if words[0] == "patch" else COMMAND_S)
        except subprocess.TimeoutExpired:
            made.kill()
            made.wait()
        made.stdout.close()
