"""A worker's modules: found in an image, and copied out of it for a process that has the image of nobody. Blocking."""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from atoll.model.errors import ImageError, Invalid, RuntimeFailed
from atoll.model.worker import MODULES, Worker
from atoll.runtimes.mounts import MNT_DETACH, MS_NODEV, MS_NOSUID, MS_RDONLY, descriptor, mount, open_beneath, unmount
from atoll.runtimes.oci_box import open_root
from atoll.runtimes.workerd_assets import RULES, RULES_BYTES_MAX, assets_directory
from atoll.runtimes.workerd_config import MODULES_MAX, Module

FILES_MAX = 20 * MODULES_MAX
"""Files below `MODULES` that are looked at."""


def list_modules(root: Path) -> list[Module]:
    """Return the files below `MODULES` of an instance's root, of every kind. Links are no modules, and none is followed.

    Raises ImageError for an image with too many files.
    """
    found: list[Module] = []
    with descriptor(open_root(root)) as fd:
        try:
            top = os.open(MODULES[1:], os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=fd)
        except (FileNotFoundError, NotADirectoryError):
            return found
        with descriptor(top):
            for where, _, names, place in os.fwalk(".", dir_fd=top, follow_symlinks=False):
                for name in names:
                    status = os.stat(name, dir_fd=place, follow_symlinks=False)
                    path = os.path.normpath(f"{where}/{name}")
                    if stat.S_ISREG(status.st_mode) and path.isprintable():
                        found.append(Module(path, status.st_size))
                    if len(found) > FILES_MAX:
                        raise ImageError(f"the worker has more than {FILES_MAX} files", mend="leave out what it does not import")
    return found


def read_rules(root: Path, worker: Worker) -> dict[str, str]:
    """Return the text of the files that say how a worker's assets are served. Raises Invalid for one that is too large."""
    found: dict[str, str] = {}
    if worker.assets is None:
        return found
    with descriptor(open_root(root)) as fd:
        for name in RULES:
            path = f"{MODULES}/{assets_directory(worker.assets)}/{name}"
            with suppress(FileNotFoundError, NotADirectoryError), open(open_beneath(fd, path, os.O_RDONLY), "rb") as file:
                data = file.read(RULES_BYTES_MAX + 1)
                if len(data) > RULES_BYTES_MAX:
                    raise Invalid(f"worker.assets: {name} has more than {RULES_BYTES_MAX} bytes", field="worker.assets")
                found[name] = data.decode(errors="replace")
    return found


def copy_modules(layers: Sequence[Path], modules: Sequence[Module], target: Path) -> None:
    """Copy `modules` of an image below `target`, open to all. Raises ImageError where one is gone."""
    with merged(layers, target) as root, descriptor(open_root(root)) as fd:
        for module in modules:
            place = target / module.path
            place.parent.mkdir(parents=True, exist_ok=True)
            try:
                with open(open_beneath(fd, f"{MODULES}/{module.path}", os.O_RDONLY | os.O_NOFOLLOW), "rb") as source:
                    place.write_bytes(source.read(module.size_bytes))
            except OSError as error:
                raise ImageError(f"cannot read the module {module.path}: {error.strerror}", mend="pull the image again") from None
            place.chmod(0o644)
    for path in (target, *(path for path in target.rglob("*") if path.is_dir())):
        path.chmod(0o755)


@contextmanager
def merged(layers: Sequence[Path], beside: Path) -> Iterator[Path]:
    """Give a directory with what `layers` (the lowest first) have in all, to be read. `beside` names a place for it."""
    if len(layers) == 1:
        yield layers[0]
        return
    point = beside.with_name(beside.name + ".merged")
    empty = point / "empty"
    (point / "root").mkdir(parents=True, mode=0o700)
    empty.mkdir()
    descriptors = [os.open(layer, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC) for layer in (empty, *layers)]
    try:
        lower = ":".join(f"/proc/self/fd/{fd}" for fd in reversed(descriptors))
        try:
            mount("overlay", point / "root", "overlay", MS_NOSUID | MS_NODEV | MS_RDONLY, f"lowerdir={lower}")
        except OSError as error:
            raise RuntimeFailed(f"cannot show the worker's image: {error}", mend="is the overlay file system available?") from None
        try:
            yield point / "root"
        finally:
            unmount(point / "root", MNT_DETACH)
    finally:
        for fd in descriptors:
            os.close(fd)
        shutil.rmtree(point, ignore_errors=True)
