"""An operator, who takes machines out of use for a while and lets them be used again."""

from __future__ import annotations

import random
from collections.abc import Sequence

from atoll.model.errors import NotFound
from atoll.model.units import Seconds
from atoll.model.views import DrainRequest
from atoll.sim.line import Line
from atoll.sim.story import Story
from atoll.sim.users import THINK_S, User

DRAINED_S = 40.0
"""The longest that a machine is out of use."""
DRAINED_CALM_S = 20.0
"""The same without faults: less than `evacuation.NO_ROOM_S`, after which an app may serve with less than in a rollout."""


class Operator(User):
    def __init__(self, nodes: Sequence[str], line: Line, choose: random.Random, story: Story, *, calm: bool) -> None:
        super().__init__("the operator", line, choose, story)
        self._nodes = nodes
        self._longest_s = DRAINED_CALM_S if calm else DRAINED_S
        self._deadlines = (300.0,) if calm else (0.0, 5.0, 30.0, 300.0)

    async def run(self) -> None:
        """Drain one machine after another, until it is enough."""
        await self.idle(THINK_S)
        while not self.enough:
            await self._take_out(self.choose.choice(self._nodes))
            await self.idle(THINK_S)

    async def _take_out(self, node: str) -> None:
        wish = DrainRequest(deadline=Seconds(self.choose.choice(self._deadlines)), leave_volumes=True)
        try:
            await self.insist(f"drain {node} within {wish.deadline:g} s", lambda s, r: s.drains.start(node, wish, request=r))
        except NotFound:
            return  # it has not joined yet
        await self.idle(self._longest_s)
        await self.insist(f"undrain {node}", lambda s, r: s.drains.undo(node, request=r))
