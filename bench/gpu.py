"""GPUs: what a sandbox costs a CUDA program, what discovery takes, whether walls hold, and how well partitions are packed.

With a GPU each figure is measured on it, ours and the bare process in turn. Without one the report says `no GPU`, has run the
contract of the device port on its fake, and gives the figures that need no device.
"""

from __future__ import annotations

import argparse
import asyncio
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from atoll.devices.mps import NvidiaMps
from atoll.devices.node import NodeDevices
from atoll.devices.nvidia import checkpoint
from atoll.devices.nvidia.hardware import NvidiaHardware
from atoll.devices.nvidia.presence import driver_version
from atoll.model.devices import GpuDevice, GpuGrant, GpuSharing
from atoll.model.errors import AtollError
from atoll.model.ports.clock import SystemClock
from atoll.model.ports.images import Image
from atoll.model.spec import Gpu
from atoll.runtimes.gvisor import GvisorRuntime
from atoll.runtimes.nvproxy import gvisor_drivers
from atoll.runtimes.runc import RuncRuntime
from atoll.scheduling.gpu import mig_measure
from bench.gpu_stand_in import stand_in_starts
from bench.gpu_tenants import PROGRAM, Tenants, alone, answer_of, cgroup, compiled, image_of
from bench.report import Report, Result, median, percentile

SAMPLES = 15
ROUNDS = 5
STREAMS = 30
WARM_UP = 2
SIZE = 4096
"""The product of two SIZE × SIZE matrices is what throughput is measured on."""
KERNELS = 40
HOLD_MIB = 1024
DEVICE_FILE = Path("/dev/nvidiactl")
MPS_LIMITS = ("CUDA_MPS_ACTIVE_THREAD_PERCENTAGE", "CUDA_MPS_PINNED_DEVICE_MEM_LIMIT")
CONTRACT = ("tests/contract/test_devices.py", "tests/unit/test_devices_node.py")


def run(arguments: list[str]) -> Report:
    """Measure and return the report."""
    parser = argparse.ArgumentParser(prog="python -m bench gpu")
    parser.add_argument("--samples", type=int, default=SAMPLES, help="starts, and discoveries")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="runs of each throughput")
    parser.add_argument("--gvisor-driver", metavar="VERSION", help="tell runsc this driver version instead of the machine's")
    options = parser.parse_args(arguments)
    report = Report("gpu")
    if DEVICE_FILE.exists():
        with tempfile.TemporaryDirectory(prefix="atoll-bench-") as directory:
            asyncio.run(_on_device(Path(directory), report, options))
    else:
        report.notes.append("no GPU: what needs one is not measured here; bench/results has the figures of machines with one")
        for what, unit, goal in _NEEDS_DEVICE:
            report.add(Result(what, None, unit, None, goal, "no GPU"))
        asyncio.run(stand_in_starts(report, options.samples))
        _contract(report)
    _packing(report)
    return report


_START = "runc: claim, create and start until main runs, beyond a bare process, p50"
_NEEDS_DEVICE = (
    ("discovery of a node, the worker's start included, p50", "ms", "<= 200"),
    (_START, "ms", "<= 50"),
    ("runc: matrix product, beside a bare process", "GFLOP/s", ">= 0.99"),
    ("gvisor: matrix product, beside a bare process", "GFLOP/s", ">= 0.95"),
    ("foreign devices reached from inside", "devices", "<= 0"),
)


def _contract(report: Report) -> None:
    """Run the device port's contract and the fault injections on the fake."""
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *CONTRACT]
    answer = subprocess.run(command, cwd=PROGRAM.parents[1], capture_output=True, text=True, timeout=600, check=False)
    found = {word: int(number) for number, word in re.findall(r"(\d+) (passed|failed|errors?)\b", answer.stdout)}
    what = "contract of the device port, and faults, on its fake"
    report.add(Result(f"{what}: tests that pass", found.get("passed", 0), "tests", None, ">= 1"))
    failed = sum(found.values()) - found.get("passed", 0) or int(answer.returncode != 0)
    report.add(Result(f"{what}: tests that fail", failed, "tests", None, "<= 0"))


def _packing(report: Report) -> None:
    """Partitions of random streams of requests and departures, none of which is ever moved."""
    for model in mig_measure.MODELS:
        found = mig_measure.compare(range(STREAMS), model)
        ours, best, knowing = (
            None if value is None else value / (1 << 30)
            for value in (found.ours_bytes, found.optimum_bytes, found.clairvoyant_bytes)
        )
        what = f"mig, {model}: accepted memory beside"
        report.add(Result(f"{what} the best policy without foresight", ours, "GiB", best, ">= 0.98"))
        report.add(Result(f"{what} one that knows every departure", ours, "GiB", knowing))
        report.add(Result(f"mig, {model}: needless refusals", found.needless, "requests", None, "<= 0"))


async def _on_device(directory: Path, report: Report, options: argparse.Namespace) -> None:
    program = compiled(directory)
    hardware = NvidiaHardware()
    known = gvisor_drivers() | ({driver_version(Path("/"))} if options.gvisor_driver else set())
    devices = NodeDevices(
        [hardware], directory=directory, clock=SystemClock(), mps=NvidiaMps(directory / "mps"), gvisor_drivers=lambda: known
    )
    try:
        await _discovery(report, options.samples)
        inventory = await devices.inventory()
        device = next(each for each in inventory if not each.mig)
        report.notes.append(f"device: {device.model}, driver {device.driver}, CUDA {device.cuda}, {len(inventory)} of them")
        image = image_of(directory, program)
        runc = Tenants(RuncRuntime(directory / "runc", cgroup=cgroup()), devices, device, image, directory)
        try:
            await runc.open()
            await _start(report, runc, program, options.samples)
            bare = await _throughput(report, runc, program, options.rounds, ">= 0.99")
            await _foreign(report, runc)
            await _shares(report, runc, bare)
        finally:
            await runc.close()
        await _gvisor(report, directory, devices, device, image, program, options)
        await _parked(report, program, options.rounds)
    finally:
        await devices.close()


async def _discovery(report: Report, samples: int) -> None:
    ours, theirs = [], []
    found: tuple[GpuDevice, ...] = ()
    for _ in range(samples):
        began = time.perf_counter()
        hardware = NvidiaHardware()
        found = await hardware.discover()
        ours.append((time.perf_counter() - began) * 1e3)
        await hardware.close()
        began = time.perf_counter()
        said = await asyncio.to_thread(subprocess.run, ["nvidia-smi", "-q", "-x"], capture_output=True, timeout=60, check=True)
        theirs.append((time.perf_counter() - began) * 1e3)
    what = "discovery of a node, the worker's start included"
    report.add(Result(f"{what}, p50", percentile(ours, 50), "ms", None, "<= 200"))
    report.add(Result(f"{what}, p99", percentile(ours, 99), "ms"))
    report.add(Result("nvidia-smi -q on the same node, p50", percentile(theirs, 50), "ms"))
    differing = differences(found, said.stdout.decode())
    report.add(Result("facts that differ from nvidia-smi -q", len(differing), "facts", None, "<= 0", "; ".join(differing) or None))


def differences(devices: Sequence[GpuDevice], xml: str) -> list[str]:
    """Return the facts of `nvidia-smi -q -x` that discovery tells otherwise, in words."""
    from xml.etree import ElementTree

    said = ElementTree.fromstring(xml)
    found: list[str] = []

    def compare(what: str, theirs: str | None, ours: str) -> None:
        if (theirs or "").strip().lower() != ours.strip().lower():
            found.append(f"{what}: {theirs!r} is {ours!r} here")

    gpus = {(gpu.findtext("uuid") or ""): gpu for gpu in said.iter("gpu")}
    compare("devices", str(sorted(gpus)), str(sorted(device.id for device in devices)))
    for device in devices:
        gpu = gpus.get(device.id)
        if gpu is None:
            continue
        compare("driver", said.findtext("driver_version"), device.driver)
        compare("cuda", said.findtext("cuda_version"), device.cuda)
        compare("model", gpu.findtext("product_name"), device.model)
        compare("minor number", gpu.findtext("minor_number"), str(device.minor))
        compare("pci", (gpu.findtext("pci/pci_bus_id") or "")[4:], device.pci)
        compare("memory", gpu.findtext("fb_memory_usage/total"), f"{device.memory_bytes >> 20} MiB")
        compare("mig", gpu.findtext("mig_mode/current_mig"), "Enabled" if device.mig else "Disabled")
        compare("ecc", gpu.findtext("ecc_mode/current_ecc"), {True: "Enabled", False: "Disabled", None: "N/A"}[device.ecc])
        rows = gpu.findtext("remapped_rows/remapped_row_unc")
        if rows is not None:
            both = int(rows) + int(gpu.findtext("remapped_rows/remapped_row_corr") or 0)
            compare("remapped rows", str(both), str(device.remapped_rows))
            compare("remap pending", gpu.findtext("remapped_rows/remapped_row_pending"), "Yes" if device.remap_pending else "No")
    return found


async def _start(report: Report, tenants: Tenants, program: Path, samples: int) -> None:
    ours, bare = [], []
    for index in range(samples + WARM_UP):
        inside, outside = await tenants.run("stamp"), await asyncio.to_thread(alone, program, "stamp")
        if index >= WARM_UP:
            ours.append((inside["main_ns"] - inside["began_ns"]) / 1e6)
            bare.append((outside["main_ns"] - outside["began_ns"]) / 1e6)
    over = [a - b for a, b in zip(ours, bare, strict=True)]
    report.add(Result(_START, percentile(over, 50), "ms", None, "<= 50"))
    report.add(Result(_START.replace("p50", "p99"), percentile(over, 99), "ms"))


async def _throughput(report: Report, tenants: Tenants, program: Path, rounds: int, goal: str) -> float:
    """Measure ours and the bare process in turn; return the bare one's GFLOP/s."""
    name = tenants.runtime.name
    work = ("check", str(SIZE), str(KERNELS))
    runs: list[tuple[dict[str, Any], dict[str, Any]]] = []
    for _ in range(rounds):
        runs.append((await tenants.run(*work), await asyncio.to_thread(alone, program, *work)))
    inside, outside = zip(*runs, strict=True)

    def both(key: str) -> tuple[float, float]:
        return median([run[key] for run in inside]), median([run[key] for run in outside])

    wrong = sum(run["wrong"] for run in inside) + sum(run["wrong"] for run in outside)
    checked = sum(run["checked"] for run in inside)
    report.add(Result(f"{name}: wrong numbers of {checked} that were checked", wrong, "numbers", None, "<= 0"))
    report.add(Result(f"{name}: matrix product, beside a bare process", both("gflops")[0], "GFLOP/s", both("gflops")[1], goal))
    report.add(Result(f"{name}: copy to the device", both("copy_gbps")[0], "GB/s", both("copy_gbps")[1], goal))
    report.add(Result(f"{name}: one small kernel and its end", both("launch_us")[0], "µs", both("launch_us")[1]))
    report.add(Result(f"{name}: take and give back 64 MiB", both("alloc_us")[0], "µs", both("alloc_us")[1]))
    report.add(Result(f"{name}: context, module and first kernel", both("first_result_ms")[0], "ms", both("first_result_ms")[1]))
    return both("gflops")[1]


async def _foreign(report: Report, tenants: Tenants) -> None:
    granted, without = await tenants.run("foreign"), await tenants.run("foreign", none=True)
    reached = granted["foreign"] + without["foreign"] + without["own"] + max(0, granted["own"] - 1)
    report.add(Result("foreign devices reached from inside", reached, "devices", None, "<= 0"))
    seen = (await tenants.run("probe"))["devices"]
    names = [f"GPU-{each['uuid']}" for each in seen]
    report.add(
        Result(
            "devices that CUDA shows inside beside the granted one",
            float(len(set(names) - {tenants.device.id}) + (tenants.device.id not in names)),
            "devices",
            None,
            "<= 0",
        )
    )


async def _shares(report: Report, tenants: Tenants, whole: float) -> None:
    """A quarter by MPS: the driver holds it to its share, memory above its share is refused, whatever its environment says."""
    what = "mps: a share of 0.25 of the device, beside the whole"
    if GpuSharing.MPS not in tenants.device.sharing:
        report.add(Result(what, None, "GFLOP/s", None, "<= 0.30", "no MPS daemon on this machine"))
        return
    grant = GpuGrant(device=tenants.device.id, sharing=GpuSharing.MPS, milli=250, memory_bytes=tenants.device.memory_bytes // 4)
    gpu = Gpu(count=0.25, sharing=GpuSharing.MPS)
    too_much = str(tenants.device.memory_bytes // 2 >> 20)
    for whose, without in (("", ()), (", to a tenant that takes its limits out of its environment", MPS_LIMITS)):
        answer = await tenants.run("check", str(SIZE), str(KERNELS), grant=grant, gpu=gpu, without=without)
        report.add(Result(what + whose, answer["gflops"], "GFLOP/s", whole, "<= 0.30"))
        refused = 0.0
        try:
            await tenants.run("hold", too_much, grant=grant, gpu=gpu, without=without)
        except RuntimeError as error:
            refused = float("out of memory" in str(error))
        report.add(Result(f"mps: twice the memory of the share is refused{whose}", refused, "yes", None, ">= 1"))


async def _gvisor(
    report: Report,
    directory: Path,
    devices: NodeDevices,
    device: GpuDevice,
    image: Image,
    program: Path,
    options: argparse.Namespace,
) -> None:
    what = "gvisor: matrix product, beside a bare process"
    runtime = GvisorRuntime(directory / "gvisor", cgroup=cgroup(), nvproxy_driver=options.gvisor_driver or "")
    tenants = Tenants(runtime, devices, device, image, directory)
    try:
        await tenants.open()
        if options.gvisor_driver:
            report.notes.append(f"gvisor: told driver {options.gvisor_driver} in place of {device.driver}, which it does not know")
        await _throughput(report, tenants, program, options.rounds, ">= 0.95")
    except AtollError as error:
        report.add(Result(what, None, "GFLOP/s", None, ">= 0.95", str(error)))
    finally:
        await tenants.close()


async def _parked(report: Report, program: Path, rounds: int) -> None:
    """A program with a context and memory on the device: how long until it is back from RAM, beside a cold start."""
    cold, off, on = [], [], []
    what = f"from RAM back to the device ({HOLD_MIB} MiB held), beside a cold start"
    for _ in range(rounds):
        began = time.perf_counter()
        process = await asyncio.create_subprocess_exec(
            str(program), "hold", str(HOLD_MIB), stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        stdin, stdout = process.stdin, process.stdout
        if stdin is None or stdout is None:
            raise AssertionError("both were asked for as pipes")
        try:
            await stdout.readline()
            cold.append((time.perf_counter() - began) * 1e3)
            began = time.perf_counter()
            await checkpoint.suspend(process.pid)
            off.append((time.perf_counter() - began) * 1e3)
            began = time.perf_counter()
            await checkpoint.resume(process.pid)
            on.append((time.perf_counter() - began) * 1e3)
            stdin.write(b"go\n")
            answer = answer_of(await stdout.readline())
            if answer["wrong"]:
                raise RuntimeError(f"{answer['wrong']} words of device memory differ after its return")
        except checkpoint.CheckpointError as error:
            report.add(Result(what, None, "ms", None, None, str(error)))
            return
        finally:
            if process.returncode is None:
                process.kill()
            await process.wait()
    report.add(Result(what, median(on), "ms", median(cold)))
    report.add(Result(f"off the device to RAM ({HOLD_MIB} MiB held)", median(off), "ms"))
