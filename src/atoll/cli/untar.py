"""Unpacking a tar stream from somewhere else: nothing in it may lead out of the directory, nothing in it is trusted.

`tarfile`'s own filters would do, but the Python of Debian 12 does not have them yet.
"""

from __future__ import annotations

import os
import shutil
import tarfile
from pathlib import Path

from atoll.model.errors import Invalid

COPY_BYTES = 1 << 18
MODE_BITS = 0o777
"""What is taken of a file's mode: no setuid, no setgid, no sticky."""


def unpack(archive: tarfile.TarFile, directory: Path, *, top: str | None = None) -> int:
    """Unpack files, directories and links below `directory`, which exists; with `top`, the first part of each name is that.

    Return how many bytes are in the files.
    Owners are the caller's. Links are made as they are and never followed. Raises Invalid for a name that leads out and for
    devices and pipes; OSError, tarfile.TarError. What came before stays.
    """
    root, size = directory.resolve(), 0
    for member in archive:
        parts = _parts(member.name)
        if top is not None and parts:
            parts[0] = top
        if not parts:
            continue  # the directory itself
        target = root.joinpath(*parts)
        _inside(root, target.parent, member.name)
        if member.isdir():
            if target.is_symlink():
                target.unlink()
            target.mkdir(mode=0o755, exist_ok=True)
            continue
        if target.is_symlink() or (target.exists() and not target.is_dir()):
            target.unlink()
        if member.isreg():
            _write(archive, member, target)
            size += member.size
        elif member.issym():
            target.symlink_to(member.linkname)
        elif member.islnk():
            linked = _parts(member.linkname)
            if top is not None and linked:
                linked[0] = top
            source = root.joinpath(*linked)
            _inside(root, source.parent, member.linkname)
            os.link(source, target, follow_symlinks=False)
        else:
            raise Invalid(f"{member.name}: neither file, directory nor link; it is not unpacked here")
    return size


def _parts(name: str) -> list[str]:
    parts = [part for part in name.split("/") if part not in ("", ".")]
    if ".." in parts or "\0" in name:
        raise Invalid(f"{name!r} leads out of the directory; it is not unpacked here")
    return parts


def _inside(root: Path, parent: Path, name: str) -> None:
    """Make `parent`, unless a link on the way to it leads out of `root`."""
    there = parent
    while not there.exists():
        there = there.parent
    if not there.resolve().is_relative_to(root):
        raise Invalid(f"{name!r} leads out of the directory through a link; it is not unpacked here")
    parent.mkdir(parents=True, exist_ok=True)


def _write(archive: tarfile.TarFile, member: tarfile.TarInfo, target: Path) -> None:
    content = archive.extractfile(member)
    descriptor = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        if content is not None:
            shutil.copyfileobj(content, file, COPY_BYTES)
        os.fchmod(descriptor, member.mode & MODE_BITS)
    os.utime(target, (member.mtime, member.mtime))
