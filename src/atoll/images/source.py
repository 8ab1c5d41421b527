"""Where an image's parts come from: a registry or a layout on disk."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO, Protocol

from msgspec import Struct

from atoll.images.manifest import Descriptor, Manifest
from atoll.model.errors import ImageError

CHUNK_BYTES = 1 << 20
"""What is hashed and written at once."""


class Resolved(Struct, frozen=True):
    """An image's manifest for this machine, its own bytes and their digest."""

    digest: str
    data: bytes
    manifest: Manifest


class Source(Protocol):
    """One image at one place."""

    async def resolve(self) -> Resolved:
        """Return the manifest for this machine. Raises ImageError, Unavailable or DeadlineExceeded."""
        ...

    async def fetch(self, descriptor: Descriptor, target: Path, on_bytes: Callable[[int], None]) -> None:
        """Write the blob to `target`, continuing what is there; its digest and size have been verified on return.

        `on_bytes` hears how many bytes there are so far. What is there after an error is a beginning of the blob that a
        repeat continues; a blob with a wrong digest is removed.
        """
        ...


class BlobSink:
    """A blob while it arrives: written, counted and hashed; continues the beginning that lies at `target`."""

    def __init__(self, target: Path, descriptor: Descriptor) -> None:
        self.descriptor = descriptor
        self._target = target
        self._file = target.open("a+b", buffering=0)
        self._hash = hashlib.sha256()
        self.size = 0
        self._file.seek(0)
        while data := self._file.read(CHUNK_BYTES):
            self._hash.update(data)
            self.size += len(data)
        self.resumed = self.size > 0
        if self.size > descriptor.size:
            self.restart()

    def write(self, data: bytes | bytearray) -> None:
        self._hash.update(data)
        view = memoryview(data)
        while view:
            view = view[self._file.write(view) :]
        self.size += len(data)

    def copy_from(self, file: BinaryIO) -> None:
        """Take the whole blob from a file, and finish."""
        while data := file.read(CHUNK_BYTES):
            if self.size + len(data) > self.descriptor.size:
                raise self.damaged(f"more than {self.descriptor.size} bytes")
            self.write(data)
        self.finish()

    def restart(self) -> None:
        self._file.truncate(0)
        self._file.seek(0)
        self._hash = hashlib.sha256()
        self.size = 0
        self.resumed = False

    def finish(self) -> None:
        """Make it durable. Raises ImageError, and removes it, when it is not what its descriptor says."""
        found = f"sha256:{self._hash.hexdigest()}"
        if self.size != self.descriptor.size:
            raise self.damaged(f"{self.size} bytes, not {self.descriptor.size}")
        if found != self.descriptor.digest:
            raise self.damaged(f"its digest is {found}")

        os.fsync(self._file.fileno())

    def damaged(self, why: str) -> ImageError:
        """Remove what came and return the error that says so."""
        with contextlib.suppress(FileNotFoundError):
            self._target.unlink()
        return ImageError(
            f"blob {self.descriptor.digest} is damaged: {why}",
            mend="push the image again; if that does not help, the registry is not to be trusted",
        )

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> BlobSink:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
