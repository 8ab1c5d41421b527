"""A stream of assignments that has nothing to say shows that it is there, and says at once what there is."""

from __future__ import annotations

import asyncio
import random

from control_cell import LoopClock, run_virtual

from atoll.api.service import KINDS, Service
from atoll.model import codec, keys
from atoll.model.records import Prefetch
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
