"""Clients that read and write one record through any server, and keep a history of it for `linear.py`.

The record is an app without instances: what counts of it is one variable. Writes, also those under a condition, must be
linearizable, whichever server takes them. Reads come from a server's cache, which may lag: each must be of some moment up to its
answer, so they are entered as if they had begun with the first of all; and at one server they never go back.
"""

from __future__ import annotations

import asyncio
import random

from atoll.api.service.access import SYSTEM
from atoll.api.service.context import RequestKey
from atoll.model.errors import AtollError, Conflict, DeadlineExceeded, NotFound, OutcomeUnknown, StaleRevision, Unavailable
from atoll.model.spec import AppSpec, Scale
from atoll.model.views import AppView
from atoll.sim.line import Line
from atoll.sim.linear import NEVER, Operation, Record, check
from atoll.sim.story import Story

APP = "register"
PROJECT = "default"
PAUSE_S = 2.5
TRIES_MAX = 6
"""Tries of one write with one key; then its outcome stays unknown."""
RETRY_S = 0.7
OPERATIONS_MAX = 40
"""Of one client in one run."""


class Register:
    """The record's clients and their history."""

    def __init__(self, lines: list[Line], choose: random.Random, story: Story) -> None:
        self.history: list[Operation] = []
        self._clients = [_Client(f"client{n}", line, self.history, choose, story) for n, line in enumerate(lines)]
        self._story = story

    async def run(self) -> None:
        """Work for ever, or until each has done enough."""
        async with asyncio.TaskGroup() as group:
            for client in self._clients:
                group.create_task(client.run())

    def check(self) -> None:
        """Break the story if the history cannot have been."""
        verdict = check(self.history, Record())
        if not verdict.holds:
            self._story.breaks(verdict.story())
        self._story.marks["history: operations checked"] += len(self.history)


class _Client:
    def __init__(self, name: str, line: Line, history: list[Operation], choose: random.Random, story: Story) -> None:
        self._name = name
        self._line = line
        self._history = history
        self._choose = choose
        self._story = story
        self._count = 0
        self._known: int | None = None
        """The revision that it last saw."""
        self._newest: dict[str, int] = {}
        """Server → the newest revision that was read there, with its life."""

    async def run(self) -> None:
        while self._count < OPERATIONS_MAX:
            await asyncio.sleep(self._choose.random() * PAUSE_S)
            self._count += 1
            match self._choose.randrange(4):
                case 0:
                    await self._read()
                case 1:
                    await self._write(None)
                case 2:
                    await self._write(self._known)
                case _:
                    await self._read()
                    await self._write(self._known)

    def _now(self) -> float:
        return asyncio.get_running_loop().time()

    async def _write(self, expected: int | None) -> None:
        value = f"{self._name}-{self._count}"
        request = RequestKey(caller=self._name, key=value, fingerprint=value)
        spec = AppSpec(name=APP, image="registry.test/app:1", env={"VALUE": value}, scale=Scale(replicas=0))
        call, argument = ("put", value) if expected is None else ("put-if", (value, expected))
        began, ended = self._now(), NEVER
        result: int | None = None
        self._story.tell(f"{self._name} writes", value=value, expected=expected)
        try:
            for _ in range(TRIES_MAX):
                try:
                    view = await self._line.call(lambda s: s.apps.put(SYSTEM, spec, if_match=expected, request=request))
                except StaleRevision:
                    ended = self._now()
                    self._story.mark("history: a stale write was refused")
                    break
                except (Conflict, Unavailable, OutcomeUnknown, DeadlineExceeded):
                    await asyncio.sleep(RETRY_S)
                else:
                    ended, self._known = self._now(), view.revision
                    result = view.revision
                    break
            else:
                self._story.mark("history: outcome unknown")
        finally:
            # Also where the client ends while it waits: then it may have happened.
            self._enter(call, argument, result, began, ended)

    async def _read(self) -> None:
        async def get(service: object) -> AppView:
            return service.apps.get(PROJECT, APP)  # type: ignore[attr-defined, no-any-return]

        server = self._line.server
        where = f"{server.name}/{server.life.name}"
        try:
            view = await self._line.call(get)
        except NotFound:
            return  # this server has not heard of it yet
        except AtollError:
            return
        if view.revision < self._newest.get(where, 0):
            self._story.breaks(f"{self._name} read revision {view.revision} at {where}, after {self._newest[where]}")
        self._newest[where] = view.revision
        self._known = view.revision
        # Served from a cache: as of any moment before.
        self._enter("get", None, (view.app.spec.env["VALUE"], view.revision), 0.0, self._now())

    def _enter(self, call: str, argument: object, result: object, began: float, ended: float) -> None:
        operation = Operation(client=self._name, key=APP, call=call, argument=argument, result=result, began=began, ended=ended)
        self._history.append(operation)
