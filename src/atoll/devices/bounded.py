"""A blocking look at the machine with a deadline: a file of /sys may hang in its driver, and a thread cannot be ended."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import Generic, TypeVar

from atoll.model.errors import Unavailable

T = TypeVar("T")
_MEND = "see the kernel's log; restart the node if it stays so"


class _Outcome(Generic[T]):
    """What came of a function: its value or its error, and that it has ended."""

    def __init__(self) -> None:
        self.ended = asyncio.Event()
        self.value: T
        self.error: Exception | None = None


class Bounded:
    """Runs one function at a time in a thread of its own. One that hangs is left behind, and until it ends there is no other."""

    def __init__(self, what: str) -> None:
        self._what = what
        self._turn = asyncio.Lock()
        self._last: _Outcome[object] | None = None

    async def __call__(self, function: Callable[[], T], deadline_s: float) -> T:
        """Return what `function` returns, or raise what it raises. Raises Unavailable when it did not end within `deadline_s`."""
        outcome: _Outcome[T] = _Outcome()
        try:
            async with asyncio.timeout(deadline_s), self._turn:
                if self._last is not None:
                    await self._last.ended.wait()
                self._last = outcome  # type: ignore[assignment]
                arguments = function, outcome, asyncio.get_running_loop()
                threading.Thread(target=_run, args=arguments, name="devices", daemon=True).start()
                await outcome.ended.wait()
        except TimeoutError:
            raise Unavailable(f"{self._what} did not answer within {deadline_s:g} s", mend=_MEND) from None
        if outcome.error is not None:
            raise outcome.error
        return outcome.value


def _run(function: Callable[[], T], outcome: _Outcome[T], loop: asyncio.AbstractEventLoop) -> None:
    try:
        outcome.value = function()
    except Exception as error:  # noqa: BLE001 (it is raised again where it was asked for)
        outcome.error = error
    try:
        loop.call_soon_threadsafe(outcome.ended.set)
    except RuntimeError:
        return  # the loop has ended meanwhile: nobody waits for the answer
