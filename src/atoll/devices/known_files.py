"""Which files of the driver a node has, looked for again only when something has changed where they can be.

To look takes milliseconds of every start: some ten libraries, each in some twenty places, and the linker's cache. A file that
comes, goes or takes another's place changes its directory; a file that is written to in place keeps its name and version, and
whoever shows it goes by the file itself.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Collection, Iterable
from pathlib import Path

from msgspec import Struct

from atoll.devices.libraries import (
    BINARY_DIRECTORIES,
    DATA_DIRECTORIES,
    DATA_FILES,
    DIRECTORIES,
    DriverFiles,
    driver_files,
    kernel_driver_version,
)
from atoll.model.spec import GpuCapability

KEPT_MAX = 16
"""Of different classes asked for; beyond it the longest kept goes."""
SETTLED_S = 2.0
"""What changed within this time may change again without a trace: a file system tells times in ticks of milliseconds."""

_PLACES = tuple(
    dict.fromkeys(
        (
            "etc/ld.so.cache",
            *DIRECTORIES,
            *BINARY_DIRECTORIES,
            *(f"{directory}/{name.rpartition('/')[0]}" for directory in DATA_DIRECTORIES for name in DATA_FILES),
        )
    )
)
Seen = tuple[tuple[int, int, int] | None, ...]
"""Device, inode and time of change of each place; None where there is nothing."""


class _Kept(Struct, frozen=True):
    version: str
    places: tuple[str, ...]
    seen: Seen
    files: DriverFiles


class KnownFiles:
    """`now` tells seconds since the epoch, as the node's file systems do."""

    def __init__(self, now: Callable[[], float] = time.time) -> None:
        self._now = now
        self._kept: dict[tuple[frozenset[GpuCapability], Path], _Kept] = {}

    def find(self, capabilities: Collection[GpuCapability], root: Path = Path("/")) -> DriverFiles:
        """As `driver_files`, and with its errors; what is found wanting is never remembered."""
        key = frozenset(capabilities), root
        version = kernel_driver_version(root)
        kept = self._kept.get(key)
        if kept is not None and kept.version == version and _look(kept.places) == kept.seen:
            return kept.files
        self._kept.pop(key, None)
        settled_ns = int((self._now() - SETTLED_S) * 1e9)
        files = driver_files(capabilities, root)
        places = _places(root, files)
        seen = _look(places)
        if files.version == version and all(place is None or place[2] < settled_ns for place in seen):
            if len(self._kept) >= KEPT_MAX:
                del self._kept[next(iter(self._kept))]
            self._kept[key] = _Kept(version, places, seen, files)
        return files


def _places(root: Path, files: DriverFiles) -> tuple[str, ...]:
    found = (mount.source.rpartition("/")[0].lstrip("/") for mount in files.mounts)
    return tuple(os.path.join(root, place) for place in dict.fromkeys((*_PLACES, *found)))  # noqa: PTH118 - for speed


def _look(places: Iterable[str]) -> Seen:
    return tuple(map(_seen, places))


def _seen(place: str) -> tuple[int, int, int] | None:
    try:
        found = os.stat(place)  # noqa: PTH116 - for speed
    except OSError:
        return None
    return found.st_dev, found.st_ino, found.st_ctime_ns
