"""What a monitor has written of its machine, taken in by the node, and shown to the monitors of copies. Blocking.

A monitor may have been taken over by its guest. So no link of its is followed, nothing is waited for in opening what it wrote,
nothing but a file is taken, none over its bound, and the node keeps files of its own, which no monitor can write to.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Sequence
from pathlib import Path

from atoll.model.errors import RuntimeFailed
from atoll.runtimes.loop_disk import copy_written, extents
from atoll.runtimes.mounts import descriptor
from atoll.runtimes.snapshots import check_content, load
from atoll.runtimes.vm.jailer import furnish

_CHUNK_BYTES = 64 << 10
CHECKED_MAX = 64
_READ_ONLY = 0o444
"""The directory around them is root's alone; a jail that has a link to one shows it to a monitor."""


class Checked:
    """Which snapshots hold what they held: each is read as a whole for its first copy, and again once a file of it has changed."""

    def __init__(self) -> None:
        self._known: dict[str, list[tuple[int, int, int, int]]] = {}

    def check(self, directory: Path) -> None:
        """Raises Corrupt, NotFound."""
        snapshot = load(directory)
        states = [(directory / file.name).stat() for file in snapshot.files]
        now = [(state.st_dev, state.st_ino, state.st_size, state.st_ctime_ns) for state in states]
        if self._known.pop(str(directory), None) != now:
            check_content(directory, snapshot)
        while len(self._known) >= CHECKED_MAX:
            del self._known[next(iter(self._known))]
        self._known[str(directory)] = now


def take_in(place: Path, name: str, target: Path, *, bytes_max: int, base: Path | None = None) -> None:
    """Copy the file `name` that a monitor wrote in `place` to a new one of the node's, without its zeros.

    With `base`, what was written are the changes since that file, which is of the node: all of it is in the new one, with them.
    Raises RuntimeFailed, OSError.
    """
    try:
        with descriptor(_open(place)) as fd:
            opened = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC, dir_fd=fd)
    except OSError as error:
        raise RuntimeFailed(f"the monitor did not write {name}: {error.strerror}", mend="see vmm.log") from None
    with descriptor(opened) as given:
        state = os.fstat(given)
        if not stat.S_ISREG(state.st_mode) or state.st_size > bytes_max:
            raise RuntimeFailed(f"the monitor wrote {name} with {state.st_size} bytes, which is no such file")
        if base is not None and base.stat().st_size != state.st_size:
            raise RuntimeFailed(f"the monitor wrote changes of {state.st_size} bytes, and not of {base.stat().st_size}")
        if base is not None:
            copy_written(base, target)
        flags = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | (os.O_CREAT | os.O_EXCL if base is None else 0)
        with descriptor(os.open(target, flags, 0o600)) as made:
            os.ftruncate(made, state.st_size)
            for start, end in extents(given, state.st_size):
                for at in range(start, end, _CHUNK_BYTES):
                    data = os.pread(given, min(_CHUNK_BYTES, end - at), at)
                    if base is not None or data.count(0) != len(data):  # zeros may be a change
                        os.pwrite(made, data, at)
            os.fchmod(made, _READ_ONLY)


def show(directory: Path, snapshot: Path, names: Sequence[str]) -> None:
    """Put a snapshot's files under their names into a directory that a monitor sees: not to be written to. Raises OSError."""
    furnish(directory, [(snapshot / name, name) for name in names])


def keep_base(base: Path, memory: Path) -> None:
    """Have `base` be the memory that the next changes are to, whatever becomes of the snapshot that it is of. Raises OSError."""
    partial = base.with_name(f"{base.name}.next")
    partial.unlink(missing_ok=True)
    os.link(memory, partial)
    partial.rename(base)


def clear(place: Path, names: Sequence[str]) -> None:
    """Remove what was shown or written under these names; a link's file stays. Raises OSError."""
    with contextlib.suppress(FileNotFoundError), descriptor(_open(place)) as fd:
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(name, dir_fd=fd)


def open_to(place: Path, uid: int) -> None:
    """Make a directory that the monitor may write to, if it is not there. Raises RuntimeFailed, OSError."""
    place.mkdir(mode=0o700, exist_ok=True)
    try:
        fd = _open(place)
    except OSError as error:
        raise RuntimeFailed(f"the machine cannot be written down: {place.name} is no directory: {error.strerror}") from None
    with descriptor(fd):
        os.fchown(fd, uid, uid)


def _open(place: Path) -> int:
    return os.open(place, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
