"""A layer in pieces that can be fetched and verified one by one, and that every other tool reads as a plain zstd layer.

```
blob = frame │ frame │ … │ frame │ skippable frame that holds the table
```
Each zstd frame holds the next `chunk_bytes` of the tar. The table gives each frame's size and SHA-256, where in the tar the files'
contents lie, and all else of the tar (headers, padding): what is needed to show the tree before any content has come. The
layer's annotation in the manifest has the table's place and digest, so that each piece is bound to the image's digest. The idea
is that of eStargz and zstd:chunked; their tables have no digest of each frame as it travels, so that they unpack first and
verify afterwards.
"""

from __future__ import annotations

import hashlib
import re
import struct
from collections.abc import Iterator
from typing import BinaryIO

import msgspec
import zstandard
from msgspec import Struct

from atoll.model.errors import ImageError

ANNOTATION = "atoll.chunks"
CHUNK_BYTES = 1 << 20
CHUNK_BYTES_MIN, CHUNK_BYTES_MAX = 4 << 10, 16 << 20
TABLE_BYTES_MAX = 64 << 20
"""Of a table as it is packed, and unpacked."""
REST_BYTES_MAX = 16 << 20
"""A tar with more headers than this is not worth showing early: it gets no table."""
PLAIN_BYTES_MAX = 1 << 40
_SKIPPABLE_MAGIC = 0x184D2A5A
_DIGEST_BYTES = 32
_PLACE = re.compile(r"([0-9]{1,15}) ([0-9]{1,15}) sha256:([0-9a-f]{64})")


class Table(Struct, frozen=True, kw_only=True):
    """What is known of a layer's pieces. `parse_table` gives consistent ones only."""

    chunk_bytes: int
    """Of the tar, in each frame but the last."""
    plain_bytes: int
    """Of the tar."""
    packed: tuple[int, ...]
    """Each frame's size in the blob, in order and without gaps."""
    digests: bytes
    """Each frame's SHA-256, one after the other."""
    content: tuple[tuple[int, int], ...]
    """Offset in the tar and size of each file's content, in order."""
    rest: bytes
    """The tar without those."""

    def digest(self, chunk: int) -> bytes:
        return self.digests[chunk * _DIGEST_BYTES : (chunk + 1) * _DIGEST_BYTES]

    def plain_range(self, chunk: int) -> tuple[int, int]:
        """Return where the piece begins and ends in the tar."""
        return chunk * self.chunk_bytes, min((chunk + 1) * self.chunk_bytes, self.plain_bytes)


class Place(Struct, frozen=True):
    """Where in the blob the table lies, packed."""

    offset: int
    size: int
    digest: str

    def __str__(self) -> str:
        return f"{self.offset} {self.size} sha256:{self.digest}"


class ChunkWriter:
    """Packs what is written to it (a tar) into frames of their own, and in the end its table."""

    def __init__(self, target: BinaryIO, *, level: int, chunk_bytes: int = CHUNK_BYTES) -> None:
        self._target = target
        self._compressor = zstandard.ZstdCompressor(level=level, write_checksum=True)
        self._chunk_bytes = chunk_bytes
        self._buffer = bytearray()
        self._packed: list[int] = []
        self._digests = bytearray()
        self._content: list[tuple[int, int]] = []
        self._rest: bytearray | None = bytearray()
        self._plain_bytes = 0
        self._skip = 0

    def write(self, data: bytes) -> int:
        skipped = min(self._skip, len(data))
        self._skip -= skipped
        if self._rest is not None:
            self._rest += data[skipped:]
            if len(self._rest) > REST_BYTES_MAX:
                self._rest = None
        self._plain_bytes += len(data)
        self._buffer += data
        while len(self._buffer) >= self._chunk_bytes:
            self._flush()
        return len(data)

    def begin_content(self, size: int) -> None:
        """The next `size` bytes are a file's content."""
        if size:
            self._content.append((self._plain_bytes, size))
            self._skip = size

    def close(self) -> dict[str, str]:
        """Write what is left, and the table if there is one; return the layer's annotations."""
        if self._buffer:
            self._flush()
        if self._rest is None:
            return {}
        table = Table(
            chunk_bytes=self._chunk_bytes,
            plain_bytes=self._plain_bytes,
            packed=tuple(self._packed),
            digests=bytes(self._digests),
            content=tuple(self._content),
            rest=bytes(self._rest),
        )
        payload = zstandard.ZstdCompressor(level=3).compress(msgspec.json.encode(table))
        if len(payload) > TABLE_BYTES_MAX:
            return {}
        place = Place(sum(self._packed) + 8, len(payload), hashlib.sha256(payload).hexdigest())
        self._target.write(struct.pack("<II", _SKIPPABLE_MAGIC, len(payload)) + payload)
        return {ANNOTATION: str(place)}

    def _flush(self) -> None:
        frame = self._compressor.compress(bytes(self._buffer[: self._chunk_bytes]))
        del self._buffer[: self._chunk_bytes]
        self._packed.append(len(frame))
        self._digests += hashlib.sha256(frame).digest()
        self._target.write(frame)


def parse_place(text: str, blob_bytes: int) -> Place | None:
    """Return the place that an annotation names in a blob of this size; None for one that cannot be."""
    match = _PLACE.fullmatch(text)
    if match is None:
        return None
    place = Place(int(match[1]), int(match[2]), match[3])
    return place if place.size <= TABLE_BYTES_MAX and place.offset + place.size <= blob_bytes else None


def parse_table(payload: bytes, place: Place) -> Table:
    """Return the table that came from `place`. Raises ImageError for one that is damaged or contradicts itself."""
    if hashlib.sha256(payload).hexdigest() != place.digest:
        raise ImageError("the table of the layer's pieces is damaged: it has another digest than the manifest says")
    try:
        plain = zstandard.ZstdDecompressor(max_window_size=TABLE_BYTES_MAX).stream_reader(payload).read(TABLE_BYTES_MAX + 1)
        if len(plain) > TABLE_BYTES_MAX:
            raise ImageError(f"the table of the layer's pieces has more than {TABLE_BYTES_MAX} bytes")
        table = msgspec.json.decode(plain, type=Table)
    except (zstandard.ZstdError, msgspec.DecodeError) as error:
        raise ImageError(f"the table of the layer's pieces is damaged: {error}") from None
    for why in _contradictions(table, place):
        raise ImageError(f"the table of the layer's pieces is damaged: {why}")
    return table


def _contradictions(table: Table, place: Place) -> Iterator[str]:
    if not CHUNK_BYTES_MIN <= table.chunk_bytes <= CHUNK_BYTES_MAX or not 0 < table.plain_bytes <= PLAIN_BYTES_MAX:
        yield "its sizes are absurd"
        return
    count = -(-table.plain_bytes // table.chunk_bytes)
    if len(table.packed) != count or len(table.digests) != count * _DIGEST_BYTES:
        yield f"it does not have {count} pieces"
    if any(not 0 < size <= table.chunk_bytes + (64 << 10) for size in table.packed):
        yield "a piece has an absurd size"
    if sum(table.packed) + 8 != place.offset:
        yield "its pieces do not end where it begins"
    end = 0
    for offset, size in table.content:
        if offset < end or size <= 0:
            yield "contents overlap"
            return
        end = offset + size
    if end > table.plain_bytes or sum(size for _, size in table.content) + len(table.rest) != table.plain_bytes:
        yield "contents and rest are not the whole"
