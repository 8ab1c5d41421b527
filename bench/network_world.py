"""Hosts for `bench network`: network namespaces on this machine, what runs in them, and what iperf3 measures between them.

Every namespace is made and removed here. The congestion control is cubic on both ends of every measurement: a default of BBR
more than halves what a veth takes, and would hide what a link costs.
"""

from __future__ import annotations

import contextlib
import json
import secrets
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from atoll.runtimes.cgroup import Cgroups
from bench.report import median

PORT = 5201
COMMAND_S = 30.0
REPLY_S = 300.0
BETWEEN_S = 15.0
"""Within it a server is ready again after a run: one in an emulated guest takes a moment."""
CONGESTION = "cubic"
SMALL_BYTES = 64
"""Of a datagram, where packets are counted and not bytes."""


def call(*command: str, check: bool = True) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=COMMAND_S, check=False)
    if check and done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout


@dataclass(frozen=True)
class Sample:
    """One run of iperf3."""

    per_second: float
    """Bits, or packets that arrived."""
    cpu_s_per_unit: float
    """Processor seconds of everything that was in the meter's group, per Gbit (or million packets)."""


class Meter:
    """The processor time of what runs in one control group: what the kernel does for a packet there is counted too."""

    def __init__(self, path: str = "") -> None:
        self.path = path or f"/bench-net-{secrets.token_hex(4)}"
        cgroups = Cgroups.detect()
        self._group = cgroups.group(self.path)
        self._directory = (cgroups.v1["cpuacct"] if not cgroups.pure else cgroups.v2 or Path()) / self.path.lstrip("/")
        self._own = not path
        if self._own:
            self._directory.mkdir(exist_ok=True)

    def wrap(self, *command: str) -> list[str]:
        """Return `command` as one that begins by entering the group."""
        return ["sh", "-c", f'echo $$ > {self._directory}/cgroup.procs; exec "$@"', "sh", *command]

    def cpu_s(self) -> float:
        return self._group.cpu_us() / 1e6

    def close(self) -> None:
        if self._own:
            with contextlib.suppress(OSError):
                self._directory.rmdir()


class Net:
    """All namespaces of one run. Use it in `with`: what was made is gone afterwards, and what was started has ended."""

    def __init__(self) -> None:
        self.tag = secrets.token_hex(3)
        self.meter = Meter()
        self._names: list[str] = []
        self._processes: list[subprocess.Popen[bytes]] = []
        self._after: list[Callable[[], object]] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for process in reversed(self._processes):
            process.terminate()
        for process in self._processes:
            try:
                process.wait(timeout=COMMAND_S * 2)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        for undo in reversed(self._after):
            undo()
        for name in self._names:
            call("ip", "netns", "delete", name, check=False)
        self.meter.close()

    def after(self, undo: Callable[[], object]) -> None:
        self._after.append(undo)

    def namespace(self, name: str) -> str:
        full = f"bn{self.tag}{name}"
        call("ip", "netns", "add", full)
        self._names.append(full)
        call("ip", "-n", full, "link", "set", "lo", "up")
        self.sysctl(full, "net.ipv4.ip_forward=1")
        return full

    def sysctl(self, netns: str, setting: str) -> None:
        call("nsenter", f"--net={path_of(netns)}", "sysctl", "-q", "-w", setting)

    def wire(self, one: str, one_end: str, other: str, other_end: str, *, names: tuple[str, str]) -> None:
        """Join two namespaces by a veth with an address at each end, each the other's default route."""
        call("ip", "-n", one, "link", "add", names[0], "type", "veth", "peer", "name", names[1], "netns", other)
        for netns, name, address in ((one, names[0], one_end), (other, names[1], other_end)):
            call("ip", "-n", netns, "address", "add", address, "dev", name)
            call("ip", "-n", netns, "link", "set", name, "up")
        call("ip", "-n", one, "route", "add", "default", "via", other_end.split("/")[0])
        call("ip", "-n", other, "route", "add", "default", "via", one_end.split("/")[0])

    def spur(self, host: str, inside: str, name: str, address: str) -> None:
        """Join a namespace to a host as bare as can be: a veth, a route each way, and nothing that looks at packets."""
        call("ip", "-n", host, "link", "add", name, "type", "veth", "peer", "name", "eth0", "netns", inside)
        call("ip", "-n", host, "link", "set", name, "up")
        call("ip", "-n", inside, "address", "add", f"{address}/32", "dev", "eth0")
        call("ip", "-n", inside, "link", "set", "eth0", "up")
        call("ip", "-n", host, "route", "add", f"{address}/32", "dev", name)
        call("ip", "-n", inside, "route", "add", "169.254.1.1", "dev", "eth0")
        call("ip", "-n", inside, "route", "add", "default", "via", "169.254.1.1", "dev", "eth0")
        call("ip", "-n", host, "address", "add", "169.254.1.1/32", "dev", name)

    def serve(self, netns: str | Path) -> None:
        """Start an iperf3 server in a namespace, and wait until it listens."""
        command = self.meter.wrap("nsenter", f"--net={path_of(netns)}", "iperf3", "--server", "--port", str(PORT))
        self._processes.append(subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL))
        deadline = time.monotonic() + COMMAND_S
        while f":{PORT}" not in call("nsenter", f"--net={path_of(netns)}", "ss", "-ltnH"):
            if time.monotonic() > deadline:
                raise TimeoutError(f"iperf3 does not listen in {netns}")
            time.sleep(0.02)

    def node(self, netns: str, directory: Path) -> Node:
        directory.mkdir(parents=True)
        node = Node(netns, directory)
        self._processes.append(node.process)
        return node

    def measure(
        self,
        netns: str | Path,
        address: str,
        *,
        seconds: int,
        reverse: bool = False,
        packets: bool = False,
        offered_per_s: float = 0.0,
        meter: Meter | None = None,
    ) -> Sample:
        """Send to `address` from a namespace (`reverse`: from there to here) and return what arrived, per second.

        Packets are `offered_per_s`, or as many as the sender can. The processor time is that of both ends, and of `meter`'s group
        where there is another one.
        """
        command = ["nsenter", f"--net={path_of(netns)}", "iperf3", "--client", address, "--port", str(PORT), "--json"]
        command += ["--time", str(seconds)] + (["--reverse"] if reverse else [])
        command += (
            ["--udp", "--bitrate", str(int(offered_per_s * SMALL_BYTES * 8)), "--length", str(SMALL_BYTES)]
            if packets
            else ["--congestion", CONGESTION]
        )
        meters = [self.meter, *([meter] if meter is not None else [])]
        deadline = time.monotonic() + BETWEEN_S
        while True:
            before = sum(one.cpu_s() for one in meters)
            done = subprocess.run(
                self.meter.wrap(*command), capture_output=True, text=True, timeout=seconds + COMMAND_S, check=False
            )
            spent = sum(one.cpu_s() for one in meters) - before
            answer = json.loads(done.stdout or "{}")
            if "error" not in answer and done.returncode == 0:
                break
            words = answer.get("error") or done.stderr.strip() or str(done.returncode)
            if time.monotonic() > deadline or not any(sign in words for sign in ("refused", "busy", "reset", "control")):
                raise RuntimeError(f"iperf3 to {address}: {words}")
            time.sleep(0.3)
        if packets:
            total = answer["end"]["sum"]
            arrived = max(0, total["packets"] - total["lost_packets"])
            return Sample(arrived / total["seconds"], spent / max(1e-6, arrived / 1e6))
        got = answer["end"]["sum_received"]
        return Sample(got["bits_per_second"], spent / max(1e-6, got["bytes"] * 8 / 1e9))


def path_of(netns: str | Path) -> Path:
    return netns if isinstance(netns, Path) else Path("/run/netns") / netns


class Node:
    """A process in a host's namespace that has our network: `python -m bench.network_node`."""

    def __init__(self, netns: str, directory: Path) -> None:
        self.netns = netns
        command = ["nsenter", f"--net={path_of(netns)}", sys.executable, "-m", "bench.network_node", str(directory)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def ask(self, do: str, **given: Any) -> Any:
        """Have the process do something, and return its answer. Raises RuntimeError with its word."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps({"do": do, **given}).encode() + b"\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"the node in {self.netns} has ended")
        answer = json.loads(line)
        if "error" in answer:
            raise RuntimeError(f"{do}: {answer['error']}")
        return answer["answer"]


def interleaved(rounds: int, ways: Mapping[str, Callable[[], Sample]]) -> dict[str, list[Sample]]:
    """Run every way in turn, `rounds` times, each round in the other order, so that no way always comes after the same one."""
    found: dict[str, list[Sample]] = {name: [] for name in ways}
    for number in range(rounds):
        names: Sequence[str] = list(ways)
        for name in names if number % 2 == 0 else reversed(names):
            found[name].append(ways[name]())
    return found


def rate(samples: Sequence[Sample]) -> float:
    return median([sample.per_second for sample in samples])


def cpu(samples: Sequence[Sample]) -> float:
    return median([sample.cpu_s_per_unit for sample in samples])
