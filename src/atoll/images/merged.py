"""The layers of an image as one plain directory, without a mount: files are hard links to the layers' own.

So what is shown at many places, by every runtime and under whatever ids, is on the disk and in the page cache once.
"""

from __future__ import annotations

import errno
import os
import shutil
import stat
from collections.abc import Sequence
from pathlib import Path

from atoll.images.entries import OPAQUE_ATTRIBUTE
from atoll.images.kept import KEPT_BYTES_MAX, Kept


def merge(layers: Sequence[Path], target: Path, *, kept_bytes_max: int = KEPT_BYTES_MAX) -> None:
    """Make `target` show `layers` (lowest first, in overlayfs' own form) as overlayfs would. Blocks for long.

    It must lie on the file system of the layers. Raises OSError, ImageError (too many directories); `target` is then half-made.
    """
    target.mkdir(mode=0o755)
    kept, times = Kept(kept_bytes_max), dict[str, tuple[int, int]]()
    for layer in layers:
        pending = [(str(layer), str(target))]
        while pending:
            source, shown = pending.pop()
            times[shown] = _describe(source, shown)
            with os.scandir(source) as entries:
                for entry in entries:
                    if (pair := _show(entry, f"{shown}/{entry.name}")) is not None:
                        if pair[1] not in times:
                            kept.add(pair[1])
                        pending.append(pair)
    # Last, since each entry that is made in a directory changes its time; and only where a directory is still one, since
    # a file or link in its place belongs to a layer.
    for directory, _, _ in os.walk(target):
        if (moment := times.get(directory)) is not None:
            os.utime(directory, ns=moment)


def _show(entry: os.DirEntry[str], shown: str) -> tuple[str, str] | None:
    """Show one entry of a layer; return the pair of directories to go on with if it is one."""
    found = entry.stat(follow_symlinks=False)
    if stat.S_ISDIR(found.st_mode):
        if _is_opaque(entry.path) or not _is_directory(shown):
            _remove(shown)
            Path(shown).mkdir(mode=0o700)
        return entry.path, shown
    _remove(shown)
    if not (stat.S_ISCHR(found.st_mode) and found.st_rdev == 0):  # a white-out
        os.link(entry.path, shown, follow_symlinks=False)
    return None


def _describe(source: str, shown: str) -> tuple[int, int]:
    """Give a directory owner and mode of the layer's; return the times that it must have in the end."""
    found = os.lstat(source)
    os.chown(shown, found.st_uid, found.st_gid)
    Path(shown).chmod(stat.S_IMODE(found.st_mode))
    return found.st_atime_ns, found.st_mtime_ns


def _is_directory(path: str) -> bool:
    try:
        return stat.S_ISDIR(os.lstat(path).st_mode)
    except FileNotFoundError:
        return False


def _is_opaque(path: str) -> bool:
    try:
        return os.getxattr(path, OPAQUE_ATTRIBUTE, follow_symlinks=False) == b"y"
    except OSError as error:
        if error.errno in (errno.ENODATA, errno.ENOTSUP):
            return False
        raise


def _remove(path: str) -> None:
    if _is_directory(path):
        shutil.rmtree(path)
    else:
        Path(path).unlink(missing_ok=True)
