"""Requests that clients send through the ingress all the time. In a calm run none of them may fail."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Mapping, Sequence

from atoll.sim.ingress import SimIngress
from atoll.sim.machine import SimMachine
from atoll.sim.rules import Rules
from atoll.sim.story import Story
from atoll.sim.users import PROJECT

EVERY_S = 0.7
LASTS_S = 1.5
"""The longest that a request takes."""
ACTIVE_MAX = 100


class Requests:
    def __init__(
        self,
        ingress: SimIngress,
        machines: Mapping[str, SimMachine],
        rules: Rules,
        story: Story,
        choose: random.Random,
        *,
        strict: bool,
    ) -> None:
        self._ingress = ingress
        self._machines = machines
        self._rules = rules
        self._story = story
        self._choose = choose
        self._strict = strict

    async def run(self, apps: Sequence[str]) -> None:
        """Ask for ever."""
        async with asyncio.TaskGroup() as group:
            active: set[asyncio.Task[None]] = set()
            while True:
                await asyncio.sleep(self._choose.random() * EVERY_S)
                if len(active) < ACTIVE_MAX:
                    task = group.create_task(self._ask(f"{PROJECT}/{self._choose.choice(apps)}"))
                    active.add(task)
                    task.add_done_callback(active.discard)

    async def _ask(self, app: str) -> None:
        endpoint = self._ingress.pick(app)
        if endpoint is None:
            if self._strict and self._rules.least_ready.get(app, 0) > 0:
                self._story.breaks(f"a request to {app} found nobody, though it serves")
            self._story.mark("request: nobody there")
            return
        machine = self._machines[endpoint.node]
        refused = machine.refuses(endpoint.address)
        process = machine.host.processes.get(endpoint.instance)
        self._ingress.active[endpoint.instance] += 1
        try:
            if not refused:
                await asyncio.sleep(self._choose.random() * LASTS_S)
                if process is None or not process.running:
                    refused = "the connection broke"
        finally:
            self._ingress.active[endpoint.instance] -= 1
        self._story.mark("request: failed" if refused else "request: answered")
        if refused and self._strict:
            self._story.breaks(f"a request to {app} at {endpoint.instance} failed without any fault: {refused}")
