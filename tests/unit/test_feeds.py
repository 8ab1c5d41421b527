"""Streams of assignments: what an agent is told first, and while there is nothing to say."""

from __future__ import annotations

import asyncio
import random

import pytest
from control_cell import LoopClock, run_virtual
from late_store import Late

from atoll.api.service import KINDS, Service
from atoll.api.service.context import REACH_S
from atoll.model import codec, keys
from atoll.model.errors import Unavailable
from atoll.model.records import Instance, OwnerKind, Prefetch
from atoll.store.cache import State
from atoll.store.memory import MemoryStore

KEEPALIVE_S = 9.0


def test_an_empty_batch_comes_whenever_nothing_has_happened_for_so_long_and_news_come_at_once() -> None:
    async def main() -> None:
        clock = LoopClock()
        store = MemoryStore(clock)
        async with State(store, KINDS) as state, Service(store, state, clock, random.Random(1), bytes(32)) as service:
            feed = service.feeds.assignments("n1", KEEPALIVE_S)
            assert (await anext(feed)).complete
            for _ in range(3):
                before = clock.monotonic()
                batch = await anext(feed)
                assert clock.monotonic() - before == KEEPALIVE_S
                assert not batch.complete
                assert batch.prefetch is None
            news = asyncio.ensure_future(anext(feed))
            await asyncio.sleep(1.0)
            await state.reach(await store.put(keys.prefetch("n1"), codec.encode(Prefetch(node="n1", images=("x:1",)))))
            before = clock.monotonic()
            assert (await news).prefetch == ("x:1",)
            assert clock.monotonic() == before
            before = clock.monotonic()
            await anext(feed)
            assert clock.monotonic() - before == KEEPALIVE_S, "counted from the last word"
            await feed.aclose()

    run_virtual(main())


def test_a_server_that_others_have_left_behind_tells_no_agent_what_is_all_there_is() -> None:
    async def main() -> None:
        clock = LoopClock()
        store = Late(clock)
        one = Instance(id="a-1", project="default", owner="a", owner_kind=OwnerKind.APP, node="n1", release=1, created_at=1.0)
        async with State(store, KINDS) as state, Service(store, state, clock, random.Random(1), bytes(32)) as service:
            store.flows.clear()
            await store.put(keys.instance("default", "a-1"), codec.encode(one))
            with pytest.raises(Unavailable):
                await anext(service.feeds.assignments("n1"))
            late = asyncio.ensure_future(anext(service.feeds.assignments("n1")))
            await asyncio.sleep(REACH_S / 2)
            assert not late.done()
            store.flows.set()
            batch = await late
            assert batch.complete
            assert list(batch.kept) == ["a-1"], "its app is not there, and so it is kept as it is"

    run_virtual(main())
