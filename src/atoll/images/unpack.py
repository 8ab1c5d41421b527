"""A layer's tar becomes a directory in overlayfs' own form. The tar may be hostile: nothing is made outside the directory."""

from __future__ import annotations

import errno
import os
import shutil
import struct
import tarfile
import threading
import zlib
from collections.abc import Callable
from pathlib import Path

import zstandard
from msgspec import Struct

from atoll.images.entries import Entries, Stopped, show
from atoll.images.kept import KEPT_BYTES_MAX
from atoll.images.stream import TarStream
from atoll.model.errors import Exhausted, ImageError, Unavailable, Unsupported

ENTRIES_MAX = 2_000_000
UNPACKED_BYTES_MAX = 64 << 30
_DAMAGE = (
    tarfile.TarError,
    zlib.error,
    zstandard.ZstdError,
    EOFError,
    ValueError,
    ArithmeticError,
    LookupError,
    RecursionError,
    struct.error,
)


class Unpacked(Struct, frozen=True):
    diff_id: str
    size_bytes: int
    """Of the plain tar."""
    implied: tuple[bytes, ...]
    """Directories that no entry describes: they must look as they do in the layers below."""


def unpack(
    source: Path,
    target: Path,
    *,
    diff_id: str | None = None,
    bytes_max: int = UNPACKED_BYTES_MAX,
    entries_max: int = ENTRIES_MAX,
    kept_bytes_max: int = KEPT_BYTES_MAX,
    on_bytes: Callable[[int], None] | None = None,
    stop: threading.Event | None = None,
) -> Unpacked:
    """Unpack the tar `source` (plain, gzip or zstd) into the new directory `target`, which is removed again on failure.

    With `diff_id` the plain tar must have that digest. Blocks: call it in a thread; setting `stop` ends it with
    Unavailable. Raises ImageError for a damaged or hostile tar, Exhausted for a full disk, Unsupported without the rights
    that it needs.
    """
    target.mkdir()
    target.chmod(0o755)  # whatever the umask is
    try:
        with source.open("rb") as raw:
            stream = TarStream(raw, bytes_max=bytes_max, on_bytes=on_bytes)
            root = os.open(target, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                stop = stop or threading.Event()
                layer = Entries(root, stream, entries_max=entries_max, stop=stop, kept_bytes_max=kept_bytes_max)
                layer.run()
            finally:
                os.close(root)
            found = stream.finish()
            if diff_id is not None and found != diff_id:
                raise ImageError(f"the layer is damaged: its tar has digest {found}, not {diff_id}")
            return Unpacked(found, stream.total_bytes, tuple(sorted(layer.implied)))
    except BaseException as error:
        shutil.rmtree(target, ignore_errors=True)
        if isinstance(error, Stopped):
            raise Unavailable("unpacking was stopped") from None
        if isinstance(error, _DAMAGE):
            raise ImageError(f"the layer is damaged: {error}"[:300]) from None
        if isinstance(error, OSError):
            raise from_os_error(error, f"cannot unpack to {target.parent}") from None
        raise


def from_os_error(error: OSError, what: str) -> Exhausted | Unsupported | ImageError:
    """Return the error of ours that says what the operating system's means for an image."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return Exhausted(f"{what}: the disk is full", mend="free some space, or put the data directory on a larger disk")
    if error.errno in (errno.EPERM, errno.EACCES, errno.EROFS):
        return Unsupported(f"{what}: {error.strerror} ({show(error.filename)})", mend="run as root, on a writable disk")
    return ImageError(f"{what}: {error.strerror} ({show(error.filename)})")
