"""Copying files out of and into an instance as a tar stream: its bounds, its names, and what does it where the node cannot."""

from __future__ import annotations

from typing import Protocol

from atoll.model.errors import Invalid

COPY_BYTES_MAX = 16 << 30
"""In one copy."""
ENTRIES_MAX = 1_000_000
DEPTH_MAX = 200
"""Directories below each other; each costs a descriptor."""
PART_BYTES = 64 << 10


class Sink(Protocol):
    def write(self, data: bytes, /) -> object: ...


class Source(Protocol):
    def read(self, size: int, /) -> bytes: ...


class Copier(Protocol):
    """Copies where the node cannot reach the instance's files itself. Both calls block: make them from a thread.

    They raise OSError for what the instance's file system says, and AtollErrors as `node/files.py` does.
    """

    def pack(self, path: str, sink: Sink) -> None:
        """Write `path` (a link there is followed) and all below it as a tar stream whose only top name is its last part."""
        ...

    def unpack(self, path: str, source: Source) -> None:
        """Unpack a tar stream into the directory `path`, which is made if need be. What was unpacked before an error stays."""
        ...


def top_of(path: str) -> str:
    """Return the name that a copy of `path` has."""
    return path.rstrip("/").rpartition("/")[2] or "."


def parts_of(name: str) -> list[str]:
    """Return the parts of a member's name. Raises Invalid for one that leads out of where it is unpacked."""
    parts = [part for part in name.split("/") if part not in ("", ".")]
    if ".." in parts or "\0" in name:
        raise Invalid(f"{name!r} leads out of the directory that it is to be unpacked in")
    return parts
