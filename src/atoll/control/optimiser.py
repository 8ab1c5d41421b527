"""Who answers where an app's instances should be: the port, ways to answer here, and a process beside the server that does."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
from asyncio.subprocess import DEVNULL, PIPE, Process
from pathlib import Path
from typing import Protocol

import msgspec
import structlog

from atoll.model.errors import Unavailable
from atoll.scheduling.layout import Question, layout_of, quick
from atoll.scheduling.optimiser import FRAME_BYTES_MAX, decode_layout, encode_question, framed, solve
from atoll.scheduling.whereabouts import Layout

ANSWER_S = 180.0
"""The longest wait for an answer; the first may have to compile, on a busy machine."""
STOP_S = 5.0

log = structlog.get_logger()


class Optimiser(Protocol):
    async def solve(self, question: Question) -> Layout:
        """Return where the instances should be. Raises Unavailable; safe to repeat."""
        ...

    async def rest(self) -> None:
        """Give back what is held while nothing is asked. Safe to repeat."""
        ...


class QuickOptimiser:
    """Answers at once with what the quick way finds. Public: for tests, and where no process can be started."""

    async def solve(self, question: Question) -> Layout:
        return layout_of(question, quick(question))

    async def rest(self) -> None:
        return


class InlineOptimiser(QuickOptimiser):
    """Answers exactly, in this process, which stands still meanwhile. Public: for tests and the simulator."""

    async def solve(self, question: Question) -> Layout:
        return solve(question)


class ProcessOptimiser:
    """Asks `python -m atoll.scheduling.optimiser`, one question at a time; compiled kernels are kept in `cache`.

    The process is started by the first question, and again after it has ended or has not answered within `answer_s`.
    """

    def __init__(self, cache: Path | None = None, *, answer_s: float = ANSWER_S) -> None:
        self._cache = cache
        self._answer_s = answer_s
        self._process: Process | None = None
        self._one = asyncio.Lock()

    @property
    def pid(self) -> int | None:
        """The process that answers; None while there is none."""
        return self._process.pid if self._process is not None and self._process.returncode is None else None

    async def solve(self, question: Question) -> Layout:
        async with self._one:
            try:
                async with asyncio.timeout(self._answer_s):
                    return await self._ask(question)
            except (OSError, TimeoutError, EOFError, ValueError, msgspec.DecodeError) as error:
                await self._stop()
                raise Unavailable(f"the optimiser of layouts does not answer: {error or 'timeout'}") from None
            except asyncio.CancelledError:
                await asyncio.shield(self._stop())
                raise

    async def rest(self) -> None:
        async with self._one:
            await self._stop()

    async def _ask(self, question: Question) -> Layout:
        process = self._process
        if process is None or process.returncode is not None:
            process = self._process = await self._start()
        if process.stdin is None or process.stdout is None:
            raise EOFError("it has no pipes")
        process.stdin.write(framed(encode_question(question)))
        await process.stdin.drain()
        length = int.from_bytes(await process.stdout.readexactly(4), "big")
        if length > FRAME_BYTES_MAX:
            raise ValueError(f"an answer of {length} bytes")
        return decode_layout(await process.stdout.readexactly(length))

    async def _start(self) -> Process:
        environment = dict(os.environ)
        if self._cache is not None:
            self._cache.mkdir(mode=0o700, parents=True, exist_ok=True)
            environment["NUMBA_CACHE_DIR"] = str(self._cache)
        log.debug("the optimiser of layouts starts")
        return await asyncio.create_subprocess_exec(
            sys.executable, "-m", "atoll.scheduling.optimiser", stdin=PIPE, stdout=PIPE, stderr=DEVNULL, env=environment
        )

    async def _stop(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(STOP_S):
                await process.wait()
