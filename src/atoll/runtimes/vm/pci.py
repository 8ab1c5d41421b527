"""Whole PCI devices of the node in a machine: what a box may ask for, what its monitor is shown, the memory that is locked for it.

Such a device is bound to vfio-pci (`devices/vfio.py` does that), and reads and writes the machine's memory by itself.
"""

from __future__ import annotations

import resource
from pathlib import Path

from msgspec import structs

from atoll.model.errors import RuntimeFailed, Unsupported
from atoll.model.ports.devices import Edits
from atoll.model.ports.runtime import Box
from atoll.model.spec import RuntimeName
from atoll.runtimes.vm.boxes import VmPlan

PCI = Path("/sys/bus/pci/devices")
VFIO = "/dev/vfio/"
LOCKED_BESIDE_BYTES = 64 << 20
"""What is locked beside the machine's memory: its firmware, and what the monitor shares with a device."""
_CAP_SYS_RESOURCE = 24
_STATUS = Path("/proc/self/status")


def check_devices(box: Box, runtime: RuntimeName) -> None:
    """Raises Unsupported where the box wants of its devices what a machine cannot be given: anything but whole PCI devices."""
    other = structs.replace(box.devices, nodes=(), env=(), devices=(), pci=(), pci_window_bytes=0)
    strangers = [node.path for node in box.devices.nodes if not node.path.startswith(VFIO)]
    if other != Edits() or strangers or (box.devices and not box.devices.pci):
        raise Unsupported(
            f"{runtime} hands on whole PCI devices only, which the node has set aside for it",
            mend="ask for a whole device, or use runc, crun or gvisor",
            field="resources.gpu",
        )


def shown_of(plan: VmPlan) -> tuple[tuple[Path, Path], ...]:
    """Return the directories of the plan's devices, which its monitor sees at the same place. It sees no other device's."""
    return tuple((PCI / address, PCI / address) for address in plan.pci)


def locked_bytes(plan: VmPlan) -> int:
    """Return how much memory the monitor must be able to lock: all of the machine's, since none of it may move under a device."""
    return plan.ram_bytes + LOCKED_BESIDE_BYTES if plan.pci else 0


def check_locking(wanted_bytes: int) -> None:
    """Raises RuntimeFailed where this process cannot let another lock so much memory."""
    _, hard = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if hard == resource.RLIM_INFINITY or hard >= wanted_bytes or _may_raise_limits():
        return
    raise RuntimeFailed(
        f"a machine with a device needs {wanted_bytes >> 20} MiB of locked memory, and this agent may allow {hard >> 20} MiB",
        mend="run the agent with CAP_SYS_RESOURCE, or with LimitMEMLOCK=infinity",
    )


def _may_raise_limits() -> bool:
    effective = next(line.split()[1] for line in _STATUS.read_text().splitlines() if line.startswith("CapEff:"))
    return bool(int(effective, 16) >> _CAP_SYS_RESOURCE & 1)
