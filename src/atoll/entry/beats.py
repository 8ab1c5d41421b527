"""An agent's beats put together: its pulse over its way to the servers."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

import structlog

from atoll.entry.joining import Reach
from atoll.model.ports.clock import Clock
from atoll.model.ports.control_plane import ControlPlane
from atoll.model.ports.datagrams import Udp
from atoll.node.beating import Beating
from atoll.node.contact import Contact
from atoll.sdk.transport import addresses_of

RETRY_S = 5.0

log = structlog.get_logger()


def beating_of(found: Reach, control: ControlPlane, clock: Clock, data: Path) -> Beating:
    servers = [f"{_bracketed(address.host)}:{address.port}" for address in addresses_of(found.servers)]
    data.mkdir(parents=True, exist_ok=True, mode=0o700)
    return Beating(found.name, control=control, opener=Udp(), clock=clock, servers=servers, contact=Contact(data / "contact"))


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host


@contextlib.asynccontextmanager
async def beating(pulse: Beating) -> AsyncIterator[None]:
    """Beat while the context lasts; at its end say goodbye."""
    task = asyncio.create_task(_for_ever(pulse), name="beating")
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def _for_ever(pulse: Beating) -> None:
    """What ends it (no socket to be had, say) is tried again; meanwhile heartbeats over HTTP say that the node lives."""
    while True:
        try:
            await pulse.run()
        except* Exception:  # the outer edge: without beats the node is watched all the same
            log.exception("beating ended, and begins again", retry_s=RETRY_S)
        await asyncio.sleep(RETRY_S)
