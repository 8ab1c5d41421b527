"""Agents' pulses and a server's exchange on a network in memory, in virtual time."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable

from control_cell import LoopClock

from atoll.control.detection.decide import Standing
from atoll.control.detection.exchange import Exchange
from atoll.control.detection.rules import TICK_S
from atoll.model import beats
from atoll.model.beats import BeatGrant
from atoll.model.ports.datagrams import Address, MemoryNet
from atoll.node.contact import Contact
from atoll.node.pulse import Pulse

CELL_KEY = bytes(32)


class Net:
    """`loss` of every datagram and up to `jitter_s` of delay; `cut` are pairs of hosts between which nothing goes, one way."""

    def __init__(self, *, loss: float = 0.0, jitter_s: float = 0.01, seed: int = 1) -> None:
        self.clock = LoopClock()
        self.chance = random.Random(seed)
        self.loss = loss
        self.jitter_s = jitter_s
        self.cut: set[tuple[str, str]] = set()
        self.net = MemoryNet(self._fate)
        self.servers: dict[str, Exchange] = {}
        self.pulses: dict[str, Pulse] = {}
        self.contacts: dict[str, Contact] = {}
        self.sites: dict[str, str] = {}
        self.enrolments: dict[str, str] = {}
        self.bases: dict[tuple[str, str], object] = {}
        self.last_seen: dict[str, float] = {}
        self.seen: list[tuple[bytes, Address, Address]] = []
        """All that was sent, with from and to."""
        self.paused: set[str] = set()
        self._held: dict[str, list[Callable[[], None]]] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}

    def _fate(self, sender: Address, to: Address) -> tuple[float, ...]:
        if (sender[0], to[0]) in self.cut or self.chance.random() < self.loss:
            return ()
        return (self.chance.random() * self.jitter_s,)

    def _basis_of(self, node: str) -> object | None:
        return self.bases.setdefault((node, self.enrolments.get(node, "")), object()) if node in self.sites else None

    async def server(self, name: str = "leader", *, leads: bool = True) -> Exchange:
        exchange = Exchange(
            key_of=lambda node, epoch: beats.key_of(CELL_KEY, node, epoch, self.enrolments.get(node, "")),
            site_of=self.sites.get,
            last_seen=self.last_seen,
            clock=self.clock,
            chance=random.Random(f"{name} {self.clock.monotonic()}"),
            basis_of=self._basis_of,
        )
        exchange.lead(leads)
        exchange.affirm(float("inf"))
        self.servers[name] = exchange
        self._tasks[name] = asyncio.create_task(self._serve(name, exchange))
        await asyncio.sleep(0)
        return exchange

    async def _serve(self, name: str, exchange: Exchange) -> None:
        def receive(data: bytes, sender: Address) -> None:
            if name in self.paused:
                self._held.setdefault(name, []).append(lambda: exchange.receive(data, sender))
            else:
                exchange.receive(data, sender)

        end = await self.net.open((name, 7600), receive)

        def send(data: bytes, to: Address) -> None:
            self.seen.append((data, end.address, to))
            end.send(data, to)

        exchange.send_to = send
        try:
            while True:
                if name not in self.paused:
                    exchange.tick(behind=end.behind())
                await asyncio.sleep(TICK_S)
        finally:
            end.close()

    async def agent(self, name: str, *, site: str = "a", counter: int | None = None) -> Pulse:
        self.sites[name] = site
        contact = self.contacts.setdefault(name, Contact(boot_id=""))
        start = counter if counter is not None else int(self.clock.now() * 1000)
        pulse = self.pulses[name] = Pulse(name, contact=contact, counter=start)
        self._tasks[name] = asyncio.create_task(self._beat(name, pulse))
        await asyncio.sleep(0)
        return pulse

    async def _beat(self, name: str, pulse: Pulse) -> None:
        def receive(data: bytes, sender: Address) -> None:
            if name in self.paused:
                self._held.setdefault(name, []).append(lambda: pulse.receive(data, sender, self.clock.monotonic()))
            else:
                pulse.receive(data, sender, self.clock.monotonic())

        end = await self.net.open((name, 7000), receive)

        def send(data: bytes, to: Address) -> None:
            self.seen.append((data, end.address, to))
            end.send(data, to)

        pulse.send_to = send
        epoch = beats.epoch_at(self.clock.now())
        grant = BeatGrant(key=beats.key_of(CELL_KEY, name, epoch, self.enrolments.get(name, "")), epoch=epoch, lasts_s=1e6)
        pulse.serve(grant, [(server, 7600) for server in self.servers])
        try:
            while True:
                if name in self.paused:
                    await asyncio.sleep(0.01)
                    continue
                due = pulse.tick(self.clock.monotonic())
                await asyncio.sleep(min(0.05, max(0.001, due - self.clock.monotonic())))
        finally:
            end.close()

    async def kill(self, name: str) -> None:
        task = self._tasks.pop(name)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    async def pause(self, name: str, span_s: float) -> None:
        """Let a process stand still; what comes meanwhile waits in its socket."""
        self.paused.add(name)
        await asyncio.sleep(span_s)
        self.paused.discard(name)
        for late in self._held.pop(name, []):
            late()

    def silent(self, server: str = "leader") -> set[str]:
        return {name for name, watch in self.servers[server].watches.items() if watch.standing is Standing.SILENT}

    async def until_silent(self, name: str, within_s: float = 30.0) -> float:
        """Return how long it took until the leader believed that a node is silent."""
        began = self.clock.monotonic()
        for _ in range(int(within_s / TICK_S)):
            if name in self.silent():
                return self.clock.monotonic() - began
            await asyncio.sleep(TICK_S)
        raise TimeoutError(f"{name} is not believed silent after {within_s:g} s")

    async def close(self) -> None:
        for name in list(self._tasks):
            await self.kill(name)
