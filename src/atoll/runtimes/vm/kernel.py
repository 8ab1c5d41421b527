"""The kernel that guests boot: Debian's for clouds, unpacked once, and an initramfs of our init with the modules that it needs.

An uncompressed kernel boots faster than the package's own (1.4 instead of 1.9 s where a processor is emulated), and is what
Firecracker takes. Blocking: call it from threads.
"""

from __future__ import annotations

import ctypes
import hashlib
import lzma
import re
import shutil
import struct
import tempfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import zstandard
from msgspec import Struct

from atoll.model.errors import Unsupported
from atoll.runtimes.native import guest_path
from atoll.runtimes.vm.settle import settle

PLACES = (Path("/usr/lib/atoll/guest"), Path("/"))
"""Where a kernel is looked for: `boot/vmlinuz-VERSION` and `lib/modules/VERSION` below it. The first is scripts/setup.sh's."""
KERNELS = "vmlinuz-*-cloud-*"
MODULES = ("virtio_blk", "virtio_net", "erofs", "ext4", "overlay")
"""What every guest needs, beside the bus that its devices are on and what its channel is made of."""
KERNEL_BYTES_MAX = 256 << 20
_MEND = "run scripts/setup.sh again, or apt-get install linux-image-cloud-amd64"
_LZ4_BLOCK_BYTES = 8 << 20
_SIGNED = b"~Module signature appended~\n"
_LZ4_MAGIC = b"\x02\x21\x4c\x18"


class GuestKernel(Struct, frozen=True):
    version: str
    image: Path
    initramfs: Path


class Source(Struct, frozen=True):
    """A kernel as a package brings it."""

    version: str
    image: Path
    modules: Path


def find_kernel(places: Sequence[Path] = PLACES) -> Source:
    """Return the newest kernel of the first place that has one. Raises Unsupported."""
    for place in places:
        found = []
        for image in (place / "boot").glob(KERNELS):
            version = image.name.removeprefix("vmlinuz-")
            for modules in (place / "lib/modules" / version, place / "usr/lib/modules" / version):
                if modules.is_dir():
                    found.append(Source(version, image, modules))
        if found:
            return max(found, key=lambda source: [int(number) for number in re.findall(r"\d+", source.version)])
    raise Unsupported("no kernel for virtual machines on this node", mend=_MEND)


def prepare_kernel(directory: Path, source: Source, modules: Sequence[str]) -> GuestKernel:
    """Return the kernel ready to boot, made below `directory` where that was not done yet.

    Of `modules` one that the kernel has built in, or not at all, is left out. Raises Unsupported for a damaged kernel.
    """
    parts = [(str(path), path.stat().st_mtime_ns) for path in (source.image, source.modules, guest_path())]
    tag = hashlib.sha256(repr((parts, tuple(modules))).encode()).hexdigest()[:12]
    place = directory / f"{source.version}-{tag}"
    kernel = GuestKernel(source.version, place / "vmlinux", place / "initramfs")
    if not place.is_dir():
        directory.mkdir(parents=True, exist_ok=True, mode=0o755)
        with tempfile.TemporaryDirectory(dir=directory, prefix=".next-") as name:
            partial = Path(name) / "kernel"
            partial.mkdir(mode=0o755)
            (partial / "vmlinux").write_bytes(unpack_kernel(source.image.read_bytes(), str(source.image)))
            (partial / "initramfs").write_bytes(initramfs(guest_path(), source.modules, modules))
            settle(partial, place)
        for old in directory.glob("*-*"):
            if old != place and not old.name.startswith("."):
                shutil.rmtree(old, ignore_errors=True)  # one that is open stays until it is closed
    return kernel


def unpack_kernel(data: bytes, name: str = "the kernel") -> bytes:
    """Return the ELF image in a bzImage (or `data`, if it is one). Raises Unsupported.

    Linux boot protocol: kernel documentation, arch/x86/boot, fields setup_sects, payload_offset and payload_length.
    """
    if data[:4] == b"\x7fELF":
        return data
    if data[0x202:0x206] != b"HdrS" or len(data) < 0x250:
        raise Unsupported(f"{name} is no Linux kernel", mend=_MEND)
    offset, length = struct.unpack_from("<II", data, 0x248)
    start = ((data[0x1F1] or 4) + 1) * 512 + offset
    payload = data[start : start + length]
    try:
        image = _decompress(payload)
    except (ValueError, OSError, lzma.LZMAError, zlib.error, zstandard.ZstdError, struct.error) as error:
        raise Unsupported(f"{name} cannot be unpacked: {error}", mend=_MEND) from None
    if image[:4] != b"\x7fELF":
        raise Unsupported(f"{name} holds no kernel that can be booted", mend=_MEND)
    return image


def _decompress(payload: bytes) -> bytes:
    if payload[:4] == _LZ4_MAGIC:
        return _lz4(payload)
    if payload[:2] == b"\x1f\x8b":
        return zlib.decompressobj(31).decompress(payload, KERNEL_BYTES_MAX)
    if payload[:6] == b"\xfd7zXZ\0":
        return lzma.LZMADecompressor().decompress(payload, KERNEL_BYTES_MAX)
    if payload[:4] == b"\x28\xb5\x2f\xfd":
        return zstandard.ZstdDecompressor().decompressobj().decompress(payload)
    raise ValueError("an unknown compression")


def _lz4(payload: bytes) -> bytes:
    """The kernel's LZ4 has blocks with their lengths, and its whole length at the end (lib/decompress_unlz4.c)."""
    library = ctypes.CDLL("liblz4.so.1")
    buffer = ctypes.create_string_buffer(_LZ4_BLOCK_BYTES)
    out = bytearray()
    at, end = 4, len(payload) - 4
    while at < end and len(out) < KERNEL_BYTES_MAX:
        (length,) = struct.unpack_from("<I", payload, at)
        block = payload[at + 4 : at + 4 + length]
        got = library.LZ4_decompress_safe(block, buffer, len(block), _LZ4_BLOCK_BYTES)
        if got <= 0 or len(block) != length:
            raise ValueError("damaged LZ4 data")
        out += ctypes.string_at(buffer, got)
        at += 4 + length
    return bytes(out)


def initramfs(init: Path, directory: Path, modules: Sequence[str]) -> bytes:
    """Return a cpio archive with `init` and `modules` of the kernel's `directory`, each after those that it depends on."""
    files = {path.name.partition(".")[0].replace("-", "_"): path for path in directory.rglob("*.ko*")}
    order: list[str] = []
    for name in modules:
        _order(name, files, order)
    archive = bytearray()
    for name, data, mode in _entries(init, files, order):
        archive += _cpio(name, data, mode)
    return bytes(archive + _cpio("TRAILER!!!", b"", 0))


def _entries(init: Path, files: dict[str, Path], order: list[str]) -> Iterator[tuple[str, bytes, int]]:
    yield "dev", b"", 0o040755
    yield "modules", b"", 0o040755
    yield "init", init.read_bytes(), 0o100755
    for name in order:
        yield f"modules/{name}.ko", _module(files[name]), 0o100644
    yield "modules/order", "".join(f"{name}.ko\n" for name in order).encode(), 0o100644


def _order(name: str, files: dict[str, Path], order: list[str]) -> None:
    if name in order or name not in files:
        return
    depends = re.search(rb"\0depends=([^\0]*)\0", _module(files[name]))
    for other in depends[1].decode().split(",") if depends else ():
        _order(other.replace("-", "_"), files, order)
    order.append(name)


def _module(path: Path) -> bytes:
    """Return a module without its signature: to check it takes an emulated processor longer than all else, and we packed it."""
    data = path.read_bytes()
    match path.suffix:
        case ".xz":
            data = lzma.decompress(data)
        case ".zst":
            data = zstandard.ZstdDecompressor().decompressobj().decompress(data)
        case ".gz":
            data = zlib.decompress(data, 31)
    if data.endswith(_SIGNED):
        # include/linux/module_signature.h: the signature, 12 bytes that end with its length, the mark.
        (length,) = struct.unpack_from(">I", data, len(data) - len(_SIGNED) - 4)
        data = data[: max(0, len(data) - len(_SIGNED) - 12 - length)]
    return data


def _cpio(name: str, data: bytes, mode: int) -> bytes:
    """One entry of the format `newc` (kernel documentation, driver-api/early-userspace/buffer-format)."""
    path = name.encode() + b"\0"
    fields = (0, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(path), 0)
    header = b"070701" + b"".join(b"%08x" % field for field in fields) + path
    return header + bytes(-len(header) % 4) + data + bytes(-len(data) % 4)
