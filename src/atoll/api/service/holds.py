"""Having a running instance stand still, go on, or be written down: asked of its node, which alone knows how."""

from __future__ import annotations

from atoll.api.service.asking import answer_of
from atoll.api.service.context import Context
from atoll.api.service.instances import Instances
from atoll.api.service.tunnels import Tunnels
from atoll.model import codec
from atoll.model.ports.control_plane import StreamKind
from atoll.model.records import NodeHealth, NodeLiveness
from atoll.model.streams import Held

ANSWER_S = 130.0
"""Above the agent's own deadline for the longest of them."""
KINDS = {"pause": StreamKind.PAUSE, "resume": StreamKind.RESUME, "snapshot": StreamKind.SNAPSHOT}


class Holds:
    def __init__(self, context: Context, instances: Instances, tunnels: Tunnels) -> None:
        self._context = context
        self._instances = instances
        self._tunnels = tunnels

    async def hold(self, project: str, id: str, what: str) -> Held:
        """Pause, resume or snapshot (`what`) an instance, and return how it then stands. Safe to repeat: a repeated snapshot is one
        of what is there then.

        Raises NotFound, Conflict (it does not run), and what the agent answers: Unsupported, Exhausted, RuntimeFailed,
        DeadlineExceeded, Unavailable, OutcomeUnknown.
        """
        instance = self._instances.running(project, id)
        node = instance.node or ""
        liveness = self._context.state.get(NodeLiveness, node)
        lost = liveness is not None and liveness.record.health is NodeHealth.LOST
        pipe = await self._tunnels.open(node, KINDS[what], id, {}, lost=lost)
        return codec.decode(await answer_of(pipe, node, ANSWER_S), Held)
