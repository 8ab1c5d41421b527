"""What Prometheus servers say of how much apps have to do: asked by the leader every 15 s, each question once for a project.

Each project has rounds of its own, so that one whose servers are slow holds back nobody's answers but its own.
"""

from __future__ import annotations

import asyncio
from collections import Counter, defaultdict
from collections.abc import Mapping
from itertools import islice
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
AT_ONCE = 32
PROJECT_AT_ONCE = 4
"""So many of one project wait for answers at a time, for its servers may be slow, and others are not to wait for that."""
QUERIES_MAX = 1_000
"""Different questions of all projects together; they get room in turns."""
PROJECT_QUERIES_MAX = 100
"""Different questions of one project; apps beyond them, by name, are not asked for."""
NO_ROOM = f"not asked: there are more than {PROJECT_QUERIES_MAX} different queries in the project, or {QUERIES_MAX:,} in the cell"

Questions = dict[PrometheusQuery, list[str]]
"""Each with the apps that ask it."""

log = structlog.get_logger()


def rooms_of(wanted: Mapping[str, int]) -> Counter[str]:
    """Return how many questions of each project are asked: one of each in turn, until there is no room or nothing left. Pure."""
    places = sorted((at, project) for project, count in wanted.items() for at in range(min(count, PROJECT_QUERIES_MAX)))
    return Counter(project for _, project in places[:QUERIES_MAX])


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
        self._turns = asyncio.Semaphore(AT_ONCE)
        self._under_way: set[str] = set()
        """Projects whose last round has not ended: they are not asked for again before it has."""

    async def run(self) -> None:
        """Never returns."""
        async with asyncio.TaskGroup() as rounds:
            while True:
                for project, questions in self._look().items():
                    if project not in self._under_way:
                        self._under_way.add(project)
                        rounds.create_task(self._round(project, questions))
                await asyncio.sleep(EVERY_S)

    def _look(self) -> dict[str, Questions]:
        """Return what each project asks now, as far as there is room; forget what nobody asks, and tell those without room."""
        wanted: defaultdict[str, Questions] = defaultdict(dict)
        for key in sorted(self._world.scaling):
            query = self._query_of(key)
            if query is not None:
                wanted[key.partition("/")[0]].setdefault(query, []).append(key)
        rooms = rooms_of({project: len(questions) for project, questions in wanted.items()})
        asked = {project: dict(islice(questions.items(), rooms[project])) for project, questions in wanted.items()}
        heard = {query for questions in asked.values() for query in questions}
        left = {query: apps for questions in wanted.values() for query, apps in questions.items() if query not in heard}
        for kept in (self.answers, self.problems):
            for gone in kept.keys() - heard - left.keys():
                del kept[gone]
        for query, apps in left.items():
            if self.problems.get(query) != NO_ROOM:
                self.problems[query] = NO_ROOM
                self._decide(apps)
        return asked

    async def _round(self, project: str, questions: Questions) -> None:
        """Ask what one project asks, once."""
        turns = asyncio.Semaphore(PROJECT_AT_ONCE)
        try:
            async with asyncio.TaskGroup() as tasks:
                for query, apps in questions.items():
                    tasks.create_task(self._one(query, apps, turns))
        finally:
            self._under_way.discard(project)

    def _query_of(self, key: str) -> PrometheusQuery | None:
        held = self._world.state.get(App, key)
        return None if held is None or held.record.spec.scale is UNSET else held.record.spec.scale.prometheus

    async def _one(self, query: PrometheusQuery, apps: list[str], turns: asyncio.Semaphore) -> None:
        async with turns, self._turns:
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
        self._decide(apps)

    def _decide(self, apps: list[str]) -> None:
        for app in apps:
            self._world.dirty[(OwnerKind.APP, app)] = None
