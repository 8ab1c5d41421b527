"""The jail that a virtual machine monitor runs in: what is shown to it, and the command that puts it there (`native/jail.c`)."""

from __future__ import annotations

import hashlib
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from msgspec import Struct

from atoll.model.errors import Unsupported
from atoll.model.ports.devices import DeviceNode
from atoll.runtimes.native import jail_path
from atoll.runtimes.vm.settle import settle

LOG = "vmm.log"
"""In the box's directory: what the monitor says."""
TAP_FD = 5
STDOUT_FD, STDERR_FD = 11, 13
"""The instance's FIFOs, open for writing."""
INSIDE = Path("/box")
"""Where the instance's own directory is in the jail, the only one that can be written to."""
_LDD_S_MAX = 10.0
_LIBRARY = re.compile(r"(?:=> )?(/\S+) \(0x")


class Jail(Struct, frozen=True, kw_only=True):
    """What one monitor is shown. Paths in pairs are (on the node, in the jail)."""

    directory: Path
    """The box's: its `vm` is shown at INSIDE, its `jail` is where the root is put together."""
    uid: int
    shown: tuple[tuple[Path, Path], ...]
    nodes: tuple[DeviceNode, ...] = ()
    opened: tuple[tuple[str, int], ...] = ()
    """Files that it is handed open for reading, each with its descriptor there (14 to 19)."""
    tap: str | None = None
    file_bytes: int = 0
    """The size that no file it writes, its log included, may be larger than."""
    locked_bytes: int = 0
    """How much memory it may lock; 0 leaves that as it is here."""
    groups: tuple[Path, ...] = ()
    small_pages: bool = False
    """Whether it is to have no huge pages, for a monitor whose own memory is to be as little as possible."""


def jail_command(jail: Jail, pid_file: Path, command: Sequence[str]) -> list[str]:
    """Return what starts `command`, a path in the jail with its arguments, there."""
    line = [str(jail_path()), "-p", str(pid_file), "-l", str(jail.directory / LOG), "-r", str(jail.directory / "jail")]
    line += ["-u", str(jail.uid), "-w", f"{jail.directory / 'vm'}={INSIDE}"]
    for source, place in jail.shown:
        line += ["-b", f"{source}={place}"]
    for node in jail.nodes:
        line += ["-d", f"{node.path}={node.major},{node.minor}"]
    for path, number in jail.opened:
        line += ["-o", f"{path}={number}"]
    for group in jail.groups:
        line += ["-g", str(group)]
    if jail.file_bytes:
        line += ["-f", str(jail.file_bytes)]
    if jail.locked_bytes:
        line += ["-m", str(jail.locked_bytes)]
    if jail.tap is not None:
        line += ["-t", jail.tap]
    if jail.small_pages:
        line += ["-s"]
    return [*line, "--", *command]


def make_tools(directory: Path, binary: str, files: Sequence[Path] = ()) -> Path:
    """Return a directory with `usr/bin/BINARY`, its libraries and `files`, and nothing else of the node; made once per version.

    `files` keep their paths; those that do not exist are left out. Raises Unsupported. Blocking.
    """
    path = shutil.which(binary)
    if path is None:
        raise Unsupported(f"{binary} is not installed", mend=f"apt-get install {binary}")
    program = Path(path).resolve()
    present = [file for file in files if file.exists()]
    state = [(str(file), file.stat().st_mtime_ns, file.stat().st_size) for file in (program, *present)]
    place = directory / f"{program.name}-{hashlib.sha256(repr(state).encode()).hexdigest()[:12]}"
    if not place.is_dir():
        directory.mkdir(parents=True, exist_ok=True, mode=0o711)
        with tempfile.TemporaryDirectory(dir=directory, prefix=".next-") as name:
            tree = Path(name) / "tools"
            for file in present:
                _copy(file, tree, file)
            _copy(program, tree, Path("/usr/bin") / binary)
            for file in (program, *(file for file in present if ".so" in file.name)):
                for library in _libraries(file):
                    _copy(library, tree, library)
            tree.chmod(0o755)
            settle(tree, place)
        for old in directory.glob(f"{program.name}-*"):
            if old != place:
                shutil.rmtree(old, ignore_errors=True)  # monitors that run keep what they have open
    return place


def _libraries(file: Path) -> list[Path]:
    try:
        found = subprocess.run(["ldd", str(file)], capture_output=True, text=True, timeout=_LDD_S_MAX, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Unsupported(f"the libraries of {file} cannot be told: {error}", mend="apt-get install libc-bin") from None
    return [Path(match[1]) for match in _LIBRARY.finditer(found.stdout)]


def _copy(source: Path, tree: Path, place: Path) -> None:
    target = tree / place.relative_to("/")
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True, mode=0o755)
        shutil.copy(source, target)  # what a link leads to
        target.chmod(0o755 if source.stat().st_mode & 0o111 else 0o644)


def top_level(tree: Path) -> tuple[tuple[Path, Path], ...]:
    """Return what shows each directory of a tree at the same name in a jail."""
    return tuple((path, Path("/") / path.name) for path in sorted(tree.iterdir()))
