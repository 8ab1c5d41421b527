"""Which instance has which slot: a journal, in which each slot is noted down before it is handed out.

One write for all slots that are handed out in one moment, at the end of one file. The kernel's state and this file end together
with the machine, so that nothing here waits for a disk.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from msgspec import Struct

from atoll.model import codec
from atoll.model.errors import AtollError, Conflict
from atoll.model.spec import NetworkRules, Port

JOURNAL = "journal"
_LAST = "last"
LINES_SPARE = 2048
"""The journal is written anew when it has so many lines more than slots in use."""


class Entry(Struct, frozen=True, kw_only=True):
    id: str
    project: str
    number: int
    ports: tuple[Port, ...] = ()
    rules: NetworkRules | None = None


class _Line(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One thing that came to be: a slot has an entry, or none any more; or that a number was given out last."""

    entry: Entry | None = None
    gone: int | None = None
    last: int | None = None


class Ledger:
    """The entries of one data directory, which one process at a time may hold open."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._lock: int | None = None
        self._journal: int | None = None
        self._size = 0
        self._lines = 0
        self._entries: dict[int, Entry] = {}
        self._last: int | None = None
        self._behind = False
        """That a slot is nobody's could not be written down."""

    def open(self) -> None:
        """Raises Conflict while another holds it. The kernel lets go of it when the holder ends, however that is."""
        self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = os.open(self._directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(lock)
            raise Conflict(f"another agent uses {self._directory}", mend="stop it, or use another data directory") from None
        self._lock = lock

    def close(self) -> None:
        for descriptor in (self._journal, self._lock):
            if descriptor is not None:
                os.close(descriptor)
        self._journal = self._lock = None

    def load(self) -> list[Entry]:
        """Return every entry; a damaged one counts as absent, and its slot is then nobody's. Changes nothing."""
        self._entries, self._last, self._lines = {}, None, 0
        with contextlib.suppress(OSError, ValueError):
            self._last = int((self._directory / _LAST).read_text())
        for path in sorted(self._directory.glob("*.json")):  # of agents that had a file for each
            try:
                entry = codec.decode(path.read_bytes(), Entry)
            except (AtollError, OSError):
                continue
            self._entries[entry.number] = entry
        for line in self._read():
            self._lines += 1
            if line.entry is not None:
                self._entries[line.entry.number] = line.entry
            if line.gone is not None:
                self._entries.pop(line.gone, None)
            if line.last is not None:
                self._last = line.last
        return list(self._entries.values())

    def _read(self) -> Iterator[_Line]:
        try:
            text = (self._directory / JOURNAL).read_bytes()
        except OSError:
            return
        for line in text.splitlines():
            try:
                yield codec.decode(line, _Line)
            except AtollError:
                continue

    def compact(self) -> None:
        """Write down what counts and nothing else. Raises OSError, as for a full disk; then all is as it was."""
        lines = [_Line(entry=entry) for entry in self._entries.values()]
        if self._last is not None:
            lines.append(_Line(last=self._last))
        partial = self._directory / f".{JOURNAL}"
        partial.write_bytes(b"".join(codec.encode(line) + b"\n" for line in lines))
        partial.replace(self._directory / JOURNAL)
        for path in (*self._directory.glob("*.json"), self._directory / _LAST):
            path.unlink(missing_ok=True)
        if self._journal is not None:
            os.close(self._journal)
            self._journal = None
        self._lines = len(lines)
        self._behind = False

    def write(self, entries: Sequence[Entry], *, handed_out: bool = False) -> None:
        """Keep `entries` in place of any earlier ones of their slots; with `handed_out`, that they were given out in this order.

        Raises OSError, as for a full disk; then what was kept before stands.
        """
        lines = [_Line(entry=entry, last=entry.number if handed_out else None) for entry in entries]
        self._append(lines)
        self._entries.update({entry.number: entry for entry in entries})
        if handed_out and entries:
            self._last = entries[-1].number

    def last(self) -> int | None:
        """Return the number that was given out last; None where that is not known."""
        return self._last

    def remove(self, numbers: Sequence[int]) -> None:
        """Keep that nobody has these slots; on a full disk later, as what is written then names too many slots, never too few."""
        known = [number for number in numbers if number in self._entries]
        if not known:
            return
        for number in known:
            del self._entries[number]
        try:
            if self._behind or self._lines > LINES_SPARE + len(self._entries):
                self.compact()
            else:
                self._append([_Line(gone=number) for number in known])
        except OSError:
            self._behind = True

    def _append(self, lines: Sequence[_Line]) -> None:
        data = b"".join([codec.encode(line) + b"\n" for line in lines])
        if self._journal is None:
            self._journal = os.open(self._directory / JOURNAL, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
            self._size = os.fstat(self._journal).st_size
            if self._size and os.pread(self._journal, 1, self._size - 1) != b"\n":  # somebody could not write it to its end
                data = b"\n" + data
        try:
            if os.write(self._journal, data) != len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError:
            os.ftruncate(self._journal, self._size)
            raise
        self._size += len(data)
        self._lines += len(lines)
