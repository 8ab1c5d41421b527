"""The brake, as operators see it and let go of it."""

from __future__ import annotations

import random

import pytest
from control_cell import LoopClock, run_virtual

from atoll.api.service import Service
from atoll.api.service.context import KINDS
from atoll.model import codec, keys
from atoll.model.errors import Conflict
from atoll.model.records import Brake
from atoll.store.cache import State
from atoll.store.memory import MemoryStore


def test_a_release_is_for_the_brake_that_is_on_and_for_no_later_one() -> None:
    async def main() -> None:
        clock = LoopClock()
        store = MemoryStore(clock)
        async with State(store, KINDS) as state:
            service = Service(store, state, clock, random.Random(1), bytes(32))

            async def put(brake: Brake) -> None:
                await state.reach(await store.put(keys.brake(), codec.encode(brake)))

            with pytest.raises(Conflict, match="not on"):
                await service.brakes.release()
            await put(Brake(since=1.0, silent=30, nodes=100))
            assert not service.brakes.get().released
            view = await service.brakes.release()
            assert view.released
            revision = await store.revision()
            assert (await service.brakes.release()).released
            assert await store.revision() == revision, "to say it again writes nothing"
            await put(Brake(since=2.0, silent=40, nodes=100))
            assert not service.brakes.get().released, "that is another brake"
        await store.close()

    run_virtual(main())
