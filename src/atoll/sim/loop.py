"""An asyncio event loop without time, threads or sockets: the clock jumps to the next timer, and a seed chooses what runs first.

Two runs from one seed do the same steps in the same order. For that, tasks and futures hash by their number and not by their
address, since sets of them are iterated inside asyncio; the garbage collector must be off (`run.py` sees to it), and text must hash
alike (`PYTHONHASHSEED`, see `__main__.py`).
"""

from __future__ import annotations

import asyncio
import collections
import contextvars
import random
from collections.abc import Callable, Coroutine, Generator
from typing import Any, TypeVar, TypeVarTuple

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

STEPS_MAX = 500_000
"""Passes of the loop after which a run counts as livelocked."""
STILL_STEPS_MAX = 50_000
"""Passes without the clock moving after which a run counts as livelocked."""


class Deadlock(BaseException):
    """Nothing is ready and no timer is set: whoever still waits would wait for ever."""


class Livelock(BaseException):
    """Something goes on for ever without time passing, or far beyond what any run needs."""


class NumberedTask(asyncio.Task[Any]):
    """A task that hashes by its number, and runs beside the others in an order that repeats."""

    def __init__(self, coroutine: Coroutine[Any, Any, Any], *, loop: VirtualLoop, **rest: Any) -> None:
        self.number = loop.next_number()
        super().__init__(coroutine, loop=loop, **rest)

    def __hash__(self) -> int:
        return self.number


class NumberedFuture(asyncio.Future[Any]):
    def __init__(self, *, loop: VirtualLoop) -> None:
        self.number = loop.next_number()
        super().__init__(loop=loop)

    def __hash__(self) -> int:
        return self.number


class _Selector:
    """Stands where the loop waits for the world: nothing ever comes from there, so the wait is over at once."""

    def __init__(self, loop: VirtualLoop) -> None:
        self._loop = loop

    def select(self, timeout: float | None) -> list[Any]:
        if timeout is None:
            raise Deadlock
        if timeout > 0:
            self._loop.advance(timeout)
        return []


class VirtualLoop(asyncio.BaseEventLoop):
    """`shuffle` is the share of passes whose ready callbacks run in another order than they came."""

    def __init__(self, choose: random.Random, *, shuffle: float = 0.0) -> None:
        super().__init__()
        self._choose = choose
        self._shuffle = shuffle
        self._at = 0.0
        self._number = 0
        self._still = 0
        self.steps = 0
        self._selector = _Selector(self)
        self._clock_resolution = 1e-9
        self.set_task_factory(_new_task)

    def time(self) -> float:
        return self._at

    def advance(self, span_s: float) -> None:
        self._at += span_s
        self._still = 0

    def begin_anew(self) -> None:
        """Count steps from 0 again, so that what went on too long can be ended."""
        self.steps = self._still = 0

    def next_number(self) -> int:
        self._number += 1
        return self._number

    def create_future(self) -> asyncio.Future[Any]:
        return NumberedFuture(loop=self)

    def _run_once(self) -> None:
        self.steps += 1
        self._still += 1
        if self.steps > STEPS_MAX or self._still > STILL_STEPS_MAX:
            raise Livelock(f"{self.steps} steps, {self._still} of them at {self._at:.3f} s")
        ready: collections.deque[Any] = self._ready  # type: ignore[attr-defined]
        if len(ready) > 1 and self._shuffle and self._choose.random() < self._shuffle:
            self._choose.shuffle(ready)
        super()._run_once()  # type: ignore[misc]

    def call_soon_threadsafe(
        self, callback: Callable[[*Ts], object], *args: *Ts, context: contextvars.Context | None = None
    ) -> asyncio.Handle:
        return self.call_soon(callback, *args, context=context)

    def run_in_executor(self, executor: Any, func: Callable[[*Ts], T], *args: *Ts) -> asyncio.Future[T]:
        """Run `func` now: what a thread would do takes no virtual time."""
        future: asyncio.Future[T] = self.create_future()
        try:
            future.set_result(func(*args))
        except Exception as error:  # noqa: BLE001 - it belongs to whoever awaits the future
            future.set_exception(error)
        return future

    def _process_events(self, event_list: list[Any]) -> None: ...

    def _write_to_self(self) -> None: ...


def _new_task(
    loop: asyncio.AbstractEventLoop, coroutine: Coroutine[Any, Any, T] | Generator[Any, None, T], **rest: Any
) -> NumberedTask:
    assert isinstance(loop, VirtualLoop)  # noqa: S101 - it is the factory of this loop alone
    return NumberedTask(coroutine, loop=loop, **rest)  # type: ignore[arg-type]


def run_virtual(main: Callable[[], Coroutine[Any, Any, T]], choose: random.Random, *, shuffle: float = 0.0) -> T:
    """Run `main()` on a new virtual loop to its end, and return its result. All its tasks are over then."""
    loop = VirtualLoop(choose, shuffle=shuffle)
    asyncio.set_event_loop(loop)
    try:
        return loop.run_until_complete(main())
    finally:
        try:
            loop.begin_anew()
            _cancel_all(loop)
            loop.run_until_complete(loop.shutdown_asyncgens())
        finally:
            asyncio.set_event_loop(None)
            loop.close()


def _cancel_all(loop: VirtualLoop) -> None:
    """Cancel what is left, as often as it takes: a task may begin others while it ends."""
    while left := sorted(asyncio.all_tasks(loop), key=hash):
        for task in left:
            task.cancel()
        loop.run_until_complete(asyncio.gather(*left, return_exceptions=True))
