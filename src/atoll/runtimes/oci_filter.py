"""Processes of runc and crun that put on their system call filter themselves, so that no tool compiles it at every start and exec.

libseccomp in the tool takes some 8 ms for each architecture. Instead it compiles a profile once per agent (`seccomp_program.py`),
and a process begins as the shim's `filter` (`native/inside.c`), which puts the program on and becomes the command. Its file is in
memory, sealed, and may be executed but not read: the kernel then lets no process beside it trace it or look into it, so that
nothing of the tenant's ever runs, or has another run, without the filter. That holds only where the instance has user ids of its
own, since its root is nobody to the file, and where /proc, by which the tool reaches the file, is sure to be the kernel's; the tool
compiles the profile as ever elsewhere.
"""

from __future__ import annotations

import fcntl
import os
import stat
import struct
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import msgspec
import structlog

from atoll.model.errors import AtollError, RuntimeFailed
from atoll.runtimes.inside import process_file
from atoll.runtimes.mounts import descriptor
from atoll.runtimes.native import shim_path
from atoll.runtimes.oci import CAPABILITIES
from atoll.runtimes.seccomp_program import filter_program

BUNDLE = "bundle"
"""In the box's directory: what the tool is given in the place of it."""
PRESERVE = ("--preserve-fds", "3")
"""The program, what it reads, and the pipe on which it tells."""
_ARGS = ("/proc/self/fd/3", "filter")
_ABOVE = 16
"""Descriptors from here on are in nobody's way when some are put where a new process expects them."""
_MFD_EXEC = 0x10
_SEALS = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE
_DUMPABLE_ALL = "1"
_PT_INTERP = 3
_KERNEL_DIRECTORIES = ("proc", "dev", "sys")

log = structlog.get_logger()


class Filter:
    """Made by `open_filter`. One per set of boxes; `close` it after the last start."""

    def __init__(self, program: int) -> None:
        self._program = program

    def bundle(self, config: dict[str, Any]) -> dict[str, Any]:
        """Return the tool's configuration in the place of `config`, of which all holds but what the process begins as."""
        linux = {name: value for name, value in config["linux"].items() if name != "seccomp"}
        return {**config, "process": self.process(config["process"]), "linux": linux}

    def process(self, process: dict[str, Any]) -> dict[str, Any]:
        """Return `process` as the tool is to start it, without variables: an image's could change what our program does."""
        return {**process, "args": list(_ARGS), "env": []}

    @contextmanager
    def handed(self, process: dict[str, Any]) -> Iterator[Sequence[int]]:
        """Give the descriptors for `Launch` with which a process becomes `process`; they hold its environment, and close after it.

        Raises Unsupported, RuntimeFailed where there is no filter for it. Blocking the first time that an agent needs a profile.
        """
        filter = filter_program(frozenset(process["capabilities"].get("bounding", ())))
        with descriptor(sealed("process", process_file(process, filter, make_directory=False))) as words:
            yield self._program, words

    def close(self) -> None:
        if self._program >= 0:
            os.close(self._program)
            self._program = -1


def open_filter(shim: Path | None = None, suid_dumpable: Path = Path("/proc/sys/fs/suid_dumpable")) -> Filter | None:
    """Return what puts filters on; None where a tool has to, for want of libseccomp or of a program that is safe from the tenant.

    Blocking: a profile is compiled.
    """
    try:
        filter_program(frozenset(CAPABILITIES))
        data = (shim or shim_path()).read_bytes()
        if not _linked_statically(data):
            raise OSError("the shim is not linked statically: the image's loader would run before the filter")
        if suid_dumpable.read_text().strip() == _DUMPABLE_ALL:
            raise OSError("fs.suid_dumpable is 1: a process could be traced before it has its filter")
        return Filter(sealed("atoll-filter", data, mode=0o111))
    except (AtollError, OSError) as error:
        log.info("filter.by.tool", reason=str(error))
        return None


@contextmanager
def handed(directory: Path, filter: Filter | None, process: dict[str, Any]) -> Iterator[Sequence[int]]:
    """Give the descriptors for `Launch` to start `process` in the box in `directory`: none where the tool puts the filter on.

    Raises Unsupported, RuntimeFailed where the box relies on a filter that cannot be had: without it nothing may be started there.
    """
    if not has_bundle(directory):
        yield ()
    elif filter is None:
        raise RuntimeFailed("the instance's filter cannot be put on by this agent", mend="apt-get install libseccomp2")
    else:
        with filter.handed(process) as given:
            yield given


def is_reached(root: Path, mounts: Sequence[dict[str, Any]], volumes: Iterable[str]) -> bool:
    """Return whether nothing of a tenant's can be at the path of our program in the instance with the root directory `root`.

    `mounts` are those that the tool makes, `volumes` where the tenant's are. Under a volume that the tool mounts, or where a link
    of the image's leads its mounts, a tenant's file could be what is started, without a filter.
    """
    if {entry["destination"] for entry in mounts}.intersection(volumes):
        return False
    device = root.stat().st_dev
    for name in _KERNEL_DIRECTORIES:
        with suppress(FileNotFoundError):  # the tool makes it
            found = (root / name).lstat()
            if not stat.S_ISDIR(found.st_mode) or found.st_dev != device:
                return False
    return True


def has_bundle(directory: Path) -> bool:
    """Return whether the box in `directory` was made with a `Filter`, and not for a tool that puts filters on."""
    return (directory / BUNDLE).is_dir()


def write_bundle(directory: Path, config: dict[str, Any]) -> None:
    """Write what the tool is configured by, for root only."""
    (directory / BUNDLE).mkdir(mode=0o700)
    (directory / BUNDLE / "config.json").write_bytes(msgspec.json.encode(config))


def sealed(name: str, data: bytes, *, mode: int = 0o400) -> int:
    """Return a sealed file in memory with `data`, closed at exec; it is out of the way of the descriptors of a new process.

    With mode 0o111 it is a program that no process with ids of its own can read, and so none can trace who runs it.
    """
    try:
        fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING | _MFD_EXEC)
    except OSError:  # before Linux 6.3 all are executable
        fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    with descriptor(fd):
        view = memoryview(data)
        while view:
            view = view[os.write(fd, view) :]
        os.fchmod(fd, mode)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
        return fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, _ABOVE)


def _linked_statically(program: bytes) -> bool:
    """Return whether an ELF file of 64 bits asks for no loader."""
    start, size, count = *struct.unpack_from("<Q", program, 32), *struct.unpack_from("<HH", program, 54)
    kinds = (struct.unpack_from("<I", program, start + at * size)[0] for at in range(count))
    return all(kind != _PT_INTERP for kind in kinds)
