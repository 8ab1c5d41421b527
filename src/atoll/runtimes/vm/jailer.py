"""Firecracker's own jailer: the command that puts a monitor into its jail, and what must lie there before.

Firecracker documentation: jailer. The jail is BASE/EXECUTABLE/ID/root: a directory of the node that becomes the monitor's whole
file system, so what the machine is made of is linked into it.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

from msgspec import Struct

ID_MAX = 64


class Jailer(Struct, frozen=True, kw_only=True):
    """All that one jail is made from. `cgroups` are (file, value) for the jailer to write in a group that it makes itself."""

    jailer: Path
    executable: Path
    """Its name must contain `firecracker`: the jailer insists."""
    id: str
    uid: int
    base: Path
    cgroup_version: int
    parent_cgroup: str = ""
    """With cgroup v2 and no `cgroups`, the group that the monitor goes into."""
    cgroups: tuple[tuple[str, str], ...] = ()
    netns: Path | None = None
    file_bytes: int = 0
    open_files: int = 2048
    daemonize: bool = False

    @property
    def root(self) -> Path:
        """Where the jail is on the node."""
        return self.base / self.executable.name / self.id / "root"

    @property
    def pid_file(self) -> Path:
        """Where the jailer writes the monitor's id: it runs in processes of its own."""
        return self.root / f"{self.executable.name}.pid"


def jail_id(id: str) -> str:
    """Return `id` as the jailer takes it: letters, digits and hyphens, at most ID_MAX. It is unique in its `base` only."""
    return re.sub("[^A-Za-z0-9-]", "-", id)[:ID_MAX]


def jailer_command(jail: Jailer, arguments: Sequence[str]) -> list[str]:
    """Return the jailer's command; `arguments` are Firecracker's own, with paths of the jail."""
    line = [str(jail.jailer), "--id", jail.id, "--exec-file", str(jail.executable), "--uid", str(jail.uid), "--gid", str(jail.uid)]
    line += ["--chroot-base-dir", str(jail.base), "--cgroup-version", str(jail.cgroup_version)]
    if jail.parent_cgroup:
        line += ["--parent-cgroup", jail.parent_cgroup.strip("/")]
    for name, value in jail.cgroups:
        line += ["--cgroup", f"{name}={value}"]
    if jail.netns is not None:
        line += ["--netns", str(jail.netns)]
    line += ["--resource-limit", f"no-file={jail.open_files}"]
    if jail.file_bytes:
        line += ["--resource-limit", f"fsize={jail.file_bytes}"]
    if jail.daemonize:
        line += ["--daemonize"]
    return [*line, "--new-pid-ns", "--", *arguments]


def furnish(root: Path, files: Sequence[tuple[Path, str]]) -> None:
    """Put each (file, name) into the jail, by a link where both are on one file system. Safe to repeat. Blocking. Raises OSError.

    The links' files stay their owner's: the monitor may remove its names for them, and write to what it owns.
    """
    root.mkdir(parents=True, exist_ok=True, mode=0o755)
    for source, name in files:
        place = root / name
        place.unlink(missing_ok=True)
        try:
            os.link(source, place)
        except OSError as error:
            if error.errno not in {errno.EXDEV, errno.EMLINK}:
                raise
            shutil.copyfile(source, place)
            place.chmod(0o644)
