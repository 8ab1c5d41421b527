"""What a machine shows of NVIDIA's driver without its library: a few small files, no process, no wait."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

LIBRARY = "libnvidia-ml.so.1"
VENDOR_ID = "0x10de"
_DISPLAY_CLASS = "0x03"
_VERSION = re.compile(r"\b(\d{3,4}\.\d{1,4}(?:\.\d{1,4})?)\b")
_DIRECTORIES = (
    "usr/lib/x86_64-linux-gnu",
    "usr/lib/aarch64-linux-gnu",
    "usr/lib64",
    "usr/lib",
    "usr/local/nvidia/lib64",
    "run/nvidia/driver/usr/lib/x86_64-linux-gnu",
    "run/opengl-driver/lib",
)
"""Where distributions, clouds and driver containers put the library."""


def driver_version(root: Path) -> str:
    """Return the version of the kernel driver that is loaded; nothing where none is."""
    for path in (root / "proc/driver/nvidia/version", root / "sys/module/nvidia/version"):
        found = _VERSION.search(_text(path))
        if found:
            return found[1]
    return ""


def pci_devices(root: Path) -> dict[str, str]:
    """Return NVIDIA's display devices on the bus: PCI address → kernel driver that has it, or nothing."""
    found: dict[str, str] = {}
    try:
        directories = sorted((root / "sys/bus/pci/devices").iterdir())
    except OSError:
        return found
    for directory in directories:
        if _text(directory / "vendor") == VENDOR_ID and _text(directory / "class").startswith(_DISPLAY_CLASS):
            driver = directory / "driver"
            found[directory.name] = driver.resolve().name if driver.exists() else ""
    return found


def library_directory(root: Path, environment: Mapping[str, str]) -> str | None:
    """Return where the management library lies: empty where the dynamic linker finds it by itself, None for nowhere."""
    try:
        cached = LIBRARY.encode() in (root / "etc/ld.so.cache").read_bytes()
    except OSError:
        cached = False
    if cached:
        return ""
    searched = [directory for directory in environment.get("LD_LIBRARY_PATH", "").split(":") if directory.startswith("/")]
    for directory in [*searched, *(str(root / directory) for directory in _DIRECTORIES)]:
        if (Path(directory) / LIBRARY).exists():
            return directory
    return None


def near(root: Path, pci: str) -> tuple[int, str]:
    """Return the NUMA node (-1: one only, or unknown) and the list of near processors of a device on the bus."""
    directory = root / "sys/bus/pci/devices" / pci
    try:
        numa = int(_text(directory / "numa_node"))
    except ValueError:
        numa = -1
    return numa, _text(directory / "local_cpulist")


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace").strip()
    except OSError:
        return ""
