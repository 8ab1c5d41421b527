"""An instance's root: overlayfs over the image's layers, with a bounded writable layer, ids shifted, and no process started."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

from atoll.model.errors import ImageError, RuntimeFailed
from atoll.model.ports.runtime import Mount
from atoll.runtimes.mount_points import make_point
from atoll.runtimes.mounts import (
    MNT_DETACH,
    MOUNT_ATTR_NODEV,
    MOUNT_ATTR_NOEXEC,
    MOUNT_ATTR_NOSUID,
    MOUNT_ATTR_RDONLY,
    MS_NODEV,
    MS_NOSUID,
    bind,
    descriptor,
    mount,
    mounts_below,
    unmount,
)

_ATTRIBUTES = {
    "ro": MOUNT_ATTR_RDONLY,
    "rw": 0,
    "nosuid": MOUNT_ATTR_NOSUID,
    "nodev": MOUNT_ATTR_NODEV,
    "noexec": MOUNT_ATTR_NOEXEC,
    "bind": 0,
    "rbind": 0,
}
_COVERED = ("/dev", "/proc", "/sys")
"""What the tool itself mounts over, and so must fill."""
OPTIONS_BYTES_MAX = 4_095
"""mount(2) takes one page."""


def make_root(root: Path, directory: Path, layers: Sequence[Path], disk: Path, *, base_id: int, userns: int | None) -> list[Path]:
    """Mount `layers` (lowest first) below a writable layer on `disk` at `root`; `directory` takes what is needed meanwhile.

    Every directory above `root` must let others pass: an instance with ids of its own reaches its root by that path.
    Files of root in the image belong to `base_id` on the node. Returns mounts that are not needed any more: taking one away
    costs 2 ms, for which nobody must wait; `drop_mounts` does it. Raises ImageError for a layer that is not there, and
    RuntimeFailed; the caller then calls `remove_root`.
    """
    upper, work = disk / "upper", disk / "work"
    root.mkdir(mode=0o755)
    for path in (upper, work):
        path.mkdir(mode=0o755, exist_ok=True)  # the disk may be a copy of another instance's
    os.chown(upper, base_id, base_id)
    points: list[Path] = []
    with ExitStack() as stack:
        lower = [_show_layer(stack, directory / f"layer{at}", layer, userns, points) for at, layer in enumerate(layers)]
        if not lower:
            empty = directory / "empty"
            empty.mkdir(mode=0o755)
            lower = [str(empty)]
        options = f"lowerdir={':'.join(reversed(lower))},upperdir={upper},workdir={work}"
        if len(options) > OPTIONS_BYTES_MAX:
            raise ImageError(f"an image of {len(layers)} layers is too deep for overlayfs", mend="squash some of its layers")
        try:
            mount("overlay", root, "overlay", MS_NOSUID | MS_NODEV, options)
        except OSError as error:
            raise RuntimeFailed(f"cannot mount the root: {error}", mend="is the overlay file system available?") from None
    return points


def drop_mounts(points: Sequence[Path]) -> None:
    """Unmount and remove what `make_root` returned; what is gone already is no error. Blocking."""
    for point in points:
        unmount(point, MNT_DETACH)
        with suppress(FileNotFoundError):
            point.rmdir()


def _show_layer(stack: ExitStack, point: Path, layer: Path, userns: int | None, points: list[Path]) -> str:
    """Return a short name under which overlayfs finds the layer with its ids shifted; it keeps a copy of the mount for itself."""
    if userns is not None:
        point.mkdir()
        points.append(point)
        try:
            bind(layer, point, userns=userns, read_only=True)
        except OSError as error:
            raise _layer_error(layer, error) from None
        layer = point
    try:
        fd = os.open(layer, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise _layer_error(layer, error) from None
    stack.callback(os.close, fd)
    return f"/proc/self/fd/{fd}"


def _layer_error(layer: Path, error: OSError) -> ImageError | RuntimeFailed:
    if error.errno in {errno.ENOENT, errno.ENOTDIR}:
        return ImageError(f"a layer of the image is gone: {layer}", mend="pull the image again")
    if error.errno == errno.EINVAL:
        return RuntimeFailed(
            f"the file system of {layer} has no idmapped mounts", mend="put the data directory on ext4, xfs, btrfs or erofs"
        )
    return RuntimeFailed(f"cannot show the layer {layer}: {error}")


def show_mounts(directory: Path, mounts: Sequence[Mount], *, userns: int | None) -> list[Path]:
    """Return, for each mount, the path below `directory` where its source is shown with the instance's ids."""
    shown = []
    for at, entry in enumerate(mounts):
        point = directory / f"volume{at}"
        try:
            if entry.source.is_dir():
                point.mkdir()
            else:
                point.touch()
            bind(entry.source, point, userns=userns, read_only=entry.read_only)
        except OSError as error:
            mend = "the volume's file system must support idmapped mounts" if error.errno == errno.EINVAL else None
            raise RuntimeFailed(f"cannot mount {entry.source} at {entry.target}: {error.strerror}", mend=mend) from None
        shown.append(point)
    return shown


def place_mounts(root: Path, mounts: Sequence[dict[str, Any]], *, owner: int) -> list[dict[str, Any]]:
    """Mount those of an OCI configuration's bind mounts that can be below `root` from here, and return the others.

    The tool takes what is mounted below a root along with it; itself it takes 0.9 ms for each mount, this 0.1. Points that are
    missing are made, for `owner`. Raises ImageError where the image has something else there, RuntimeFailed for a source.
    """
    left = []
    with descriptor(os.open(root, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)) as top:
        for entry in mounts:
            target, options = entry["destination"], entry["options"]
            covered = any(target == path or target.startswith(path + "/") for path in _COVERED)
            if entry["type"] != "bind" or covered or not _ATTRIBUTES.keys() >= set(options):
                left.append(entry)
                continue
            source = Path(entry["source"])
            inside = make_point(top, target, directory=source.is_dir(), owner=owner)
            attributes = sum({_ATTRIBUTES[option] for option in options})
            try:
                bind(source, root / inside.lstrip("/"), recursive="rbind" in options, attributes=attributes)
            except OSError as error:
                raise RuntimeFailed(f"cannot mount {source} at {target}: {error.strerror}") from None
    return left


def remove_root(directory: Path) -> None:
    """Unmount all that lies below `directory` and remove it; safe to repeat."""
    while (point := next(reversed(list(mounts_below(directory))), None)) is not None:
        unmount(point, MNT_DETACH)  # with all that is mounted below it: each call costs 2 ms
    shutil.rmtree(directory, ignore_errors=True)
    if directory.exists():
        raise RuntimeFailed(f"cannot remove {directory}", mend="is something mounted or open below it?")
