"""What a runtime remembers of each box on disk, so that the next agent can adopt it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from msgspec import Struct

from atoll.model.codec import decode, encode
from atoll.model.errors import Invalid
from atoll.model.ports.runtime import Limits

_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,127}")


class BoxRecord(Struct, frozen=True, kw_only=True):
    """Written before anything else of a box is made, and removed after all else is gone."""

    id: str
    path: str
    """The box's directory."""
    boot_id: str
    slot: int | None
    """Its range of user ids; None without a user namespace."""
    disk: str
    """The name of its scratch disk."""
    limits: Limits

    @property
    def directory(self) -> Path:
        return Path(self.path)


class BoxRecords:
    """The records of one runtime, a file each."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def exists(self, id: str) -> bool:
        return self._path(id).exists()

    def write(self, record: BoxRecord) -> None:
        """Safe against a crash of the agent; after one of the machine nothing that it describes runs, so it is not synced."""
        self._directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        path = self._path(record.id)
        partial = path.with_suffix(".next")
        partial.write_bytes(encode(record))
        partial.rename(path)

    def read(self, id: str) -> BoxRecord | None:
        """Return None when there is none. Raises Invalid for a damaged one."""
        try:
            return decode(self._path(id).read_bytes(), BoxRecord)
        except FileNotFoundError:
            return None

    def ids(self) -> Iterator[str]:
        if self._directory.is_dir():
            yield from sorted(path.stem for path in self._directory.glob("*.json"))

    def remove(self, id: str) -> None:
        self._path(id).unlink(missing_ok=True)

    def _path(self, id: str) -> Path:
        return self._directory / f"{check_id(id)}.json"


def check_id(id: str) -> str:
    """Return `id` if it can name a file and a control group. Raises Invalid."""
    if not _ID.fullmatch(id):
        raise Invalid(f"{id!r} cannot name an instance", field="id")
    return id


def boot_id() -> str:
    """Return what changes with every start of the machine."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
