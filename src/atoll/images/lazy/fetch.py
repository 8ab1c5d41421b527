"""Brings the pieces of one image: those that a reader waits for at once, all others behind the last reader, in growing parts."""

from __future__ import annotations

import asyncio
import contextlib
import functools
from collections.abc import AsyncGenerator, Callable
from typing import Protocol

from msgspec import Struct

from atoll.images.lazy.pieces import Pieces
from atoll.images.threads import in_thread
from atoll.images.unpack import from_os_error
from atoll.model.errors import AtollError, DeadlineExceeded, Retry, Unavailable

PUTS_MAX = 2
"""Pieces that are verified and written at a time; meanwhile the next ones come."""


class Ranges(Protocol):
    def __call__(self, start: int, end: int, /) -> AsyncGenerator[bytes, None]:
        """Yield these bytes of the blob as they come. Raises AtollError."""
        ...


class Pace(Struct, frozen=True, kw_only=True):
    """How long to wait, and how much to ask for at once."""

    read_s: float = 30.0
    """A reader gets an error when what it reads has not come in this time."""
    again_s: float = 0.25
    """Before another try for a reader; doubled each time."""
    demands_max: int = 4
    """Requests for readers at a time."""
    part_max: int = 16
    """Pieces in one request of those that nobody waits for."""
    part_s: float = 0.5
    """How long such a request should take, so that a reader in want of its last piece does not wait for long."""
    rest_s: float = 1.0
    """After a failure of such a request; doubled each time up to `rest_max_s`."""
    rest_max_s: float = 60.0


class Fetcher:
    """`need` is for readers; `fill` brings everything. `told` hears of failures and, with None, of the first success after one."""

    def __init__(self, pieces: Pieces, ranges: Ranges, *, told: Callable[[str | None], None], pace: Pace | None = None) -> None:
        self._pieces = pieces
        self._ranges = ranges
        self._told = told
        self._pace = pace or Pace()
        self._coming: dict[int, asyncio.Future[None]] = {}
        self._demands = asyncio.Semaphore(self._pace.demands_max)
        self._demanded = 0
        self._tasks: set[asyncio.Task[None]] = set()
        self._idle = asyncio.Event()
        self._idle.set()
        self._next = 0
        """The piece after the last one that a reader wanted."""

    async def need(self, chunks: range) -> None:
        """Return when these pieces are in the tree.

        Raises ImageError at once for a damaged piece, and after `read_s` whatever kept them away; the next call tries anew.
        """
        error: AtollError | None = None
        wait_s = self._pace.again_s
        try:
            async with asyncio.timeout(self._pace.read_s):
                while missing := [chunk for chunk in chunks if not self._pieces.has(chunk)]:
                    self._demand([chunk for chunk in missing if chunk not in self._coming])
                    coming = [self._coming[chunk] for chunk in missing if chunk in self._coming]
                    results = await asyncio.gather(*map(asyncio.shield, coming), return_exceptions=True)
                    for result in results:
                        if isinstance(result, AtollError):
                            error = result
                            if result.retry is not Retry.SAFE:
                                raise result
                        elif isinstance(result, BaseException):
                            raise result
                    if any(isinstance(result, AtollError) for result in results):
                        await asyncio.sleep(wait_s)
                        wait_s *= 2
        except TimeoutError:
            raise error or DeadlineExceeded(f"what is read did not come within {self._pace.read_s:g} s") from None

    async def fill(self) -> None:
        """Fetch all that is missing, and return when all is here. Failures are told and tried again, for ever."""
        part, rest_s = 1, self._pace.rest_s
        loop = asyncio.get_running_loop()
        while self._pieces.missing:
            await self._idle.wait()
            chunks = self._after(self._next, part)
            if not chunks:  # what is missing is on its way for a reader, or has come while it was waited for above
                if self._coming:
                    await asyncio.wait(list(self._coming.values()), return_when=asyncio.FIRST_COMPLETED)
                continue
            self._next = chunks[-1] + 1
            began = loop.time()
            try:
                await self._fetch(self._expect(chunks))
            except AtollError:
                await asyncio.sleep(rest_s)
                part, rest_s = 1, min(2 * rest_s, self._pace.rest_max_s)
                continue
            rest_s = self._pace.rest_s
            took_s = loop.time() - began
            part = min(2 * part, self._pace.part_max) if took_s < self._pace.part_s / 2 else part
            part = max(1, part // 2) if took_s > 2 * self._pace.part_s else part

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _demand(self, chunks: list[int]) -> None:
        """Have these pieces fetched for a reader, each run of them by one request."""
        while chunks:
            length = next((at for at in range(1, len(chunks)) if chunks[at] != chunks[0] + at), len(chunks))
            run, chunks = chunks[:length], chunks[length:]
            self._next = run[-1] + 1
            self._demanded += 1
            self._idle.clear()
            task = asyncio.create_task(self._fetch_demand(self._expect(run)))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _fetch_demand(self, chunks: list[int]) -> None:
        try:
            async with self._demands:
                await self._fetch(chunks)
        except AtollError:
            pass  # whoever waits for one of them has it from its future
        finally:
            self._demanded -= 1
            if not self._demanded:
                self._idle.set()

    def _after(self, start: int, most: int) -> list[int]:
        """Return the first run of pieces from `start` on, round the end, that are neither here nor on their way."""
        found: list[int] = []
        count = self._pieces.count
        for at in range(count):
            chunk = (start + at) % count
            if self._pieces.has(chunk) or chunk in self._coming or (found and chunk != found[-1] + 1):
                if found:
                    break
                continue
            found.append(chunk)
            if len(found) == most:
                break
        return found

    def _expect(self, chunks: list[int]) -> list[int]:
        for chunk in chunks:
            self._coming[chunk] = asyncio.get_running_loop().create_future()
        return chunks

    async def _fetch(self, chunks: list[int]) -> None:
        """Fetch one run of pieces that are expected; each is given as soon as it is verified and written. Raises AtollError."""
        failures: list[AtollError] = []
        puts: set[asyncio.Task[None]] = set()
        try:
            async with contextlib.aclosing(self._packed(chunks)) as packed:
                async for chunk, data in packed:
                    if len(puts) >= PUTS_MAX:
                        _, puts = await asyncio.wait(puts, return_when=asyncio.FIRST_COMPLETED)
                    if failures:
                        break
                    puts.add(asyncio.create_task(self._put(chunk, data, failures)))
        except AtollError as failure:
            failures.append(failure)
        finally:
            if puts:
                await asyncio.wait(puts)
            for chunk in chunks:
                if not self._pieces.has(chunk):
                    self._arrived(chunk, failures[0] if failures else Unavailable("fetching was given up"))
        self._told(str(failures[0]) if failures else None)
        if failures:
            raise failures[0]

    async def _packed(self, chunks: list[int]) -> AsyncGenerator[tuple[int, bytes], None]:
        """Yield each piece as it lies in the blob."""
        buffer = bytearray()
        at = 0
        async with contextlib.aclosing(self._ranges(*self._pieces.packed_range(chunks[0], chunks[-1]))) as ranges:
            async for data in ranges:
                buffer += data
                while at < len(chunks) and len(buffer) >= (size := self._pieces.table.packed[chunks[at]]):
                    yield chunks[at], bytes(buffer[:size])
                    del buffer[:size]
                    at += 1

    async def _put(self, chunk: int, packed: bytes, failures: list[AtollError]) -> None:
        try:
            await in_thread(functools.partial(self._pieces.put, chunk, packed))
        except AtollError as error:
            failures.append(error)
        except OSError as error:
            failures.append(from_os_error(error, f"cannot keep a piece of {self._pieces.image.source}"))
        else:
            self._arrived(chunk, None)

    def _arrived(self, chunk: int, error: AtollError | None) -> None:
        future = self._coming.pop(chunk, None)
        if future is None or future.done():
            return
        if error is None:
            future.set_result(None)
        else:
            future.set_exception(error)
            future.exception()  # read here, so that one that nobody waits for does not warn
