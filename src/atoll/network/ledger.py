"""Which instance has which slot: one small file each, written before the slot is handed out.

The kernel's state and these files end together with the machine, so that nothing here waits for a disk.
"""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

from msgspec import Struct

from atoll.model import codec
from atoll.model.errors import AtollError, Conflict
from atoll.model.spec import NetworkRules, Port

_LAST = "last"


class Entry(Struct, frozen=True, kw_only=True):
    id: str
    project: str
    number: int
    ports: tuple[Port, ...] = ()
    rules: NetworkRules | None = None


class Ledger:
    """The entries of one data directory, which one process at a time may hold open."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._lock: int | None = None

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
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def load(self) -> list[Entry]:
        """Return every entry; a damaged one counts as absent, and its slot is then nobody's."""
        entries = []
        for path in sorted(self._directory.iterdir()):
            if path.name == _LAST:
                continue
            try:
                entries.append(codec.decode(path.read_bytes(), Entry))
            except (AtollError, OSError):
                path.unlink(missing_ok=True)
        return entries

    def write(self, entry: Entry) -> None:
        """Keep `entry` in place of any earlier one of its slot. Raises OSError, as for a full disk; then the old one stands."""
        partial = self._directory / f".{entry.number}"
        partial.write_bytes(codec.encode(entry))
        partial.replace(self._directory / f"{entry.number}.json")

    def handed_out(self, number: int) -> None:
        """Keep that `number` was given out last. Raises OSError."""
        partial = self._directory.with_name(f"{self._directory.name}.{_LAST}")
        partial.write_text(str(number))
        partial.replace(self._directory / _LAST)

    def last(self) -> int | None:
        """Return the number that was given out last; None where that is not known."""
        try:
            return int((self._directory / _LAST).read_text())
        except (OSError, ValueError):
            return None

    def remove(self, number: int) -> None:
        (self._directory / f"{number}.json").unlink(missing_ok=True)
