"""Whether a server is current is asked once for all who want to know at a time, and never answered from before they asked."""

from __future__ import annotations

import asyncio
import random

from atoll.api.service import KINDS, Service
from atoll.api.service.context import Context
from atoll.model import codec, keys
from atoll.model.errors import Unavailable
from atoll.model.ports.clock import SystemClock
from atoll.model.ports.store import Revision
from atoll.model.records import Project
from atoll.store.cache import State
from atoll.store.memory import MemoryStore


class CountingStore(MemoryStore):
    """Its newest revision is read when the read begins, and told when the gate is open."""

    def __init__(self) -> None:
        super().__init__(SystemClock())
        self.reads = 0
        self.gate = asyncio.Event()
        self.gate.set()
        self.away = False

    async def revision(self) -> Revision:
        self.reads += 1
        if self.away:
            raise Unavailable("nobody is there")
        found = await super().revision()
        await self.gate.wait()
        return found


class Cell:
    def __init__(self) -> None:
        self.store = CountingStore()
        self.state = State(self.store, KINDS)

    async def __aenter__(self) -> Context:
        await self.state.start()
        return Service(self.store, self.state, SystemClock(), random.Random(1), bytes(32)).context

    async def __aexit__(self, *_: object) -> None:
        await self.state.close()
        await self.store.close()


async def test_a_thousand_that_ask_at_once_cost_one_read() -> None:
    cell = Cell()
    async with cell as context:
        before = cell.store.reads
        await asyncio.gather(*(context.be_current() for _ in range(1_000)))
        assert cell.store.reads == before + 1


async def test_who_asks_after_a_read_has_begun_is_not_answered_from_it() -> None:
    cell = Cell()
    async with cell as context:
        cell.store.gate.clear()
        first = asyncio.ensure_future(context.be_current())
        await asyncio.sleep(0.01)
        before = cell.store.reads
        written = await cell.store.put(keys.project("p"), codec.encode(Project(name="p", created_at=1.0)))
        second = asyncio.ensure_future(context.be_current())
        await asyncio.sleep(0.01)
        assert cell.store.reads == before + 1
        cell.store.gate.set()
        await asyncio.gather(first, second)
        assert cell.state.revision >= written


async def test_one_that_goes_away_takes_the_answer_from_nobody_and_a_failure_is_everybodys() -> None:
    cell = Cell()
    async with cell as context:
        cell.store.gate.clear()
        asking = [asyncio.ensure_future(context.be_current()) for _ in range(3)]
        await asyncio.sleep(0.01)
        asking[0].cancel()
        cell.store.gate.set()
        await asyncio.gather(*asking[1:])
        cell.store.away = True
        failed = await asyncio.gather(*(context.be_current() for _ in range(3)), return_exceptions=True)
        assert all(isinstance(one, Unavailable) for one in failed)
        cell.store.away = False
        reads = cell.store.reads
        await context.be_current()
        assert cell.store.reads == reads + 1


async def test_what_the_cache_has_not_seen_is_waited_for() -> None:
    cell = Cell()
    async with cell as context:
        written = await cell.store.put(keys.project("p"), codec.encode(Project(name="p", created_at=1.0)))
        await context.be_current()
        assert cell.state.revision >= written
