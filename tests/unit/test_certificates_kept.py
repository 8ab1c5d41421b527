"""A key that cannot be opened withdraws nothing: an ingress that shows its certificate goes on, whatever it is told meanwhile."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import aclosing

import pytest
from msgspec.structs import replace

from atoll.api.service import KINDS, SYSTEM, Service
from atoll.api.service.certificate_feed import AT_ONCE
from atoll.ingress.certificates import CertificateTable
from atoll.model import codec, keys
from atoll.model.certificates import CertificateRequest
from atoll.model.ports.clock import SystemClock
from atoll.model.records.certificate import Certificate
from atoll.store.cache import State
from atoll.store.memory import MemoryStore
from made_certificates import Maker

MAKER = Maker()


@pytest.fixture
async def service() -> AsyncIterator[Service]:
    clock = SystemClock()
    store = MemoryStore(clock)
    async with (
        State(store, KINDS) as state,
        Service(store, state, clock, random.Random(1), bytes(32), "apps.test") as made,
    ):
        yield made
    await store.close()


async def add(service: Service, host: str) -> None:
    chain, key = MAKER.sign(host)
    await service.certificates.put(SYSTEM, "default", host, CertificateRequest(chain=chain, key=key))


async def damage(service: Service, host: str) -> None:
    """Have a key sealed for another place."""
    held = service.context.state.get(Certificate, host)
    assert held is not None
    record = replace(held.record, sealed=service.context.sealer.seal(b"x", "elsewhere"))
    await service.context.reach(await service.context.store.put(keys.certificate(host), codec.encode(record)))


async def test_a_key_that_cannot_be_opened_any_more_withdraws_nothing_from_a_running_ingress(service: Service) -> None:
    for host in ("bad.test", "good.test", "gone.test"):
        await add(service, host)
    table = CertificateTable(lambda host: None)
    async with asyncio.timeout(30):
        async with aclosing(service.certificate_feeds.certificates("edge")) as feed:  # type: ignore[type-var]
            table.apply(await anext(feed))
            assert set(table) == {"bad.test", "good.test", "gone.test"}
            await damage(service, "bad.test")
            table.apply(await anext(feed))
            assert set(table) == {"bad.test", "good.test", "gone.test"}
        await service.certificates.remove("default", "gone.test")
        # And when it connects anew.
        async with aclosing(service.certificate_feeds.certificates("edge")) as feed:  # type: ignore[type-var]
            table.apply(await anext(feed))
            assert set(table) == {"bad.test", "good.test"}
            await service.certificates.remove("default", "bad.test")
            table.apply(await anext(feed))
            assert set(table) == {"good.test"}


async def test_also_one_that_is_told_of_in_an_earlier_part_of_everything(service: Service) -> None:
    await add(service, "a.test")
    table = CertificateTable(lambda host: None)
    async with asyncio.timeout(30):
        async with aclosing(service.certificate_feeds.certificates("edge")) as feed:  # type: ignore[type-var]
            table.apply(await anext(feed))
        held = service.context.state.get(Certificate, "a.test")
        assert held is not None
        for number in range(AT_ONCE):
            host = f"h{number}.test"
            record = replace(held.record, host=host, sealed=service.context.sealer.seal(b"x", keys.certificate(host)))
            await service.context.store.put(keys.certificate(host), codec.encode(record))
        await damage(service, "a.test")
        async with aclosing(service.certificate_feeds.certificates("edge")) as feed:  # type: ignore[type-var]
            async for batch in feed:
                table.apply(batch)
                if batch.complete:
                    break
    assert len(table) == AT_ONCE + 1
