"""A fleet of agents and a network that loses and delays, on a clock that the caller moves: what detection is measured on.

What beats do to the leader's table is done for all nodes at once, since an hour of 5,000 nodes has 180 million of them; every
probe, every answer and all that a helper carries is a real datagram between the real `Exchange` and real `Pulse`s.
"""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from atoll.control.detection.decide import Standing
from atoll.control.detection.exchange import Exchange
from atoll.control.detection.rules import TICK_S
from atoll.model import beats
from atoll.model.beats import BeatGrant
from atoll.model.ports.datagrams import Address
from atoll.node.contact import Contact
from atoll.node.pulse import BURST, Pulse, rate_of

CELL_KEY = bytes(32)
LEADER: Address = ("10.255.0.1", 7600)
SITES = 20
_RING = 16
"""Steps ahead of which arrivals are kept: above the longest delay."""
PAUSE_GAP_S = 1.0
"""The least time between two pauses of one process: two with nothing between them would be one of twice the length."""


class ManualClock:
    """Moved by the caller. Implements `Clock`."""

    def __init__(self) -> None:
        self.at = 0.0

    def now(self) -> float:
        return 1_700_000_000.0 + self.at

    def monotonic(self) -> float:
        return self.at


@dataclass(frozen=True)
class Weather:
    """What the network and the machines do to what is sent. Every datagram is delayed by up to `jitter_s`, evenly."""

    loss: float = 0.0
    jitter_s: float = 0.02
    pause_s: float = 0.0
    """How long a process stands still at a time: the socket keeps what comes, and nothing goes out."""
    pause_every_s: float = 0.0
    """Mean time between two pauses of one agent; 0 for none."""
    leader_pause_every_s: float = 0.0


class Field:
    """`step` once every `TICK_S`. Nodes are `n0`, `n1`, …; they are dealt out over sites."""

    def __init__(self, nodes: int, weather: Weather, clock: ManualClock, seed: int) -> None:
        self.count = nodes
        self.weather = weather
        self._clock = clock
        self._chance = random.Random(seed)
        self._draw = np.random.default_rng(seed)
        self.names = [f"n{number}" for number in range(nodes)]
        self._numbers = {name: number for number, name in enumerate(self.names)}
        self.exchange = Exchange(
            key_of=lambda node, epoch: beats.key_of(CELL_KEY, node, epoch),
            site_of=self.site_of,
            last_seen={},
            clock=clock,
            chance=random.Random(seed + 1),
        )
        self.exchange.send_to = lambda data, to: self._send(data, LEADER, to)
        self._epoch = beats.epoch_at(clock.now())
        self._pulses: dict[int, Pulse] = {}
        self.dead_at = np.full(nodes, np.inf)
        self._paused_until = np.full(nodes, -1.0)
        self._pause_at = self._pauses(nodes, weather.pause_every_s)
        self._leader_paused_until = -1.0
        self._leader_pause_at = float(self._pauses(1, weather.leader_pause_every_s)[0])
        self._arrivals = np.zeros((_RING, nodes), dtype=bool)
        self._steps = 0
        self._period_steps = max(1, round(1 / (rate_of(weather.loss) * TICK_S)))
        self._phase = self._draw.integers(0, self._period_steps, nodes)
        self._queue: list[tuple[float, int, bytes, Address, Address]] = []
        self._number = 0
        self.pauses = 0
        self.leader_pauses = 0
        self.datagrams = 0
        self.beats = 0
        self.rows = np.zeros(nodes, dtype=np.int64)
        for number, name in enumerate(self.names):
            peer = self.exchange.peers.add(name)
            peer.epoch = self._epoch
            peer.address = self.address_of(number)
            self.rows[number] = peer.row
            self.exchange.peers.heard[peer.row] = 0.0

    def _pauses(self, count: int, mean_s: float) -> np.ndarray:
        return self._draw.exponential(mean_s, count) + 1.0 if mean_s else np.full(count, np.inf)

    def site_of(self, name: str) -> str | None:
        return f"s{self._numbers[name] % SITES}" if name in self._numbers else None

    def address_of(self, number: int) -> Address:
        return f"10.0.{number >> 8}.{number & 255}", 7000

    def _number_of(self, address: Address) -> int:
        _, _, high, low = address[0].split(".")
        return int(high) << 8 | int(low)

    def silent(self) -> set[str]:
        return {name for name, watch in self.exchange.watches.items() if watch.standing is Standing.SILENT}

    def kill(self, number: int, at: float) -> None:
        self.dead_at[number] = at

    def revive(self, number: int) -> None:
        self.dead_at[number] = np.inf

    def step(self) -> None:
        """Let what happened until the clock's time happen."""
        now = self._clock.at
        self._rest(now)
        leader_awake = now >= self._leader_paused_until
        self._beat(now, leader_awake)
        self._deliver(now)
        if leader_awake:
            self.exchange.tick()
        self._steps += 1

    def _rest(self, now: float) -> None:
        due = np.flatnonzero(self._pause_at <= now)
        if len(due):
            self.pauses += len(due)
            self._paused_until[due] = now + self.weather.pause_s
            gaps = PAUSE_GAP_S + self._draw.exponential(self.weather.pause_every_s, len(due))
            self._pause_at[due] = now + self.weather.pause_s + gaps
        if self._leader_pause_at <= now:
            self.leader_pauses += 1
            self._leader_paused_until = now + self.weather.pause_s
            self._leader_pause_at = now + self.weather.pause_s + self.weather.leader_pause_every_s

    def _beat(self, now: float, leader_awake: bool) -> None:
        # Between the step before and this one; a node that dies within it may have beaten before.
        alive = self.dead_at > now - TICK_S * self._draw.random(self.count)
        able = alive & (self._paused_until <= now)
        back = able & (self._paused_until > now - TICK_S)
        sends = able & ((self._steps + self._phase) % self._period_steps == 0)
        self._lose_and_delay(np.flatnonzero(sends & ~back))
        for _ in range(BURST):
            self._lose_and_delay(np.flatnonzero(back))
        if leader_awake:
            # What came while it stood still was kept by its socket.
            waiting = range(_RING) if self._leader_paused_until > now - TICK_S else (0,)
            for ago in waiting:
                slot = (self._steps - ago) % _RING
                here = self._arrivals[slot]
                self.exchange.peers.heard[self.rows[here]] = self.exchange.awake.now()
                here[:] = False

    def _lose_and_delay(self, who: np.ndarray) -> None:
        self.beats += len(who)
        come = who[self._draw.random(len(who)) >= self.weather.loss]
        delays = 1 + (self._draw.random(len(come)) * self.weather.jitter_s / TICK_S).astype(np.int64)
        self._arrivals[(self._steps + delays) % _RING, come] = True

    def _send(self, data: bytes, sender: Address, to: Address) -> None:
        self.datagrams += 1
        if self._chance.random() >= self.weather.loss:
            self._number += 1
            at = self._clock.at + self._chance.random() * self.weather.jitter_s
            heapq.heappush(self._queue, (at, self._number, data, sender, to))

    def _deliver(self, now: float) -> None:
        while self._queue and self._queue[0][0] <= now:
            at, _, data, sender, to = heapq.heappop(self._queue)
            if to == LEADER:
                if now < self._leader_paused_until:
                    self._wait(self._leader_paused_until, data, sender, to)
                else:
                    self.exchange.receive(data, sender)
                continue
            number = self._number_of(to)
            if self.dead_at[number] <= at:
                continue
            if now < self._paused_until[number]:
                self._wait(float(self._paused_until[number]), data, sender, to)
            elif data:
                pulse = self._pulse(number)
                pulse.receive(data, sender, now)
                self._come_again(number, pulse, now)
            else:
                self._come_again(number, self._pulse(number), now)

    def _wait(self, until: float, data: bytes, sender: Address, to: Address) -> None:
        self._number += 1
        heapq.heappush(self._queue, (until, self._number, data, sender, to))

    def _come_again(self, number: int, pulse: Pulse, now: float) -> None:
        """Let a helper say in time that nothing came: an empty datagram to itself is its timer."""
        due = pulse.carries_until(now)
        if due is not None:
            here = self.address_of(number)
            self._wait(max(due, now + TICK_S), b"", here, here)

    def _pulse(self, number: int) -> Pulse:
        pulse = self._pulses.get(number)
        if pulse is None:
            name = self.names[number]
            pulse = self._pulses[number] = Pulse(name, contact=Contact(boot_id=""), counter=1)
            key = beats.key_of(CELL_KEY, name, self._epoch)
            pulse.serve(BeatGrant(key=key, epoch=self._epoch, lasts_s=1e9), [])
            here = self.address_of(number)
            pulse.send_to = lambda data, to: self._send(data, here, to)
        return pulse


Moved = Callable[[float], None]


def run(field: Field, clock: ManualClock, until_s: float, moved: Moved = lambda _: None) -> None:
    """Move the clock in steps until `until_s`, calling `moved` after each."""
    while clock.at < until_s:
        clock.at += TICK_S
        field.step()
        moved(clock.at)
