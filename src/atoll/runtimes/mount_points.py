"""Where a mount goes below an instance's root: found and made from the node's side, while nothing of the tenant's runs yet.

The root is the tenant's, links in it too. A path is resolved as the instance itself would resolve it, so that nothing outside the
root is reached, and comes out without a link: LXC refuses to mount by way of one.
"""

from __future__ import annotations

import os
import posixpath
import stat

from atoll.model.errors import ImageError
from atoll.runtimes.mounts import descriptor, open_beneath

LINKS_MAX = 40
"""As many as the kernel follows."""


def make_point(root: int, path: str, *, directory: bool, owner: int) -> str:
    """Return `path` without links, having made what was missing of it, a directory or an empty file, for the user `owner`.

    `root` is a descriptor of the root directory. Raises ImageError, naming the path, where something else is in the way.
    """
    try:
        return _make(root, path, directory=directory, owner=owner)
    except OSError as error:
        raise ImageError(
            f"the image has something at {path} where a mount must be: {error.strerror}", mend="remove it from the image"
        ) from None


def _make(root: int, path: str, *, directory: bool, owner: int) -> str:
    done, left, links = "/", [part for part in path.split("/") if part], 0
    while left:
        name = left.pop(0)
        if name in {".", ".."}:
            done = done if name == "." else posixpath.dirname(done)
            continue
        with descriptor(open_beneath(root, done, os.O_PATH | os.O_DIRECTORY)) as above:
            try:
                mode = os.stat(name, dir_fd=above, follow_symlinks=False).st_mode
            except FileNotFoundError:
                mode = _create(above, name, directory=directory or bool(left), owner=owner)
            if stat.S_ISLNK(mode):
                links += 1
                if links > LINKS_MAX:
                    raise OSError(40, os.strerror(40), path)
                goal = os.readlink(name, dir_fd=above)
                left = [part for part in goal.split("/") if part] + left
                done = "/" if goal.startswith("/") else done
                continue
            if stat.S_ISDIR(mode) != (directory or bool(left)):
                number = 21 if stat.S_ISDIR(mode) else 20
                raise OSError(number, os.strerror(number), path)
        done = posixpath.join(done, name)
    return done


def _create(above: int, name: str, *, directory: bool, owner: int) -> int:
    if directory:
        os.mkdir(name, 0o755, dir_fd=above)
    else:
        os.close(os.open(name, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o644, dir_fd=above))
    os.chown(name, owner, owner, dir_fd=above, follow_symlinks=False)
    return os.stat(name, dir_fd=above, follow_symlinks=False).st_mode
