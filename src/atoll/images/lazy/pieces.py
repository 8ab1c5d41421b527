"""The pieces of one image on this node: which are here, and how one that came is verified and put into the tree."""

from __future__ import annotations

import bisect
import hashlib
import os
from pathlib import Path

import zstandard

from atoll.images.lazy.record import ALL, HAVE, TREE, LazyImage
from atoll.model.errors import ImageError


class Pieces:
    """One process alone writes them. Paths are followed from the tree's own descriptor, so that the tree may be moved."""

    def __init__(self, directory: Path, image: LazyImage) -> None:
        self.image = image
        self.table = image.table
        self._directory = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        self._root = os.open(TREE, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | os.O_NOFOLLOW, dir_fd=self._directory)
        self._have_fd = os.open(HAVE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600, dir_fd=self._directory)
        count = len(self.table.packed)
        self._have = bytearray(os.pread(self._have_fd, count, 0).ljust(count, b"\0"))
        self._starts = [0]
        for size in self.table.packed:
            self._starts.append(self._starts[-1] + size)
        # One name of each content is enough: hard links lead to the same file.
        self._by_offset = {entry.offset: at for at, entry in enumerate(image.entries) if entry.offset}
        self._contents = image.content

    @property
    def count(self) -> int:
        return len(self._have)

    @property
    def missing(self) -> int:
        return self._have.count(0)

    def has(self, chunk: int) -> bool:
        return self._have[chunk] == 1

    def packed_range(self, first: int, last: int) -> tuple[int, int]:
        """Return where in the blob these pieces begin and end."""
        return self._starts[first], self._starts[last + 1]

    def chunks_of(self, entry: int, offset: int, size: int) -> range:
        """Return the pieces that hold these bytes of a file."""
        shown = self.image.entries[entry]
        end = min(offset + size, shown.size)
        if offset >= end:
            return range(0)
        first, last = shown.offset + offset, shown.offset + end - 1
        return range(first // self.table.chunk_bytes, last // self.table.chunk_bytes + 1)

    def read(self, entry: int, offset: int, size: int) -> bytes:
        """Return bytes of a file, all of whose pieces are here; fewer at its end. Blocks."""
        # Opened each time: a descriptor that is kept could be closed, and become another file's, while a thread reads it.
        fd = os.open(self._path(entry), os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=self._root)
        try:
            return os.pread(fd, size, offset)
        finally:
            os.close(fd)

    def put(self, chunk: int, packed: bytes) -> None:
        """Verify a piece and put it into the tree. Blocks; for one piece at a time safe beside others in threads.

        Raises ImageError for a piece that is not what the image's digest vouches for: nothing of it is written. Raises OSError.
        """
        if hashlib.sha256(packed).digest() != self.table.digest(chunk):
            raise ImageError(
                f"piece {chunk} of {self.image.layer.digest} is damaged: it has another digest than the image says",
                mend="push the image again; if that does not help, the registry is not to be trusted",
            )
        begin, end = self.table.plain_range(chunk)
        try:
            if zstandard.frame_content_size(packed) not in (-1, end - begin):
                raise zstandard.ZstdError("its frame claims another size")
            plain = zstandard.ZstdDecompressor().decompress(packed, max_output_size=end - begin)
        except zstandard.ZstdError as error:
            raise ImageError(f"piece {chunk} of {self.image.layer.digest} is damaged: {error}") from None
        if len(plain) != end - begin:
            raise ImageError(f"piece {chunk} of {self.image.layer.digest} is damaged: it has {len(plain)} bytes")
        view = memoryview(plain)
        for offset, size in self._within(begin, end):
            entry = self._by_offset.get(offset)
            if entry is None:  # a file that a later entry of the layer replaced
                continue
            first, last = max(begin, offset), min(end, offset + size)
            part, at = view[first - begin : last - begin], first - offset
            fd = os.open(self._path(entry), os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=self._root)
            try:
                while part:
                    written = os.pwrite(fd, part, at)
                    part, at = part[written:], at + written
            finally:
                os.close(fd)
        os.pwrite(self._have_fd, b"\1", chunk)
        self._have[chunk] = 1

    def finish(self) -> None:
        """Say that every piece has come."""
        os.close(os.open(ALL, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600, dir_fd=self._directory))

    def __del__(self) -> None:
        # Not before: a thread that still reads would find another file behind the number of a closed descriptor.
        for fd in (self._have_fd, self._root, self._directory):
            os.close(fd)

    def _within(self, begin: int, end: int) -> list[tuple[int, int]]:
        at = max(0, bisect.bisect_right(self._contents, (begin, 1 << 62)) - 1)
        found = []
        while at < len(self._contents) and self._contents[at][0] < end:
            if self._contents[at][0] + self._contents[at][1] > begin:
                found.append(self._contents[at])
            at += 1
        return found

    def _path(self, entry: int) -> str:
        parts: list[str] = []
        while entry:
            shown = self.image.entries[entry]
            parts.append(shown.name)
            entry = shown.parent
        return "/".join(reversed(parts))
