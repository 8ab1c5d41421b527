"""What Atoll's runtime port adds to each runtime's own tool: the same bundle, started by both in turn.

Ours is the agent's own API: from the call of `start` to its answer, when the process runs. The bare tool is `run --detach` of the
very bundle that ours wrote, in the same surroundings; LXC's is `lxc-start --daemon` of the configuration that ours wrote. Time to
first command is create, start, and `echo` by exec, one instance after another; the bare tool's is `run --detach` and `exec` in what
was created before. Further commands are those of a sandbox in which an usher waits, beside those by the tool.
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

from msgspec.structs import replace

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
ECHO = ("echo", "hello")
SETTLE_S = 0.3
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
    parser.add_argument("--of", action="append", choices=_names(), help="only this runtime's own rows; may be repeated")
    parser.add_argument("--copies-only", action="store_true", help="leave out the starts beside each runtime's own tool")
    parser.add_argument("--burst", type=int, default=copies.BURST, help="copies (of runc: instances) that are begun at once")
    parser.add_argument("--copies-of", action="append", choices=copies.KINDS, help="only copies of this runtime; may be repeated")
    options = parser.parse_args(arguments)
    samples = options.samples
    report = Report(
        "runtimes", notes=[f"{samples} samples each, ours and the bare tool in turn, after {WARM_UP} warm-ups", _BIAS, _FILTER]
    )
    beside = () if options.copies_only else RUNTIMES
    for kind in (kind for kind in beside if kind.name in (options.of or _names())):
        with tempfile.TemporaryDirectory(prefix="atoll-bench-") as directory:
            asyncio.run(_measure(kind(Path(directory) / "runtime", cgroup=f"/atoll-bench-{uuid.uuid4().hex[:8]}"), report, samples))
    if options.of:
        return report
    if not options.copies_only:
        machines.measure(report, samples)
    copies.measure(report, samples, alive=options.alive, burst=options.burst, kinds=options.copies_of or tuple(copies.KINDS))
    return report


def _names() -> list[str]:
    return [kind.name.value for kind in RUNTIMES if isolation_of(kind.name) in (Isolation.CONTAINER, Isolation.SANDBOX)]


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
    ours, bare, first, bare_first = [], [], [], []
    by_usher: list[float] = []
    by_tool: list[float] = []
    try:
        await runtime.recover()
        for index in range(samples + WARM_UP):
            started = await bench.ours(f"{tag}-o{index}")
            alone, alone_first = await bench.bare(f"{tag}-b{index}")
            command = await bench.first_command(f"{tag}-c{index}")
            if index >= WARM_UP:
                ours.append(started)
                bare.append(alone)
                first.append(command)
                bare_first += [] if alone_first is None else [alone_first]
        by_usher, by_tool, usher_bytes = await bench.further_commands(f"{tag}-f", samples)
    finally:
        await bench.close()
    report.add(Result(f"{what}, p50", percentile(ours, 50), "ms", percentile(bare, 50), "<= 1.10"))
    report.add(Result(f"{what}, p99", percentile(ours, 99), "ms", percentile(bare, 99), "<= 1.25"))
    what = f"{runtime.name}: create, start and first command"
    if not isinstance(runtime, GvisorRuntime):
        report.add(Result(f"{what}, p50", percentile(first, 50), "ms", None, f"<= {FIRST_COMMAND_MS}"))
    report.add(Result(f"{what}, p99", percentile(first, 99), "ms"))
    if bare_first:
        goal = "<= 1.10" if isinstance(runtime, GvisorRuntime) else None
        beside = f"{what}, beside its own tool's start and command, p50"
        report.add(Result(beside, percentile(first, 50), "ms", percentile(bare_first, 50), goal))
    what = f"{runtime.name}: a command in a sandbox whose usher waits"
    report.add(Result(f"{what}, beside one by the tool, p50", percentile(by_usher, 50), "ms", percentile(by_tool, 50)))
    report.add(Result(f"{what}, p99", percentile(by_usher, 99), "ms"))
    report.add(Result(f"{runtime.name}: memory of a sandbox with an usher beyond one without", usher_bytes / 1024, "KiB"))


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

    async def bare(self, id: str) -> tuple[float, float | None]:
        """The tool alone on what `create` made: its start, and that with a command; clearing away is the runtime's.

        LXC's own command would ask the monitor, in other surroundings: it has none here.
        """
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
            first_ms = None
            if not isinstance(self._runtime, LxcRuntime) and done == 0:
                done = await asyncio.to_thread(_call, [*tool, "exec", id, *ECHO], output)
                first_ms = (time.perf_counter() - began) * 1000
        words = (box.directory / "bare.out").read_text(errors="replace")
        await self._runtime.delete(id)
        if done != 0:
            raise RuntimeError(f"{' '.join(command)}: {words[-500:]}")
        return took_ms, first_ms

    async def first_command(self, id: str) -> float:
        began = time.perf_counter()
        await self._runtime.create(self._boxes.make(id))
        await self._runtime.start(id)
        await self._command(id)
        took_ms = (time.perf_counter() - began) * 1000
        await self._runtime.delete(id)
        return took_ms

    async def further_commands(self, id: str, samples: int) -> tuple[list[float], list[float], int]:
        """Commands in a sandbox with an usher and in one without, in turn, and how much more memory the first one has taken."""
        took: dict[str, list[float]] = {"usher": [], "tool": []}
        for name in took:
            await self._runtime.create(replace(self._boxes.make(f"{id}-{name}"), attended=name == "usher"))
            await self._runtime.start(f"{id}-{name}")
        before = [(await self._runtime.usage(f"{id}-{name}")).memory_bytes for name in took]
        for name in took:
            await self._command(f"{id}-{name}")
        await asyncio.sleep(SETTLE_S)
        after = [(await self._runtime.usage(f"{id}-{name}")).memory_bytes for name in took]
        for _ in range(samples):
            for name, times in took.items():
                times.append(await self._command(f"{id}-{name}"))
        for name in took:
            await self._runtime.delete(f"{id}-{name}")
        return took["usher"], took["tool"], (after[0] - before[0]) - (after[1] - before[1])

    async def _command(self, id: str) -> float:
        began = time.perf_counter()
        execution = await self._runtime.exec(id, ECHO)
        answer = await execution.read()
        took_ms = (time.perf_counter() - began) * 1000
        await execution.close()
        if answer != (1, b"hello\n"):
            raise RuntimeError(f"a command in {id} said {answer!r}")
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
