"""How long an app with large weights takes to its first answer: its node has them, fetched them ahead, or has yet to fetch them;
and what showing a volume before it is here saves, and costs, beside fetching it whole.

The weights are one file of random bytes, as packed weights nearly are, in an image of the cell's own registry; a second agent on
this machine is the node that is measured. A sample's clock runs from the deploy request to the first byte of the file through the
ingress. Beside that the node's image store alone is measured, without an instance: in turn it fetches the image whole, and shows it
lazily, each time in a new directory and with a new process that serves it.
"""

from __future__ import annotations

import argparse
import asyncio
import http.client
import json
import logging
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import structlog

from atoll.entry.scratch import ScratchAtoll, ScratchNode
from atoll.images.lazy.mount import refusal
from atoll.images.lazy.shown import LazyImages
from atoll.images.reference import CELL_HOST
from atoll.images.registry import Registries
from atoll.images.store import ImageStore
from atoll.images.transport import Access
from bench.report import Report, Result, median

SAMPLES = 5
SIZE_MB = 500
WAIT_S = 300.0
WARM_READS = 7
"""Of the whole file, each way."""
BUSYBOX = Path("/bin/busybox")


def run(arguments: list[str]) -> Report:
    """Measure and return the report."""
    parser = argparse.ArgumentParser(prog="python -m bench weights")
    parser.add_argument("--samples", type=int, default=SAMPLES)
    parser.add_argument("--size-mb", type=int, default=SIZE_MB)
    given = parser.parse_args(arguments)
    if not BUSYBOX.exists():
        why = "needs busybox-static for the app that serves the file"
        return Report("weights", [Result("deploy request → first byte of the weights", None, "s", why=why)])
    work = Path(tempfile.mkdtemp(prefix="atoll-bench-"))
    try:
        with ScratchAtoll("atoll-bench-") as scratch:
            scratch.environment["XDG_CACHE_HOME"] = str(work / "cache")
            return Weights(scratch, work, given.size_mb).measure(given.samples)
    finally:
        shutil.rmtree(work, ignore_errors=True)


class Weights:
    def __init__(self, scratch: ScratchAtoll, work: Path, size_mb: int) -> None:
        self.scratch = scratch
        self.size_mb = size_mb
        self.first = scratch.atoll_json("nodes", "list")[0]["node"]["name"]
        self.node = ScratchNode(scratch, "measured")
        self.server = self._build(work / "server", ["busybox"], lambda directory: shutil.copy(BUSYBOX, directory / "busybox"))
        self.weights = self._build(work / "weights", ["weights.bin"], self._random)

    def measure(self, samples: int) -> Report:
        absent: list[float] = []
        here: list[float] = []
        ahead: list[float] = []
        fetches: list[float] = []
        with self.node:
            self._heard()
            for number in range(samples):
                print(f"\r{number + 1} of {samples}", end="", file=sys.stderr, flush=True)
                self._forget()
                self._cordon(self.first)
                absent.append(self._sample())
                here.append(self._sample())
                self._forget()
                self._cordon(self.node.name)
                self._deploy("elsewhere")
                self._answers("elsewhere")
                began = time.monotonic()
                self._uncordon(self.node.name)
                self._has(self.weights)
                fetches.append(time.monotonic() - began)
                self._cordon(self.first)
                ahead.append(self._sample())
                self._delete("elsewhere")
        print(file=sys.stderr)
        start = f"deploy request → first byte of {self.size_mb} MB of weights, p50: "
        report = Report("weights", notes=[f"{samples} samples each; one machine is registry, both nodes and client"])
        report.add(Result(start + "not on the node", median(absent), "s"))
        report.add(Result(start + "here since an earlier start, beside not on the node", median(here), "s", median(absent)))
        report.add(Result(start + "fetched ahead, beside not on the node", median(ahead), "s", median(absent)))
        report.add(Result("an app runs elsewhere → this node has its images too, p50", median(fetches), "s"))
        Volumes(self).measure(report, samples)
        return report

    def _build(self, directory: Path, files: list[str], fill: Callable[[Path], object]) -> str:
        directory.mkdir()
        fill(directory)
        spec = {"name": directory.name, "build": {"base": "scratch", "workdir": "/", "files": files}}
        (directory / "atoll.json").write_text(json.dumps(spec))
        return str(self.scratch.atoll_json("build", "--file", str(directory / "atoll.json"))["image"])

    def _random(self, directory: Path) -> None:
        with open(directory / "weights.bin", "wb") as file:
            for _ in range(self.size_mb):
                file.write(os.urandom(1_000_000))

    def _forget(self) -> None:
        """Have the measured node lose its images."""
        self.node.stop()
        shutil.rmtree(self.node.data / "agent" / "images", ignore_errors=True)
        self.node.start()
        self._heard(time.time())

    def _sample(self) -> float:
        began = time.monotonic()
        self._deploy("measured")
        self._answers("measured")
        took_s = time.monotonic() - began
        instances = self._call("GET", "/v1/projects/default/instances?app=measured")["items"]
        if [view["instance"]["node"] for view in instances] != [self.node.name]:
            raise RuntimeError(f"it did not run on the measured node: {instances}")
        self._delete("measured")
        return took_s

    def _deploy(self, name: str) -> None:
        spec = {
            "name": name,
            "image": self.server,
            "command": ["/busybox", "httpd", "-f", "-p", "8000", "-h", "/models"],
            "ports": [{"port": 8000}],
            "volumes": [{"name": "weights", "path": "/models", "image": self.weights}],
            "resources": {"cpu": 0.1, "memory": "64MiB"},
            "stop": {"grace": "1s", "signal": "SIGKILL"},
        }
        self._call("PUT", f"/v1/projects/default/apps/{name}", spec)

    def _answers(self, name: str) -> None:
        host, port = self.scratch.ingress.rsplit(":", 1)

        def answers() -> bool:
            connection = http.client.HTTPConnection(host, int(port), timeout=WAIT_S)
            try:
                connection.request("GET", "/weights.bin", headers={"Host": f"{name}.localhost"})
                answer = connection.getresponse()
                return answer.status == 200 and len(answer.read(1)) == 1
            finally:
                connection.close()

        self._wait(answers, f"{name} to answer", 0.002)

    def _delete(self, name: str) -> None:
        self._call("DELETE", f"/v1/projects/default/apps/{name}")

        def gone() -> bool:
            return name not in {view["app"]["name"] for view in self._call("GET", "/v1/projects/default/apps")["items"]}

        self._wait(gone, f"{name} to be gone", 0.02)

    def _heard(self, since: float = 0.0) -> None:
        def heard() -> bool:
            views = [view for view in self._call("GET", "/v1/nodes")["items"] if view["node"]["name"] == self.node.name]
            beats = [view["heartbeat"] for view in views if view.get("heartbeat") and view.get("health", "ready") == "ready"]
            return any(beat["at"] > since for beat in beats)

        self._wait(heard, "a heartbeat of the measured node")

    def _has(self, image: str) -> None:
        digest, view = image.partition("@")[2], f"/v1/nodes/{self.node.name}"
        self._wait(lambda: digest in self._call("GET", view)["heartbeat"].get("images", ()), "the node to have the image")

    def _cordon(self, name: str) -> None:
        """Use the other node only."""
        for node in (self.first, self.node.name):
            self._call("POST", f"/v1/nodes/{node}/{'cordon' if node == name else 'uncordon'}")

    def _uncordon(self, name: str) -> None:
        self._call("POST", f"/v1/nodes/{name}/uncordon")

    def _call(self, method: str, path: str, body: object = None) -> Any:
        host, port = self.scratch.api.rsplit(":", 1)
        connection = http.client.HTTPConnection(host, int(port), timeout=WAIT_S)
        try:
            headers = {"Authorization": f"Bearer {self.scratch.token}", "Content-Type": "application/json"}
            connection.request(method, path, None if body is None else json.dumps(body), headers)
            answer = connection.getresponse()
            content = answer.read()
        finally:
            connection.close()
        if answer.status >= 300:
            raise RuntimeError(f"{method} {path}: {answer.status} {content.decode()[:500]}")
        return json.loads(content) if content else None

    def _wait(self, holds: Callable[[], bool], what: str, poll_s: float = 0.05) -> None:
        deadline = time.monotonic() + WAIT_S
        while not holds():
            if time.monotonic() > deadline:
                raise RuntimeError(f"waited {WAIT_S:.0f} s for {what}\n{self.node.log[-3000:]}")
            time.sleep(poll_s)


class Volumes:
    """The node's image store, shown the image lazily and fetching it whole, in turn."""

    def __init__(self, weights: Weights) -> None:
        scratch = weights.scratch
        self.image = weights.weights
        self.middle = weights.size_mb * 500_000
        self.size_mb = weights.size_mb
        self.access = {CELL_HOST: Access(url=f"http://{scratch.api}", username="agent", password=scratch.token)}
        self.directory = scratch.data / "stores"

    def measure(self, report: Report, samples: int) -> None:
        what = f"volume of {self.size_mb} MB wanted → "
        if why := refusal():
            report.add(Result(what + "first byte of its middle, lazily", None, "s", why=why))
            return
        structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING))  # stdout is the report's
        taken: dict[str, list[float]] = {}
        for number in range(samples):
            for way in ("whole", "lazy"):
                for name, value in asyncio.run(self._sample(self.directory / f"{way}{number}", way == "lazy")).items():
                    taken.setdefault(f"{way} {name}", []).append(value)
                shutil.rmtree(self.directory / f"{way}{number}", ignore_errors=True)
        found = {name: median(values) for name, values in taken.items()}
        report.notes.append("lazily: a new process that serves the volume is started each time, and is part of the time")
        for name, unit, words, goal in (
            ("first", "s", what + "first byte of its middle, p50: lazily, beside whole", "<= 0.5"),
            ("all", "s", what + "all of it read, p50: lazily, beside whole", "<= 1.0"),
            ("here", "s", what + "all of it here as plain files, p50: lazily, beside whole", None),
        ):
            report.add(Result(words, found[f"lazy {name}"], unit, found[f"whole {name}"], goal=goal))
        words = "warm reads of 1 MiB, p50: through the mount, beside plain files, in turn"
        report.add(Result(words, found["lazy warm"], "MB/s", found["lazy warm plain"], goal=">= 0.8"))

    async def _sample(self, directory: Path, lazily: bool) -> dict[str, float]:
        directory.mkdir(parents=True)
        registries = Registries(self.access)
        lazy = LazyImages(directory / "lazy", self.access) if lazily else None
        store = ImageStore(directory, registries, lazy=lazy)
        began = time.monotonic()
        tree = await store.tree(await store.ensure(self.image, lazily=True))
        if lazily == tree.is_relative_to(directory / "layers"):
            raise RuntimeError(f"it was to be shown {'lazily' if lazily else 'whole'}, and is at {tree}")
        file = tree / "weights.bin"
        taken = {}
        await asyncio.to_thread(self._read, file, self.middle, 1)
        taken["first"] = time.monotonic() - began
        await asyncio.to_thread(self._read, file, 0, None)
        taken["all"] = time.monotonic() - began
        while await store.find(self.image) is None:  # noqa: ASYNC110 (another process brings it)
            await asyncio.sleep(0.01)
        taken["here"] = time.monotonic() - began
        if lazy is not None:
            plain = (await store.tree(await store.ensure(self.image))) / "weights.bin"
            await asyncio.to_thread(self._read, plain, 0, None)
            both = [
                (await asyncio.to_thread(self._read, file, 0, None), await asyncio.to_thread(self._read, plain, 0, None))
                for _ in range(WARM_READS)
            ]
            taken["warm"], taken["warm plain"] = (self.size_mb / median(list(times)) for times in zip(*both, strict=True))
            lazy.end()
        await store.close()
        await registries.aclose()
        return taken

    def _read(self, path: Path, offset: int, size: int | None) -> float:
        """Read all, or `size` bytes, in pieces of 1 MiB; return the seconds that took."""
        began = time.monotonic()
        buffer = bytearray(1 << 20 if size is None else size)
        with path.open("rb", buffering=0) as file:
            file.seek(offset)
            while file.readinto(buffer) and size is None:
                pass
        return time.monotonic() - began
