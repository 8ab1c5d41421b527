"""Requests that clients send through the sites' ingresses all the time. In a calm run none of them may fail."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Mapping, Sequence

from atoll.model.records import Endpoint
from atoll.sim.ingress import SimIngress
from atoll.sim.machine import SimMachine
from atoll.sim.net import Net
from atoll.sim.story import Story
from atoll.sim.users import PROJECT

EVERY_S = 0.7
LASTS_S = 1.5
"""The longest that a request takes."""
ACTIVE_MAX = 100
TRIES_MAX = 5
"""Endpoints that a request is sent to, one after another, where none has begun to work on it: Envoy's four retries."""


class Requests:
    """`must_serve` says whether an app is sure to have a ready instance; then nobody's being there is a failure too."""

    def __init__(
        self,
        ingresses: Sequence[SimIngress],
        machines: Mapping[str, SimMachine],
        net: Net,
        must_serve: Callable[[str], bool],
        story: Story,
        choose: random.Random,
        *,
        strict: bool,
        every_s: float = EVERY_S,
    ) -> None:
        self._ingresses = ingresses
        self._machines = machines
        self._net = net
        self._must_serve = must_serve
        self._story = story
        self._choose = choose
        self.strict = strict
        """Without any fault: no request fails, not even at first."""
        self.sure = False
        """Processes crash and sites are cut off, but each app has another instance at the site: no request fails in the end."""
        self._every_s = every_s
        self.failed = 0
        self.answered = 0

    def enter_by(self, ingresses: Sequence[SimIngress]) -> None:
        """Let requests enter by these alone from now on."""
        self._ingresses = ingresses

    async def run(self, apps: Sequence[str]) -> None:
        """Ask for ever."""
        async with asyncio.TaskGroup() as group:
            active: set[asyncio.Task[None]] = set()
            while True:
                await asyncio.sleep(self._choose.random() * self._every_s)
                if len(active) < ACTIVE_MAX:
                    ingress = self._choose.choice(self._ingresses)
                    task = group.create_task(self._ask(ingress, f"{PROJECT}/{self._choose.choice(apps)}"))
                    active.add(task)
                    task.add_done_callback(active.discard)

    async def _ask(self, ingress: SimIngress, app: str) -> None:
        tried: dict[str, str] = {}
        while len(tried) < TRIES_MAX:
            endpoint = ingress.pick(app, tried)
            if endpoint is None:
                break
            why = await self._send(ingress, endpoint)
            ingress.count(app, endpoint.release, failed=bool(why))
            if not why:
                self.answered += 1
                self._story.mark("request: answered" if not tried else "request: answered by another instance")
                return
            tried[endpoint.instance] = why
            if self.strict:
                self._story.breaks(f"a request to {app} at {endpoint.instance} failed without any fault: {why}")
        self.failed += 1
        self._story.mark("request: failed" if tried else "request: nobody there")
        if not tried and self.strict and self._must_serve(app):
            self._story.breaks(f"a request to {app} found nobody, though it serves")
        elif self.sure:
            self._story.breaks(f"a request to {app} through {ingress.name} failed: {tried or 'nobody there'}")

    async def _send(self, ingress: SimIngress, endpoint: Endpoint) -> str:
        """Return why it was not answered, or nothing."""
        machine = self._machines[endpoint.node]
        if not self._net.talk(ingress.name, machine.name):
            return "no route to the site"
        refused = machine.refuses(endpoint.address)
        if refused:
            return refused
        process = machine.host.processes.get(endpoint.instance)
        ingress.active[endpoint.instance] += 1
        try:
            await asyncio.sleep(self._choose.random() * LASTS_S)
        finally:
            ingress.active[endpoint.instance] -= 1
        return "the connection broke" if process is None or not process.running else ""
