"""A layer's bytes as a plain tar stream: decompressed, counted, hashed and bounded, read forwards only."""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Callable
from typing import BinaryIO, Protocol

import zstandard

from atoll.model.errors import ImageError

GZIP_MAGIC = b"\x1f\x8b"
ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
ZSTD_WINDOW_BYTES_MAX = 128 << 20
"""A frame that asks for more memory than this is refused."""
INPUT_CHUNK_BYTES = 256 << 10
OUTPUT_CHUNK_BYTES = 1 << 20
LOOKBACK_BYTES = 1024
HEADER_BYTES_MAX = 1 << 20
"""The longest header of one entry (names, PAX records, sparse maps); one that claims more is refused."""
DIGITS_MAX = 512
"""tarfile looks for a number in a header in quadratic time: a longer run of digits is refused."""
_DIGITS = bytes.maketrans(b"123456789", b"000000000")


class Reader(Protocol):
    def read(self, size: int, /) -> bytes: ...


class _Gzip:
    """Reads gzip of one or more members, as `cat a.gz b.gz` makes them."""

    def __init__(self, raw: BinaryIO) -> None:
        self._raw = raw
        self._inflate = zlib.decompressobj(wbits=31)
        self._pending = b""
        self._ended = False

    def read(self, size: int, /) -> bytes:
        while not self._ended:
            if self._inflate.eof:
                self._pending = (self._inflate.unused_data or self._raw.read(INPUT_CHUNK_BYTES)).lstrip(b"\0")
                if not self._pending:
                    self._ended = True
                    break
                self._inflate = zlib.decompressobj(wbits=31)
            data = self._pending or self._raw.read(INPUT_CHUNK_BYTES)
            if not data:
                raise EOFError("the gzip stream ends early")
            out = self._inflate.decompress(data, size)
            self._pending = self._inflate.unconsumed_tail
            if out:
                return out
        return b""


def open_compressed(raw: BinaryIO) -> Reader:
    """Return a reader of the plain bytes; what they are packed with is told by their first bytes."""
    magic = raw.read(4)
    raw.seek(0)
    if magic.startswith(GZIP_MAGIC):
        return _Gzip(raw)
    if magic == ZSTD_MAGIC or (magic[1:] == b"\x2a\x4d\x18" and magic[0] >> 4 == 5):
        decompressor = zstandard.ZstdDecompressor(max_window_size=ZSTD_WINDOW_BYTES_MAX)
        return decompressor.stream_reader(raw, read_size=INPUT_CHUNK_BYTES, read_across_frames=True, closefd=False)
    return raw


class TarStream:
    """A file object that tarfile can read without seeking back further than a block.

    It hashes everything that passes, and refuses to give more than `bytes_max` (a decompression bomb) or headers of more
    than `HEADER_BYTES_MAX`. `on_bytes` hears how many compressed bytes have been used.
    """

    def __init__(self, raw: BinaryIO, *, bytes_max: int, on_bytes: Callable[[int], None] | None = None) -> None:
        self._raw = raw
        self._reader = open_compressed(raw)
        self._bytes_max = bytes_max
        self._on_bytes = on_bytes
        self._hash = hashlib.sha256()
        self._buffer = b""
        self._start = 0
        """Offset in the plain stream of the buffer's first byte."""
        self._position = 0
        self._allowance = HEADER_BYTES_MAX
        self._ended = False

    def tell(self) -> int:
        return self._position

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        if whence != 0 or offset < self._start:
            raise ImageError("the layer is damaged: a tar header points backwards")
        while offset > self._start + len(self._buffer):
            if not self._fill():
                break
        self._position = min(offset, self._start + len(self._buffer))
        if self._position < offset:
            raise ImageError("the layer is damaged: the tar ends inside a file")
        return offset

    def begin_header(self) -> None:
        """What is read from now on is the header of one entry."""
        self._allowance = HEADER_BYTES_MAX

    def read(self, size: int = -1) -> bytes:
        """Return `size` bytes of a header, fewer at the end of the stream."""
        if not 0 <= size <= self._allowance:
            raise ImageError(f"the layer is damaged: a tar header of more than {HEADER_BYTES_MAX} bytes")
        self._allowance -= size
        data = self.take(size)
        if size > DIGITS_MAX and b"0" * DIGITS_MAX in data.translate(_DIGITS):
            raise ImageError(f"the layer is damaged: a number of more than {DIGITS_MAX} digits in a tar header")
        return data

    def take(self, size: int) -> bytes:
        """Return `size` bytes of a file's content, fewer at the end of the stream."""
        end = self._position + size
        if end <= self._start + len(self._buffer):
            begin = self._position - self._start
            self._position = end
            return self._buffer[begin : begin + size]
        parts: list[bytes] = []
        while size:
            begin = self._position - self._start
            part = self._buffer[begin : begin + size]
            if not part:
                if not self._fill():
                    break
                continue
            parts.append(part)
            size -= len(part)
            self._position += len(part)
        return b"".join(parts)

    def finish(self) -> str:
        """Read what is left behind the tar's end and return the digest of the whole plain stream."""
        while self._fill():
            pass
        return f"sha256:{self._hash.hexdigest()}"

    @property
    def total_bytes(self) -> int:
        return self._start + len(self._buffer)

    def _fill(self) -> bool:
        """Replace the buffer by the next piece, keeping `LOOKBACK_BYTES` of the old; False at the end."""
        if self._ended:
            return False
        data = self._reader.read(OUTPUT_CHUNK_BYTES)
        if not data:
            self._ended = True
            return False
        self._hash.update(data)
        kept = self._buffer[-LOOKBACK_BYTES:]
        self._start += len(self._buffer) - len(kept)
        self._buffer = kept + data
        if self.total_bytes > self._bytes_max:
            raise ImageError(
                f"the layer unpacks to more than {self._bytes_max} bytes", mend="make it smaller, or raise the node's bound"
            )
        if self._on_bytes is not None:
            self._on_bytes(self._raw.tell())
        return True
