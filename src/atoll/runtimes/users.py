"""Who a process runs as: an image's `user` resolved against the image's own /etc/passwd and /etc/group.

Those files are the tenant's: they are opened below the root without leaving it, read up to a bound, and odd lines are skipped.
"""

from __future__ import annotations

import os
import stat

from msgspec import Struct

from atoll.model.errors import ImageError
from atoll.runtimes.mounts import descriptor, open_beneath

FILE_BYTES_MAX = 4 << 20
GROUPS_MAX = 256
ID_MAX = 65_535
"""Ids above it do not exist inside an instance."""


class User(Struct, frozen=True):
    uid: int
    gid: int
    groups: tuple[int, ...] = ()
    home: str = "/"


def resolve_user(root: int, user: str) -> User:
    """Return who `user` (`""`, `"1000"`, `"app"`, `"app:staff"`, `"1000:1000"`) is in the root directory `root`.

    Raises ImageError, naming the user, where a name is not in the image's files.
    """
    name, _, group = user.partition(":")
    name = name or "0"
    accounts = _lines(root, "etc/passwd", 7)
    found = next((line for line in accounts if line[0] == name or (name.isdecimal() and line[2] == name)), None)
    uid, gid, home, login = _account(name, found)
    groups = _lines(root, "etc/group", 4) if group or login else []
    extra: tuple[int, ...] = ()
    if group:
        gid = _group(group, groups)
    elif login:
        members = (int(line[2]) for line in groups if line[2].isdecimal() and login in line[3].split(","))
        extra = tuple(dict.fromkeys(number for number in members if number <= ID_MAX and number != gid))[:GROUPS_MAX]
    if uid > ID_MAX or gid > ID_MAX:
        raise ImageError(f"user {user!r} has an id over {ID_MAX}", mend="use an id up to 65535", field="user")
    return User(uid, gid, extra, home)


def _account(name: str, found: list[str] | None) -> tuple[int, int, str, str]:
    if found is not None and found[2].isdecimal() and found[3].isdecimal():
        return int(found[2]), int(found[3]), found[5] or "/", found[0]
    if name.isdecimal():
        return int(name), 0, "/root" if int(name) == 0 else "/", ""
    raise ImageError(
        f"no user {name!r} in the image's /etc/passwd", mend="give a number, or a user that the image has", field="user"
    )


def _group(group: str, groups: list[list[str]]) -> int:
    for line in groups:
        if line[0] == group and line[2].isdecimal():
            return int(line[2])
    if group.isdecimal():
        return int(group)
    raise ImageError(
        f"no group {group!r} in the image's /etc/group", mend="give a number, or a group that the image has", field="user"
    )


def _lines(root: int, path: str, fields: int) -> list[list[str]]:
    try:
        fd = open_beneath(root, path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY)
    except OSError:
        return []
    with descriptor(fd):
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            return []
        text = os.read(fd, FILE_BYTES_MAX).decode(errors="replace")
    split = (line.strip().split(":") for line in text.splitlines() if not line.startswith("#"))
    return [line for line in split if len(line) >= fields]
