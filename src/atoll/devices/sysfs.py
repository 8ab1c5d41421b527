"""GPUs of AMD and Intel, as the kernel shows them.

What is read where: the kernel's documentation of amdgpu (`mem_info_*`, `gpu_busy_percent`, `unique_id`, `ras`), of KFD's topology
(the `gfx` name, the memory of each process), of i915 (`lmem_total_bytes`) and xe (`physical_vram_size_bytes`).
"""

from __future__ import annotations

from typing import ClassVar

from atoll.devices.drm import Card, DrmHardware, number, text
from atoll.model.devices import GpuHealth, GpuVendor
from atoll.model.ports.devices import DeviceNode
from atoll.model.units import format_bytes

OWN_MEMORY_BYTES_MIN = 2 << 30
"""With less memory of its own an AMD GPU counts as part of the processor: what it has is cut from the machine's, 512 MiB as a rule.
One for which the firmware sets aside more is offered."""
INTEGRATED_PLACE = "0000:00:02.0"
"""Where Intel's processors have their GPU, always."""


class AmdHardware(DrmHardware):
    """AMD's devices, over amdgpu and KFD."""

    vendor = GpuVendor.AMD
    pci_vendor = "0x1002"
    drivers = frozenset({"amdgpu"})
    models: ClassVar[dict[int, str]] = {
        0x738C: "AMD Instinct MI100",
        0x7408: "AMD Instinct MI250X",
        0x740C: "AMD Instinct MI250X",
        0x740F: "AMD Instinct MI210",
        0x744C: "AMD Radeon RX 7900",
        0x74A0: "AMD Instinct MI300A",
        0x74A1: "AMD Instinct MI300X",
        0x74A5: "AMD Instinct MI325X",
        0x75A0: "AMD Instinct MI350X",
        0x75A3: "AMD Instinct MI355X",
    }

    def id(self, card: Card) -> str:
        """`GPU-` and the device's own number, as ROCm's programs name it."""
        unique = card.text("unique_id").removeprefix("0x")
        return f"GPU-{unique}" if unique.strip("0") else card.pci

    def model(self, card: Card) -> str:
        return card.text("product_name") or super().model(card)

    def memory_bytes(self, card: Card) -> int:
        return card.number("mem_info_vram_total") or super().memory_bytes(card)

    def integrated(self, card: Card) -> str:
        own = card.number("mem_info_vram_total")
        if own >= OWN_MEMORY_BYTES_MIN:
            return ""
        return f"part of the processor: it has {format_bytes(own) if own else 'no'} memory of its own (mem_info_vram_total)"

    def compute_capability(self, card: Card) -> str:
        version = int(self._topology(card).get("gfx_target_version", "0"))
        return f"gfx{version // 10_000}{version // 100 % 100:x}{version % 100:x}" if version else ""

    def errors(self, card: Card) -> tuple[bool | None, int]:
        counts = dict(line.split(":", 1) for line in card.text("ras/umc_err_count").splitlines() if ":" in line)
        return (True, int(counts["ue"])) if counts.get("ue", "").strip().isdigit() else (None, 0)

    def health(self, card: Card) -> tuple[GpuHealth, str]:
        _, errors = self.errors(card)
        return (
            (GpuHealth.DEGRADED, f"{errors} uncorrected memory errors since the driver was loaded")
            if errors
            else (GpuHealth.OK, "")
        )

    def processes(self, card: Card) -> dict[int, int]:
        gpu = self._topology(card).get("gpu_id", "")
        directories = (self.root / "sys/class/kfd/kfd/proc").glob("[0-9]*")
        used = {int(directory.name): number(directory / f"vram_{gpu}") for directory in directories if directory.name.isdigit()}
        return {pid: memory for pid, memory in used.items() if memory}

    def common_nodes(self) -> list[DeviceNode]:
        # One file for all devices: KFD itself shows a process only those whose render nodes its device cgroup allows.
        return [self.node("kfd", self.root / "sys/class/kfd/kfd/dev")]

    def _topology(self, card: Card) -> dict[str, str]:
        """Return what KFD says of the device."""
        for node in (self.root / "sys/class/kfd/kfd/topology/nodes").glob("*"):
            properties = dict(line.split(None, 1) for line in text(node / "properties").splitlines() if len(line.split()) == 2)
            if properties.get("drm_render_minor") == str(card.minor):
                return properties | {"gpu_id": text(node / "gpu_id")}
        return {}


class IntelHardware(DrmHardware):
    """Intel's devices, over i915 or xe."""

    vendor = GpuVendor.INTEL
    pci_vendor = "0x8086"
    drivers = frozenset({"i915", "xe"})
    models: ClassVar[dict[int, str]] = {
        0x0BD5: "Intel Data Center GPU Max 1550",
        0x0BDA: "Intel Data Center GPU Max 1100",
        0x56A0: "Intel Arc A770",
        0x56A1: "Intel Arc A750",
        0x56C0: "Intel Data Center GPU Flex 170",
        0x56C1: "Intel Data Center GPU Flex 140",
        0xE20B: "Intel Arc B580",
        0xE20C: "Intel Arc B570",
    }

    def memory_bytes(self, card: Card) -> int:
        return self._own_memory_bytes(card) or super().memory_bytes(card)

    def integrated(self, card: Card) -> str:
        # A driver that names no memory may only be too old for it: the place decides then, unless the model is known.
        if card.pci != INTEGRATED_PLACE or card.number("device") in self.models or self._own_memory_bytes(card):
            return ""
        return "part of the processor: it has no memory of its own (lmem_total_bytes, physical_vram_size_bytes)"

    def _own_memory_bytes(self, card: Card) -> int:
        patterns = ("drm/card*/lmem_total_bytes", "tile*/physical_vram_size_bytes")
        return sum(number(path) for pattern in patterns for path in card.device.glob(pattern))
