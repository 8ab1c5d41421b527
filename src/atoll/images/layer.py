"""Making a layer: a canonical tar, compressed with zstd, whose bytes depend on its content only."""

from __future__ import annotations

import hashlib
import io
import os
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import zstandard
from msgspec import Struct

from atoll.images.chunks import ChunkWriter
from atoll.images.entries import XATTR_PREFIX
from atoll.images.manifest import OCI_LAYER_ZSTD, Descriptor

COMPRESSION_LEVEL = 3
COPY_BYTES = 1 << 20


class LayerBlob(Struct, frozen=True):
    """A layer in a layout's blobs."""

    digest: str
    size: int
    diff_id: str
    media_type: str = OCI_LAYER_ZSTD
    annotations: dict[str, str] = {}
    """With `chunked`: where its table lies."""

    @property
    def descriptor(self) -> Descriptor:
        return Descriptor(self.media_type, self.digest, self.size, annotations=self.annotations)


class _Hashing:
    """A file that hashes what is written to it."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._hash = hashlib.sha256()
        self.size = 0

    def write(self, data: bytes) -> int:
        self._file.write(data)
        self._hash.update(data)
        self.size += len(data)
        return len(data)

    def tell(self) -> int:
        return self.size

    def flush(self) -> None:
        self._file.flush()

    @property
    def digest(self) -> str:
        return f"sha256:{self._hash.hexdigest()}"


class _Content:
    """A file whose bytes are announced as content before the first of them is written."""

    def __init__(self, file: BinaryIO, chunks: ChunkWriter, size: int) -> None:
        self._file = file
        self._chunks: ChunkWriter | None = chunks
        self._size = size

    def read(self, size: int) -> bytes:
        if self._chunks is not None:
            self._chunks.begin_content(self._size)
            self._chunks = None
        return self._file.read(size)


class LayerWriter:
    """Writes a layer to the new file `target`. The caller adds entries in a fixed order, then `close`s.

    Entries have the time `mtime` (seconds since the epoch) unless they bring one; owners are numbers only. `chunked` makes it one
    whose pieces can be fetched one by one (`chunks.py`), a little larger than otherwise.
    """

    def __init__(self, target: Path, *, mtime: int = 0, chunked: bool = False) -> None:
        self._mtime = mtime
        self._file = target.open("xb")
        self._packed = _Hashing(self._file)
        self._chunks = ChunkWriter(self._packed, level=COMPRESSION_LEVEL) if chunked else None  # type: ignore[arg-type]
        stream = zstandard.ZstdCompressor(level=COMPRESSION_LEVEL, write_checksum=True).stream_writer
        packer: Any = self._chunks or stream(self._packed, closefd=False)  # type: ignore[arg-type]
        self._zstd = packer
        self._plain = _Hashing(packer)
        self._tar = tarfile.open(fileobj=self._plain, mode="w", format=tarfile.PAX_FORMAT)  # type: ignore[call-overload]  # noqa: SIM115 (`close` ends it)

    def add(
        self,
        name: str,
        kind: bytes,
        *,
        mode: int,
        uid: int = 0,
        gid: int = 0,
        size: int = 0,
        content: BinaryIO | None = None,
        link: str = "",
        device: tuple[int, int] = (0, 0),
        mtime: int | None = None,
        xattrs: Mapping[str, str] | None = None,
    ) -> None:
        """Add one entry; `kind` is a tarfile type, `name` has no leading slash."""
        info = tarfile.TarInfo(name)
        info.type = kind
        info.mode, info.uid, info.gid, info.size = mode & 0o7777, uid, gid, size
        info.linkname = link
        info.devmajor, info.devminor = device
        info.mtime = self._mtime if mtime is None else mtime
        info.pax_headers = {f"{XATTR_PREFIX}{key}": value for key, value in sorted((xattrs or {}).items())}
        if self._chunks is not None and content is not None:
            content = _Content(content, self._chunks, size)  # type: ignore[assignment]
        self._tar.addfile(info, content)
        self._tar.members.clear()  # tarfile would keep them all

    def directory(self, name: str, mode: int = 0o755) -> None:
        self.add(name, tarfile.DIRTYPE, mode=mode)

    def bytes(self, name: str, data: bytes, mode: int = 0o644) -> None:
        self.add(name, tarfile.REGTYPE, mode=mode, size=len(data), content=io.BytesIO(data))

    def close(self) -> LayerBlob:
        """Finish, make durable, and return what was written."""
        self._tar.close()
        annotations: dict[str, str] = self._zstd.close() or {}
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        return LayerBlob(self._packed.digest, self._packed.size, self._plain.digest, annotations=annotations)

    def abandon(self) -> None:
        self._file.close()
