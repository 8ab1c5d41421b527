"""What Atoll's runtime port adds to each runtime's own tool: the same bundle, started by both in turn.

Ours is the agent's own API: from the call of `start` to its answer, when the process runs. The bare tool is `run --detach` of the
very bundle that ours wrote, in the same surroundings; LXC's is `lxc-start --daemon` of the configuration that ours wrote. Time to
first command is create, start, and `echo` by exec, one instance after another.
"""

from __future__ import annotations

import argparse
import asyncio
import shutil
import subprocess
import tempfile
import time
import uuid
from pathlib import Path
from typing import Any

from atoll.model.errors import AtollError, Unsupported
from atoll.model.ports.runtime import Limits
from atoll.model.spec import Isolation
from atoll.runtimes.gvisor import GvisorRuntime
from atoll.runtimes.lxc import LxcRuntime
from atoll.runtimes.oci_runtime import OciRuntime
from atoll.runtimes.offer import RUNTIMES, isolation_of
from bench import copies, machines
from bench.busybox import BUSYBOX, Boxes
from bench.report import Report, Result, percentile

SAMPLES = 30
WARM_UP = 2
LIMITS = Limits(cpu_milli=2000, memory_bytes=128 << 20, disk_bytes=256 << 20, pids=128)
FIRST_COMMAND_MS = 40
"""The goal for containers; a sandbox's is about its own tool."""

_BIAS = (
    "the bare tool is called by Python's subprocess from a thread, which costs it some ms: a ratio below 1 means equal, not faster"
)
_FILTER = (
    "ours puts a ready-made system call filter on: bare runc and crun compile it each time, and lxc-start runs the program without"
)


def run(arguments: list[str]) -> Report:
    """Measure and return the report."""
    parser = argparse.ArgumentParser(prog="python -m bench runtimes")
    parser.add_argument("--samples", type=int, default=SAMPLES)
    parser.add_argument("--alive", type=int, default=0, help="copies of a machine to keep at once; 200 take some minutes")
    parser.add_argument("--copies-only", action="store_true", help="leave out the starts beside each runtime's own tool")
    parser.add_argument("--burst", type=int, default=copies.BURST, help="copies (of runc: instances) that are begun at once")
    parser.add_argument("--copies-of", action="append", choices=copies.KINDS, help="only copies of this runtime; may be repeated")
    options = parser.parse_args(arguments)
    samples = options.samples
    report = Report(
        "runtimes", notes=[f"{samples} samples each, ours and the bare tool in turn, after {WARM_UP} warm-ups", _BIAS, _FILTER]
    )
    beside = () if options.copies_only else RUNTIMES
    for kind in (kind for kind in beside if isolation_of(kind.name) in (Isolation.CONTAINER, Isolation.SANDBOX)):
        with tempfile.TemporaryDirectory(prefix="atoll-bench-") as directory:
            asyncio.run(_measure(kind(Path(directory) / "runtime", cgroup=f"/atoll-bench-{uuid.uuid4().hex[:8]}"), report, samples))
    if not options.copies_only:
        machines.measure(report, samples)
    copies.measure(report, samples, alive=options.alive, burst=options.burst, kinds=options.copies_of or tuple(copies.KINDS))
    return report


async def _measure(runtime: OciRuntime, report: Report, samples: int) -> None:
    what = f"{runtime.name}: start, beside its own tool on the same bundle"
    try:
        if not BUSYBOX.exists():
            raise Unsupported("busybox-static is not installed")
        await runtime.probe()  # type: ignore[attr-defined]
    except Unsupported as error:
        report.add(Result(f"{what}, p50", None, "ms", None, "<= 1.10", str(error)))
        return
    bench = _Bench(runtime)
    tag = uuid.uuid4().hex[:8]  # the name of a sandbox of gVisor is taken on the whole machine
    ours, bare, first = [], [], []
    try:
        await runtime.recover()
        for index in range(samples + WARM_UP):
            started = await bench.ours(f"{tag}-o{index}")
            alone = await bench.bare(f"{tag}-b{index}")
            command = await bench.first_command(f"{tag}-c{index}")
            if index >= WARM_UP:
                ours.append(started)
                bare.append(alone)
                first.append(command)
    finally:
        await bench.close()
    report.add(Result(f"{what}, p50", percentile(ours, 50), "ms", percentile(bare, 50), "<= 1.10"))
    report.add(Result(f"{what}, p99", percentile(ours, 99), "ms", percentile(bare, 99), "<= 1.25"))
    goal = None if isinstance(runtime, GvisorRuntime) else f"<= {FIRST_COMMAND_MS}"
    report.add(Result(f"{runtime.name}: create, start and first command, p50", percentile(first, 50), "ms", None, goal))
    report.add(Result(f"{runtime.name}: create, start and first command, p99", percentile(first, 99), "ms"))


class _Bench:
    """One runtime, and one image of busybox for it."""

    def __init__(self, runtime: OciRuntime) -> None:
        self._runtime = runtime
        self._directory = Path(tempfile.mkdtemp(prefix="atoll-bench-"))
        self._boxes = Boxes(self._directory, LIMITS)

    async def ours(self, id: str) -> float:
        await self._runtime.create(self._boxes.make(id))
        began = time.perf_counter()
        await self._runtime.start(id)
        took_ms = (time.perf_counter() - began) * 1000
        await self._runtime.delete(id)
        return took_ms

    async def bare(self, id: str) -> float:
        """The tool alone on what `create` made; clearing away is the runtime's, as after a start that failed."""
        box = self._boxes.make(id)
        await self._runtime.create(box)
        boxes = await self._runtime._boxes()
        if isinstance(self._runtime, LxcRuntime):
            command = [*self._runtime.lxc_start(boxes, box.directory, id, daemon=True), *box.argv]
        else:
            tool = self._runtime.tool(boxes, box.directory / "bare.log")
            command = [*tool, "run", "--detach", "--bundle", str(box.directory), "--pid-file", str(box.directory / "bare.pid"), id]
        with (box.directory / "bare.out").open("wb") as output:
            began = time.perf_counter()
            done = await asyncio.to_thread(_call, command, output)
            took_ms = (time.perf_counter() - began) * 1000
        words = (box.directory / "bare.out").read_text(errors="replace")
        await self._runtime.delete(id)
        if done != 0:
            raise RuntimeError(f"{' '.join(command)}: {words[-500:]}")
        return took_ms

    async def first_command(self, id: str) -> float:
        began = time.perf_counter()
        await self._runtime.create(self._boxes.make(id))
        await self._runtime.start(id)
        execution = await self._runtime.exec(id, ["echo", "hello"])
        answer = await execution.read()
        took_ms = (time.perf_counter() - began) * 1000
        await execution.close()
        await self._runtime.delete(id)
        if answer != (1, b"hello\n"):
            raise RuntimeError(f"the first command of {id} said {answer!r}")
        return took_ms

    async def close(self) -> None:
        runtime: Any = self._runtime
        for found in await runtime.recover():
            try:
                await runtime.delete(found.id)
            except AtollError as error:
                print(f"{found.id} is left behind: {error}")
        await runtime.close()
        self._boxes.close()
        shutil.rmtree(self._directory, ignore_errors=True)


def _call(command: list[str], output: Any) -> int:
    return subprocess.run(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, timeout=60, check=False).returncode
