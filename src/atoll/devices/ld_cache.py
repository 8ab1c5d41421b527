"""The dynamic linker's cache, read without running its tool: `/etc/ld.so.cache` of glibc, format `glibc-ld.so.cache1.1`.

A damaged or older file counts as none: callers search the usual directories then.
"""

from __future__ import annotations

import platform
import struct
from collections.abc import Iterator
from pathlib import Path

CACHE_BYTES_MAX = 16 << 20
_MAGIC = b"glibc-ld.so.cache1.1"
_HEADER = struct.Struct("<20sII")
_HEADER_BYTES = 48
_ENTRY = struct.Struct("<iIIIQ")
_FLAGS = {"x86_64": 0x0303, "aarch64": 0x0A03}
"""An ELF library for glibc (3) of the machine's 64-bit interface."""


def cached_libraries(root: Path = Path("/")) -> Iterator[tuple[str, str]]:
    """Yield (name, path) of this machine's 64-bit libraries, in the order in which the linker would take them."""
    try:
        with (root / "etc/ld.so.cache").open("rb") as file:
            data = file.read(CACHE_BYTES_MAX)
    except OSError:
        return
    start = data.find(_MAGIC)  # behind the table of the older format, where both are there
    if start < 0 or len(data) < start + _HEADER_BYTES:
        return
    data = data[start:]
    count = _HEADER.unpack_from(data)[1]
    wanted = _FLAGS.get(platform.machine())
    if len(data) < _HEADER_BYTES + count * _ENTRY.size:
        return
    for at in range(count):
        flags, name, path, _, _ = _ENTRY.unpack_from(data, _HEADER_BYTES + at * _ENTRY.size)
        if flags == wanted:
            yield _text(data, name), _text(data, path)


def _text(data: bytes, at: int) -> str:
    end = data.find(b"\0", at)
    return data[at : end if end >= 0 else len(data)].decode(errors="surrogateescape")
