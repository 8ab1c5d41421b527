"""Leases on the virtual clock, where what is lost in rounding is lost for ever. (Both were found by the simulator.)"""

from __future__ import annotations

import asyncio
import random

from atoll.model.ports.store import Store
from atoll.sim.clock import VirtualClock
from atoll.sim.loop import run_virtual
from atoll.store.memory import MemoryStore


async def come_and_go(store: Store, choose: random.Random, name: str, times: int) -> None:
    for _ in range(times):
        await asyncio.sleep(choose.random() * 3)
        lease = await store.lease_grant(1 + choose.random())
        await store.put(name, b"", lease=lease.id)
        await asyncio.sleep(choose.random())
        await store.lease_keep_alive(lease.id)
        await asyncio.sleep(2.1)
        assert await store.get(name) is None


def test_a_lease_ends_however_its_time_is_rounded() -> None:
    async def main() -> None:
        choose = random.Random(1)
        store = MemoryStore(VirtualClock(asyncio.get_running_loop()))
        await asyncio.gather(*(come_and_go(store, choose, f"k{number}", 200) for number in range(10)))
        await store.close()

    run_virtual(main, random.Random(1))


def test_a_store_without_leases_rests_on_a_machine_that_has_been_up_for_days() -> None:
    async def main() -> None:
        store = MemoryStore(VirtualClock(asyncio.get_running_loop()))
        await asyncio.sleep(40 * 86_400)
        await come_and_go(store, random.Random(1), "k", 1)
        await asyncio.sleep(86_400)
        await store.close()

    run_virtual(main, random.Random(1))
