"""The pulse on a socket and a clock, from the first moment of an agent's life: before it looks at its runtimes or devices."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Sequence

import structlog

from atoll.model.beats import BeatGrant
from atoll.model.errors import AtollError, Invalid, NotFound, Unavailable
from atoll.model.ports.clock import Clock
from atoll.model.ports.control_plane import ControlPlane
from atoll.model.ports.datagrams import Address, Opener
from atoll.node.contact import Contact
from atoll.node.pulse import Pulse

LOOK_S = 0.2
"""The longest sleep between two looks at what is due."""
HEARTBEAT_S = 5.0
"""Between two heartbeats over HTTP, which say what is in use."""
HEARTBEAT_MAX_S = 30.0
"""The same where the server asks for them less often, and beats show that the node lives."""
DEAF_S = 2.0
"""The same while datagrams do not get through: then it is the heartbeats that say that the node lives."""
GRANT_S = 10.0
"""Deadline of asking for a key."""
RETRY_MIN_S = 0.5
RETRY_MAX_S = 15.0
ANEW_S = 300.0
"""A server that has no keys to give (an older one) is asked again after so long; names are looked up anew as often."""
ANEW_FIRST_S = 20.0
"""The same the first time: a large cell may begin at one moment, and what its servers ask for goes by how many nodes there are."""
SAVE_S = 1.0
SPREAD_MAX_S = 30.0
"""No longer does an agent stay away from a server by itself, whatever that asks for."""

log = structlog.get_logger()


class Beating:
    """`servers` are `HOST:PORT` to use where the grant names none: those at which the API is asked."""

    def __init__(
        self,
        node: str,
        *,
        control: ControlPlane,
        opener: Opener,
        clock: Clock,
        servers: Sequence[str],
        contact: Contact,
        bind: Address = ("0.0.0.0", 0),  # noqa: S104 - answers come from wherever the servers are
    ) -> None:
        self._node = node
        self._control = control
        self._opener = opener
        self._clock = clock
        self._servers = tuple(servers)
        self._bind = bind
        self._count = 0
        self._cut_off = False
        self._heartbeat_s = HEARTBEAT_S
        self.spread_s = 0.0
        """How long at most the agent waits, by chance, before it comes back after a connection that was good."""
        self._reached = asyncio.Event()
        self.contact = contact
        self.pulse = Pulse(node, contact=contact, counter=int(clock.now() * 1000))
        self.orderly = True
        """Whether the end of `run` is told to the servers; a process that is killed tells nobody (for the simulator)."""
        self.on_deaf: Callable[[], None] = lambda: None
        """Called when servers that did answer do not any more."""

    @property
    def http_counts(self) -> bool:
        """Whether a heartbeat over HTTP proves that the leader knows of this node: it does where nothing else can, and where there
        is but one server."""
        return not self.pulse.answered or self._count < 2

    @property
    def heartbeat_s(self) -> float:
        """How often a heartbeat over HTTP is needed to show that this node lives, and what is in use on it."""
        now = self._clock.monotonic()
        if self.pulse.cut_off(now):
            return DEAF_S
        return self._heartbeat_s if self.pulse.answered and not self.pulse.deaf(now) else HEARTBEAT_S

    def reached(self) -> None:
        """Take in that the control plane has just been reached: who still waits to ask for a key asks now, lest this node be given
        up between its first heartbeat and its first beat."""
        self._reached.set()

    async def run(self) -> None:
        """Beat for ever."""
        self.contact.load(self._clock.monotonic())
        grant = await self._ask()
        addresses = await self._addresses(grant)
        bind = ("::", 0) if addresses and all(":" in host for host, _ in addresses) else self._bind
        end = await self._opener.open(bind, lambda data, sender: self.pulse.receive(data, sender, self._clock.monotonic()))
        try:
            self.pulse.send_to = end.send
            self.pulse.inside = await self._inside(addresses, end.address)
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._tick(), name="beats")
                anew_s = ANEW_FIRST_S
                while True:
                    self._count = len(addresses)
                    self._heartbeat_s = min(HEARTBEAT_MAX_S, max(HEARTBEAT_S, grant.heartbeat_s))
                    self.spread_s = min(SPREAD_MAX_S, max(0.0, grant.spread_s))
                    self.pulse.serve(grant, addresses)
                    await asyncio.sleep(min(anew_s, max(1.0, grant.lasts_s / 2)))
                    anew_s = ANEW_S
                    grant = await self._ask()
                    addresses = await self._addresses(grant) or addresses
        finally:
            if self.orderly:
                self.pulse.say_goodbye(self._clock.monotonic())
            self.contact.save()
            end.close()

    async def _tick(self) -> None:
        saved = 0.0
        while True:
            now = self._clock.monotonic()
            due = self.pulse.tick(now)
            cut_off = self.pulse.cut_off(now)
            if cut_off and not self._cut_off:
                log.warning("the server that leads acknowledges no beats; heartbeats come sooner", node=self._node)
                self.on_deaf()
            self._cut_off = cut_off
            if now - saved >= SAVE_S:
                self.contact.save()
                saved = now
            await asyncio.sleep(min(LOOK_S, max(0.0, due - self._clock.monotonic())))

    async def _ask(self) -> BeatGrant:
        pause_s = RETRY_MIN_S
        while True:
            self._reached.clear()
            try:
                async with asyncio.timeout(GRANT_S):
                    return await self._control.beat_grant(self._node)
            except (NotFound, Invalid):
                log.info("the server takes no beats; heartbeats over HTTP alone say that this node lives", node=self._node)
                await asyncio.sleep(ANEW_S)
                continue
            except (AtollError, TimeoutError) as error:
                log.debug("no key for beats", node=self._node, error=str(error) or "timed out", retry_s=pause_s)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(pause_s):
                    await self._reached.wait()
            pause_s = min(RETRY_MAX_S, 2 * pause_s)

    async def _addresses(self, grant: BeatGrant) -> list[Address]:
        found: list[Address] = []
        for text in grant.servers or self._servers:
            host, _, port = text.rpartition(":")
            try:
                found.append(await self._opener.resolve(host.strip("[]"), int(port)))
            except Unavailable as error:
                log.warning("a server's name has no address", server=text, error=error.message)
        return found

    async def _inside(self, servers: Sequence[Address], here: Address) -> str:
        """Return where this node's neighbours find its socket: by the address from which it goes to the servers."""
        host = await self._opener.source(servers[0]) if servers else ""
        return f"{host}:{here[1]}" if host else ""
