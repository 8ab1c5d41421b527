"""The part of `bench network` about virtual machines: what goes to and from a guest, beside the same monitor and guest on a tap
that is tuned by hand: the host's own stack at its other end, offloads on, no second link, no filter, no rules."""

from __future__ import annotations

import argparse
import asyncio
import os
import re
import shutil
import subprocess
import threading
from collections.abc import Callable, Coroutine
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from atoll.model.errors import AtollError
from atoll.model.ports.images import Image, ImageConfig
from atoll.model.ports.runtime import Box, Limits
from atoll.network.slots import GATEWAY, GATEWAY_MAC
from atoll.runtimes.qemu import QemuRuntime
from bench.network_world import PORT, Meter, Net, Sample, call, cpu, interleaved, rate
from bench.report import Report, Result

LIMITS = Limits(cpu_milli=2000, memory_bytes=192 << 20, disk_bytes=64 << 20, pids=64)
BARE, NEAR = "198.18.3.2", "198.18.3.1"
READY_S = 90.0
OFFERED_MIN, OFFERED_MAX = 10_000.0, 4_000_000.0
OFFERED = 1.25
"""Packets per second that a guest is sent, beside those that it takes of the hand-tuned tap at most: far more would measure how the
sender and the monitor share the processors."""
T = TypeVar("T")


def measure(report: Report, directory: Path, options: argparse.Namespace) -> None:
    """Two machines side by side, one on our link and one on a tap alone."""
    rows = (
        ("to", "machine, node → guest: TCP beside a hand-tuned tap", ">= 0.97"),
        ("from", "machine, guest → node: TCP beside a hand-tuned tap", ">= 0.97"),
        ("packets to", "machine, node → guest: small UDP packets beside a hand-tuned tap", ">= 0.97"),
        ("packets from", "machine, guest → node: small UDP packets beside a hand-tuned tap", ">= 0.97"),
    )
    with Net() as net, _Machines(net, directory) as machines:
        try:
            machines.probe()
        except AtollError as error:
            for _, what, goal in rows:
                report.add(Result(what, None, "", goal=goal, why=str(error)))
            return
        host, bare = net.namespace("h"), net.namespace("b")
        node = net.node(host, directory / "h")
        node.ask("open", subnet="10.200.0.0/24", prepared=0)
        link = node.ask("attach", id="one")
        machines.start("ours", Path(link["netns"]))
        _make_link(bare)
        machines.create("bare", Path("/run/netns") / bare)
        _tap_alone(bare)
        machines.begin("bare")
        ends = {"ours": (host, link["address"]), "bare": (bare, BARE)}
        for netns, address in ends.values():
            _until_served(netns, address)
        offered = _offered(partial(net.measure, bare, BARE, seconds=options.seconds, packets=True, meter=machines.meters["bare"]))
        ways = {}
        for name, (netns, address) in ends.items():
            go = partial(net.measure, netns, address, seconds=options.seconds, meter=machines.meters[name])
            ways[f"to, {name}"] = go
            ways[f"from, {name}"] = partial(go, reverse=True)
            ways[f"packets to, {name}"] = partial(go, packets=True, offered_per_s=offered)
            ways[f"packets from, {name}"] = partial(go, packets=True, reverse=True)
        found = interleaved(options.rounds, dict(sorted(ways.items())))
        accelerator = machines.runtimes["ours"].accelerator
    for key, what, goal in rows:
        one, other = found[f"{key}, ours"], found[f"{key}, bare"]
        unit, divided = ("k/s", 1e3) if key.startswith("packets") else ("Gbit/s", 1e9)
        why = f"QEMU by {accelerator}: the guest's processor is emulated, and is what limits both" if accelerator == "tcg" else None
        report.add(Result(what, rate(one) / divided, unit, rate(other) / divided, goal, why))
        per = "million packets" if key.startswith("packets") else "Gbit"
        what = re.sub("TCP|small UDP packets", f"processor per {per}", what)
        report.add(Result(what, cpu(one) * 1000, "ms", cpu(other) * 1000, None if key.startswith("packets") else "<= 1.05"))


def _offered(send: Callable[..., Sample]) -> float:
    """Return how many packets per second a guest is to be sent: more are offered until it takes less than four in five of them."""
    offered = OFFERED_MIN
    while True:
        arrived = send(offered_per_s=offered).per_second
        if arrived < 0.8 * offered or offered >= OFFERED_MAX:
            return OFFERED * arrived
        offered *= 2


class _Machines:
    """Machines by name, each with a runtime and a control group of its own, on a loop of their own thread."""

    def __init__(self, net: Net, directory: Path) -> None:
        self.runtimes: dict[str, QemuRuntime] = {}
        self.meters: dict[str, Meter] = {}
        self._net = net
        self._directory = directory
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="bench-machines")
        self._thread.start()
        self._readers: list[int] = []
        for name in ("ours", "bare"):
            group = f"/bench-net-{net.tag}-{name}"
            self.runtimes[name] = QemuRuntime(directory / "runtimes" / name, cgroup=group, cache=directory / "cache")
            self.meters[name] = Meter(group)

    def __enter__(self) -> _Machines:
        return self

    def __exit__(self, *_: object) -> None:
        for name, runtime in self.runtimes.items():
            for found in self._run(runtime.recover()):
                self._run(runtime.delete(found.id))
            self._run(runtime.close())
            del name
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        for reader in self._readers:
            os.close(reader)

    def probe(self) -> None:
        for runtime in self.runtimes.values():
            self._run(runtime.probe())
            self._run(runtime.recover())

    def start(self, name: str, netns: Path) -> None:
        self.create(name, netns)
        self.begin(name)

    def create(self, name: str, netns: Path) -> None:
        fifos = []
        for stream in ("out", "err"):
            path = self._directory / f"{name}.{stream}"
            os.mkfifo(path)
            self._readers.append(os.open(path, os.O_RDONLY | os.O_NONBLOCK))
            fifos.append(path)
        box = Box(
            id=f"{name}-{self._net.tag}",
            directory=self._directory / "instances" / name,
            image=_image(self._directory / "layer"),
            argv=("/usr/bin/iperf3", "--server", "--port", str(PORT)),
            env=(),
            workdir="/",
            user="",
            hostname=name,
            limits=LIMITS,
            netns=netns,
            stdout=fifos[0],
            stderr=fifos[1],
        )
        self._run(self.runtimes[name].create(box))

    def begin(self, name: str) -> None:
        self._run(self.runtimes[name].start(f"{name}-{self._net.tag}"))

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()


def _image(layer: Path) -> Image:
    """Return an image of iperf3 and the libraries that it is linked to."""
    if not layer.exists():
        program = shutil.which("iperf3") or "iperf3"
        linked = re.findall(r"(/\S+)", call("ldd", program))
        for path in [program, *linked]:
            target = layer / path.lstrip("/")
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, target)
        for name in ("tmp", "etc", "proc", "sys", "dev"):
            (layer / name).mkdir(exist_ok=True)
    return Image(reference="bench", digest="sha256:0", config=ImageConfig(), layers=(layer,))


def _make_link(netns: str) -> None:
    """Make what the runtime takes for an instance's link: a veth with an address, whose other end nobody uses."""
    call("ip", "-n", netns, "link", "add", "eth0", "address", "02:61:c6:12:03:02", "type", "veth", "peer", "name", "other")
    call("ip", "-n", netns, "address", "add", f"{BARE}/32", "dev", "eth0")
    call("ip", "-n", netns, "link", "set", "eth0", "up")


def _tap_alone(netns: str) -> None:
    """Take the link away, and lead from the host's stack straight into the tap."""
    call("ip", "-n", netns, "link", "delete", "eth0")
    call("tc", "-n", netns, "qdisc", "delete", "dev", "tap0", "ingress")
    call("ip", "-n", netns, "link", "set", "tap0", "down")
    call("ip", "-n", netns, "link", "set", "tap0", "address", GATEWAY_MAC.hex(":"))
    call("ip", "-n", netns, "link", "set", "tap0", "up")
    call("ip", "-n", netns, "address", "add", f"{GATEWAY}/32", "dev", "tap0")
    call("ip", "-n", netns, "address", "add", f"{NEAR}/32", "dev", "tap0")
    call("ip", "-n", netns, "route", "add", f"{BARE}/32", "dev", "tap0", "src", NEAR)
    call("ip", "-n", netns, "neighbour", "replace", BARE, "lladdr", "02:61:c6:12:03:02", "dev", "tap0", "nud", "permanent")


def _until_served(netns: str, address: str) -> None:
    """Wait until the guest's server answers: a run of a tenth of a second that comes to its end."""
    command = ["nsenter", f"--net=/run/netns/{netns}", "iperf3", "--client", address, "--port", str(PORT), "--time", "1"]
    for _ in range(int(READY_S)):
        done = subprocess.run(command, capture_output=True, text=True, timeout=READY_S, check=False)
        if done.returncode == 0:
            return
        threading.Event().wait(1.0)
    raise TimeoutError(f"the guest at {address} does not answer: {done.stdout[-200:]}{done.stderr[-200:]}")
