"""A worker's start: until it answers, beside workerd alone, and beside the start of a container that runc makes.

And the same of workers that share a process, with the memory that each takes in either form.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import shutil
import socket
import subprocess
import tempfile
import time
import uuid
from pathlib import Path

from msgspec import structs

from atoll.model.errors import Unsupported
from atoll.model.ports.images import Image, ImageConfig
from atoll.model.ports.runtime import Box, Limits, WorkerCode
from atoll.model.worker import Worker
from atoll.network import namespaces
from atoll.network.namespaces import run_inside
from atoll.runtimes.runc import RuncRuntime
from atoll.runtimes.workerd import WorkerdRuntime
from atoll.runtimes.workerd_config import CONFIG, Module, configuration
from atoll.runtimes.workerd_root import find_workerd
from bench.report import Report, Result, percentile

SAMPLES = 40
WORKERS = 20
WARM_UP = 3
ANSWER_S_MAX = 20.0
SETTLE_S = 2.0
"""Until processes that others took over from have ended."""
LIMITS = Limits(cpu_milli=2000, memory_bytes=128 << 20, disk_bytes=64 << 20, pids=64)
_CODE = "export default { fetch() { return new Response('hello'); } };"
_BUSYBOX = Path("/bin/busybox")


def run(arguments: list[str]) -> Report:
    """Measure and return the report."""
    parser = argparse.ArgumentParser(prog="python -m bench workers")
    parser.add_argument("--samples", type=int, default=SAMPLES)
    parser.add_argument("--workers", type=int, default=WORKERS, help="how many share a process")
    given = parser.parse_args(arguments)
    samples, workers = given.samples, given.workers
    report = Report(
        "workers", notes=[f"{samples} samples each, in turn, after {WARM_UP} warm-ups; an answer is looked for every ms"]
    )
    with tempfile.TemporaryDirectory(prefix="atoll-bench-") as directory:
        asyncio.run(_measure(Path(directory), report, samples, workers))
    return report


async def _measure(directory: Path, report: Report, samples: int, workers: int) -> None:
    what = "worker: from nothing to its first answer"
    cgroup = f"/atoll-bench-{uuid.uuid4().hex[:8]}"
    workerd = WorkerdRuntime(directory / "workerd", cgroup=cgroup)
    runc = RuncRuntime(directory / "runc", cgroup=cgroup)
    try:
        await workerd.probe()
        if not _BUSYBOX.exists():
            raise Unsupported("busybox-static is not installed")
    except Unsupported as error:
        report.add(Result(what, None, "ms", goal="<= 60", why=str(error)))
        return
    bench = _Bench(directory)
    ours, bare, container = [], [], []
    try:
        for runtime in (workerd, runc):
            await runtime.recover()
        for index in range(samples + WARM_UP):
            figures = await bench.worker(workerd, f"w{index}"), bench.bare(), await bench.container(runc, f"c{index}")
            if index >= WARM_UP:
                for found, figure in zip((ours, bare, container), figures, strict=True):
                    found.append(figure)
    finally:
        for runtime in (workerd, runc):
            for found in await runtime.recover():
                await runtime.delete(found.id)
            await runtime.close()
        bench.close()
    await _shared(directory, report, workers)
    for name, share in (("p50", 50), ("p99", 99)):
        report.add(
            Result(f"{what}, beside workerd alone without a jail, {name}", percentile(ours, share), "ms", percentile(bare, share))
        )
        beyond = percentile([one - other for one, other in zip(ours, container, strict=True)], share)
        goal = "<= 60" if name == "p50" else None
        report.add(Result(f"{what}, beyond runc's create and start of a container, {name}", beyond, "ms", None, goal))
        report.add(Result(f"container of runc: create and start, {name}", percentile(container, share), "ms"))


async def _shared(directory: Path, report: Report, count: int) -> None:
    """Start `count` workers of one project, each way in turn; all of them stay until the end."""
    runtime = WorkerdRuntime(directory / "shared", cgroup=f"/atoll-bench-{uuid.uuid4().hex[:8]}")
    bench = _Bench(directory / "of-shared")
    networks: list[Path] = []
    times: dict[bool, list[float]] = {True: [], False: []}
    memory_bytes: dict[bool, float] = {}
    try:
        await runtime.recover()
        for at in range(count):
            for shared in (True, False):
                networks.append(namespaces.DIRECTORY / f"atoll-bench-{uuid.uuid4().hex[:12]}")
                namespaces.create(networks[-1], _bring_up)
                box = structs.replace(bench.worker_box(f"{'s' if shared else 'a'}{at}", shared=shared), netns=networks[-1])
                began = time.perf_counter()
                await runtime.create(box)
                await runtime.start(box.id)
                await asyncio.to_thread(run_inside, networks[-1], lambda: _until_answer(8080))
                times[shared].append((time.perf_counter() - began) * 1000)
        await asyncio.sleep(SETTLE_S)
        for shared in (True, False):
            ids = [f"{'s' if shared else 'a'}{at}" for at in range(count)]
            memory_bytes[shared] = sum([(await runtime.usage(id)).memory_bytes for id in ids]) / count
    finally:
        for found in await runtime.recover():
            await runtime.delete(found.id)
        await runtime.close()
        bench.close()
        for network in networks:
            namespaces.remove(network)
    what = f"{count} workers that share a process, beside each alone"
    mib = {shared: value / (1 << 20) for shared, value in memory_bytes.items()}
    report.add(Result(f"{what}: memory of each", mib[True], "MiB", mib[False]))
    report.add(
        Result(f"{what}: from nothing to its first answer, p50", percentile(times[True], 50), "ms", percentile(times[False], 50))
    )
    last = [found[-max(1, count // 4) :] for found in (times[True], times[False])]
    report.add(Result(f"{what}: the same of the last quarter, p50", percentile(last[0], 50), "ms", percentile(last[1], 50)))


def _bring_up() -> None:
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)


class _Bench:
    def __init__(self, directory: Path) -> None:
        self._directory = directory
        modules, busybox = directory / "modules", directory / "busybox"
        (modules / "worker").mkdir(parents=True)
        (modules / "worker/index.js").write_text(_CODE)
        for name in ("bin", "etc", "tmp"):
            (busybox / name).mkdir(parents=True)
        shutil.copy(_BUSYBOX, busybox / "bin/busybox")
        self._modules, self._busybox = modules, busybox
        self._readers: list[int] = []

    def _box(self, id: str, layer: Path, worker: WorkerCode | None) -> Box:
        fifos = []
        for name in ("out", "err"):
            path = self._directory / f"{id}.{name}"
            os.mkfifo(path)
            self._readers.append(os.open(path, os.O_RDONLY | os.O_NONBLOCK))
            fifos.append(path)
        return Box(
            id=id,
            directory=self._directory / "instances" / id,
            image=Image(reference="bench", digest="sha256:0", config=ImageConfig(), layers=(layer,)),
            argv=() if worker else ("busybox", "sleep", "1000"),
            env=(),
            workdir="/",
            user="",
            hostname=id,
            limits=LIMITS,
            worker=worker,
            stdout=fifos[0],
            stderr=fifos[1],
        )

    def worker_box(self, id: str, *, shared: bool) -> Box:
        return self._box(id, self._modules, _code(8080, shared=shared))

    async def worker(self, runtime: WorkerdRuntime, id: str) -> float:
        began = time.perf_counter()
        await runtime.create(self._box(id, self._modules, _code(8080)))
        pid = (await runtime.start(id)).pid
        await asyncio.to_thread(run_inside, Path(f"/proc/{pid}/ns/net"), lambda: _until_answer(8080))
        took_ms = (time.perf_counter() - began) * 1000
        await runtime.delete(id)
        return took_ms

    def bare(self) -> float:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = int(probe.getsockname()[1])
        config = self._modules / CONFIG
        config.write_text(configuration(_code(port), [Module("index.js")], memory_bytes=LIMITS.memory_bytes))
        began = time.perf_counter()
        process = subprocess.Popen([str(find_workerd("workerd")), "serve", str(config)], stderr=subprocess.DEVNULL)
        try:
            _until_answer(port)
            return (time.perf_counter() - began) * 1000
        finally:
            process.kill()
            process.wait()

    async def container(self, runtime: RuncRuntime, id: str) -> float:
        began = time.perf_counter()
        await runtime.create(self._box(id, self._busybox, None))
        await runtime.start(id)
        took_ms = (time.perf_counter() - began) * 1000
        await runtime.delete(id)
        return took_ms

    def close(self) -> None:
        for fd in self._readers:
            os.close(fd)


def _code(port: int, *, shared: bool = False) -> WorkerCode:
    worker = Worker(main="index.js", compatibility_date="2026-11-01", shared=shared)
    return WorkerCode(worker=worker, project="bench", port=port)


def _until_answer(port: int) -> None:
    deadline = time.monotonic() + ANSWER_S_MAX
    while time.monotonic() < deadline:
        with contextlib.suppress(ConnectionError), socket.create_connection(("127.0.0.1", port), timeout=ANSWER_S_MAX) as client:
            client.sendall(b"GET / HTTP/1.1\r\nHost: bench\r\n\r\n")
            if client.recv(4096).startswith(b"HTTP/1.1 200"):
                return
        time.sleep(0.001)
    raise RuntimeError(f"no answer within {ANSWER_S_MAX:.0f} s")
