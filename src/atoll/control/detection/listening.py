"""The exchange on a socket and a clock: what a server runs beside its API, whether it leads or not."""

from __future__ import annotations

import asyncio

import structlog

from atoll.control.detection.exchange import Exchange
from atoll.control.detection.rules import TICK_S
from atoll.model.errors import Unavailable
from atoll.model.ports.datagrams import Address, Opener

RETRY_S = 5.0
"""Between two tries to have the address."""

log = structlog.get_logger()


async def listen_for_beats(exchange: Exchange, opener: Opener, bind: Address) -> None:
    """Take beats at `bind` for ever. While the address cannot be had, nodes are known by their heartbeats over HTTP alone."""
    while True:
        try:
            end = await opener.open(bind, exchange.receive)
        except Unavailable as error:
            log.warning("no beats are heard; silent nodes are found slowly", cause=error.message, retry_s=RETRY_S)
            await asyncio.sleep(RETRY_S)
            continue
        exchange.send_to = end.send
        try:
            while True:
                exchange.tick(behind=end.behind())
                await asyncio.sleep(TICK_S)
        finally:
            exchange.send_to = lambda _data, _to: None
            end.close()
