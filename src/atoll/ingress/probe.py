"""How far the other sites are: the time that a TCP connection to their ingress takes, which is one round trip."""

from __future__ import annotations

import asyncio
import ipaddress
import socket
from collections.abc import Mapping, Sequence
from typing import Protocol

from atoll.model.ports.clock import Clock
from atoll.model.ports.control_plane import Peer

TRIES = 3
TIMEOUT_S = 2.0
SMOOTHING = 0.3
"""What the newest measurement counts."""
ROUND_MAX = 32
"""Peers that are measured in one round, those first that have waited longest."""
AT_ONCE = 4
PEERS_MAX = 2_000


def own_address(bind: str) -> str:
    """Return where others may reach what listens at `bind`; empty for nobody but this machine, or when that cannot be told."""
    try:
        address = ipaddress.ip_address(bind)
        if address.is_loopback:
            return ""
        if not address.is_unspecified:
            return bind
        family = socket.AF_INET if address.version == 4 else socket.AF_INET6
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            # Nothing is sent: the kernel says which address it would send from to anywhere (RFC 5737, RFC 3849).
            probe.connect(("192.0.2.1" if address.version == 4 else "2001:db8::1", 9))
            own: str = probe.getsockname()[0]
        return own
    except (ValueError, OSError):
        return ""


class Dial(Protocol):
    async def connect(self, address: str, port: int) -> None:
        """Make a connection and close it. Raises OSError."""
        ...


class TcpDial:
    async def connect(self, address: str, port: int) -> None:
        _, writer = await asyncio.open_connection(address, port)
        writer.close()


class Prober:
    """Measures rounds of peers; keeps one smoothed figure for each other site."""

    def __init__(self, site: str, clock: Clock, dial: Dial | None = None) -> None:
        self._site = site
        self._clock = clock
        self._dial: Dial = dial or TcpDial()
        self._ms: dict[str, float] = {}
        self._measured_at: dict[str, float] = {}

    @property
    def round_trips_ms(self) -> Mapping[str, float]:
        """Site → round trip in ms, of those that have answered and are still there."""
        return {site: round(ms, 3) for site, ms in sorted(self._ms.items())}

    async def measure(self, peers: Sequence[Peer]) -> None:
        """Measure one round. A peer that does not answer keeps its last figure."""
        others = [peer for peer in peers[:PEERS_MAX] if peer.site != self._site]
        sites = {peer.site for peer in others}
        for gone in [site for site in self._measured_at if site not in sites]:
            del self._measured_at[gone]
            self._ms.pop(gone, None)
        others.sort(key=lambda peer: (self._measured_at.get(peer.site, float("-inf")), peer.site, peer.address))
        gate = asyncio.Semaphore(AT_ONCE)
        await asyncio.gather(*(self._measure(peer, gate) for peer in others[:ROUND_MAX]))

    async def _measure(self, peer: Peer, gate: asyncio.Semaphore) -> None:
        async with gate:
            found = [ms for _ in range(TRIES) if (ms := await self._once(peer)) is not None]
        self._measured_at[peer.site] = self._clock.monotonic()
        if found:
            # The shortest: what took longer waited somewhere.
            best, before = min(found), self._ms.get(peer.site)
            self._ms[peer.site] = best if before is None else before + SMOOTHING * (best - before)

    async def _once(self, peer: Peer) -> float | None:
        began = self._clock.monotonic()
        try:
            async with asyncio.timeout(TIMEOUT_S):
                await self._dial.connect(peer.address, peer.port)
        except (OSError, TimeoutError):
            return None
        return max(0.001, (self._clock.monotonic() - began) * 1000.0)
