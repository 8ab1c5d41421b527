"""The builder's cache: which step gave which layer, by a key of everything that went into it."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import hashlib
import os
import shutil
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import msgspec
from msgspec import Struct

from atoll.images.disk import spread_below
from atoll.images.layer import LayerBlob
from atoll.images.layout import Layout
from atoll.model.errors import DeadlineExceeded

CACHE_BYTES_MAX = 20 << 30
"""When the layers of the cache grow beyond this, those that were used longest ago go."""
BLOB_KEEP_S = 3600.0
"""A blob that no step knows is kept for so long: an image that was just built may still be pushed."""
LOCK_WAIT_S = 1800.0
LOCK_POLL_S = 0.1


class StepResult(Struct, frozen=True):
    layer: LayerBlob
    facts: dict[str, str] = {}
    """What later steps need to know of this one."""


class StepCache:
    """`directory/layout` holds the blobs, `steps/KEY.json` the results, `work/` what is being made."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.layout = Layout(directory / "layout")
        self._steps = directory / "steps"
        self._work = directory / "work"

    @contextlib.asynccontextmanager
    async def locked(self) -> AsyncIterator[None]:
        """Hold the cache alone; builds of one machine go one after the other."""
        self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        fd = os.open(self.directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            deadline = time.monotonic() + LOCK_WAIT_S
            while True:
                try:
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() > deadline:
                        raise DeadlineExceeded(f"another build holds {self.directory} for more than {LOCK_WAIT_S:.0f} s") from None
                    await asyncio.sleep(LOCK_POLL_S)
            self._prepare()
            yield
        finally:
            os.close(fd)

    def _prepare(self) -> None:
        for directory in (self._steps, self._work):
            directory.mkdir(mode=0o700, exist_ok=True)
        spread_below(self._work)
        for left in self._work.iterdir():  # by a build that was killed; its mounts ended with its mount namespace
            shutil.rmtree(left, ignore_errors=True)
        self.layout.create()

    @contextlib.contextmanager
    def workplace(self) -> Iterator[Path]:
        """Give a new directory that is gone afterwards. It can be entered by apt's unprivileged user."""
        path = Path(tempfile.mkdtemp(dir=self._work))
        try:
            yield path
        finally:
            shutil.rmtree(path, ignore_errors=True)

    def find(self, key: str) -> StepResult | None:
        """Return the step's result if its layer is still there whole."""
        path = self._steps / f"{key}.json"
        try:
            result = msgspec.json.decode(path.read_bytes(), type=StepResult)
            if self.layout.blob(result.layer.digest).stat().st_size != result.layer.size:
                return None
        except (OSError, msgspec.DecodeError):
            return None
        os.utime(path)
        return result

    def keep(self, key: str, result: StepResult, file: Path | None = None) -> StepResult:
        """Remember the result; `file` is the layer if it is not among the blobs yet."""
        if file is not None:
            self.layout.adopt(file, result.layer.digest)
        made = self._work / f"{key}.json"
        made.write_bytes(msgspec.json.encode(result))
        made.rename(self._steps / made.name)
        return result

    def prune(self, bytes_max: int = CACHE_BYTES_MAX) -> int:
        """Forget the steps used longest ago until the layers fit into `bytes_max`; return the bytes freed."""
        used: dict[str, int] = {}
        for path in sorted(self._steps.iterdir(), key=lambda path: path.stat().st_mtime, reverse=True):
            result = msgspec.json.decode(path.read_bytes(), type=StepResult)
            if result.layer.digest in used or sum(used.values()) + result.layer.size <= bytes_max:
                used[result.layer.digest] = result.layer.size
            else:
                path.unlink()
        freed = 0
        for blob in self.layout.blobs():
            found = blob.stat()
            if f"sha256:{blob.name}" not in used and time.time() - found.st_mtime > BLOB_KEEP_S:
                blob.unlink()
                freed += found.st_size
        return freed


def step_key(*parts: object) -> str:
    """Return the key of a step made from `parts`, which are plain data."""
    return hashlib.sha256(msgspec.json.encode(parts, order="deterministic")).hexdigest()
