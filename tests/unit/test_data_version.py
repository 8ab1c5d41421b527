"""A server works only over data that it understands, and beside servers that understand what it writes."""

from __future__ import annotations

import asyncio

import pytest

from atoll.api.service.data_version import BEFORE, check_data
from atoll.model import codec, keys
from atoll.model.errors import Corrupt, Unsupported
from atoll.model.membership import Server
from atoll.model.ports.store import Put
from atoll.store.memory import MemoryStore


async def version_in(store: MemoryStore) -> int:
    held = await store.get(keys.CELL_DATA)
    return BEFORE if held is None else int(held.value)


async def store_with(*, data: bytes | None = None, servers: tuple[Server, ...] = ()) -> MemoryStore:
    store = MemoryStore()
    await store.put("projects/default", b"{}")
    if data is not None:
        await store.put(keys.CELL_DATA, data)
    for server in servers:
        await store.put(keys.server(server.id), codec.encode(server))
    return store


@pytest.mark.parametrize(("there", "ours"), [(1, 1), (1, 2), (2, 2), (2, 1), (4, 5), (5, 4), (5, 5)])
async def test_versions_one_apart_work_over_one_store_and_the_newer_one_stays_written_down(there: int, ours: int) -> None:
    store = await store_with(data=b"%d" % there if there > 1 else None)
    await check_data(store, ours)
    assert await version_in(store) == max(there, ours)
    await check_data(store, ours)
    assert await version_in(store) == max(there, ours)


@pytest.mark.parametrize(
    ("there", "ours", "mend"), [(3, 1, "use the newer Atoll"), (5, 2, "newer Atoll"), (2, 4, "the one that writes 3")]
)
async def test_versions_further_apart_are_refused_and_nothing_is_written(there: int, ours: int, mend: str) -> None:
    store = await store_with(data=b"%d" % there)
    before = await store.revision()
    with pytest.raises(Unsupported, match=f"of version {there}") as refused:
        await check_data(store, ours)
    assert mend in (refused.value.mend or "")
    assert await store.revision() == before


async def test_a_new_cell_is_of_its_first_servers_version() -> None:
    store = MemoryStore()
    await check_data(store, 7)
    assert await version_in(store) == 7


async def test_data_of_before_versions_were_written_down_is_not_taken_for_a_new_cells() -> None:
    store = await store_with()
    with pytest.raises(Unsupported):
        await check_data(store, 3)
    await check_data(store, 2)
    await check_data(store, 3)
    assert await version_in(store) == 3


async def test_a_server_that_is_too_old_to_understand_is_waited_for_by_name() -> None:
    old = Server(id="s-old", urls=("https://10.0.0.9:7600",), version="0.1", started_at=1.0)
    store = await store_with(data=b"2", servers=(old,))
    with pytest.raises(Unsupported, match=r"s-old at https://10\.0\.0\.9:7600"):
        await check_data(store, 3)
    assert await version_in(store) == 2
    await store.delete(keys.server("s-old"))
    await check_data(store, 3)
    assert await version_in(store) == 3


async def test_a_server_of_a_version_to_come_may_say_more_of_itself() -> None:
    store = await store_with(data=b"2")
    await store.txn([], [Put(keys.server("s-new"), b'{"id":"s","urls":[],"version":"9","started_at":1,"data":3,"more":true}')])
    await check_data(store, 3)
    assert await version_in(store) == 3


async def test_two_servers_that_upgrade_at_once_leave_the_newer_version() -> None:
    store = await store_with(data=b"3")
    await asyncio.gather(check_data(store, 4), check_data(store, 3), check_data(store, 4))
    assert await version_in(store) == 4


@pytest.mark.parametrize("value", [b"", b"two", b"-1", b"12345678"])
async def test_what_is_no_version_is_said_to_be_damage(value: bytes) -> None:
    store = await store_with(data=value)
    with pytest.raises(Corrupt, match="cell/data"):
        await check_data(store, 1)
