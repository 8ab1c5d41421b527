"""The brake on giving up nodes: how it stands, and an operator's word that lets go of it."""

from __future__ import annotations

from atoll.api.service.access import SYSTEM, Caller
from atoll.api.service.context import Context, Draft, RequestKey
from atoll.model import codec, keys
from atoll.model.errors import Conflict
from atoll.model.ports.store import Put
from atoll.model.records import Brake, BrakeRelease
from atoll.model.views import BrakeView

_KEY = "cell"


class Brakes:
    def __init__(self, context: Context) -> None:
        self._context = context
        self._state = context.state

    def get(self) -> BrakeView:
        brake, release = self._state.get(Brake, _KEY), self._state.get(BrakeRelease, _KEY)
        released = brake is not None and release is not None and release.revision > brake.revision
        return BrakeView(brake=brake.record if brake is not None else None, released=released)

    async def release(self, *, caller: Caller = SYSTEM, request: RequestKey | None = None) -> BrakeView:
        """Have nodes that do not answer given up again, at the usual rate; it is for the brake that is on now. Safe to repeat.

        Raises Conflict: it is not on.
        """

        def build() -> Draft[BrakeView]:
            view = self.get()
            if view.brake is None:
                raise Conflict("the brake is not on", mend="'atoll nodes' says when it is")
            if view.released:
                return Draft(answer=lambda _: view)
            made = BrakeRelease(at=self._context.clock.now(), by=caller.name or caller.id)
            answer = BrakeView(brake=view.brake, released=True)
            return Draft(ops=[Put(keys.brake_release(), codec.encode(made))], answer=lambda _: answer)

        return await self._context.write(BrakeView, build, request)
