"""A user whose app goes by shares of the requests: canaries and blue-green sets, judged by what ingresses count, and steered."""

from __future__ import annotations

import asyncio
import random

from atoll.api.service.access import SYSTEM
from atoll.model.errors import Conflict, NotFound
from atoll.model.records import AppPhase
from atoll.model.rollouts import RolloutPhase
from atoll.model.spec import Analysis, CanaryStep, Rollout, Strategy
from atoll.model.units import Seconds
from atoll.sim.line import Line
from atoll.sim.story import Story
from atoll.sim.users import PROJECT, REPLICAS_MAX, RETRY_S, AppUser

FINISH_MAX = 10
"""Releases that are made until one goes through: one that is judged while machines are away may be taken back."""
ANALYSIS = Analysis(error_rate_max=0.3, requests_min=2, interval=Seconds(2), failures_max=1)
ORDERS = ("pause", "resume", "promote", "abort")


class SteeringUser(AppUser):
    """As any owner of an app, who also speaks of how its rollouts go on."""

    def __init__(self, name: str, line: Line, choose: random.Random, story: Story, *, calm: bool, once: float = 0.0) -> None:
        super().__init__(name, line, choose, story, calm=calm, once=once)
        blue_green = choose.random() < 0.3
        weights = sorted(choose.sample((20, 40, 60, 80), choose.randint(1, 2)))
        steps = tuple(CanaryStep(weight=weight, pause=Seconds(choose.choice((1, 4)))) for weight in weights)
        self.rollout = Rollout(
            strategy=Strategy.BLUE_GREEN if blue_green else Strategy.CANARY,
            steps=() if blue_green else steps,
            max_surge=choose.randint(1, 2),
            max_unavailable=self.rollout.max_unavailable,
            drain=self.rollout.drain,
            deadline=self.rollout.deadline,
            analysis=ANALYSIS if choose.random() < 0.6 else None,
            promote_after=Seconds(choose.choice((1, 4))) if blue_green else None,
            keep_old=Seconds(choose.choice((1, 4))),
        )

    async def wish(self) -> None:
        if not self.exists or self.choose.random() < 0.5:
            await super().wish()
        else:
            await self.steer(self.choose.choice(ORDERS))

    async def restart(self) -> None:
        """It is refused while two releases share the requests."""
        self.generation += 1
        try:
            self._expect(await self.insist("restart", lambda s, r: s.apps.restart(PROJECT, self.app, request=r)))
        except Conflict:
            self.generation -= 1

    async def steer(self, order: str) -> None:
        """Speak of the rollout that is under way; that there is none is no fault."""
        try:
            view = await self.insist(
                f"{order} the rollout", lambda s, r: getattr(s.rollouts, order)(SYSTEM, PROJECT, self.app, request=r)
            )
        except Conflict:
            self.story.mark("user: there is no rollout to steer")
        else:
            self.story.mark(f"user: {order} a rollout")
            self._expect(view)

    async def finish(self) -> None:
        """Leave the app with a release that works and has all requests."""
        for _ in range(FINISH_MAX if self.exists else 0):
            await self.put(good=True, scale=self.choose.randint(1, REPLICAS_MAX))
            if await self._goes_through():
                return

    async def _goes_through(self) -> bool:
        """Wait for the end of the rollout: whether the release has all requests, and was not taken back."""
        while True:
            try:
                view = await self.read(lambda service: service.apps.get(PROJECT, self.app))
            except NotFound:
                self.story.breaks(f"{self.app}, which was acknowledged, is not there")
                return True
            status = view.status
            rollout = status.rollout if status is not None and status.release == self.release else None
            if rollout is not None and rollout.release == self.release and rollout.phase is RolloutPhase.REVERTED:
                self.story.tell(f"{self.name} sees that release {self.release} was taken back", why=rollout.message)
                return False
            if status is not None and (status.release, status.phase) == (self.release, AppPhase.RUNNING):
                return True
            await asyncio.sleep(RETRY_S)
