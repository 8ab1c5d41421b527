"""An instance's kept output: numbered files of bounded size, one line each of `TIME STREAM TEXT`.

`STREAM` is `o` or `e`, in upper case for a part of a line that goes on in the next. Text is kept as the bytes that came,
and decoded when it is read. A higher number is newer; a reader that follows goes from file to file.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from atoll.model.streams import LogLine

FILE_BYTES_MAX = 8 << 20
FILES_MAX = 4
"""Kept files of an instance: at most FILES_MAX × FILE_BYTES_MAX bytes of disk."""
READ_BYTES = 64 << 10
_STREAMS = {b"o": ("stdout", False), b"e": ("stderr", False), b"O": ("stdout", True), b"E": ("stderr", True)}


def encode_line(at: float, stream: str, text: bytes, partial: bool = False) -> bytes:
    letter = b"o" if stream == "stdout" else b"e"
    return b"%.6f %b %b\n" % (at, letter.upper() if partial else letter, text)


def decode_line(line: bytes) -> LogLine | None:
    """Return the line; None for what no agent wrote whole (its disk was full, its machine lost power)."""
    at, _, rest = line.partition(b" ")
    letter, _, text = rest.partition(b" ")
    try:
        stream, partial = _STREAMS[letter]
        return LogLine(at=float(at), stream=stream, text=text.decode("utf-8", "replace"), partial=partial)
    except (KeyError, ValueError):
        return None


def numbers(directory: Path) -> list[int]:
    """Return the numbers of the files that are there, oldest first."""
    try:
        return sorted(int(path.stem) for path in directory.iterdir() if path.suffix == ".log" and path.stem.isdecimal())
    except FileNotFoundError:
        return []


def file_of(directory: Path, number: int) -> Path:
    return directory / f"{number:08d}.log"


class LogWriter:
    """Appends whole lines, and begins a new file when one is full. Nothing is made before there is something to keep."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.lost_bytes = 0
        """What could not be written since the last success: the disk was full."""
        known = numbers(directory)
        self._number = known[-1] if known else 1
        self._file = -1
        self._size = 0

    def _open(self) -> None:
        self.directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
        self._file = os.open(file_of(self.directory, self._number), flags, 0o600)
        self._size = os.fstat(self._file).st_size
        if self._size and os.pread(self._file, 1, self._size - 1) != b"\n":
            self._size += os.write(self._file, b"\n")  # an earlier write was cut

    def write(self, lines: bytes) -> bool:
        """Append; return whether it was kept. A full disk loses lines, and never stops the instance."""
        try:
            if self._file < 0:
                self._open()
            written = os.write(self._file, lines)
            self._size += written
            if written < len(lines):
                # Only a full disk writes less than asked: do not leave half a line to be taken for a whole one.
                self.lost_bytes += len(lines) - written
                self.close()
                return False
            if self._size >= FILE_BYTES_MAX:
                self._rotate()
        except OSError:
            self.lost_bytes += len(lines)
            return False
        return True

    def _rotate(self) -> None:
        self.close()
        self._number += 1
        for number in numbers(self.directory):
            if number <= self._number - FILES_MAX:
                file_of(self.directory, number).unlink(missing_ok=True)
        self._open()

    def close(self) -> None:
        if self._file >= 0:
            os.close(self._file)
            self._file = -1


class LogReader:
    """Reads on from where it is, file after file. A slow one may find files gone: it goes on with the oldest kept."""

    def __init__(self, directory: Path, *, tail: int | None = None) -> None:
        self._directory = directory
        self._file = -1
        self._number = 0
        self._rest = b""
        if tail is not None:
            self._seek(tail)

    def read(self) -> list[bytes]:
        """Return the next lines, of about READ_BYTES; none when there are no more yet."""
        while True:
            if self._file < 0 and not self._next():
                return []
            data = os.read(self._file, READ_BYTES)
            if data:
                *lines, self._rest = (self._rest + data).split(b"\n")
                if lines:
                    return lines
            elif not self._next():
                return []

    def _next(self) -> bool:
        for number in numbers(self._directory):
            if number > self._number:
                with contextlib.suppress(FileNotFoundError):
                    self._enter(number)
                    return True
        return False

    def _enter(self, number: int) -> None:
        file = os.open(file_of(self._directory, number), os.O_RDONLY | os.O_CLOEXEC)
        self.close()
        self._file, self._number, self._rest = file, number, b""

    def _seek(self, tail: int) -> None:
        """Stand before the last `tail` lines of what is whole now."""
        wanted = tail
        for number in reversed(numbers(self._directory)):
            with contextlib.suppress(FileNotFoundError):
                self._enter(number)
                offset, found = _last_lines(self._file, wanted)
                os.lseek(self._file, offset, os.SEEK_SET)
                wanted -= found
                if wanted <= 0:
                    return

    def close(self) -> None:
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def __enter__(self) -> LogReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _last_lines(file: int, wanted: int) -> tuple[int, int]:
    """Return (where the last `wanted` lines begin, how many there are), reading back from the end."""
    end = os.fstat(file).st_size
    if wanted <= 0:
        return end, 0
    found = 0
    for position, block in _blocks_backward(file, end):
        index = len(block)
        while (index := block.rfind(b"\n", 0, index)) >= 0:
            if position + index + 1 == end:
                continue  # the end of the last line, not the beginning of one
            found += 1
            if found >= wanted:
                return position + index + 1, found
    return 0, found + (1 if end else 0)


def _blocks_backward(file: int, end: int) -> Iterator[tuple[int, bytes]]:
    while end > 0:
        start = max(0, end - READ_BYTES)
        yield start, os.pread(file, end - start, start)
        end = start


def remove_kept(directory: Path) -> None:
    """Remove an instance's kept output, and its project's directory when that is the last."""
    shutil.rmtree(directory, ignore_errors=True)
    with contextlib.suppress(OSError):
        directory.parent.rmdir()
