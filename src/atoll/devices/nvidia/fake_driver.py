"""A driver in a directory, for tests and for a machine without a GPU: what `fake_nvml` shows in a worker, and what befalls it.

driver = FakeDriver(directory, [fake_device(0), fake_device(1, mig=True)])
hardware = driver.hardware()
driver.xid(device, 79)
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pynvml  # type: ignore[import-untyped]

from atoll.devices.nvidia import fake_state
from atoll.devices.nvidia.hardware import Deadlines, NvidiaHardware
from atoll.devices.uevents import Uevents, kernel_uevents

DRIVER = "580.159.04"
_GIB = 1 << 30
_PROFILES = (
    # name, NVML_GPU_INSTANCE_PROFILE_*, id, compute slices, memory slices, first slices, most: an H100 with 80 GB
    ("1g.10gb", 0x0, 19, 1, 1, (0, 1, 2, 3, 4, 5, 6), 7),
    ("1g.10gb+me", 0x7, 20, 1, 1, (0, 1, 2, 3, 4, 5, 6), 1),
    ("1g.20gb", 0x9, 15, 1, 2, (0, 2, 4, 6), 4),
    ("2g.20gb", 0x1, 14, 2, 2, (0, 2, 4), 3),
    ("3g.40gb", 0x2, 9, 3, 4, (0, 4), 2),
    ("4g.40gb", 0x3, 5, 4, 4, (0,), 1),
    ("7g.80gb", 0x4, 0, 7, 8, (0,), 1),
)


def fake_device(index: int, *, mig: bool = False, nvlinks: Sequence[str] = ()) -> dict[str, Any]:
    """Return a device as the fake driver has it; `nvlinks` are PCI addresses, `switch`, or empty for a link that is down."""
    names = ("name", "kind", "id", "compute_slices", "memory_slices", "starts", "most")
    profiles = [dict(zip(names, profile, strict=True)) for profile in _PROFILES]
    return {
        "id": f"GPU-{index:08x}-1111-2222-3333-444444444444",
        "model": "NVIDIA H100 80GB HBM3",
        "pci": f"0000:{0x1B + index:02x}:00.0",
        "minor": index,
        "memory_bytes": 80 * _GIB,
        "capability": [9, 0],
        "mig": mig,
        "profiles": [profile | {"memory_bytes": 10 * _GIB * int(profile["memory_slices"])} for profile in profiles],  # type: ignore[call-overload]
        "instances": [],
        "ecc": True,
        "ecc_errors": 0,
        "remapped": [0, 0, 0, 0],
        "recovery": 0,
        "fabric": None,
        "lost": False,
        "events": True,
        "nvlinks": list(nvlinks),
        "ancestors": {},
        "busy_percent": 0,
        "power_milliwatts": 70_000,
        "temperature_c": 40,
        "processes": {},
        "graphics_processes": {},
        "mps_processes": {},
    }


class FakeDriver:
    """Holds the driver's state in `directory`; `root` below it has what the machine's /proc and /sys would show."""

    def __init__(self, directory: Path, devices: Sequence[dict[str, Any]]) -> None:
        self.directory, self.root = directory, directory / "root"
        self.root.mkdir(parents=True)
        state = {"driver": DRIVER, "cuda": 13000, "devices": list(devices), "faults": {}}
        (directory / fake_state.STATE).write_text(json.dumps(state))
        os.mkfifo(directory / fake_state.EVENTS)
        # Held open, so that an event that nobody waits for yet is not lost.
        self._pipe = os.open(directory / fake_state.EVENTS, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
        self.install(DRIVER)
        for device in devices:
            place = self.root / "sys/bus/pci/devices" / device["pci"]
            place.mkdir(parents=True)
            numa = device["minor"] % 2
            files = {"vendor": "0x10de", "class": "0x030200", "numa_node": numa, "local_cpulist": f"{8 * numa}-{8 * numa + 7}"}
            for name, value in files.items():
                (place / name).write_text(f"{value}\n")

    def hardware(self, *, deadlines: Deadlines = Deadlines(), uevents: Uevents = kernel_uevents) -> NvidiaHardware:
        return NvidiaHardware(
            root=self.root,
            library="atoll.devices.nvidia.fake_nvml",
            environment={fake_state.VARIABLE: str(self.directory)},
            deadlines=deadlines,
            uevents=uevents,
        )

    def install(self, version: str) -> None:
        """Have the kernel show a driver of this version."""
        path = self.root / "proc/driver/nvidia/version"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  {version}  Release Build\n")

    @contextmanager
    def change(self) -> Iterator[Any]:
        """Change the driver's state: `with driver.change() as state: state["devices"][0]["ecc_errors"] = 1`."""
        before = os.environ.get(fake_state.VARIABLE)
        os.environ[fake_state.VARIABLE] = str(self.directory)
        try:
            with fake_state.change() as state:
                yield state
        finally:
            if before is None:
                del os.environ[fake_state.VARIABLE]
            else:
                os.environ[fake_state.VARIABLE] = before

    def fail(self, function: str, code: int, *, times: int = -1, device: str = "") -> None:
        """Have a function of NVML fail with an NVML error, as often as `times` says (-1: always); `device`: of that one only."""
        self._fault(f"{function}@{device}" if device else function, {"kind": "error", "code": code, "times": times})

    def lack(self, function: str) -> None:
        """Be a driver that does not have this function."""
        self.fail(function, pynvml.NVML_ERROR_FUNCTION_NOT_FOUND)

    def hang(self, function: str, *, times: int = 1) -> None:
        """Have it never return."""
        self._fault(function, {"kind": "hang", "times": times})

    def crash(self, function: str, *, times: int = 1) -> None:
        """Have it end the process that calls it."""
        self._fault(function, {"kind": "crash", "times": times})

    def _fault(self, function: str, fault: dict[str, Any]) -> None:
        with self.change() as state:
            state["faults"][function] = fault

    def heal(self) -> None:
        with self.change() as state:
            state["faults"].clear()

    def xid(self, device: str, code: int, *, part: int | None = None) -> None:
        self.event(device, pynvml.nvmlEventTypeXidCriticalError, code, part=part)

    def event(self, device: str, kind: int, data: int = 0, *, part: int | None = None) -> None:
        """Report an event of NVML's type `kind` to whoever waits, now or next."""
        os.write(self._pipe, f"{device} {kind} {data} {'-' if part is None else part}\n".encode())

    def lose(self, device: str) -> None:
        """Let a device fall off the bus, without any word but to who asks it."""
        with self.change() as state:
            next(each for each in state["devices"] if each["id"] == device)["lost"] = True
        os.write(self._pipe, f"{device} lost 0 -\n".encode())

    def close(self) -> None:
        os.close(self._pipe)
