"""Makes a box's devices appear in an instance of an OCI runtime: `Box.devices`, carried out to the letter. Blocking.

Device files: where ids are shifted, no tool can make one inside; it would show the node's own, with the node's owner and mode,
under the node's name. So each is made beside the instance's root, as it shall be, and shown from there.

Libraries: they lie in a directory of their own, which the linker is told of by LD_LIBRARY_PATH, before what the instance has in
it. That holds for glibc and musl, with or without a linker's cache in the image, for a read-only root, and for commands beside;
and nothing of the image is run for it. An `ldconfig` of the image's would be a tenant's program.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from atoll.model.errors import ImageError, RuntimeFailed
from atoll.model.ports.devices import DeviceNode, Edits
from atoll.runtimes.mounts import descriptor, open_beneath

LIBRARY_PATH = "LD_LIBRARY_PATH"
DEVICE_NAMES = ("NVIDIA_", "CUDA_", "ROCR_", "HIP_", "GPU_", "ZE_")
"""Variables that begin so say which devices there are: what was granted decides, not the image or the spec."""


def device_rules(edits: Edits) -> list[dict[str, Any]]:
    """Return the control group's rules that allow the devices, to be put behind the one that forbids all."""
    return [
        {"allow": True, "type": "c", "major": node.major, "minor": node.minor, "access": node.permissions} for node in edits.nodes
    ]


def device_entries(edits: Edits) -> list[dict[str, Any]]:
    """Return `linux.devices`, for a tool that makes the files itself."""
    return [
        {"type": "c", "path": node.path, "major": node.major, "minor": node.minor, "fileMode": node.mode, "uid": 0, "gid": 0}
        for node in edits.nodes
    ]


def environment(env: Sequence[tuple[str, str]], edits: Edits) -> tuple[tuple[str, str], ...]:
    """Return the instance's environment with the devices' part.

    Of the devices' variables those of `DEVICE_NAMES` replace what there was; any other is only a default.
    """
    variables = dict(env)
    for name, value in edits.env:
        if name.startswith(DEVICE_NAMES) or name not in variables:
            variables[name] = value
    if edits.library_directories:
        others = [part for part in variables.get(LIBRARY_PATH, "").split(":") if part and part not in edits.library_directories]
        variables[LIBRARY_PATH] = ":".join([*edits.library_directories, *others])
    return tuple(variables.items())


def show_nodes(directory: Path, nodes: Sequence[DeviceNode], *, base_id: int) -> tuple[Path, ...]:
    """Make the device files below `directory`, owned by the instance's root, and return where each is, in their order.

    Where the file system of `directory` has no device files (`nodev`), the node's own are returned. Raises RuntimeFailed.
    """
    if not nodes:
        return ()
    if os.statvfs(directory).f_flag & os.ST_NODEV:
        return tuple(Path(node.host_path) for node in nodes)
    directory = directory / "devices"
    directory.mkdir(mode=0o700)
    shown = []
    for at, node in enumerate(nodes):
        path = directory / str(at)
        try:
            os.mknod(path, stat.S_IFCHR | 0o600, os.makedev(node.major, node.minor))
            path.chmod(node.mode)  # whatever the umask is
            os.chown(path, base_id, base_id)
        except OSError as error:
            raise RuntimeFailed(f"cannot make the device file {node.path}: {error.strerror}") from None
        shown.append(path)
    return tuple(shown)


def check_sources(edits: Edits) -> None:
    """Raises RuntimeFailed, naming the first file of the node that is not there."""
    for mount in edits.mounts:
        if not Path(mount.source).exists():
            raise RuntimeFailed(
                f"{mount.source}, which a device of the instance needs, is gone from this node",
                mend="was its driver replaced? start the agent again, then the instance",
            )


def make_links(root: Path, links: Sequence[tuple[str, str]], *, base_id: int) -> None:
    """Make symbolic links (path inside, goal) below `root`, the directories above them too.

    A file or link of the image's in its place gives way, in the instance's own layer. Nothing outside `root` is reached, whatever
    links the image has. Raises ImageError, naming the path, where the image has a directory or something impassable there.
    """
    if not links:
        return
    with descriptor(os.open(root, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)) as top:
        for path, goal in links:
            parent, _, name = path.strip("/").rpartition("/")
            try:
                with descriptor(_directory(top, parent, base_id)) as above:
                    _link(above, name, goal, base_id)
            except OSError as error:
                raise ImageError(
                    f"the image has something at {path} where a link to the driver's library must be: {error.strerror}",
                    mend="remove it from the image",
                ) from None


def _directory(top: int, path: str, base_id: int) -> int:
    """Return a descriptor of the directory `path` below `top`, made where it is not there."""
    flags = os.O_PATH | os.O_DIRECTORY
    try:
        return open_beneath(top, path or ".", flags)
    except FileNotFoundError:
        parent, _, name = path.rpartition("/")
    with descriptor(_directory(top, parent, base_id)) as above:
        os.mkdir(name, 0o755, dir_fd=above)
        os.chown(name, base_id, base_id, dir_fd=above, follow_symlinks=False)
    return open_beneath(top, path, flags)


def _link(above: int, name: str, goal: str, base_id: int) -> None:
    try:
        found = os.stat(name, dir_fd=above, follow_symlinks=False)
    except FileNotFoundError:
        pass
    else:
        if stat.S_ISLNK(found.st_mode) and os.readlink(name, dir_fd=above) == goal:
            return
        os.unlink(name, dir_fd=above)
    os.symlink(goal, name, dir_fd=above)
    os.chown(name, base_id, base_id, dir_fd=above, follow_symlinks=False)
