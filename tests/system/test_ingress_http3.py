"""HTTP/3 on the real Envoy, with a client that is another's."""

from __future__ import annotations

import asyncio
from typing import cast

import pytest
from test_ingress_tls import BODY, TIMEOUT_S, Cell, ask, cell, eventually, known
from test_ingress_tls import pytestmark as pytestmark

from atoll.model.records import Endpoint, Routing
from atoll.model.spec import AppSpec, IngressRules, Port

pytest.importorskip("aioquic", reason="the client for HTTP/3 is not installed")

from aioquic.asyncio.client import connect
from aioquic.asyncio.protocol import QuicConnectionProtocol
from aioquic.h3.connection import H3Connection
from aioquic.h3.events import DataReceived, H3Event, HeadersReceived
from aioquic.quic.configuration import QuicConfiguration
from aioquic.quic.events import QuicEvent
from aioquic.tls import SessionTicket

__all__ = ["cell"]


class Client(QuicConnectionProtocol):
    """Asks one thing at a time."""

    http: H3Connection | None = None

    def quic_event_received(self, event: QuicEvent) -> None:
        if self.http is None:
            self.http = H3Connection(self._quic)
            self._answer: asyncio.Future[tuple[str, bytes]] = asyncio.get_running_loop().create_future()
            self._status, self._body = "", b""
        for each in self.http.handle_event(event):
            self._take(each)

    def _take(self, event: H3Event) -> None:
        if isinstance(event, HeadersReceived):
            self._status = dict(event.headers)[b":status"].decode()
        if isinstance(event, DataReceived):
            self._body += event.data
        if isinstance(event, HeadersReceived | DataReceived) and event.stream_ended and not self._answer.done():
            self._answer.set_result((self._status, self._body))

    async def ask(self, host: str, method: str = "GET", body: bytes = b"") -> tuple[str, bytes]:
        if self.http is None:
            self.http = H3Connection(self._quic)
        self._answer = asyncio.get_running_loop().create_future()
        self._status, self._body = "", b""
        stream = self._quic.get_next_available_stream_id()
        headers = [(b":method", method.encode()), (b":scheme", b"https"), (b":authority", host.encode()), (b":path", b"/")]
        headers += [(b"content-length", str(len(body)).encode())] if body else []
        self.http.send_headers(stream, headers, end_stream=not body)
        if body:
            self.http.send_data(stream, body, end_stream=True)
        self.transmit()
        async with asyncio.timeout(TIMEOUT_S):
            return await self._answer


async def fast(
    cell: Cell,
    host: str,
    method: str = "GET",
    body: bytes = b"",
    *,
    idle_s: float = 1.0,
    tickets: list[SessionTicket] | None = None,
    at: str = "127.0.0.1",
) -> tuple[str, bytes] | None:
    """Return status and body by HTTP/3; None where there is no connection to be had, or nothing comes for `idle_s`.

    The server's tickets for another connection go into `tickets`.
    """
    settings = QuicConfiguration(is_client=True, alpn_protocols=["h3"], server_name=host, idle_timeout=idle_s)
    settings.load_verify_locations(cadata=cell.maker.pem.encode())
    keep = tickets.append if tickets is not None else None
    try:
        async with connect(
            at, cell.tls_port, configuration=settings, create_protocol=Client, session_ticket_handler=keep
        ) as client:
            return await cast(Client, client).ask(host, method, body)
    except ConnectionError:
        return None


def routing(cell: Cell, app: str, *hosts: str, http3: bool = True) -> Routing:
    port = cell._port
    return Routing(
        project="default",
        app=app,
        spec=AppSpec(name=app, image="none", ports=(Port(port=port),), ingress=IngressRules(http3=http3)),
        hosts=tuple((host, "/", port, False) for host in hosts),
        endpoints=(Endpoint(instance=f"{app}-1", node="n", address="127.0.0.1"),),
    )


async def answered(cell: Cell, host: str) -> bool:
    return await fast(cell, host) == ("200", BODY)


async def test_hostnames_that_ask_for_it_are_served_by_http3_and_others_are_not(cell: Cell) -> None:
    cell.routing.put(
        routing(cell, "quick", "quick.test", "late.test", "*.wild.test"), routing(cell, "slow", "slow.test", http3=False)
    )
    cell.show(*(cell.maker.material(host) for host in ("quick.test", "slow.test", "*.wild.test")))
    await eventually(lambda: known(cell, "slow.test"))
    await eventually(lambda: answered(cell, "quick.test"))
    await eventually(lambda: answered(cell, "a.wild.test"))
    tickets: list[SessionTicket] = []
    big = b"x" * 200_000
    assert await fast(cell, "quick.test", "POST", big, idle_s=TIMEOUT_S, tickets=tickets) == ("200", BODY)
    # It may come back with one of them, but not with a request before the handshake is done.
    assert tickets
    assert not any(ticket.max_early_data_size for ticket in tickets)
    # Who came by TCP is told.
    reader, writer = await cell.dial("quick.test", "http/1.1")
    assert f'alt-svc: h3=":{cell.tls_port}"; ma=86400'.encode() in await ask(reader, writer, "quick.test")
    writer.close()
    reader, writer = await cell.dial("slow.test", "http/1.1")
    assert b"alt-svc" not in await ask(reader, writer, "slow.test")
    writer.close()
    assert await fast(cell, "slow.test") is None
    assert await fast(cell, "late.test") is None
    # As soon as it has a certificate, and no longer than it asks for it.
    cell.show(cell.maker.material("late.test"))
    await eventually(lambda: answered(cell, "late.test"))
    await eventually(lambda: answered(cell, "quick.test"))
    cell.routing.put(routing(cell, "quick", "late.test"))
    await eventually(lambda: _refused(cell, "quick.test"))
    await eventually(lambda: answered(cell, "late.test"))


async def _refused(cell: Cell, host: str) -> bool:
    return await fast(cell, host) is None
