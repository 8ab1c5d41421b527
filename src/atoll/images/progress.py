"""How far a pull is, told to everyone who waits for it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterator

from atoll.model.ports.images import PullProgress

Progress = Callable[[PullProgress], None]


class Meter:
    """Counts the bytes of a pull's layers; listeners may come and go. All but `from_thread`'s result is for the event loop."""

    def __init__(self) -> None:
        self._listeners: list[Progress] = []
        self._sizes: dict[str, int] = {}
        self._fetched: dict[str, int] = {}
        self._unpacked: dict[str, int] = {}
        self._last = PullProgress("resolve", 0, 0)

    @contextlib.contextmanager
    def listened_by(self, progress: Progress | None) -> Iterator[None]:
        if progress is None:
            yield
            return
        self._listeners.append(progress)
        try:
            progress(self._last)
            yield
        finally:
            self._listeners.remove(progress)

    def begin(self, sizes: dict[str, int]) -> None:
        self._sizes = sizes
        self._tell()

    def skip(self, digest: str) -> None:
        """The layer is here already."""
        self._fetched[digest] = self._unpacked[digest] = self._sizes.get(digest, 0)
        self._tell()

    def fetched(self, digest: str, done_bytes: int) -> None:
        self._fetched[digest] = done_bytes
        self._tell()

    def from_thread(self, digest: str) -> Callable[[int], None]:
        """Return what counts unpacked bytes from another thread."""
        loop = asyncio.get_running_loop()

        def on_bytes(done_bytes: int) -> None:
            loop.call_soon_threadsafe(self._unpack, digest, done_bytes)

        return on_bytes

    def _unpack(self, digest: str, done_bytes: int) -> None:
        self._unpacked[digest] = done_bytes
        self._tell()

    def _tell(self) -> None:
        total = sum(self._sizes.values())
        fetched = sum(self._fetched.values())
        done, phase = (fetched, "download") if fetched < total else (sum(self._unpacked.values()), "unpack")
        self._last = PullProgress(phase, min(done, total), total)
        for listener in list(self._listeners):
            listener(self._last)
