"""Drains: an operator's word that everything is to leave a node, its undoing, and how far it has come.

A drain is a policy of the node; the leader works it off, whoever asked for it is still there or not.
"""

from __future__ import annotations

from msgspec.structs import replace

from atoll.api.service.access import SYSTEM, Caller
from atoll.api.service.context import Context, Draft, RequestKey
from atoll.api.service.lookups import by_node, by_owner, owner_of
from atoll.api.service.nodes import Nodes
from atoll.api.service.specs import spec_of
from atoll.model import keys, stored
from atoll.model.errors import NotFound
from atoll.model.evacuation import Evacuation, evacuation_of, in_force, in_words
from atoll.model.maintenance import Drain, Maintenance
from atoll.model.ports.store import Put, absent, unchanged
from atoll.model.records import App, AppStatus, Instance, Node, NodePolicy, Status
from atoll.model.spec import AppSpec, JobSpec
from atoll.model.states import Desired
from atoll.model.views import DrainItem, DrainRequest, DrainState, DrainView, NodeView
from atoll.scheduling.budget import may_go
from atoll.scheduling.demand import holds_volumes
from atoll.store.cache import Held


class Drains:
    def __init__(self, context: Context, nodes: Nodes) -> None:
        self._context = context
        self._state = context.state
        self._nodes = nodes

    async def start(self, name: str, wish: DrainRequest, *, caller: Caller = SYSTEM, request: RequestKey | None = None) -> NodeView:
        """Have everything leave a node, or change how. Safe to repeat: who asks again only moves the deadline. Raises NotFound."""

        def build() -> Draft[NodeView]:
            node, held = self._node(name), self._state.get(NodePolicy, name)
            policy = held.record if held is not None else NodePolicy(name=name)
            now = self._context.clock.now()
            before = policy.drain
            drain = Drain(
                since=before.since if before is not None else now,
                deadline=now + wish.deadline,
                leave_volumes=wish.leave_volumes,
                instances=before.instances if before is not None else len(self._on(node.record)),
                by=caller.name or caller.id,
            )
            return self._draft(name, held, replace(policy, drain=drain))

        return await self._context.write(NodeView, build, request)

    async def undo(self, name: str, *, request: RequestKey | None = None) -> NodeView:
        """Let the node be used again; what has left does not come back. Safe to repeat. Raises NotFound."""

        def build() -> Draft[NodeView]:
            self._node(name)
            held = self._state.get(NodePolicy, name)
            if held is None or held.record.drain is None:
                return Draft(answer=lambda _: self._nodes.get(name))
            return self._draft(name, held, replace(held.record, drain=None))

        return await self._context.write(NodeView, build, request)

    def get(self, name: str, caller: Caller = SYSTEM) -> DrainView:
        """Return how far the drain, or the emptying before a maintenance, has come. Instances of projects that `caller` does not
        see are counted only. Raises NotFound."""
        node = self._node(name).record
        policy = self._state.get(NodePolicy, name)
        drain = policy.record.drain if policy is not None else None
        evacuation = self.evacuation(node)
        items = [self._item(held.record, evacuation) for held in self._on(node)]
        seen = tuple(sorted((i for i in items if caller.sees(i.project)), key=lambda i: (i.project, i.owner, i.instance)))
        left = sum(item.state is not DrainState.KEPT for item in items)
        return DrainView(
            node=name,
            evacuation=evacuation,
            drain=drain,
            items=seen,
            left=left,
            kept=len(items) - left,
            total=max(drain.instances if drain is not None else 0, len(items)),
            done=evacuation is not None and left == 0,
        )

    def evacuation(self, node: Node) -> Evacuation | None:
        """Return why instances are to leave the node now, None where they need not."""
        policy = self._state.get(NodePolicy, node.name)
        windows = in_force((held.record for held in self._state.records(Maintenance).values()), self._context.clock.now())
        return evacuation_of(node, policy.record if policy is not None else None, windows)

    def _node(self, name: str) -> Held[Node]:
        held = self._state.get(Node, name)
        if held is None:
            raise NotFound(f"no node '{name[:60]}'", mend="'atoll nodes' lists them")
        return held

    def _draft(self, name: str, held: Held[NodePolicy] | None, policy: NodePolicy) -> Draft[NodeView]:
        key = keys.node_policy(name)
        return Draft(
            compare=[absent(key) if held is None else unchanged(key, held.revision)],
            ops=[Put(key, stored.encode_over(policy, held.beside if held is not None else None))],
            answer=lambda _: replace(self._nodes.get(name), policy=policy),
        )

    def _on(self, node: Node) -> list[Held[Instance]]:
        """Return what is on the node and has not ended."""
        found = self._state.found(Instance, by_node, node.name).values()
        return [held for held in found if (status := self._status(held.record)) is None or not status.phase.final]

    def _status(self, instance: Instance) -> Status | None:
        held = self._state.get(Status, f"{instance.project}/{instance.id}")
        return held.record if held is not None else None

    def _item(self, instance: Instance, evacuation: Evacuation | None) -> DrainItem:
        state, why = self._standing(instance, evacuation)
        return DrainItem(
            instance=instance.id, project=instance.project, kind=instance.owner_kind, owner=instance.owner, state=state, why=why
        )

    def _standing(self, instance: Instance, evacuation: Evacuation | None) -> tuple[DrainState, str]:
        if instance.desired is Desired.STOP:
            return DrainState.STOPPING, instance.reason
        if instance.desired is Desired.DRAIN:
            return DrainState.DRAINING, "its requests come to their end"
        if evacuation is None:
            return DrainState.STAYS, ""
        spec = spec_of(self._state, instance)
        if isinstance(spec, AppSpec) and holds_volumes(spec) and not evacuation.leave_volumes:
            names = ", ".join(volume.name for volume in spec.volumes if not volume.read_only)
            return DrainState.KEPT, f"it writes to volumes of this node ({names}); --leave-volumes begins with empty ones elsewhere"
        until = in_words(evacuation.deadline)
        if isinstance(spec, JobSpec) or spec is None:
            return DrainState.RUNS, f"its end is waited for until {until}; then it is tried again elsewhere"
        if spec.placement.gang and spec.placement.together is not None:
            return DrainState.WAITS, f"it goes with its whole gang, at {until}"
        return self._of_app(instance, spec, until)

    def _of_app(self, instance: Instance, spec: AppSpec, until: str) -> tuple[DrainState, str]:
        key = f"{instance.project}/{instance.owner}"
        app, status = self._state.get(App, key), self._state.get(AppStatus, key)
        if app is None:
            return DrainState.STOPPING, "its app is gone"
        for other in self._newcomers(instance, app.record):
            if other.node is not None:
                return DrainState.REPLACING, f"{other.id} starts on {other.node}"
            if other.rejection is not None:
                return DrainState.WAITS, f"{other.id}, which is to serve in its place, has no node: {other.rejection.message}"
            return DrainState.REPLACING, f"{other.id} gets its place"
        wanted = app.record.wanted(status.record if status is not None else None)
        ready = status.record.ready if status is not None else 0
        spare = may_go(app.record.spec, wanted, ready)
        if spare > 0:
            return DrainState.WAITS, "it is next"
        return DrainState.WAITS, f"for the app's budget: {ready} of {wanted} are ready, {ready - spare} must be"

    def _newcomers(self, instance: Instance, app: App) -> list[Instance]:
        """Return those of the wanted release that do not serve yet: one of them is to serve in its place."""
        found = []
        for held in self._state.found(Instance, by_owner, owner_of(app)).values():
            other = held.record
            if other.id == instance.id or other.standby or other.desired is not Desired.RUN:
                continue
            status = self._status(other)
            if other.release == app.release and other.node != instance.node and not (status is not None and status.ready):
                found.append(other)
        return sorted(found, key=lambda other: (other.node is None, other.created_at, other.id))
