"""The node's snapshots: each in a directory named by what it holds, the longest unused removed when there are too many.

    SNAPSHOTS/PROJECT/HEX/      a whole one, and in `of` what it was taken of
              PROJECT/.ID.next/ one that is being written
Blocking: call it from threads, `place` excepted.
"""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

from atoll.model.errors import AtollError, Invalid, NotFound
from atoll.model.spec import SNAPSHOT_DIGEST
from atoll.model.streams import SnapshotView
from atoll.runtimes.snapshots import load

SNAPSHOTS_MAX = 32
"""Kept on a node, of all projects."""
_OF = "of"
_OF_BYTES_MAX = 256


class Snapshots:
    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def place(self, project: str, instance: str) -> Path:
        """Return where a snapshot of an instance is written until it is whole. What an earlier agent left there is removed."""
        path = self._directory / project / f".{instance}.next"
        shutil.rmtree(path, ignore_errors=True)
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        return path

    def keep(self, project: str, digest: str, written: Path, of: str = "") -> None:
        """Take in a whole snapshot; one that holds the same is kept in its stead."""
        place = self._path(project, digest)
        (written / _OF).write_text(of)
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

    def all(self, project: str, node: str) -> list[SnapshotView]:
        """Return a project's snapshots, those used last first. What cannot be read is left out: nothing can go on from it."""
        found = []
        for path in (self._directory / project).glob("[0-9a-f]*"):
            try:
                snapshot, used_at = load(path), path.stat().st_mtime
                of = (path / _OF).read_bytes()[:_OF_BYTES_MAX].decode(errors="replace") if (path / _OF).exists() else ""
            except (AtollError, OSError):
                continue
            found.append(
                SnapshotView(
                    digest=snapshot.digest,
                    node=node,
                    runtime=snapshot.compatibility.runtime,
                    stored_bytes=snapshot.stored_bytes,
                    taken_at=snapshot.taken_at,
                    of=of,
                    used_at=used_at,
                )
            )
        return sorted(found, key=lambda view: -view.used_at)

    def remove(self, project: str, digest: str) -> None:
        """Remove one; what has gone on from it goes on. Raises NotFound, Invalid."""
        path = self._path(project, digest)
        if not path.is_dir():
            raise NotFound(f"this node has no snapshot {digest[:19]} of project '{project}'", field="digest")
        # Out of sight at once: half of it must not be found by who goes on from it.
        gone = path.with_name(f".{path.name}.gone")
        shutil.rmtree(gone, ignore_errors=True)
        path.rename(gone)
        shutil.rmtree(gone, ignore_errors=True)

    def _path(self, project: str, digest: str) -> Path:
        if re.match(SNAPSHOT_DIGEST, digest) is None or digest.endswith("\n"):
            mend = "'atoll sandbox snapshots' lists them"
            raise Invalid(f"{digest[:80]!r} is no digest of a snapshot", field="digest", mend=mend)
        return self._directory / project / digest.removeprefix("sha256:")

    def _collect(self) -> None:
        for path in self._directory.glob("*/.*.gone"):  # of an agent that ended while it removed one
            shutil.rmtree(path, ignore_errors=True)
        found = [path for path in self._directory.glob("*/*") if not path.name.startswith(".")]
        for path in sorted(found, key=lambda path: path.stat().st_mtime, reverse=True)[SNAPSHOTS_MAX:]:
            shutil.rmtree(path, ignore_errors=True)
