"""What one life of an agent can reach of its machine: the fakes, with the time that they take, their failures, and its death."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence

from atoll.model.errors import RuntimeFailed, Unavailable
from atoll.model.ports.network import Link
from atoll.model.ports.runtime import Box, Found, Started
from atoll.model.records import Exit, Usage
from atoll.model.spec import NetworkRules, Port
from atoll.network.fake import FakeNetwork, FakeNetworkState
from atoll.runtimes.fake import FakeRuntime
from atoll.runtimes.fake_host import FakeHost
from atoll.sim.faults import Faults, Life
from atoll.sim.story import Story

START_S = 0.05
"""The longest that a runtime's call usually takes."""
SLOW_CALL_S = 70.0
"""A call that hangs takes up to so long: longer than the agent's patience with starting."""


class SimRuntime(FakeRuntime):
    """The fake runtime with the time that it takes, its failures, and its agent's death."""

    def __init__(self, host: FakeHost, life: Life, faults: Faults, story: Story, choose: random.Random) -> None:
        super().__init__(host)
        self._life = life
        self._faults = faults
        self._story = story
        self._choose = choose

    async def _before(self, call: str) -> None:
        self._life.check()
        await asyncio.sleep(self._choose.random() * START_S)
        if self._faults.hit(self._faults.profile.runtime_fails / 4):
            self._story.mark(f"runtime: {call} hangs")
            await self._faults.dawdle(SLOW_CALL_S)
        self._life.check()
        if self._faults.hit(self._faults.profile.runtime_fails):
            self._story.mark(f"runtime: {call} fails")
            raise RuntimeFailed(f"{call} was told to fail")

    async def _after(self) -> None:
        await self._faults.pause()
        self._life.check()

    async def create(self, box: Box) -> None:
        await self._before("create")
        await super().create(box)
        await self._after()

    async def start(self, id: str) -> Started:
        await self._before("start")
        started = await super().start(id)
        if self._faults.hit(self._faults.profile.runtime_fails / 4):
            self._story.mark("runtime: start hangs when done")
            await self._faults.dawdle(SLOW_CALL_S)
        await self._after()
        return started

    async def wait(self, id: str) -> Exit:
        self._life.check()
        exit = await super().wait(id)
        self._life.check()
        return exit

    async def signal(self, id: str, name: str) -> None:
        await self._before("signal")
        await super().signal(id, name)
        await self._after()

    async def kill(self, id: str) -> None:
        await self._before("kill")
        await super().kill(id)
        await self._after()

    async def pause(self, id: str) -> None:
        await self._before("pause")
        await super().pause(id)
        await self._after()

    async def resume(self, id: str) -> None:
        await self._before("resume")
        await super().resume(id)
        await self._after()

    async def usage(self, id: str) -> Usage:
        self._life.check()
        return await super().usage(id)

    async def delete(self, id: str) -> None:
        await self._before("delete")
        await super().delete(id)
        await self._after()

    async def recover(self) -> Sequence[Found]:
        await self._before("recover")
        found = await super().recover()
        self._life.adopted = True
        return found


class SimNetwork(FakeNetwork):
    def __init__(self, state: FakeNetworkState, life: Life, faults: Faults, story: Story) -> None:
        super().__init__(state)
        self._life = life
        self._faults = faults
        self._story = story

    async def _before(self, call: str) -> None:
        self._life.check()
        await self._faults.pause()
        self._life.check()
        if self._faults.hit(self._faults.profile.runtime_fails):
            self._story.mark(f"network: {call} fails")
            raise Unavailable(f"{call} was told to fail")

    async def attach(self, id: str, *, project: str, ports: Sequence[Port], rules: NetworkRules | None = None) -> Link:
        await self._before("attach")
        link = await super().attach(id, project=project, ports=ports, rules=rules)
        await self._faults.pause()
        self._life.check()
        return link

    async def detach(self, id: str) -> None:
        await self._before("detach")
        await super().detach(id)

    async def recover(self, keep: Sequence[str]) -> Sequence[Link]:
        await self._before("recover")
        return await super().recover(keep)
