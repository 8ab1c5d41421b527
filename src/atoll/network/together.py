"""What is asked for in one moment is done in one go: one write and one netlink transaction for a burst of starts, as for one."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

from atoll.model.errors import AtollError

TOGETHER_MAX = 64
"""In one go: a netlink attribute has at most 64 KiB."""

T = TypeVar("T")


class Together(Generic[T]):
    """`work` does all it is given or nothing, and blocks; its AtollError or OSError is that of whoever asked. `lost` is called with
    what failed when whoever asked for it no longer waits."""

    def __init__(self, work: Callable[[Sequence[T]], None], lost: Callable[[T], None]) -> None:
        self._work = work
        self._lost = lost
        self._asked: list[tuple[T, asyncio.Future[None]]] = []

    def ask(self, one: T) -> asyncio.Future[None]:
        """Have `one` done, with everything else that is asked for before the loop gets to it; done even if nobody waits."""
        loop = asyncio.get_running_loop()
        if not self._asked:
            loop.call_soon(self._do_all)
        future: asyncio.Future[None] = loop.create_future()
        self._asked.append((one, future))
        return future

    def _do_all(self) -> None:
        asked, self._asked = self._asked, []
        for at in range(0, len(asked), TOGETHER_MAX):
            self._do(asked[at : at + TOGETHER_MAX])

    def _do(self, asked: Sequence[tuple[T, asyncio.Future[None]]]) -> None:
        try:
            self._work([one for one, _ in asked])
        except (AtollError, OSError) as error:
            if len(asked) > 1:  # one that is refused is not to spoil the others'
                for each in asked:
                    self._do([each])
                return
            one, future = asked[0]
            if future.done():
                self._lost(one)
            else:
                future.set_exception(error)
            return
        for _, future in asked:
            if not future.done():
                future.set_result(None)
