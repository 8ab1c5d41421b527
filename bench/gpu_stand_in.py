"""What the files of a GPU cost a start, on a machine without one: device files that nobody opens, libraries that nobody loads.

Claim, create and start are the real ones of runc; the driver that is asked is the fake, which answers at once. So this is the
part of a start that is ours and runc's, in full; what asking a real driver takes comes on top.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import tempfile
from collections.abc import Collection, Sequence
from pathlib import Path

from atoll.devices.fake import FakeHardware
from atoll.devices.libraries import LIBRARY_DIRECTORY
from atoll.devices.node import NodeDevices
from atoll.model.devices import GpuGrant
from atoll.model.ports.clock import SystemClock
from atoll.model.ports.devices import DeviceNode, Edits, FileMount
from atoll.model.spec import GpuCapability
from atoll.runtimes.runc import RuncRuntime
from bench.gpu_tenants import Tenants, alone, cgroup, compiled, image_of
from bench.report import Report, Result, percentile

WARM_UP = 2
LIBRARIES = 30
LIBRARY_BYTES = 64 << 10
NODES = ("nvidia0", "nvidiactl", "nvidia-uvm", "nvidia-uvm-tools", "nvidia-modeset", "dri/card1", "dri/renderD128")
MAJOR = 195
"""NVIDIA's; a file of it can be made and shown where no driver answers to it."""

_WITH = "runc, stand-ins for the files of a GPU: claim, create and start until main runs, beyond a bare process, p50"
_WITHOUT = "the same without a device"
_APART = "what the files add: median of the differences, in turn"


class StandIn(FakeHardware):
    """The fake driver, with as many files as NVIDIA's has, which are there."""

    def __init__(self, directory: Path) -> None:
        super().__init__()
        directory.mkdir()
        self._files: list[FileMount] = []
        self._links: list[tuple[str, str]] = []
        for at in range(LIBRARIES):
            path = directory / f"libstandin{at}.so.580.159.04"
            path.write_bytes(bytes(LIBRARY_BYTES))
            self._files.append(FileMount(str(path), f"{LIBRARY_DIRECTORY}/{path.name}"))
            self._links.append((f"{LIBRARY_DIRECTORY}/libstandin{at}.so.1", path.name))

    def edits(self, grants: Sequence[GpuGrant], capabilities: Collection[GpuCapability], partitions: Sequence[str]) -> Edits:
        nodes = (DeviceNode(path=f"/dev/{name}", host_path="/dev/null", major=MAJOR, minor=at) for at, name in enumerate(NODES))
        return Edits(
            nodes=tuple(nodes),
            mounts=tuple(self._files),
            links=tuple(self._links),
            library_directories=(LIBRARY_DIRECTORY,),
            env=(("NVIDIA_VISIBLE_DEVICES", "void"),),
        )


async def stand_in_starts(report: Report, samples: int) -> None:
    """Add what a start costs with and without the files, in turn, to `report`."""
    if os.geteuid() != 0 or shutil.which("runc") is None or shutil.which("gcc") is None:
        for what in (_WITH, _WITHOUT, _APART):
            report.add(Result(what, None, "ms", None, None, "needs root, runc and gcc"))
        return
    with tempfile.TemporaryDirectory(prefix="atoll-bench-") as scratch:
        directory = Path(scratch)
        program = compiled(directory)
        devices = NodeDevices([StandIn(directory / "driver")], directory=directory / "devices", clock=SystemClock())
        (device,) = await devices.inventory()
        image = image_of(directory, program)
        tenants = Tenants(RuncRuntime(directory / "runc", cgroup=cgroup()), devices, device, image, directory)
        try:
            await tenants.open()
            having, lacking = [], []
            for index in range(samples + WARM_UP):
                answers = [await tenants.run("stamp"), await tenants.run("stamp", none=True)]
                outside = await asyncio.to_thread(alone, program, "stamp")
                if index >= WARM_UP:
                    took = [(answer["main_ns"] - answer["began_ns"]) / 1e6 for answer in (*answers, outside)]
                    having.append(took[0] - took[2])
                    lacking.append(took[1] - took[2])
        finally:
            await tenants.close()
            await devices.close()
    report.add(Result(_WITH, percentile(having, 50), "ms"))
    report.add(Result(_WITHOUT, percentile(lacking, 50), "ms"))
    report.add(Result(_APART, percentile([one - other for one, other in zip(having, lacking, strict=True)], 50), "ms"))
