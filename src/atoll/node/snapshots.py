"""The node's snapshots: each in a directory named by what it holds, the longest unused removed when there are too many.

    SNAPSHOTS/PROJECT/HEX/      a whole one      SNAPSHOTS/PROJECT/.ID.next/      one that is being written
Blocking: call it from threads, `place` excepted.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from atoll.model.errors import NotFound

SNAPSHOTS_MAX = 32
"""Kept on a node, of all projects."""


class Snapshots:
    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def place(self, project: str, instance: str) -> Path:
        """Return where a snapshot of an instance is written until it is whole. What an earlier agent left there is removed."""
        path = self._directory / project / f".{instance}.next"
        shutil.rmtree(path, ignore_errors=True)
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        return path

    def keep(self, project: str, digest: str, written: Path) -> None:
        """Take in a whole snapshot; one that holds the same is kept in its stead."""
        place = self._path(project, digest)
        try:
            written.rename(place)
        except OSError:  # it is there already
            shutil.rmtree(written, ignore_errors=True)
        os.utime(place)
        self._collect()

    def find(self, project: str, digest: str) -> Path:
        """Return a snapshot's directory; it is then the last that goes. Raises NotFound."""
        path = self._path(project, digest)
        try:
            os.utime(path)
        except OSError:
            raise NotFound(
                f"this node has no snapshot {digest[:19]} of project '{project}'",
                mend="it was taken elsewhere, or is gone: take another",
            ) from None
        return path

    def _path(self, project: str, digest: str) -> Path:
        return self._directory / project / digest.removeprefix("sha256:")

    def _collect(self) -> None:
        found = [path for path in self._directory.glob("*/*") if not path.name.startswith(".")]
        for path in sorted(found, key=lambda path: path.stat().st_mtime, reverse=True)[SNAPSHOTS_MAX:]:
            shutil.rmtree(path, ignore_errors=True)
