"""Sandboxes over the agent's own runtime API: copies of one snapshot beside cold starts, a burst, memory, and many alive at once.

Time to first command goes from the call that makes the instance to the first output of `echo` by exec. A copy's private memory is
what the kernel counts for its monitor alone (`smaps`).
"""

from __future__ import annotations

import asyncio
import os
import resource
import sys
import tempfile
import time
import uuid
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

from atoll.model.errors import AtollError, Unsupported
from atoll.model.ports.runtime import Box, Limits
from atoll.runtimes.gvisor import GvisorRuntime
from atoll.runtimes.qemu import QemuRuntime
from atoll.runtimes.runc import RuncRuntime
from bench.busybox import Boxes
from bench.report import Report, Result, percentile

COLD = 6
BURST = 100
MEMORY_OF = 6
ONE_S_MAX, BURST_S_MAX, ALIVE_S_MAX, ASKED_S_MAX = 60.0, 300.0, 420.0, 120.0
"""Deadlines of one sandbox to its first command, of a whole burst, of making all copies that are to be alive, and of their answers:
what is not there by then has failed, and is counted so."""
ASKED_AT_ONCE = 8
LIMITS = Limits(cpu_milli=1000, memory_bytes=64 << 20, disk_bytes=64 << 20, pids=64)
"""A machine has 64 MiB more for its kernel: 128 MiB in all."""
MACHINE_BYTES = 128 << 20
KINDS = {"runc": RuncRuntime, "gvisor": GvisorRuntime, "qemu": QemuRuntime}


def measure(report: Report, samples: int, *, alive: int, burst: int, kinds: Sequence[str]) -> None:
    """Add the rows of each of `kinds` that this machine can run; `alive` is how many copies are kept at once, 0 for none."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, max(soft, 16_384)), hard))
    report.notes.append(f"copies: over the agent's own runtime API; load of the machine before it {os.getloadavg()[0]:.1f}")
    for name in kinds:
        asyncio.run(_measure(name, report, samples, alive, burst))


async def _measure(name: str, report: Report, samples: int, alive: int, burst: int) -> None:
    with tempfile.TemporaryDirectory(prefix="atoll-bench-") as directory:
        node = _Node(name, Path(directory))
        try:
            await node.runtime.probe()
        except Unsupported as error:
            report.add(Result(f"{name}: copies", None, "ms", None, None, str(error)))
            return
        try:
            await node.runtime.recover()
            if name == "runc":
                await _burst(report, name, node, node.cold, burst)
                return
            await _copies(report, name, node, samples)
            await _burst(report, name, node, node.copy, burst)
            if name == "qemu":
                await _memory(report, node)
                if alive:
                    await _alive(report, node, alive)
        finally:
            await node.close()


async def _copies(report: Report, name: str, node: _Node, samples: int) -> None:
    cold = []
    for at in range(COLD):
        cold.append(await node.first_command(f"cold{at}", node.cold))
        if at:
            await node.delete(f"cold{at}")
    began = time.perf_counter()
    snapshot = await node.runtime.snapshot(node.id("cold0"), node.snapshot)
    took_ms = (time.perf_counter() - began) * 1000
    copied, restored = [], []
    for at in range(samples + 2):
        began = time.perf_counter()
        await node.copy(f"copy{at}")
        restored.append((time.perf_counter() - began) * 1000)
        await node.delete(f"copy{at}")
        copied.append(await node.first_command(f"again{at}", node.copy))
        await node.delete(f"again{at}")
    ours, base = percentile(copied[2:], 50), percentile(cold, 50)
    vm = name == "qemu"
    report.add(Result(f"{name}: a snapshot is taken", took_ms, "ms"))
    report.add(Result(f"{name}: what it takes on the disk", snapshot.stored_bytes / (1 << 20), "MiB"))
    report.add(Result(f"{name}: copy made and answering (restore), p50", percentile(restored[2:], 50), "ms"))
    report.add(Result(f"{name}: copy to first command, p50", ours, "ms", None, "<= 60" if vm else None))
    report.add(Result(f"{name}: copy to first command, p99", percentile(copied[2:], 99), "ms"))
    report.add(Result(f"{name}: copy to first command, beside its cold start, p50", ours, "ms", base, "<= 0.04" if vm else None))


async def _burst(report: Report, name: str, node: _Node, make: Callable[[str], Awaitable[None]], count: int) -> None:
    if not count:
        return

    deadline = time.perf_counter() + BURST_S_MAX

    async def one(at: int) -> float | None:
        try:
            return await node.first_command(f"burst{at:04}", make, within_s=deadline - time.perf_counter())
        except (AtollError, RuntimeError, TimeoutError) as error:
            print(f"{name}: {error or 'not there in time'}", file=sys.stderr)
            return None

    took = await asyncio.gather(*(one(at) for at in range(count)))
    answered = [each for each in took if each is not None]
    what = "copies" if make == node.copy else "cold"
    report.add(Result(f"{name}: burst of {count} at once ({what}), failed", count - len(answered), "", None, "<= 0"))
    report.add(Result(f"{name}: burst of {count} at once ({what}), to first command, p99", percentile(answered, 99), "ms"))
    await asyncio.gather(*(node.delete(f"burst{at:04}") for at in range(count)))


async def _memory(report: Report, node: _Node) -> None:
    """All of a kind are there at once: what only one maps for now would count as its own."""
    found = []
    for kind, make in (("small", node.copy), ("large", node.cold)):
        names = [f"{kind}{at}" for at in range(MEMORY_OF)]
        for name in names:
            await node.first_command(name, make)
        found.append([node.memory(name) for name in names])
        for name in names:
            await node.delete(name)
    (copies, beyond), (cold, beyond_cold) = (
        [sum(column) / MEMORY_OF / (1 << 20) for column in zip(*each, strict=True)] for each in found
    )
    what = f"qemu: private memory of {MEMORY_OF} copies of 128 MiB, each, beside as many cold"
    report.add(Result(what, copies, "MiB", cold, "<= 0.10"))
    report.add(
        Result("qemu: private memory of a copy's monitor beyond its guest's, beside a cold one's", beyond, "MiB", beyond_cold)
    )


async def _alive(report: Report, node: _Node, count: int) -> None:
    """Make `count` copies, keep all, and only then ask each."""
    began, alive = time.perf_counter(), list[str]()
    for at in range(count):
        if time.perf_counter() - began > ALIVE_S_MAX:
            print(f"{len(alive)} copies after {ALIVE_S_MAX:.0f} s: no more are made", file=sys.stderr)
            break
        try:
            async with asyncio.timeout(ONE_S_MAX):
                await node.copy(f"alive{at}")
        except (AtollError, TimeoutError) as error:
            print(f"copy {at}: {error or 'not there in time'}", file=sys.stderr)
        else:
            alive.append(f"alive{at}")
    made_s = time.perf_counter() - began
    private = sum(node.memory(name)[0] for name in alive) / max(1, len(alive)) / (1 << 20)
    turns = asyncio.Semaphore(ASKED_AT_ONCE)
    deadline = asyncio.get_running_loop().time() + ASKED_S_MAX

    async def ask(name: str) -> bool:
        try:
            async with asyncio.timeout_at(deadline), turns:
                return await node.answers(name)
        except (AtollError, TimeoutError):
            return False

    answers = await asyncio.gather(*map(ask, alive))
    report.add(Result(f"qemu: copies of 128 MiB alive at once, answering (of {count})", sum(answers), "", None, ">= 200"))
    report.add(Result(f"qemu: {len(alive)} copies made one after the other", made_s, "s"))
    report.add(Result(f"qemu: private memory of each of {len(alive)} copies", private, "MiB"))


class _Node:
    """One runtime, and one image of busybox for it."""

    def __init__(self, name: str, directory: Path) -> None:
        self.runtime: Any = KINDS[name](directory / "runtime", cgroup=f"/atoll-bench-{uuid.uuid4().hex[:8]}")
        self.snapshot = directory / "snapshot"
        self._tag = uuid.uuid4().hex[:6]  # the name of a sandbox of gVisor is taken on the whole machine
        self._boxes = Boxes(directory, LIMITS)
        self._pids: dict[str, int] = {}

    def id(self, name: str) -> str:
        return f"{self._tag}-{name}"

    def _box(self, name: str) -> Box:
        return self._boxes.make(self.id(name), name)

    async def cold(self, name: str) -> None:
        await self.runtime.create(self._box(name))
        self._pids[name] = (await self.runtime.start(self.id(name))).pid

    async def copy(self, name: str) -> None:
        self._pids[name] = (await self.runtime.restore(self._box(name), self.snapshot)).pid

    async def answers(self, name: str) -> bool:
        execution = await self.runtime.exec(self.id(name), ["echo", "hello"])
        answer = await execution.read()
        await execution.close()
        return bool(answer == (1, b"hello\n"))

    async def first_command(self, name: str, make: Callable[[str], Awaitable[None]], *, within_s: float = ONE_S_MAX) -> float:
        began = time.perf_counter()
        async with asyncio.timeout(within_s):
            await make(name)
            execution = await self.runtime.exec(self.id(name), ["echo", "hello"])
            answer = await execution.read()
        took_ms = (time.perf_counter() - began) * 1000
        await execution.close()
        if answer != (1, b"hello\n"):
            raise RuntimeError(f"the first command of {name} said {answer!r}")
        return took_ms

    def memory(self, name: str) -> tuple[int, int]:
        """Return how much memory is private to a monitor, and how much of that is not its guest's."""
        total, guest, size, private = 0, 0, 0, 0
        for line in (*Path(f"/proc/{self._pids[name]}/smaps").read_text().splitlines(), "0-0"):
            word = line.split()[0]
            if ":" not in word:  # the next mapping begins
                total += private
                guest += private if size >= MACHINE_BYTES else 0
                start, _, end = word.partition("-")
                size, private = int(end, 16) - int(start, 16), 0
            elif word in ("Private_Clean:", "Private_Dirty:"):
                private += int(line.split()[1]) << 10
        return total, total - guest

    async def delete(self, name: str) -> None:
        await self.runtime.delete(self.id(name))
        self._boxes.forget(name)

    async def close(self) -> None:
        for found in await self.runtime.recover():
            await self.runtime.delete(found.id)
        await self.runtime.close()
        self._boxes.close()
