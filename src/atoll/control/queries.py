"""What Prometheus servers say of how much apps have to do: asked by the leader every 15 s, each question once for all who ask."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from typing import Protocol

import structlog
from msgspec import UNSET

from atoll.control.world import World
from atoll.model.errors import AtollError, Forbidden
from atoll.model.ports.clock import Clock
from atoll.model.records import App, OwnerKind
from atoll.model.spec import PrometheusQuery

EVERY_S = 15.0
ANSWER_S = 5.0
"""The longest wait for an answer."""
AT_ONCE = 8
QUERIES_MAX = 1_000
"""Different questions; apps beyond them, by name, are not asked for."""

log = structlog.get_logger()


class Ask(Protocol):
    """Where questions go."""

    async def ask(self, query: PrometheusQuery) -> float:
        """Return the answer. Raises Forbidden for a server that may not be asked, Invalid for no single number, Unavailable."""
        ...


class Queries:
    """One term's answers. Read live by the decisions; an app is decided about when its answer, or the lack of one, is new."""

    def __init__(self, world: World, clock: Clock, ask: Ask | None) -> None:
        self._world = world
        self._clock = clock
        self._ask = ask
        self.answers: dict[PrometheusQuery, tuple[float, float]] = {}
        """The last, and when it came, on the monotonic clock."""
        self.problems: dict[PrometheusQuery, str] = {}
        """Why there was none, the last time."""

    async def run(self) -> None:
        """Never returns."""
        while True:
            await self.round()
            await asyncio.sleep(EVERY_S)

    async def round(self) -> None:
        """Ask everything once."""
        wanted: defaultdict[PrometheusQuery, list[str]] = defaultdict(list)
        for key in sorted(self._world.scaling):
            query = self._query_of(key)
            if query is not None and (query in wanted or len(wanted) < QUERIES_MAX):
                wanted[query].append(key)
        for kept in (self.answers, self.problems):
            for gone in kept.keys() - wanted.keys():
                del kept[gone]
        turns = asyncio.Semaphore(AT_ONCE)
        async with asyncio.TaskGroup() as tasks:
            for query, apps in wanted.items():
                tasks.create_task(self._one(query, apps, turns))

    def _query_of(self, key: str) -> PrometheusQuery | None:
        held = self._world.state.get(App, key)
        return None if held is None or held.record.spec.scale is UNSET else held.record.spec.scale.prometheus

    async def _one(self, query: PrometheusQuery, apps: list[str], turns: asyncio.Semaphore) -> None:
        async with turns:
            try:
                if self._ask is None:
                    raise Forbidden("no server may be asked; the operator names them with --prometheus HOST:PORT")
                async with asyncio.timeout(ANSWER_S):
                    value = await self._ask.ask(query)
            except (AtollError, TimeoutError) as error:
                self.problems[query] = str(error) or f"no answer within {ANSWER_S:g} s"
            except Exception as error:  # the outer edge of a question: one that breaks is one without an answer
                log.exception("asking a Prometheus server failed", url=query.url)
                self.problems[query] = f"a fault: {type(error).__name__}"
            else:
                self.answers[query] = (value, self._clock.monotonic())
                self.problems.pop(query, None)
        for app in apps:
            self._world.dirty[(OwnerKind.APP, app)] = None
