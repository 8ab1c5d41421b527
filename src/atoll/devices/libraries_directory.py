"""A driver's libraries as one directory that is mounted whole, where each would be a mount of its own: some thirty per start.

The directory holds hard links to the node's files, so that nothing is copied, and a new driver makes another one. What an
instance has mounted is never touched: a directory goes only while no instance holds a device.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import stat
import tempfile
from pathlib import Path

import structlog
from msgspec.structs import replace

from atoll.model.ports.devices import Edits, FileMount

USUAL = FileMount("", "").options
DIRECTORIES_MAX = 16
"""Of different drivers and capabilities; what is wanted beyond them is mounted file by file."""

log = structlog.get_logger()


class LibraryDirectories:
    """Made below `directory`, which must lie on the file system of the libraries to be of use."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._told = False

    def gather(self, edits: Edits) -> Edits:
        """Return `edits` with the files and links of each library directory as one mount; as they are where that cannot be made.

        Blocks, for a few hundred microseconds unless a directory is made. Raises nothing.
        """
        for target in edits.library_directories:
            edits = self._gathered(edits, target)
        return edits

    def clear(self) -> None:
        """Remove what was made; for when no instance holds a device."""
        shutil.rmtree(self._directory, ignore_errors=True)

    def _gathered(self, edits: Edits, target: str) -> Edits:
        inside = f"{target.rstrip('/')}/"
        below = [entry for entry in edits.mounts if entry.target.startswith(inside)]
        files = [entry for entry in below if "/" not in entry.target[len(inside) :] and entry.options == USUAL]
        links = [pair for pair in edits.links if pair[0].startswith(inside) and "/" not in pair[0][len(inside) :]]
        if len(files) < 2 or len(files) < len(below):
            return edits
        try:
            wanted = {entry.target[len(inside) :]: entry.source for entry in files}
            made = self._made(wanted, {path[len(inside) :]: goal for path, goal in links})
        except OSError as error:
            if not self._told:
                self._told = True
                log.info("libraries are mounted one by one", directory=target, why=str(error))
            return edits
        gone, unlinked = set(files), set(links)
        mounts = (*(entry for entry in edits.mounts if entry not in gone), FileMount(str(made), target))
        return replace(edits, mounts=mounts, links=tuple(link for link in edits.links if link not in unlinked))

    def _made(self, files: dict[str, str], links: dict[str, str]) -> Path:
        key = hashlib.sha256()
        for name, source in sorted(files.items()):
            found = os.stat(source)  # noqa: PTH116 - thirty of them at every start
            if not stat.S_ISREG(found.st_mode):
                raise OSError(f"{source} is no plain file")
            key.update(f"{name}\0{found.st_dev}\0{found.st_ino}\0{found.st_mtime_ns}\0{found.st_size}\0".encode())
        key.update(repr(sorted(links.items())).encode())
        path = self._directory / key.hexdigest()[:32]
        if path.is_dir():
            return path
        self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        if len(list(self._directory.iterdir())) >= DIRECTORIES_MAX:
            raise OSError(f"there are {DIRECTORIES_MAX} directories already")
        made = Path(tempfile.mkdtemp(prefix=".new-", dir=self._directory))
        try:
            for name, source in files.items():
                os.link(Path(source).resolve(strict=True), made / name)
            for name, goal in links.items():
                (made / name).symlink_to(goal)
            made.chmod(0o755)
            made.rename(path)
        except OSError:
            shutil.rmtree(made, ignore_errors=True)
            raise
        return path
