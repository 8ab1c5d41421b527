"""An instance's root: overlayfs over the image's layers, with a bounded writable layer, ids shifted, and no process started."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from pathlib import Path

from atoll.model.errors import ImageError, RuntimeFailed
from atoll.model.ports.runtime import Mount
from atoll.runtimes.mounts import MNT_DETACH, MS_NODEV, MS_NOSUID, bind, mount, mounts_below, unmount

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
    for path in (root, upper, work):
        path.mkdir(mode=0o755)
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


def remove_root(directory: Path) -> None:
    """Unmount all that lies below `directory` and remove it; safe to repeat."""
    for point in mounts_below(directory):
        unmount(point, MNT_DETACH)
    shutil.rmtree(directory, ignore_errors=True)
    if directory.exists():
        raise RuntimeFailed(f"cannot remove {directory}", mend="is something mounted or open below it?")
