"""A cell for a replay: one server as in production, with its API service, leader, controllers, scheduler and detection, over a
store in memory and on a virtual clock. Nothing of it fails by itself."""

from __future__ import annotations

import asyncio
import random
from contextlib import AsyncExitStack

from atoll.api.service.beat_keys import beat_key
from atoll.api.service.service import Service
from atoll.control.controllers import run_control
from atoll.control.detection.exchange import Exchange
from atoll.control.detection.rules import TICK_S
from atoll.model.records import Node
from atoll.sim.clock import EPOCH, VirtualClock
from atoll.sim.server import KINDS, SECRET_KEY
from atoll.store.cache import State
from atoll.store.memory import MemoryStore


class Cell:
    """Use as `async with`, on a virtual loop. `began_at` is the simulated date at which the trace begins."""

    def __init__(self, chance: random.Random) -> None:
        self.clock = VirtualClock(asyncio.get_running_loop())
        self.store = MemoryStore(self.clock)
        self.state = State(self.store, KINDS)
        self.service = Service(
            self.store,
            self.state,
            self.clock,
            chance,
            SECRET_KEY,
            entropy=lambda count: chance.randbytes(count),
            store_name="memory",
        )
        self.detection = Exchange(
            key_of=lambda node, epoch: beat_key(self.service.context, node, epoch),
            site_of=self._site_of,
            last_seen=self.service.heartbeats.last_seen(),
            clock=self.clock,
            chance=chance,
        )
        self.began_at = EPOCH
        self._chance = chance
        self._stack = AsyncExitStack()
        self._tasks: list[asyncio.Task[None]] = []

    def begin(self) -> None:
        """Let the trace begin now."""
        self.began_at = self.clock.now()

    def now_s(self) -> float:
        """Return the trace's time."""
        return self.clock.now() - self.began_at

    def pass_over(self, span_s: float) -> None:
        """Let a time go by in which nothing happens. It is the date that goes on: by the clock that leases, heartbeats and silence
        are counted with, none of it has passed, as on a machine that slept and did not notice."""
        self.clock.jump(span_s)

    def check(self) -> None:
        """Raise what ended one of the server's own tasks, which nothing may."""
        for task in self._tasks:
            if task.done():
                raise RuntimeError(f"the server's {task.get_name()} ended") from (None if task.cancelled() else task.exception())

    async def __aenter__(self) -> Cell:
        await self._stack.enter_async_context(self.state)
        await self._stack.enter_async_context(self.service)
        control = run_control(
            self.store,
            self.state,
            self.clock,
            self._chance,
            self.service.heartbeats.last_seen(),
            detection=self.detection,
            ingresses=self.service.ingresses.all(),
            traffic=self.service.traffic.totals(),
            demand=self.service.demand,
        )
        self._tasks = [
            asyncio.create_task(control, name="control"),
            asyncio.create_task(self._tick(), name="detection"),
        ]
        return self

    async def __aexit__(self, *_: object) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._stack.aclose()
        await self.store.close()

    async def _tick(self) -> None:
        while True:
            self.detection.tick()
            await asyncio.sleep(TICK_S)

    def _site_of(self, node: str) -> str | None:
        held = self.state.get(Node, node)
        return held.record.site if held is not None else None
