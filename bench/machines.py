"""Starts of virtual machines through the agent's runtime port beside the bare monitor: the same machine, with the same guest.

Ours is from the call of `start` to its answer, when the instance's process runs. The bare monitor is QEMU with the arguments that
ours gives it, without jail, control group and shim, until its guest says the same.
"""

from __future__ import annotations

import asyncio
import tempfile
import time
import uuid
from pathlib import Path

from atoll.model.errors import Unsupported
from atoll.model.ports.runtime import Limits
from atoll.runtimes.cloud_hypervisor import CloudHypervisorRuntime
from atoll.runtimes.firecracker import FirecrackerRuntime
from atoll.runtimes.qemu import AGENT, QemuRuntime
from atoll.runtimes.vm.boxes import VmPlan, load_plan
from atoll.runtimes.vm.channel import GuestChannel
from atoll.runtimes.vm.jail import INSIDE, STDERR_FD, STDOUT_FD
from atoll.runtimes.vm.sockets import open_socket
from bench.busybox import Boxes
from bench.report import Report, Result, percentile

LIMITS = Limits(cpu_milli=1000, memory_bytes=64 << 20, disk_bytes=64 << 20, pids=64)
SAMPLES_MAX = 12
"""A boot takes seconds where the processor is emulated."""
START_S_MAX = 60.0
_OPENS = f'exec {STDOUT_FD}>>/dev/null {STDERR_FD}>>/dev/null; exec "$@"'


def measure(report: Report, samples: int) -> None:
    """Add the rows of each kind of machine; of those that do not run here, why."""
    for kind in (FirecrackerRuntime, CloudHypervisorRuntime):
        with tempfile.TemporaryDirectory(prefix="atoll-bench-") as directory:
            why = asyncio.run(_why_not(kind(Path(directory))))
        report.add(Result(f"{kind.name}: start", None, "ms", why=why or "it runs here, but this bench cannot start it bare yet"))
    asyncio.run(_qemu(report, min(samples, SAMPLES_MAX)))


async def _why_not(runtime: FirecrackerRuntime | CloudHypervisorRuntime) -> str:
    try:
        await runtime.probe()
    except Unsupported as error:
        return str(error)
    finally:
        await runtime.close()
    return ""


async def _qemu(report: Report, samples: int) -> None:
    what = "qemu: start, beside QEMU alone with the same machine"
    with tempfile.TemporaryDirectory(prefix="atoll-bench-") as name:
        directory = Path(name)
        runtime = QemuRuntime(directory / "runtime", cgroup=f"/atoll-bench-{uuid.uuid4().hex[:8]}")
        try:
            await runtime.probe()
        except Unsupported as error:
            report.add(Result(f"{what}, p50", None, "ms", None, "<= 1.10", str(error)))
            return
        await runtime.recover()
        boxes, ours, bare = Boxes(directory, LIMITS), list[float](), list[float]()
        try:
            for at in range(samples + 1):
                started = await _ours(runtime, boxes, f"o{at}")
                alone = await _bare(runtime, boxes, f"b{at}")
                if at:
                    ours.append(started)
                    bare.append(alone)
        finally:
            for found in await runtime.recover():
                await runtime.delete(found.id)
            await runtime.close()
            boxes.close()
    report.add(Result(f"{what}, p50", percentile(ours, 50), "ms", percentile(bare, 50), "<= 1.10"))
    report.add(Result(f"{what}, p99", percentile(ours, 99), "ms", percentile(bare, 99), "<= 1.25"))


async def _ours(runtime: QemuRuntime, boxes: Boxes, id: str) -> float:
    await runtime.create(boxes.make(id))
    began = time.perf_counter()
    await runtime.start(id)
    took_ms = (time.perf_counter() - began) * 1000
    await runtime.delete(id)
    return took_ms


async def _bare(runtime: QemuRuntime, boxes: Boxes, id: str) -> float:
    box = boxes.make(id)
    await runtime.create(box)
    plan = await asyncio.to_thread(load_plan, box.directory)
    command = ["bash", "-c", _OPENS, "bare", *_on_the_node(runtime, plan)]
    log = box.directory / "bare.log"
    with log.open("wb") as output:
        began = time.perf_counter()
        process = await asyncio.create_subprocess_exec(*command, stdin=asyncio.subprocess.DEVNULL, stdout=output, stderr=output)
        try:
            socket = Path(plan.directory) / "vm" / AGENT
            channel = await GuestChannel.open(lambda: open_socket(socket), deadline_s=START_S_MAX)
            async with asyncio.timeout(START_S_MAX):
                why = await channel.first.started
            took_ms = (time.perf_counter() - began) * 1000
            await channel.close()
        finally:
            process.kill()
            await process.wait()
    if why:
        raise RuntimeError(f"{why}: {log.read_text(errors='replace')[-500:]}")
    await runtime.delete(id)
    return took_ms


def _on_the_node(runtime: QemuRuntime, plan: VmPlan) -> list[str]:
    """Return QEMU's command with the node's paths instead of the jail's."""
    kernel = runtime.kernel()
    whole = {"/kernel": str(kernel.image), "/initramfs": str(kernel.initramfs)}
    parts = {f"={INSIDE}/": f"={Path(plan.directory) / 'vm'}/", "file=/image": f"file={plan.image_disk}"}
    words = []
    for word in runtime.monitor(plan):
        for inside, outside in parts.items():
            word = word.replace(inside, outside)
        words.append(whole.get(word, word))
    return words
