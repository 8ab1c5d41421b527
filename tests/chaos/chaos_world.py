"""A small world on one machine: hosts as network namespaces behind one switch, in namespaces that vanish with their first process.

`run` begins it from outside: a PID namespace whose end is the end of every process in it, also after a SIGKILL of whoever began it;
a mount namespace with a file system in memory for all data; control groups below one of its own. `World` makes the hosts within.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from atoll.runtimes.cgroup import Cgroups

NETWORK = "10.77.0"
SWITCH = f"{NETWORK}.1"
"""Where users are: they reach every host, whatever is cut between hosts."""
GROUP_PREFIX = "atoll-chaos-"
RULES = """
table inet chaos {
  set from { type ipv4_addr; }
  set to { type ipv4_addr; }
  chain input { type filter hook input priority raw; ip saddr @from drop; }
  chain output { type filter hook output priority raw; ip daddr @to drop; }
}
"""
# Reaps what is left without a parent, as the first process of a machine must.
FIRST = """
set -e
mount -t tmpfs -o size=3g,mode=700 chaos "$1"
mount -t tmpfs -o size=64m chaos /run
mkdir -p /run/netns
ip link set lo up
shift
"$@" & wait $!
"""


def missing() -> str:
    """Return why this machine cannot have such a world, or nothing."""
    if os.geteuid() != 0:
        return "needs root: makes namespaces, mounts and cgroups"
    tools = ("etcd", "etcdctl", "ip", "nft", "nsenter", "setpriv", "unshare")
    lacking = [tool for tool in tools if shutil.which(tool) is None]
    if lacking:
        return f"needs {', '.join(lacking)}"
    if not Path("/bin/busybox").exists():
        return "needs the package busybox-static"
    made = subprocess.run(["unshare", "--net", "--mount", "ip", "link", "add", "br0", "type", "bridge"], capture_output=True)
    return "" if made.returncode == 0 else f"this kernel makes no bridges: {made.stderr.decode().strip()}"


def command(data: Path, *arguments: str) -> list[str]:
    """Return what runs `arguments` as a world's program, with its data in memory at `data`."""
    ends = ["setpriv", "--pdeathsig=KILL", "unshare", "--pid", "--fork", "--kill-child=KILL", "--mount", "--mount-proc", "--net"]
    return [*ends, "bash", "-c", FIRST, "first", str(data), *arguments]


def run(data: Path, *arguments: str, seconds: float) -> subprocess.CompletedProcess[str]:
    """Run a program of this folder in a world of its own and return what it said; whatever happens, all of it is gone then."""
    sweep()
    program = str(Path(__file__).with_name("chaos_inside.py"))
    running = subprocess.Popen(
        command(data, sys.executable, program, str(data), f"{GROUP_PREFIX}{os.getpid()}", *arguments),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        said, _ = running.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        running.kill()
        said = running.communicate()[0] + f"\nit took longer than {seconds:.0f} s"
    finally:
        running.kill()
        running.wait()
        sweep()
    return subprocess.CompletedProcess(arguments, running.returncode, said)


def sweep() -> None:
    """Remove the control groups of worlds that have ended; those of a world that runs hold processes, and stay."""
    for mount in _group_mounts():
        for world in mount.glob(f"{GROUP_PREFIX}*"):
            owner = Path("/proc") / world.name.removeprefix(GROUP_PREFIX)
            if owner.exists() and int(owner.name) != os.getpid():
                continue
            for group in sorted(world.rglob("*/"), key=lambda path: -len(path.parts)):
                with contextlib.suppress(OSError):
                    group.rmdir()
            with contextlib.suppress(OSError):
                world.rmdir()


def _group_mounts() -> list[Path]:
    found = Cgroups.mounted()
    points = [*found.v1.values(), *([found.v2] if found.v2 is not None else [])]
    return list(dict.fromkeys(points))


class Host:
    """A machine with one address. `run_in` is what a command begins with to run there."""

    def __init__(self, name: str, number: int) -> None:
        self.name = name
        self.address = f"{NETWORK}.{number}"
        self.run_in = ("nsenter", f"--net=/run/netns/{name}", "--")

    def rules(self, *words: str) -> None:
        _do(*self.run_in, "nft", *words)


class World:
    """Hosts behind one switch, and what is cut between them. Made in namespaces of its own, it needs no end."""

    def __init__(self, groups: str) -> None:
        _confine(groups)
        _do("ip", "link", "add", "br0", "type", "bridge")
        _do("ip", "address", "add", f"{SWITCH}/24", "dev", "br0")
        _do("ip", "link", "set", "br0", "up")
        self.hosts: dict[str, Host] = {}

    def host(self, name: str) -> Host:
        host = Host(name, 10 + len(self.hosts))
        _do("ip", "netns", "add", name)
        _do("ip", "link", "add", f"v-{name}", "type", "veth", "peer", "name", "eth0", "netns", name)
        _do("ip", "link", "set", f"v-{name}", "master", "br0", "up")
        inside = (
            ("link", "set", "lo", "up"),
            ("address", "add", f"{host.address}/24", "dev", "eth0"),
            ("link", "set", "eth0", "up"),
        )
        for words in (*inside, ("route", "add", "default", "via", SWITCH)):
            _do(*host.run_in, "ip", *words)
        subprocess.run([*host.run_in, "nft", "-f", "-"], input=RULES, text=True, check=True)
        self.hosts[name] = host
        return host

    def cut(self, *hosts: Host, from_: tuple[Host, ...], one_way: bool = False) -> None:
        """Let nothing pass between `hosts` and `from_`; one way: nothing from `from_` to `hosts`."""
        others = "{ " + ", ".join(other.address for other in from_) + " }"
        for host in hosts:
            host.rules("add", "element", "inet", "chaos", "from", others)
            if not one_way:
                host.rules("add", "element", "inet", "chaos", "to", others)

    def heal(self) -> None:
        for host in self.hosts.values():
            host.rules("flush", "set", "inet", "chaos", "from")
            host.rules("flush", "set", "inet", "chaos", "to")


def _confine(name: str) -> None:
    """Put all control groups that are made from now on below one of ours, in every hierarchy."""
    for mount in _group_mounts():
        own = mount / name
        own.mkdir(exist_ok=True)
        for file in ("cpuset.cpus", "cpuset.mems"):
            if (own / file).exists() and (mount / file).exists():
                (own / file).write_text((mount / file).read_text())
        if (mount / "cgroup.controllers").exists() and mount == Cgroups.mounted().v2 and not Cgroups.mounted().v1:
            (mount / "cgroup.subtree_control").write_text("+cpu +memory +pids")
        _do("mount", "--bind", str(own), str(mount))


def _do(*words: str) -> None:
    done = subprocess.run(words, capture_output=True, text=True, timeout=20, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(words)}: {done.stderr.strip()}")


def processes(*words: str) -> list[int]:
    """Return the processes whose command line holds all of `words`."""
    return [pid for pid, line in _command_lines() if all(word in line for word in words)]


def _command_lines() -> Iterator[tuple[int, str]]:
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            yield int(path.parent.name), path.read_bytes().replace(b"\0", b" ").decode(errors="replace")


def wait_for(process: subprocess.Popen[bytes], seconds: float) -> int:
    """Wait for an end in order, else bring it about."""
    deadline = time.monotonic() + seconds
    while process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    if process.poll() is None:
        process.send_signal(signal.SIGKILL)
    return process.wait()
