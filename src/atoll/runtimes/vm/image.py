"""An image as a block device that all virtual machines of the node share: one file per digest, read-only, EROFS or else ext4.

EROFS is made uncompressed: a guest's kernel may be older than the tools here. Blocking: call it from threads.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from atoll.model.errors import Exhausted, ImageError, RuntimeFailed
from atoll.model.ports.images import Image
from atoll.runtimes.mounts import MNT_DETACH, MS_NODEV, MS_NOSUID, MS_RDONLY, descriptor, mount, open_beneath, unmount
from atoll.runtimes.rootfs import OPTIONS_BYTES_MAX

MAKE_S_MAX = 600.0
UNUSED_MAX = 8
"""Images kept that no instance uses."""
FILE = "root.img"
_ACCOUNTS = ("etc/passwd", "etc/group")
_ACCOUNTS_BYTES_MAX = 4 << 20
_EXT4_SLACK_BYTES = 16 << 20
_BLOCK = 4096


class ImageDisks:
    """The image disks of one runtime below `directory`, which others may pass through but not list."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._lock = threading.Lock()
        self._making: dict[str, threading.Lock] = {}

    def ensure(self, image: Image) -> Path:
        """Return the directory of the image's disk: `root.img`, and the image's accounts below `etc`. Safe to repeat.

        Raises ImageError for a layer that is gone, Exhausted for a full disk, RuntimeFailed.
        """
        key = hashlib.sha256(repr((image.digest, [str(layer) for layer in image.layers])).encode()).hexdigest()[:32]
        place = self._directory / key
        with self._lock:
            lock = self._making.setdefault(key, threading.Lock())
        with lock:
            if place.is_dir():
                with suppress(OSError):
                    os.utime(place)
                return place
            self._directory.mkdir(parents=True, exist_ok=True, mode=0o711)
            with tempfile.TemporaryDirectory(dir=self._directory, prefix=".next-") as name:
                partial = Path(name) / "image"
                (partial / "etc").mkdir(parents=True, mode=0o755)
                with merged(image, Path(name)) as tree:
                    make_disk(tree, partial / FILE)
                    _keep_accounts(tree, partial)
                partial.chmod(0o711)
                partial.rename(place)
        return place

    def collect(self, used: Collection[Path]) -> None:
        """Remove the disks of which no instance has need, but the newest UNUSED_MAX, and what a crash left half-made."""
        if not self._directory.is_dir():
            return
        unused = [path for path in self._directory.iterdir() if path not in used]
        for path in [path for path in unused if path.name.startswith(".")]:
            unmount(path / "merged", MNT_DETACH)
            shutil.rmtree(path, ignore_errors=True)
        kept = sorted((path for path in unused if not path.name.startswith(".")), key=lambda path: path.stat().st_mtime)
        for path in kept[:-UNUSED_MAX]:
            shutil.rmtree(path, ignore_errors=True)


@contextmanager
def merged(image: Image, directory: Path) -> Iterator[Path]:
    """Give a directory that shows all layers as one, read-only. Raises ImageError, RuntimeFailed."""
    with ExitStack() as stack:
        lower = []
        for layer in image.layers:
            try:
                fd = os.open(layer, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
            except OSError:
                raise ImageError(f"a layer of the image is gone: {layer}", mend="pull the image again") from None
            stack.callback(os.close, fd)
            lower.append(f"/proc/self/fd/{fd}")
        point, empty = directory / "merged", directory / "empty"
        point.mkdir()
        empty.mkdir(mode=0o755)
        lower.insert(0, str(empty))  # an overlay without a writable layer wants two at least
        options = f"lowerdir={':'.join(reversed(lower))}"
        if len(options) > OPTIONS_BYTES_MAX:
            raise ImageError(f"an image of {len(image.layers)} layers is too deep for overlayfs", mend="squash some of its layers")
        try:
            mount("overlay", point, "overlay", MS_RDONLY | MS_NOSUID | MS_NODEV, options)
        except OSError as error:
            raise RuntimeFailed(f"cannot show the image's layers: {error}", mend="is the overlay file system available?") from None
        stack.callback(unmount, point, MNT_DETACH)
        yield point


def make_disk(tree: Path, disk: Path) -> None:
    """Make the file `disk` a file system with everything in `tree`. Raises Exhausted, RuntimeFailed."""
    if shutil.which("mkfs.erofs"):
        _run(["mkfs.erofs", "-d0", str(disk), str(tree)], disk)
    else:
        size = sum(-(-path.lstat().st_size // _BLOCK) * _BLOCK + _BLOCK for path in tree.rglob("*"))
        with disk.open("wb") as file:
            file.truncate((size + size // 16 + _EXT4_SLACK_BYTES) // _BLOCK * _BLOCK)
        _run(["mkfs.ext4", "-q", "-F", "-m", "0", "-O", "^has_journal", "-d", str(tree), str(disk)], disk)
    disk.chmod(0o644)


def _run(command: list[str], disk: Path) -> None:
    try:
        result = subprocess.run(command, capture_output=True, timeout=MAKE_S_MAX, check=False)
    except FileNotFoundError:
        raise RuntimeFailed(f"{command[0]} is not installed", mend="apt-get install erofs-utils") from None
    except subprocess.TimeoutExpired:
        raise RuntimeFailed(f"{command[0]} did not finish within {MAKE_S_MAX:.0f} s") from None
    if result.returncode == 0:
        return
    space = os.statvfs(disk.parent)
    if space.f_bavail * space.f_frsize < 1 << 20:
        raise Exhausted("the node's disk is full", mend=f"free space below {disk.parent.parent}")
    raise RuntimeFailed(f"{command[0]} failed: {result.stderr.decode(errors='replace').strip()[-300:]}")


def _keep_accounts(tree: Path, place: Path) -> None:
    """Copy the image's accounts out: who a command runs as is resolved here, where no guest can answer for it."""
    with descriptor(os.open(tree, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)) as root:
        for name in _ACCOUNTS:
            try:
                fd = open_beneath(root, name, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY)
            except OSError:
                continue
            with descriptor(fd), suppress(OSError):
                (place / name).write_bytes(os.read(fd, _ACCOUNTS_BYTES_MAX))
