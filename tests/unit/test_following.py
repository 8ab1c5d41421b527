"""How far a feed has gone, as it says to those whom it tells."""

from __future__ import annotations

import asyncio

from control_cell import LoopClock, run_virtual

from atoll.api.service import KINDS
from atoll.api.service.following import Following
from atoll.model import codec, keys
from atoll.model.records import Prefetch
from atoll.store.cache import State
from atoll.store.memory import MemoryStore


def test_what_changes_nothing_that_is_held_takes_a_feed_along_and_a_change_only_once_it_was_applied() -> None:
    async def main() -> None:
        store = MemoryStore(LoopClock())
        async with State(store, KINDS) as state:
            applied: list[int] = []
            following = Following(state, "test", lambda deltas: applied.append(int(deltas.revision)), lambda: None)
            following.start()
            for _ in range(5):
                await state.reach(await store.put("requests/nobody-keeps", b"x"))
                assert following.revision == int(state.revision)
            assert not applied
            changed = await store.put(keys.prefetch("n1"), codec.encode(Prefetch(node="n1", images=("x:1",))))
            while state.revision < changed:
                assert following.revision < int(changed)
                await asyncio.sleep(0)
            if not applied:
                assert following.revision < int(changed)
            await following.reach(int(changed))
            assert applied == [int(changed)]
            assert following.revision == int(changed)
            await following.close()

    run_virtual(main())
