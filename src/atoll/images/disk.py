"""How the image store lies on disk. Everything appears by rename; a record is written last and vouches for what it names.

```
records/HEX.json   one per image that is ready, by its manifest's digest
blobs/HEX          layers that have been fetched and verified but belong to no record yet
partial/HEX        beginnings of blobs, which a repeated pull continues
layers/HEX         unpacked layers by diff id; `c-HEX` by chain id where a layer depends on those below it
trees/HEX          layers of an image that is a volume as one directory, by its manifest's digest: hard links, no copies
making/  trash/    what is being made, what is being removed; both emptied on start
```
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import stat
import struct
import tempfile
from collections.abc import Iterable, Sequence
from collections.abc import Set as AbstractSet
from pathlib import Path

import msgspec
import structlog
from msgspec import Struct

from atoll.images.beneath import open_beneath, sync_filesystem
from atoll.images.merged import merge
from atoll.model.ports.images import Image, ImageConfig

log = structlog.get_logger()

RECORD_BYTES_MAX = 16 << 20
_GET_FLAGS, _SET_FLAGS, _TOP_DIRECTORY = 0x80086601, 0x40086602, 0x00020000  # FS_IOC_GETFLAGS, …SETFLAGS, FS_TOPDIR_FL


class Record(Struct, frozen=True, kw_only=True):
    """An image that is ready."""

    digest: str
    references: tuple[str, ...]
    config: ImageConfig
    layers: tuple[str, ...]
    """Names below `layers/`, lowest first."""
    layer_bytes: tuple[int, ...]


class Disk:
    """The directory of one image store; only one process may use it."""

    def __init__(self, directory: Path) -> None:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        directory.chmod(0o700)  # set-uid files of images lie below
        self.directory = directory
        self._records = directory / "records"
        self._blobs = directory / "blobs"
        self._partial = directory / "partial"
        self._layers = directory / "layers"
        self._making = directory / "making"
        self._trash = directory / "trash"
        self._trees = directory / "trees"
        for part in (self._records, self._blobs, self._partial, self._layers, self._trees, self._making, self._trash):
            part.mkdir(mode=0o700, exist_ok=True)
        spread_below(self._making)

    def recover(self) -> list[Record]:
        """Remove what was half-made and return the images that are whole."""
        for path in [*self._making.iterdir(), *self._trash.iterdir()]:
            _remove(path)
        records = [record for path in sorted(self._records.iterdir()) if (record := self._read(path))]
        self.move_unused({name for record in records for name in record.layers}, None)
        self.move_trees(record.digest for record in records)
        self.empty_trash()
        return records

    def image(self, record: Record, reference: str) -> Image:
        """Return the record as the port has it; of a layer that occurs twice the lower one hides nothing and is left out."""
        names = list(dict.fromkeys(reversed(record.layers)))[::-1]
        return Image(
            reference=reference,
            digest=record.digest,
            config=record.config,
            layers=tuple(self.layer(name) for name in names),
            size_bytes=sum(dict(zip(record.layers, record.layer_bytes, strict=True)).values()),
        )

    def layer(self, name: str) -> Path:
        return self._layers / name

    def tree(self, digest: str) -> Path:
        return self._trees / hex_of(digest)

    def blob(self, digest: str) -> Path:
        return self._blobs / hex_of(digest)

    def partial(self, digest: str) -> Path:
        return self._partial / hex_of(digest)

    def new_path(self) -> Path:
        """Return a path that does not exist; what is made there is removed on the next start."""
        return Path(tempfile.mkdtemp(dir=self._making)) / "it"

    def release_path(self, path: Path) -> None:
        """Remove a path that `new_path` gave, and what still lies there."""
        _remove(path.parent)

    def keep_layer(self, made: Path, name: str) -> None:
        """Give the unpacked layer its name; if another has it already, that one is the same."""
        if self.layer(name).exists():
            return
        made.rename(self.layer(name))

    def make_tree(self, layers: Sequence[Path], digest: str) -> None:
        """Make the layers one directory at `tree(digest)`. Blocks for long: call it in a thread. Raises OSError."""
        made = self.new_path()
        try:
            merge(layers, made)
            made.rename(self.tree(digest))
        finally:
            self.release_path(made)

    def drop_blobs(self, digests: Iterable[str]) -> None:
        for digest in digests:
            self.blob(digest).unlink(missing_ok=True)
            self.partial(digest).unlink(missing_ok=True)

    def write_record(self, record: Record) -> None:
        """Make the record durable, and before that all that it vouches for."""
        data = msgspec.json.encode(record)
        directory = os.open(self._records, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            sync_filesystem(directory)
            making = self.new_path()
            try:
                with making.open("wb") as file:
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
                making.rename(self._records / f"{hex_of(record.digest)}.json")
            finally:
                self.release_path(making)
            os.fsync(directory)
        finally:
            os.close(directory)

    def forget(self, record: Record) -> None:
        (self._records / f"{hex_of(record.digest)}.json").unlink(missing_ok=True)

    def move_unused(self, layers: AbstractSet[str], blobs: AbstractSet[str] | None) -> None:
        """Move layers, and blobs and their beginnings (`None`: leave those alone), that are not named to the trash."""
        _move_others(self._layers, layers, self._trash)
        if blobs is not None:
            names = {hex_of(digest) for digest in blobs}
            _move_others(self._blobs, names, self._trash)
            _move_others(self._partial, names, self._trash)

    def move_trees(self, keep: Iterable[str]) -> None:
        """Move the trees of all images but those with the digests `keep` to the trash."""
        _move_others(self._trees, {hex_of(digest) for digest in keep}, self._trash)

    def empty_trash(self) -> int:
        """Remove what lies in the trash and return the bytes that this freed. Blocks for long: call it in a thread."""
        freed = 0
        for path in list(self._trash.iterdir()):
            freed += _size(path)
            _remove(path)
        return freed

    def free_bytes(self) -> int:
        status = os.statvfs(self.directory)
        return status.f_bavail * status.f_frsize

    def _read(self, path: Path) -> Record | None:
        try:
            if path.stat().st_size > RECORD_BYTES_MAX:
                raise ValueError("too large")
            record = msgspec.json.decode(path.read_bytes(), type=Record)
            missing = [name for name in record.layers if not self.layer(name).is_dir()]
            if missing or len(record.layers) != len(record.layer_bytes) or f"{hex_of(record.digest)}.json" != path.name:
                raise ValueError(f"layers are missing: {missing}")
        except (msgspec.DecodeError, ValueError) as error:
            log.warning("image record dropped; it will be pulled again", path=str(path), cause=str(error))
            path.unlink()
            return None
        return record


def spread_below(directory: Path) -> None:
    """Let ext4 put each new directory in `directory` into a part of the disk of its own (`chattr +T`); elsewhere do nothing.

    Where thousands of files were deleted in the last minutes, ext4 takes a millisecond to find a free inode, since it
    passes over every one that was just freed; a new part of the disk has none.
    """
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        with contextlib.suppress(OSError):
            (flags,) = struct.unpack("l", fcntl.ioctl(fd, _GET_FLAGS, bytes(struct.calcsize("l"))))
            fcntl.ioctl(fd, _SET_FLAGS, struct.pack("l", flags | _TOP_DIRECTORY))
    finally:
        os.close(fd)


def hex_of(digest: str) -> str:
    return digest.removeprefix("sha256:")


def copy_attributes(layer: Path, paths: Sequence[bytes], lower: Sequence[Path]) -> None:
    """Give directories that a layer only implies the owner, mode and times that they have in the layers below.

    Without this a layer that holds `tmp/x` but no entry for `tmp` would make `/tmp` a plain 0755 directory.
    """
    root = os.open(layer, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        for path in sorted(paths):
            found = next((found for below in reversed(lower) if (found := _directory_in(below, path))), None)
            if found is None:
                continue
            with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                fd = open_beneath(root, path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
                try:
                    os.fchown(fd, found.st_uid, found.st_gid)
                    os.fchmod(fd, stat.S_IMODE(found.st_mode))
                    os.utime(fd, ns=(found.st_mtime_ns, found.st_mtime_ns))
                finally:
                    os.close(fd)
    finally:
        os.close(root)


def _directory_in(layer: Path, path: bytes) -> os.stat_result | None:
    root = os.open(layer, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fd = open_beneath(root, path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError:
        return None
    finally:
        os.close(root)
    try:
        return os.fstat(fd)
    finally:
        os.close(fd)


def _move_others(directory: Path, names: AbstractSet[str], trash: Path) -> None:
    for path in directory.iterdir():
        if path.name not in names:
            path.rename(Path(tempfile.mkdtemp(dir=trash)) / "it")


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _size(path: Path) -> int:
    """Return the bytes on disk below `path`; hard links count once."""
    seen: set[int] = set()
    total = 0
    for directory, _, files in os.walk(path):
        for name in files:
            found = os.lstat(f"{directory}/{name}")
            if found.st_nlink > 1:
                if found.st_ino in seen:
                    continue
                seen.add(found.st_ino)
            total += found.st_blocks * 512
    return total
