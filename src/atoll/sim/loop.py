"""An asyncio event loop without time, threads or sockets: the clock jumps to the next timer, and a seed chooses what runs first.

Two runs from one seed do the same steps in the same order. For that, tasks and futures hash by the order in which they were first
hashed and not by their address, since sets of them are iterated inside asyncio; the garbage collector must be off (`run.py` sees to
it), and text must hash alike (`PYTHONHASHSEED`, see `__main__.py`).

Everything that one simulated process does runs in a context of its own (`process_context`), so that it can be stopped and continued
as a whole: what became due meanwhile runs when it goes on, late and all at once, as after a long collection of garbage.
"""

from __future__ import annotations

import asyncio
import collections
import contextvars
import heapq
import random
from collections.abc import Callable, Coroutine, Generator
from typing import Any, TypeVar, TypeVarTuple

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

STEPS_MAX = 3_000_000
"""Passes of the loop after which a run counts as livelocked."""
STILL_STEPS_MAX = 50_000
"""Passes without the clock moving after which a run counts as livelocked."""

_push, _pop, _copy_context = heapq.heappush, heapq.heappop, contextvars.copy_context
_PROCESS: contextvars.ContextVar[str] = contextvars.ContextVar("process", default="")


class Deadlock(BaseException):
    """Nothing is ready and no timer is set: whoever still waits would wait for ever."""


class Livelock(BaseException):
    """Something goes on for ever without time passing, or far beyond what any run needs."""


def process_context(name: str) -> contextvars.Context:
    """Return a context for a process: tasks that begin in it, and what they begin, can be stopped by `VirtualLoop.stop_process`."""
    context = contextvars.copy_context()
    context.run(_PROCESS.set, name)
    return context


def running_process() -> str:
    """Return the name of the process whose code runs now; empty outside of all."""
    return _PROCESS.get()


class _Numbered:
    """Hashes by the order of first use in a set or a dict, which repeats, unlike an address."""

    number = 0

    def __hash__(self) -> int:
        number = self.number
        if not number:
            loop: VirtualLoop = self.get_loop()  # type: ignore[attr-defined]
            self.number = number = loop.next_number()
        return number


class NumberedTask(_Numbered, asyncio.Task[Any]):
    __hash__ = _Numbered.__hash__


class NumberedFuture(_Numbered, asyncio.Future[Any]):
    __hash__ = _Numbered.__hash__


class _Handle:
    """What `call_soon` and `call_at` return, as far as asyncio uses it."""

    __slots__ = ("_args", "_callback", "_when", "context", "dead")

    def __init__(self, callback: Callable[..., object], args: tuple[Any, ...], context: contextvars.Context | None, when: float):
        self._callback = callback
        self._args = args
        self.context = _copy_context() if context is None else context
        self._when = when
        self.dead = False

    def cancel(self) -> None:
        self.dead = True

    def cancelled(self) -> bool:
        return self.dead

    def when(self) -> float:
        return self._when


class VirtualLoop(asyncio.BaseEventLoop):
    """`shuffle` is the share of passes whose ready callbacks run in another order than they came. More passes than `steps_max`, or
    than `still_steps_max` without the clock moving, are a livelock."""

    def __init__(
        self,
        choose: random.Random,
        *,
        shuffle: float = 0.0,
        steps_max: int = STEPS_MAX,
        still_steps_max: int = STILL_STEPS_MAX,
    ) -> None:
        super().__init__()
        self._choose = choose
        self._shuffle = shuffle
        self._steps_max = steps_max
        self._still_steps_max = still_steps_max
        self._at = 0.0
        self._number = 0
        self._still = 0
        self._order = 0
        self.steps = 0
        self._handles: collections.deque[_Handle] = collections.deque()
        self._timers: list[tuple[float, int, _Handle]] = []
        self._stopped: dict[str, list[_Handle]] = {}
        """Process that does not run → what it will have to do."""
        self.set_task_factory(_new_task)

    def time(self) -> float:
        return self._at

    def begin_anew(self) -> None:
        """Count steps from 0 again, and let every process run, so that what went on too long can be ended."""
        self.steps = self._still = 0
        for name in list(self._stopped):
            self.continue_process(name)

    def next_number(self) -> int:
        self._number += 1
        return self._number

    def stop_process(self, name: str) -> None:
        """Let nothing of the process run until `continue_process`; its timers become due, but wait."""
        self._stopped.setdefault(name, [])

    def continue_process(self, name: str) -> None:
        self._handles.extend(self._stopped.pop(name, ()))

    def is_stopped(self, name: str) -> bool:
        return name in self._stopped

    def create_future(self) -> asyncio.Future[Any]:
        return NumberedFuture(loop=self)

    def call_soon(  # type: ignore[override]  # a handle of our own, with what asyncio asks of one
        self, callback: Callable[[*Ts], object], *args: *Ts, context: contextvars.Context | None = None
    ) -> _Handle:
        handle = _Handle(callback, args, context, 0.0)
        self._handles.append(handle)
        return handle

    call_soon_threadsafe = call_soon  # type: ignore[assignment]

    def call_at(  # type: ignore[override]
        self, when: float, callback: Callable[[*Ts], object], *args: *Ts, context: contextvars.Context | None = None
    ) -> _Handle:
        handle = _Handle(callback, args, context, when)
        self._order += 1
        _push(self._timers, (when, self._order, handle))
        return handle

    def call_later(  # type: ignore[override]
        self, delay: float, callback: Callable[[*Ts], object], *args: *Ts, context: contextvars.Context | None = None
    ) -> _Handle:
        when = self._at + delay
        handle = _Handle(callback, args, context, when)
        self._order = order = self._order + 1
        _push(self._timers, (when, order, handle))
        return handle

    get_debug = staticmethod(bool)  # false; it is asked for each future and each task

    def _run_once(self) -> None:
        """Run passes until the loop is told to stop: one call of this for the whole of a run, for speed."""
        ready, timers, choose, shuffle, stopped = self._handles, self._timers, self._choose, self._shuffle, self._stopped
        while True:
            self.steps += 1
            self._still += 1
            if self.steps > self._steps_max or self._still > self._still_steps_max:
                raise Livelock(f"{self.steps} steps, {self._still} of them at {self._at:.3f} s")
            while timers and timers[0][2].dead:
                _pop(timers)
            if not ready:
                if not timers:
                    raise Deadlock
                if timers[0][0] > self._at:
                    self._at = timers[0][0]
                    self._still = 0
            while timers and timers[0][0] <= self._at:
                handle = _pop(timers)[2]
                if not handle.dead:
                    ready.append(handle)
            count = len(ready)
            if count > 1 and shuffle and choose.random() < shuffle:
                choose.shuffle(ready)
            for _ in range(count):
                handle = ready.popleft()
                if handle.dead:
                    continue
                if stopped and (waiting := stopped.get(handle.context.get(_PROCESS, ""))) is not None:
                    waiting.append(handle)
                    continue
                try:
                    handle.context.run(handle._callback, *handle._args)
                except (SystemExit, KeyboardInterrupt):
                    raise
                except BaseException as error:  # noqa: BLE001 - as asyncio's own handles do
                    self.call_exception_handler({"message": f"in {handle._callback!r}", "exception": error})
            if self._stopping:  # type: ignore[attr-defined]
                return

    def run_in_executor(self, executor: Any, func: Callable[[*Ts], T], *args: *Ts) -> asyncio.Future[T]:
        """Run `func` now: what a thread would do takes no virtual time."""
        future: asyncio.Future[T] = self.create_future()
        try:
            future.set_result(func(*args))
        except Exception as error:  # noqa: BLE001 - it belongs to whoever awaits the future
            future.set_exception(error)
        return future


def _new_task(
    loop: asyncio.AbstractEventLoop, coroutine: Coroutine[Any, Any, T] | Generator[Any, None, T], **rest: Any
) -> NumberedTask:
    return NumberedTask(coroutine, loop=loop, **rest)


def run_virtual(
    main: Callable[[], Coroutine[Any, Any, T]],
    choose: random.Random,
    *,
    shuffle: float = 0.0,
    steps_max: int = STEPS_MAX,
    still_steps_max: int = STILL_STEPS_MAX,
) -> T:
    """Run `main()` on a new virtual loop (`VirtualLoop`) to its end, and return its result. All its tasks are over then."""
    loop = VirtualLoop(choose, shuffle=shuffle, steps_max=steps_max, still_steps_max=still_steps_max)
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
