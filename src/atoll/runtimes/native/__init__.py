"""The small C program that parents containers and brings processes into them, and where to find it."""

from __future__ import annotations

import os
from pathlib import Path

from atoll.model.errors import Unsupported

SOURCE = Path(__file__).with_name("shim.c")
SOURCES = ("shim.c", "inside.c", "shim.h")
_BINARY = Path(__file__).with_name("atoll-shim")


def shim_path(binary: Path = _BINARY) -> Path:
    """Return the shim's path. Raises Unsupported, with the command that builds it, where it is missing or stale."""
    mend = f"run `make -C {SOURCE.parent}` (it needs gcc and make)"
    if not os.access(binary, os.X_OK):
        raise Unsupported("the native shim is not built", mend=mend)
    sources = (SOURCE.with_name(name) for name in SOURCES)
    if any(source.exists() and source.stat().st_mtime > binary.stat().st_mtime for source in sources):
        raise Unsupported("the native shim is older than its source", mend=mend)
    return binary


def guest_path(binary: Path = SOURCE.parent / "guest/atoll-guest") -> Path:
    """Return the path of the guest's init. Raises Unsupported, with the command that builds it, where it is missing or stale."""
    mend = f"run `make -C {binary.parent}` (it needs gcc and make)"
    if not os.access(binary, os.X_OK):
        raise Unsupported("the guest's init is not built", mend=mend)
    if any(source.stat().st_mtime > binary.stat().st_mtime for source in binary.parent.glob("*.[ch]")):
        raise Unsupported("the guest's init is older than its source", mend=mend)
    return binary


def jail_path(binary: Path = SOURCE.with_name("atoll-jail")) -> Path:
    """Return the path of the program that puts monitors in jail. Raises Unsupported, with the command that builds it."""
    mend = f"run `make -C {SOURCE.parent}` (it needs gcc and make)"
    if not os.access(binary, os.X_OK):
        raise Unsupported("the native jail is not built", mend=mend)
    source = SOURCE.with_name("jail.c")
    if source.exists() and source.stat().st_mtime > binary.stat().st_mtime:
        raise Unsupported("the native jail is older than its source", mend=mend)
    return binary
