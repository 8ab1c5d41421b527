"""Before an authority looks, every ingress is asked whether it answers: over real sockets of this machine."""

from __future__ import annotations

import asyncio

import pytest

from atoll.control.answering import Answering
from atoll.model import codec, keys
from atoll.model.certificates import CHALLENGE_PATH
from atoll.model.ports.clock import SystemClock
from atoll.model.records import Ingress
from atoll.store.cache import State
from atoll.store.memory import MemoryStore

ANSWERS = {"token": "token.thumb"}


class Edge:
    """An ingress that answers for one hostname, from the given try on."""

    def __init__(self, from_try: int = 1, text: str = "token.thumb") -> None:
        self.asked: list[bytes] = []
        self._from_try, self._text = from_try, text

    async def start(self) -> int:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        return int(self._server.sockets[0].getsockname()[1])

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.asked.append(await reader.readuntil(b"\r\n\r\n"))
        good = len(self.asked) >= self._from_try
        status, body = ("200 OK", self._text) if good else ("404 Not Found", "nothing")
        writer.write(f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n{body}".encode())
        writer.close()

    def stop(self) -> None:
        self._server.close()


async def ask(*edges: Edge, wait_s: float, gone: bool = False) -> bool:
    """Return whether all answered before the wait was over."""
    store = MemoryStore(SystemClock())
    async with State(store, {keys.INGRESSES: Ingress}) as state:
        for number, edge in enumerate(edges):
            record = Ingress(name=f"e{number}", http_port=await edge.start())
            await state.reach(await store.put(keys.ingress(record.name), codec.encode(record)))
            if gone:
                edge.stop()
        done = asyncio.create_task(Answering(state, wait_s)("www.test", ANSWERS))
        try:
            await asyncio.wait({done}, timeout=min(wait_s / 2, 30.0))
            early = done.done()
            await done
        finally:
            for edge in edges:
                edge.stop()
    await store.close()
    return early


async def test_it_waits_until_the_last_ingress_answers_as_the_authority_would_be() -> None:
    quick, slow = Edge(), Edge(from_try=3)
    assert await ask(quick, slow, wait_s=60.0)
    assert len(slow.asked) == 3
    assert slow.asked[0].startswith(f"GET {CHALLENGE_PATH}token HTTP/1.1\r\nHost: www.test\r\n".encode())


@pytest.mark.parametrize(("edge", "gone"), [(Edge(text="another"), False), (Edge(), True)], ids=["says another", "is gone"])
async def test_one_that_does_not_answer_holds_an_order_up_for_a_bounded_time(edge: Edge, gone: bool) -> None:
    await ask(edge, wait_s=1.0, gone=gone)
    assert bool(edge.asked) is not gone, "it was asked, and the wait has ended all the same"


async def test_without_ingresses_there_is_nobody_to_ask() -> None:
    assert await ask(wait_s=60.0)
