"""The top layer of a build: the app's own files, below its working directory."""

from __future__ import annotations

import fnmatch
import os
import stat
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from msgspec import Struct

from atoll.images.layer import LayerBlob, LayerWriter
from atoll.images.tree import EPOCH
from atoll.model.errors import ImageError, Invalid
from atoll.model.spec import Build

FILES_MAX = 200_000
FILES_BYTES_MAX = 20 << 30
RACE_S = 0.05
"""A file that was changed so short a time ago may change again without its time telling."""


class AppFile(Struct, frozen=True):
    """One entry; `stamp` changes whenever its content may have."""

    path: str
    """Below the working directory."""
    source: Path
    mode: int
    stamp: tuple[int, ...]


def list_files(directory: Path, spec: Build) -> list[AppFile]:
    """Return what `spec.files` names, sorted by path. Raises Invalid for what is absent or lies outside `directory`."""
    if not directory.is_dir():
        raise Invalid(f"{directory} is not a directory", mend="name the app's directory")
    root = directory.resolve()
    found: dict[str, AppFile] = {}
    total = 0
    for index, text in enumerate(spec.files):
        field = f"build.files[{index}]"
        start = _start(root, text, field)
        for path in _walk(start, root, spec.ignore):
            status = path.lstat()
            if not (stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode) or stat.S_ISLNK(status.st_mode)):
                raise Invalid(
                    f"{field}: {path} is neither a file nor a directory nor a link", field=field, mend="add it to build.ignore"
                )
            total += status.st_size if stat.S_ISREG(status.st_mode) else 0
            if len(found) >= FILES_MAX or total > FILES_BYTES_MAX:
                raise Invalid(
                    f"{field}: more than {FILES_MAX} files or {FILES_BYTES_MAX} bytes",
                    field=field,
                    mend="leave out what the app does not need with build.ignore",
                )
            name = path.relative_to(root).as_posix()
            stamp = (status.st_mode, status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino)
            found[name] = AppFile(name, path, status.st_mode, stamp)
    return [found[name] for name in sorted(found)]


def settled(files: list[AppFile]) -> bool:
    """Whether the stamps are old enough to be trusted the next time."""
    newest = max((file.stamp[3] for file in files), default=0)
    return newest / 1e9 < time.time() - RACE_S


def pack_files(files: list[AppFile], workdir: str, target: Path) -> LayerBlob:
    """Write the layer. Modes are 0755 or 0644 whatever the umask was, owners root, times `EPOCH`. Blocks.

    Raises ImageError when a file changes or vanishes meanwhile.
    """
    writer = LayerWriter(target, mtime=EPOCH, chunked=True)
    base = PurePosixPath(workdir.strip("/"))
    made: set[str] = set()
    try:
        for parent in [*reversed(base.parents), base]:
            _directory(writer, str(parent), made)
        for file in files:
            name = base / file.path
            for parent in reversed(name.parents):
                _directory(writer, str(parent), made)
            try:
                _add(writer, str(name), file, made)
            except OSError as error:
                raise ImageError(
                    f"cannot read {file.source}: {error.strerror or error}", mend="keep the files still while they are built"
                ) from None
        return writer.close()
    finally:
        writer.abandon()


def _add(writer: LayerWriter, name: str, file: AppFile, made: set[str]) -> None:
    if stat.S_ISDIR(file.mode):
        _directory(writer, name, made)
    elif stat.S_ISLNK(file.mode):
        writer.add(name, tarfile.SYMTYPE, mode=0o777, link=str(file.source.readlink()))
    else:
        fd = os.open(file.source, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        with os.fdopen(fd, "rb") as content:
            size = os.fstat(fd).st_size
            writer.add(name, tarfile.REGTYPE, mode=0o755 if file.mode & 0o111 else 0o644, size=size, content=content)


def _directory(writer: LayerWriter, name: str, made: set[str]) -> None:
    if name not in made and name not in (".", ""):
        made.add(name)
        writer.directory(name)


def _start(root: Path, text: str, field: str) -> Path:
    path = PurePosixPath(text)
    if not text or path.is_absolute() or ".." in path.parts or "\0" in text:
        raise Invalid(f"{field}: {text!r} is outside the app's directory", field=field, mend="name a path below it")
    start = root / path
    if not start.parent.resolve().is_relative_to(root) and start != root:
        raise Invalid(f"{field}: {text!r} leads out of the app's directory by a link", field=field, mend="copy the files into it")
    if not os.path.lexists(start):
        raise Invalid(f"{field}: there is no {text!r} in {root}", field=field, mend="check the path")
    return start


def _walk(start: Path, root: Path, ignore: tuple[str, ...]) -> Iterator[Path]:
    """Yield `start` and all below it that no pattern of `ignore` matches by name or by path."""
    if start != root:
        if _ignored(start, root, ignore):
            return
        yield start
    if not start.is_dir() or start.is_symlink():
        return
    for child in sorted(start.iterdir()):
        yield from _walk(child, root, ignore)


def _ignored(path: Path, root: Path, ignore: tuple[str, ...]) -> bool:
    relative = path.relative_to(root).as_posix()
    return any(fnmatch.fnmatchcase(path.name, pattern) or fnmatch.fnmatchcase(relative, pattern.strip("/")) for pattern in ignore)
