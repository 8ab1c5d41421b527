"""How fast an instance starts: ours, bare `runc run` of the same bundle, and `podman run` of the same image, interleaved.

A sample's clock starts before the request (or the command) and stops at the measured process's own first instruction.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import http.client
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from atoll.entry.scratch import ScratchAtoll
from atoll.runtimes.oci_filter import BUNDLE
from bench.image import compile_stamp, docker_archive
from bench.report import Report, Result, median, percentile

SAMPLES = 40
PR_SET_CHILD_SUBREAPER = 36
CLONE_NEWNET = 0x40000000
WARM_UP = 3
SETTLE_S = 0.3
SAMPLE_S = 20.0
IMAGE = "localhost/stamp:1"
PODMAN = ("podman", "--cgroup-manager=cgroupfs", "--runtime", "runc")
PODMAN_LIMITS = ("--ulimit", "nofile=1024:1024", "--ulimit", "nproc=1000:1000")


class NotMeasured(Exception):
    """A peer cannot be measured here; the message says why."""


def run(arguments: list[str]) -> Report:
    """Measure and return the report."""
    parser = argparse.ArgumentParser(prog="python -m bench start")
    parser.add_argument("--samples", type=int, default=SAMPLES)
    samples = parser.parse_args(arguments).samples
    work = Path(tempfile.mkdtemp(prefix="atoll-bench-"))
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, 1)
    try:
        with ScratchAtoll("atoll-bench-") as scratch:
            return _measure(scratch, work, samples)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _measure(scratch: ScratchAtoll, work: Path, samples: int) -> Report:
    archive = docker_archive(work, IMAGE)
    image = scratch.atoll_json("image", "import", str(archive), "--name", "stamp", "--tag", "1")["image"]
    ours = Ours(scratch, image)
    runc = BareRunc(work, ours.bundle(work))
    podman: Podman | None = None
    why = None
    try:
        podman = Podman(work, archive)
    except NotMeasured as error:
        why = str(error)
    running: list[float] = []
    first_byte: list[float] = []
    bare: list[float] = []
    peer: list[float] = []
    for index in range(-WARM_UP, samples):
        _progress(index + WARM_UP, samples + WARM_UP)
        turns = ["ours", "runc", *(["podman"] if podman else [])]
        # In turn first, second and third, and each only when what the one before leaves to be tidied up is done.
        for turn in turns[index % len(turns) :] + turns[: index % len(turns)]:
            time.sleep(SETTLE_S)
            _reap()
            if turn == "ours":
                started, answered = ours.sample(index + WARM_UP)
                running.append(started)
                first_byte.append(answered)
            elif turn == "runc":
                bare.append(runc.sample(index + WARM_UP))
            elif podman:
                peer.append(podman.sample(index + WARM_UP))
    for figures in (running, first_byte, bare, peer):
        del figures[:WARM_UP]
    runc.close()
    if podman:
        podman.close()
    return _report(running, first_byte, bare, peer, why, samples)


def _report(
    running: list[float], first_byte: list[float], bare: list[float], peer: list[float], why: str | None, samples: int
) -> Report:
    report = Report(
        "start", notes=[f"{samples} samples each, interleaved, after {WARM_UP} warm-ups; the image is present everywhere"]
    )
    started = "create request → process running"
    report.add(Result(f"{started}, p50, beside bare runc run", median(running), "ms", median(bare), "<= 1.5"))
    report.add(Result(f"{started}, p99, beside bare runc run", percentile(running, 99), "ms", percentile(bare, 99)))
    if peer:
        report.add(Result(f"{started}, p50, beside podman run", median(running), "ms", median(peer), "< 0.5"))
        report.add(Result(f"{started}, p99, beside podman run", percentile(running, 99), "ms", percentile(peer, 99)))
    else:
        report.add(Result(f"{started}, p50, beside podman run", median(running), "ms", None, "< 0.5", why))
    report.add(Result("create request → first byte through the ingress, p50", median(first_byte), "ms"))
    report.add(Result("create request → first byte through the ingress, p99", percentile(first_byte, 99), "ms"))
    return report


class Ours:
    """One sample: a new app with one replica, from the request to its first instruction and to its first answer."""

    def __init__(self, scratch: ScratchAtoll, image: str) -> None:
        self.scratch = scratch
        self.image = image
        self.volumes = scratch.data / "agent" / "volumes" / "default"
        host, port = scratch.api.rsplit(":", 1)
        self.connection = http.client.HTTPConnection(host, int(port), timeout=SAMPLE_S)

    def sample(self, index: int) -> tuple[float, float]:
        name = f"stamp-{index}"
        stamp = self.volumes / name / "probe" / "t"
        began_ns = time.time_ns()
        self.deploy(name)
        answered_ns = self._wait_answer(name)
        started_ns = _read_stamp(stamp)
        self.delete(name)
        return (started_ns - began_ns) / 1e6, (answered_ns - began_ns) / 1e6

    def deploy(self, name: str) -> None:
        spec = {
            "name": name,
            "image": self.image,
            "ports": [{"port": 8080}],
            "volumes": [{"name": "probe", "path": "/probe"}],
            "resources": {"cpu": 0.1, "memory": "64MiB"},
            "stop": {"grace": "1s"},
        }
        self.call("PUT", f"/v1/projects/default/apps/{name}", spec)

    def delete(self, name: str) -> None:
        self.call("DELETE", f"/v1/projects/default/apps/{name}")
        _wait(lambda: not self.call("GET", f"/v1/projects/default/instances?app={name}")["items"], f"{name} to be gone")

    def call(self, method: str, path: str, body: object = None) -> Any:
        data = None if body is None else json.dumps(body)
        headers = {"Authorization": f"Bearer {self.scratch.token}", "Content-Type": "application/json"}
        self.connection.request(method, path, data, headers)
        answer = self.connection.getresponse()
        content = answer.read()
        if answer.status >= 300:
            raise RuntimeError(f"{method} {path}: {answer.status} {content.decode()[:500]}")
        return json.loads(content) if content else None

    def _wait_answer(self, name: str) -> int:
        host, port = self.scratch.ingress.rsplit(":", 1)
        deadline = time.monotonic() + SAMPLE_S
        while time.monotonic() < deadline:
            connection = http.client.HTTPConnection(host, int(port), timeout=SAMPLE_S)
            connection.request("GET", "/", headers={"Host": f"{name}.localhost"})
            answer = connection.getresponse()
            answer.read()
            connection.close()
            if answer.status == 200:
                return time.time_ns()
            time.sleep(0.001)
        raise RuntimeError(f"{name} did not answer within {SAMPLE_S:.0f} s\n{self.scratch.log[-3000:]}")

    def bundle(self, work: Path) -> dict[str, Any]:
        """Return the configuration that our agent wrote for an instance, which bare runc is then given."""
        self.deploy("bundle")
        self._wait_answer("bundle")
        found = (self.scratch.data / "agent").rglob("config.json")
        written = [path for path in found if path.parent.name != BUNDLE]  # the whole one, which says what the process is
        bundle: dict[str, Any] = json.loads(written[0].read_text())
        self.delete("bundle")
        return bundle


class BareRunc:
    """`runc run --detach` of our own bundle: only paths that must differ are changed; root and network are made ahead."""

    def __init__(self, work: Path, bundle: dict[str, Any]) -> None:
        self.work = work
        self.probe = work / "probe"
        self.root = work / "bundle"
        rootfs = self.root / "rootfs"
        rootfs.mkdir(parents=True)
        self.probe.mkdir(mode=0o777)
        self.probe.chmod(0o777)
        work.chmod(0o755)
        for name in ("probe", "etc", "proc", "sys", "dev", "tmp"):
            (rootfs / name).mkdir()
        shutil.copy2(compile_stamp(work), rootfs / "stamp")
        _own(rootfs, bundle)
        bundle["root"]["path"] = str(rootfs)
        for mount in bundle["mounts"]:
            if mount["destination"] == "/probe":
                mount["source"] = str(self.probe)
            elif mount["destination"] == "/sys":
                mount["source"] = str(self._make_network())
            elif mount.get("source", "").startswith("/") and not Path(mount["source"]).exists():
                # hosts, hostname, resolv.conf: of the instance that is gone by now
                Path(work / "file").touch()
                mount["source"] = str(work / "file")
        self.bundle = bundle
        self.runc = ["runc", "--root", str(work / "runc")]
        self.inside = ThreadPoolExecutor(1, initializer=_enter, initargs=(self.netns,))

    def _make_network(self) -> Path:
        """Make a namespace with its own sysfs ahead, as our agent does, and return where that sysfs is."""
        self.netns = Path(f"/run/netns/bench-{os.getpid()}")
        sysfs = self.work / "sysfs"
        sysfs.mkdir()
        _call(["ip", "netns", "add", self.netns.name])
        _call(["nsenter", f"--net={self.netns}", "mount", "-t", "sysfs", "sysfs", str(sysfs)])
        return sysfs

    def close(self) -> None:
        self.inside.shutdown()
        _call(["umount", str(self.work / "sysfs")])
        _call(["ip", "netns", "delete", self.netns.name])

    def sample(self, index: int) -> float:
        stamp = self.probe / "t"
        stamp.unlink(missing_ok=True)
        name = f"bare-{os.getpid()}-{index}"
        # A group of its own, as every instance of ours has: one that still holds the last one's remains is slow to enter.
        self.bundle["linux"]["cgroupsPath"] = f"/{name}"
        (self.root / "config.json").write_text(json.dumps(self.bundle))
        began_ns = time.time_ns()
        self.inside.submit(_call, [*self.runc, "run", "--detach", "--bundle", str(self.root), name]).result()
        started_ns = _read_stamp(stamp)
        _call([*self.runc, "delete", "--force", name])
        return (started_ns - began_ns) / 1e6


class Podman:
    """`podman run --detach` of the same image, with its default network."""

    def __init__(self, work: Path, archive: Path) -> None:
        if shutil.which("podman") is None:
            raise NotMeasured("podman is not installed")
        self.probe = work / "podman-probe"
        self.probe.mkdir()
        loaded = subprocess.run([*PODMAN, "load", "-q", "-i", str(archive)], capture_output=True, text=True, check=False)
        if loaded.returncode != 0:
            raise NotMeasured(f"podman cannot load the image: {loaded.stderr.strip()[-200:]}")

    def sample(self, index: int) -> float:
        stamp = self.probe / "t"
        stamp.unlink(missing_ok=True)
        name = f"bench-{os.getpid()}-{index}"
        began_ns = time.time_ns()
        _call([*PODMAN, "run", "--detach", "--name", name, *PODMAN_LIMITS, "-m", "64m", "-v", f"{self.probe}:/probe", IMAGE])
        started_ns = _read_stamp(stamp)
        _call([*PODMAN, "rm", "-f", "-t", "0", name])
        return (started_ns - began_ns) / 1e6

    def close(self) -> None:
        _call([*PODMAN, "rmi", "-f", IMAGE])


def _enter(netns: Path) -> None:
    """Move this thread, and what it will start, into a network namespace."""
    with open(netns) as file:
        if ctypes.CDLL(None, use_errno=True).setns(file.fileno(), CLONE_NEWNET) != 0:
            raise OSError(ctypes.get_errno(), f"cannot enter {netns}")


def _own(rootfs: Path, bundle: dict[str, Any]) -> None:
    """Give the files to the bundle's root user, as the agent's id-mapped mount does."""
    mappings = bundle["linux"].get("uidMappings") or [{"hostID": 0}]
    host = mappings[0]["hostID"]
    for path in (rootfs, *rootfs.rglob("*")):
        os.chown(path, host, host)


def _call(command: list[str]) -> None:
    # Into a file: what the command leaves running holds its stderr open, and a pipe would never end.
    with tempfile.TemporaryFile() as errors:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=errors, check=False, timeout=SAMPLE_S
        )
        if done.returncode != 0:
            errors.seek(0)
            raise RuntimeError(f"{' '.join(command)}: {errors.read().decode()[-500:]}")


def _reap() -> None:
    """Collect the orphans that tools left to this process; left to a slow init they would hold their groups."""
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def _read_stamp(path: Path) -> int:
    text = ""

    def written() -> bool:
        nonlocal text
        text = path.read_text() if path.exists() else ""
        return text.endswith("\n")

    _wait(written, f"{path} to be written")
    return int(text)


def _wait(holds: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + SAMPLE_S
    while not holds():
        if time.monotonic() > deadline:
            raise RuntimeError(f"waited {SAMPLE_S:.0f} s for {what}")
        time.sleep(0.002)


def _progress(done: int, total: int) -> None:
    if sys.stderr.isatty():
        print(f"\r{done}/{total}", end="" if done + 1 < total else "\n", file=sys.stderr)
