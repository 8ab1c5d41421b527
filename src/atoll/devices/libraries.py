"""The NVIDIA driver's user-space libraries: those of exactly the kernel driver's version, for the classes that were asked for.

The kernel driver and `libcuda` speak to each other without a stable interface: with another version nothing works, and the
error says little. So a library is taken only if its file name ends in the version of the driver that is loaded. File names
and their classes are those of the driver's README ("Installed Components").
"""

from __future__ import annotations

import contextlib
import platform
import re
import stat
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path

from msgspec import Struct

from atoll.devices.ld_cache import cached_libraries
from atoll.model.errors import Unsupported
from atoll.model.ports.devices import FileMount
from atoll.model.spec import GpuCapability

LIBRARY_DIRECTORY = "/usr/local/nvidia/lib64"
"""Where the libraries appear inside: alone, so that the linker may search it first without finding anything else there."""
BINARY_DIRECTORY = "/usr/bin"
DIRECTORIES = (
    "usr/local/nvidia/lib64",
    "run/opengl-driver/lib",
    "usr/lib/x86_64-linux-gnu",
    "usr/lib/x86_64-linux-gnu/nvidia/current",
    "usr/lib/aarch64-linux-gnu",
    "usr/lib64",
    "usr/lib",
    "usr/lib/wsl/lib",
    "lib64",
    "lib",
)
"""Where drivers put their libraries, below the root; searched after the linker's cache."""
BINARY_DIRECTORIES = ("usr/bin", "usr/local/nvidia/bin", "usr/local/bin", "run/current-system/sw/bin", "opt/bin", "usr/sbin")
DATA_DIRECTORIES = ("usr/share", "etc", "usr/local/nvidia/share", "run/opengl-driver/share")
_HOPS_MAX = 40
_VERSION = re.compile(r"\b(\d{3,4}\.\d+(?:\.\d+)?)\b")
_VERSION_BYTES_MAX = 4096
_MACHINES = {"x86_64": 62, "aarch64": 183}
"""`e_machine` of ELF."""


class Library(Struct, frozen=True):
    """`needed`: without it the class is of no use; others come and go with the driver's versions."""

    name: str
    soname: str = ""
    """What follows the name in the shared object's own name; empty where that is the full version."""
    needed: bool = False


LIBRARIES: dict[GpuCapability, tuple[Library, ...]] = {
    GpuCapability.COMPUTE: (
        Library("libcuda.so", "1", needed=True),
        Library("libnvidia-ptxjitcompiler.so", "1"),
        Library("libnvidia-nvvm.so", "4"),
        Library("libnvidia-gpucomp.so"),
        Library("libcudadebugger.so", "1"),
        Library("libnvidia-opencl.so", "1"),
        Library("libnvidia-pkcs11.so"),
        Library("libnvidia-pkcs11-openssl3.so"),
    ),
    GpuCapability.UTILITY: (Library("libnvidia-ml.so", "1", needed=True), Library("libnvidia-cfg.so", "1")),
    GpuCapability.GRAPHICS: (
        Library("libGLX_nvidia.so", "0", needed=True),
        Library("libEGL_nvidia.so", "0"),
        Library("libGLESv1_CM_nvidia.so", "1"),
        Library("libGLESv2_nvidia.so", "2"),
        Library("libnvidia-allocator.so", "1"),
        Library("libnvidia-eglcore.so"),
        Library("libnvidia-glcore.so"),
        Library("libnvidia-glsi.so"),
        Library("libnvidia-glvkspirv.so"),
        Library("libnvidia-gpucomp.so"),
        Library("libnvidia-fbc.so", "1"),
        Library("libnvidia-rtcore.so"),
        Library("libnvidia-tls.so"),
        Library("libnvidia-vulkan-producer.so"),
        Library("libnvoptix.so", "1"),
    ),
    GpuCapability.VIDEO: (
        Library("libnvidia-encode.so", "1", needed=True),
        Library("libnvcuvid.so", "1"),
        Library("libnvidia-opticalflow.so", "1"),
        Library("libvdpau_nvidia.so", "1"),
    ),
}
_BINARIES = {GpuCapability.UTILITY: ("nvidia-smi", "nvidia-debugdump")}
_DATA = {
    GpuCapability.COMPUTE: ("OpenCL/vendors/nvidia.icd",),
    GpuCapability.GRAPHICS: ("glvnd/egl_vendor.d/10_nvidia.json", "vulkan/icd.d/nvidia_icd.json"),
}
"""What makes a vendor-neutral loader (of OpenCL, EGL, Vulkan) find the driver: path below a data directory."""
DATA_FILES = tuple(name for names in _DATA.values() for name in names)
_DATA_TARGETS = {"OpenCL/vendors/nvidia.icd": "/etc/OpenCL/vendors/nvidia.icd"}


class DriverFiles(Struct, frozen=True, kw_only=True):
    """What of the driver's user space appears inside."""

    version: str
    mounts: tuple[FileMount, ...]
    links: tuple[tuple[str, str], ...]


def kernel_driver_version(root: Path = Path("/")) -> str:
    """Return the version of the loaded kernel driver. Raises Unsupported where none is loaded."""
    for path in ("proc/driver/nvidia/version", "sys/module/nvidia/version"):
        with contextlib.suppress(OSError), (root / path).open("rb") as file:
            if found := _VERSION.search(file.read(_VERSION_BYTES_MAX).decode(errors="replace")):
                return found[1]
    raise Unsupported("NVIDIA's kernel driver is not loaded on this node", mend="modprobe nvidia, or install the driver")


def driver_files(capabilities: Collection[GpuCapability], root: Path = Path("/")) -> DriverFiles:
    """Return mounts and links for the classes asked for. Looks up files only; it opens each that it takes, to know its kind.

    Raises Unsupported where a needed library is not there, or only in another version than the kernel driver's: the message
    names the library and both versions.
    """
    version = kernel_driver_version(root)
    search = _Search(root, version)
    mounts: dict[str, FileMount] = {}
    links: dict[str, str] = {}
    for capability in GpuCapability:
        if capability not in capabilities:
            continue
        for library in LIBRARIES[capability]:
            found = search.library(library.name)
            if found is not None:
                _add_library(library, found, version, mounts, links)
            elif library.needed:
                raise search.missing(library.name, capability)
        _add_others(capability, root, mounts)
    return DriverFiles(version=version, mounts=tuple(mounts.values()), links=tuple(links.items()))


def _add_library(library: Library, found: str, version: str, mounts: dict[str, FileMount], links: dict[str, str]) -> None:
    full = f"{library.name}.{version}"
    target = f"{LIBRARY_DIRECTORY}/{full}"
    mounts[target] = FileMount(found, target)
    if library.soname:
        short = f"{library.name}.{library.soname}"
        links[f"{LIBRARY_DIRECTORY}/{short}"] = full
        links[f"{LIBRARY_DIRECTORY}/{library.name}"] = short
    else:
        links[f"{LIBRARY_DIRECTORY}/{library.name}"] = full


def _add_others(capability: GpuCapability, root: Path, mounts: dict[str, FileMount]) -> None:
    for name in _BINARIES.get(capability, ()):
        found = _first_file(root, (f"{directory}/{name}" for directory in BINARY_DIRECTORIES))
        if found:
            target = f"{BINARY_DIRECTORY}/{name}"
            mounts[target] = FileMount(found, target)
    for name in _DATA.get(capability, ()):
        found = _first_file(root, (f"{directory}/{name}" for directory in DATA_DIRECTORIES))
        if found:
            target = _DATA_TARGETS.get(name, f"/usr/share/{name}")
            mounts[target] = FileMount(found, target)


class _Search:
    """One search of the node's files; what it saw of other versions is kept for the error."""

    def __init__(self, root: Path, version: str) -> None:
        self._root = root
        self._version = version
        self._others: dict[str, set[str]] = {}
        self._cached: dict[str, list[str]] = {}
        for name, path in cached_libraries(root):
            self._cached.setdefault(name.partition(".so")[0] + ".so", []).append(path)

    def library(self, name: str) -> str | None:
        """Return the node's path of `name` in the driver's version, or None."""
        wanted = f"{name}.{self._version}"
        for path in self._candidates(name, wanted):
            real = resolve(self._root, path)
            if real is None or not _is_ours(self._root / real.lstrip("/")):
                continue
            if real.endswith(f"/{wanted}"):
                return real
            if found := _VERSION.search(real.rpartition("/")[2]):
                self._others.setdefault(name, set()).add(found[1])
        return None

    def _candidates(self, name: str, wanted: str) -> Iterator[str]:
        for directory in DIRECTORIES[:1]:
            yield f"/{directory}/{wanted}"  # a driver that was put there for containers is meant for them
        yield from self._cached.get(name, ())
        for directory in DIRECTORIES:
            yield f"/{directory}/{wanted}"
        for directory in DIRECTORIES:
            yield f"/{directory}/{name}.1"

    def missing(self, name: str, capability: GpuCapability) -> Unsupported:
        others = sorted(self._others.get(name, ()))
        if others:
            return Unsupported(
                f"{name} on this node is of version {', '.join(others)}, but the kernel driver is {self._version}",
                mend=f"install the user-space driver {self._version}, or load the kernel driver {others[-1]} (a restart does)",
                field="resources.gpu",
            )
        return Unsupported(
            f"{name}.{self._version}, which '{capability}' needs, is not found on this node",
            mend=f"install the user-space part of driver {self._version}, or leave '{capability}' out of the capabilities",
            field="resources.gpu.capabilities",
        )


def resolve(root: Path, path: str) -> str | None:
    """Return the file that `path` leads to if `root` were `/`, as a path below it; None where there is none."""
    done: list[str] = []
    rest = [part for part in reversed(path.split("/")) if part]
    hops = 0
    while rest:
        part = rest.pop()
        if part in (".", ".."):
            if part == ".." and done:
                done.pop()
            continue
        here = root.joinpath(*done, part)
        try:
            mode = here.lstat().st_mode
            target = str(here.readlink()) if stat.S_ISLNK(mode) else ""
        except OSError:
            return None
        if not target:
            done.append(part)
            continue
        hops += 1
        if hops > _HOPS_MAX:
            return None
        if target.startswith("/"):
            done.clear()
        rest.extend(part for part in reversed(target.split("/")) if part)
    return "/" + "/".join(done)


def _first_file(root: Path, paths: Iterable[str]) -> str | None:
    for path in paths:
        real = resolve(root, path)
        if real is not None and (root / real.lstrip("/")).is_file():
            return real
    return None


def _is_ours(path: Path) -> bool:
    """Whether it is a 64-bit ELF file for this machine's processor."""
    try:
        with path.open("rb") as file:
            head = file.read(20)
    except OSError:
        return False
    machine = _MACHINES.get(platform.machine())
    return head[:5] == b"\x7fELF\x02" and int.from_bytes(head[18:20], "little") == machine
