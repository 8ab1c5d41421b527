"""The snapshots of a project: each is on one node, which alone knows of it, so nodes are asked."""

from __future__ import annotations

import asyncio

from atoll.api.service.asking import answer_of
from atoll.api.service.context import Context
from atoll.api.service.projects import require_project
from atoll.api.service.tunnels import Tunnels
from atoll.model import codec
from atoll.model.errors import AtollError, NotFound
from atoll.model.ports.control_plane import StreamKind
from atoll.model.records import Node, NodeHealth, NodeLiveness
from atoll.model.spec import SNAPSHOT_RUNTIMES
from atoll.model.streams import SnapshotView
from atoll.model.views import SnapshotsView

ANSWER_S = 10.0
"""How long one node has for its list, or for removing one."""
ASKED_AT_ONCE = 32


class ProjectSnapshots:
    def __init__(self, context: Context, tunnels: Tunnels) -> None:
        self._context = context
        self._tunnels = tunnels

    async def all(self, project: str, node: str | None = None) -> SnapshotsView:
        """Return the project's snapshots, those used last first, of all nodes that can have any, or of one; and which were silent.

        Raises NotFound.
        """
        require_project(self._context, project)
        turns = asyncio.Semaphore(ASKED_AT_ONCE)

        async def ask(name: str) -> tuple[SnapshotView, ...] | None:
            async with turns:
                try:
                    return codec.decode(await self._ask(name, StreamKind.SNAPSHOTS, {"project": project}), tuple[SnapshotView, ...])
                except AtollError:
                    return None

        names = [node] if node is not None else self._able()
        if node is not None:
            self._require(node)
        answers = dict(zip(names, await asyncio.gather(*map(ask, names)), strict=True))
        found = [view for views in answers.values() for view in views or ()]
        silent = tuple(name for name, views in answers.items() if views is None)
        return SnapshotsView(snapshots=tuple(sorted(found, key=lambda view: -view.used_at)), silent=silent)

    async def remove(self, project: str, digest: str, node: str) -> SnapshotsView:
        """Remove one from its node; sandboxes that went on from it go on. Raises NotFound, Invalid, and what keeps the node from
        answering; a retry is safe."""
        require_project(self._context, project)
        self._require(node)
        await self._ask(node, StreamKind.SNAPSHOT_REMOVE, {"project": project, "digest": digest})
        return SnapshotsView()

    async def _ask(self, node: str, kind: str, options: dict[str, str]) -> bytes:
        pipe = await self._tunnels.open(node, kind, "", options, lost=self._is_lost(node))
        return await answer_of(pipe, node, ANSWER_S, of_node=True)

    def _able(self) -> list[str]:
        """Return the nodes that can have any, and are not lost, by name."""
        able = set(SNAPSHOT_RUNTIMES)
        nodes = (held.record for held in self._context.state.records(Node).values())
        return sorted(node.name for node in nodes if able & set(node.runtimes) and not self._is_lost(node.name))

    def _is_lost(self, node: str) -> bool:
        liveness = self._context.state.get(NodeLiveness, node)
        return liveness is not None and liveness.record.health is NodeHealth.LOST

    def _require(self, node: str) -> None:
        if self._context.state.get(Node, node) is None:
            raise NotFound(f"no node '{node[:60]}'", field="node", mend="'atoll nodes' lists them")
