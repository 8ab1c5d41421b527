"""A directory tree as a layer's entries, in a fixed order and with nothing in them that differs between machines."""

from __future__ import annotations

import contextlib
import os
import stat
import tarfile
from pathlib import Path

from atoll.images.entries import XATTRS_KEPT
from atoll.images.layer import LayerWriter

EPOCH = 1_700_000_000
"""The time that everything made during a build carries (2023-11-14T22:13:20Z)."""
CREATED = "2023-11-14T22:13:20Z"
_KINDS = (
    (stat.S_ISREG, tarfile.REGTYPE),
    (stat.S_ISDIR, tarfile.DIRTYPE),
    (stat.S_ISLNK, tarfile.SYMTYPE),
    (stat.S_ISFIFO, tarfile.FIFOTYPE),
    (stat.S_ISCHR, tarfile.CHRTYPE),
    (stat.S_ISBLK, tarfile.BLKTYPE),
)


def add_tree(writer: LayerWriter, root: Path) -> None:
    """Add all below `root`, sorted by name; every time is `EPOCH`. Blocks for long."""
    linked: dict[tuple[int, int], str] = {}
    base = os.fsencode(root)
    pending = [b""]
    while pending:
        path = pending.pop()
        absolute = base + b"/" + path if path else base
        found = os.lstat(absolute)
        if path:
            _add(writer, absolute, path, found, linked)
        if stat.S_ISDIR(found.st_mode):
            children = sorted(os.listdir(absolute), reverse=True)  # noqa: PTH208 (names here are bytes)
            pending.extend(path + b"/" + name if path else name for name in children)


def _add(writer: LayerWriter, absolute: bytes, path: bytes, found: os.stat_result, linked: dict[tuple[int, int], str]) -> None:
    kind = next((kind for test, kind in _KINDS if test(found.st_mode)), None)
    if kind is None:  # a socket means nothing in an image
        return
    name, link = os.fsdecode(path), ""
    if kind == tarfile.SYMTYPE:
        link = os.fsdecode(os.readlink(absolute))  # noqa: PTH115 (names here are bytes)
    elif kind == tarfile.REGTYPE and found.st_nlink > 1:
        link = linked.setdefault((found.st_dev, found.st_ino), name)
        kind, link = (kind, "") if link == name else (tarfile.LNKTYPE, link)
    plain = kind == tarfile.REGTYPE
    with open(absolute, "rb") if plain else contextlib.nullcontext() as content:
        writer.add(
            name,
            kind,
            mode=found.st_mode,
            uid=found.st_uid,
            gid=found.st_gid,
            size=found.st_size if plain else 0,
            content=content,
            link=link,
            device=(os.major(found.st_rdev), os.minor(found.st_rdev)),
            mtime=EPOCH,
            xattrs=_xattrs(absolute) if plain else None,
        )


def _xattrs(path: bytes) -> dict[str, str]:
    return {
        name: os.getxattr(path, name).decode("utf-8", "surrogateescape")
        for name in os.listxattr(path, follow_symlinks=False)
        if name.startswith(XATTRS_KEPT)
    }
