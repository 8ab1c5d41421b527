"""Who must hear of what: one task follows the cache and marks, for every agent and ingress that listens, what has changed.

A listener is marked, never queued for: what it is told is computed from the newest records when it is ready to hear. So a slow
listener costs one set of names, and a busy record is told once.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import AsyncIterator, Mapping

import structlog

from atoll.api.service.callers import CALLERS, caller_ca
from atoll.api.service.context import Context
from atoll.api.service.following import Following
from atoll.api.service.lookups import by_node, by_owner
from atoll.api.service.routing import routing_of
from atoll.api.service.specs import spec_of
from atoll.model.errors import Unavailable
from atoll.model.fabric import FabricNode
from atoll.model.ports.control_plane import AssignmentBatch, RoutingBatch
from atoll.model.records import (
    App,
    AppStatus,
    Assignment,
    Instance,
    Node,
    NodeLiveness,
    OwnerKind,
    Prefetch,
    Project,
    Release,
    Routing,
    Status,
)
from atoll.model.records.certificate import CertificateRoot
from atoll.model.spec import AppSpec
from atoll.model.states import Desired, Phase
from atoll.store.cache import Delta, Deltas, Held
from atoll.store.index import by_project

LEFT_S, LEFT_MAX = 3_600.0, 10_000
"""How long it is known that a project had an instance on a node, and of how many."""
ROUTINGS_AT_ONCE = 500
"""Apps whose routing is computed before others get their turn."""

_ENDED = frozenset({Phase.STOPPED, Phase.SUCCEEDED, Phase.FAILED})
"""What a node says once, for good; `lost` is said of it by others."""

log = structlog.get_logger()


class Listener:
    """One agent's or ingress's open ear."""

    def __init__(self) -> None:
        self.dirty: set[str] = set()
        self.everything = True
        """Tell all anew: at first, and after this server lost track."""
        self.prefetch = False
        """Tell which images the node may need."""
        self.ended = False
        self._wake = asyncio.Event()

    def mark(self, key: str) -> None:
        self.dirty.add(key)
        self._wake.set()

    def mark_prefetch(self) -> None:
        self.prefetch = True
        self._wake.set()

    def mark_everything(self) -> None:
        self.everything = True
        self._wake.set()

    def end(self) -> None:
        self.ended = True
        self._wake.set()

    async def wait(self, keepalive_s: float | None) -> None:
        """Return when there is something to tell, or after `keepalive_s`. Raises Unavailable when the server stops."""
        if not self._wake.is_set():
            # A timer that wakes it costs a third of a deadline that ends it, and there is one for each of thousands of nodes.
            timer = asyncio.get_running_loop().call_later(keepalive_s, self._wake.set) if keepalive_s is not None else None
            try:
                await self._wake.wait()
            finally:
                if timer is not None:
                    timer.cancel()
        self._wake.clear()
        if self.ended:
            raise Unavailable("the server is stopping", mend="connect again")


class Feeds:
    """Assignments for agents, routing for ingresses. `start` before use; `close` ends every stream."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._state = context.state
        self._agents: dict[str, dict[Listener, None]] = defaultdict(dict)  # in the order they came, which repeats
        self._ingresses: dict[Listener, None] = {}
        self._routings: dict[str, Routing | None] = {}
        self._left: dict[tuple[str, str], float] = {}
        """(node, project) → when one of the project's instances has gone from there; the last so last."""
        self._following = Following(self._state, "feeds", self._apply, self._rebuild)

    def start(self) -> None:
        """Begin to follow; safe to repeat. Must be called where the event loop runs."""
        self._following.start()

    async def close(self) -> None:
        for listener in (*self._ingresses, *(one for group in self._agents.values() for one in group)):
            listener.end()
        await self._following.close()

    def of_node(self, node: str) -> list[Held[Instance]]:
        """Return the instances that are placed on `node`."""
        return list(self._state.found(Instance, by_node, node).values())

    def had(self, node: str, project: str) -> bool:
        """Return whether an instance of the project was on `node` in the last LEFT_S, as far as this server has seen it go."""
        at = self._left.get((node, project))
        return at is not None and self._context.clock.monotonic() - at < LEFT_S

    async def assignments(self, node: str, keepalive_s: float | None = None) -> AsyncIterator[AssignmentBatch]:
        """See `ControlPlane.assignments`; with `keepalive_s`, an empty batch whenever so long nothing happened.

        What is not in a complete batch is gone, and its node forgets it. So none comes from a server that others may have left
        behind: it raises Unavailable where it cannot be sure.
        """
        listener = self._listen(self._agents[node])
        try:
            while True:
                if listener.everything:
                    await self._context.be_current()
                    await self._following.reach(int(self._state.revision))
                revision = self._following.revision
                if listener.everything:
                    listener.everything = listener.prefetch = False
                    listener.dirty.clear()
                    yield self._all_assignments(node, revision)
                else:
                    dirty, listener.dirty = listener.dirty, set()
                    prefetch = self._prefetch(node) if listener.prefetch else None
                    listener.prefetch = False
                    yield self._assignment_changes(node, revision, dirty, prefetch)
                await listener.wait(keepalive_s)
        finally:
            self._agents[node].pop(listener, None)
            if not self._agents[node]:
                del self._agents[node]

    async def routing(self, keepalive_s: float | None = None) -> AsyncIterator[RoutingBatch]:
        """See `ControlPlane.routing`."""
        listener = self._listen(self._ingresses)
        sent: dict[str, Routing] = {}
        now = asyncio.get_running_loop().time
        told_at = now()
        try:
            while True:
                complete = listener.everything
                listener.everything = False
                revision = self._following.revision
                dirty, listener.dirty = listener.dirty, set()
                names = set(self._state.records(App)) if complete else dirty
                put, removed = [], []
                for count, key in enumerate(sorted(names), 1):
                    routing = self._routing(key)
                    if key in self._state.broken(App):
                        continue  # what was told of it holds
                    if routing is None:
                        if sent.pop(key, None) is not None:
                            removed.append(key)
                    elif complete or sent.get(key) != routing:
                        sent[key] = routing
                        put.append(routing)
                    if count % ROUTINGS_AT_ONCE == 0:
                        await asyncio.sleep(0)
                if complete:
                    sent = {f"{routing.project}/{routing.app}": routing for routing in put}
                    told_at = now()
                    yield RoutingBatch(revision, True, tuple(put), kept=tuple(sorted(self._state.broken(App))))
                elif put or removed or (keepalive_s is not None and now() - told_at >= keepalive_s):
                    told_at = now()
                    yield RoutingBatch(revision, False, tuple(put), tuple(removed))
                await listener.wait(keepalive_s)
        finally:
            self._ingresses.pop(listener, None)

    def _listen(self, group: dict[Listener, None]) -> Listener:
        if self._following.closed:
            raise Unavailable("the server is stopping", mend="connect again")
        self.start()
        listener = Listener()
        group[listener] = None
        return listener

    def _all_assignments(self, node: str, revision: int) -> AssignmentBatch:
        """What does not decode may be any node's, and is kept by whichever has it."""
        put = []
        kept = {key.rpartition("/")[2]: Desired.RUN for key in self._state.broken(Instance)}
        for held in sorted(self.of_node(node), key=lambda one: one.record.id):
            assignment = self._assignment(held)
            if assignment is not None:
                put.append(assignment)
            else:
                kept[held.record.id] = self._kept(held)
        return AssignmentBatch(revision, True, tuple(put), kept=kept, prefetch=self._prefetch(node))

    def _prefetch(self, node: str) -> tuple[str, ...]:
        held = self._state.get(Prefetch, node)
        return held.record.images if held is not None else ()

    def _assignment_changes(
        self, node: str, revision: int, dirty: set[str], prefetch: tuple[str, ...] | None = None
    ) -> AssignmentBatch:
        put, removed, kept = [], [], {}
        for key in sorted(dirty):
            held = self._state.get(Instance, key)
            id = key.rpartition("/")[2]
            if held is None and key in self._state.broken(Instance):
                kept[id] = Desired.RUN
            elif held is None or held.record.node != node:
                removed.append(id)
            elif (assignment := self._assignment(held)) is not None:
                put.append(assignment)
            else:
                kept[id] = self._kept(held)
        return AssignmentBatch(revision, False, tuple(put), tuple(removed), kept, prefetch)

    def _assignment(self, held: Held[Instance]) -> Assignment | None:
        """Return what the node needs to run it; None where the node goes on with what it has of it, if anything.

        So it is with what has ended there for good.
        """
        if self._has_ended(held.record):
            return None
        spec = spec_of(self._state, held.record)
        if spec is None:
            log.error(
                "an instance's spec is gone; its node goes on with what it knows",
                instance=held.record.id,
                release=held.record.release,
            )
            return None
        mutual = isinstance(spec, AppSpec) and spec.ingress is not None and spec.ingress.mutual
        ca = caller_ca(self._state) if mutual else ""
        return Assignment(instance=held.record, workload=spec, revision=held.revision, caller_ca=ca)

    def _kept(self, held: Held[Instance]) -> Desired:
        """A node that forgot an end (it lost power or its disk was full, and so its newest records) is not to run it again."""
        return Desired.STOP if self._has_ended(held.record) else held.record.desired

    def _has_ended(self, instance: Instance) -> bool:
        status = self._state.get(Status, f"{instance.project}/{instance.id}")
        return status is not None and status.record.node == instance.node and status.record.phase in _ENDED

    def _routing(self, key: str) -> Routing | None:
        """Compute an app's routing, once for all ingresses."""
        if key not in self._routings:
            app = self._state.get(App, key)
            instances = [held.record for held in self._of_app(key).values()]
            routing = routing_of(self._state, app.record, instances, self._context.domain) if app is not None else None
            self._routings[key] = routing
        return self._routings[key]

    def _rebuild(self) -> None:
        self._routings.clear()
        for listener in (*self._ingresses, *(one for group in self._agents.values() for one in group)):
            listener.mark_everything()

    def _of_app(self, key: str) -> Mapping[str, Held[Instance]]:
        project, _, name = key.partition("/")
        return self._state.found(Instance, by_owner, (OwnerKind.APP, project, name))

    def _apply(self, deltas: Deltas) -> None:
        apps: set[str] = set()
        for delta in deltas.deltas:
            if delta.kind is Instance:
                self._apply_instance(delta.key, delta.old, delta.new, apps)
            elif delta.kind is Status:
                held = self._state.get(Instance, delta.key)
                if held is not None and held.record.owner_kind is OwnerKind.APP:
                    apps.add(f"{held.record.project}/{held.record.owner}")
            elif delta.kind is CertificateRoot and delta.key == CALLERS:
                for listener in (one for group in self._agents.values() for one in group):
                    listener.mark_everything()
            elif delta.kind is Prefetch:
                for listener in self._agents.get(delta.key, ()):
                    listener.mark_prefetch()
            elif delta.kind is Project and _request_rate(delta.old) != _request_rate(delta.new):
                apps.update(self._state.found(App, by_project, delta.key))
            elif delta.kind is App or (delta.kind is AppStatus and _shares(delta.old) != _shares(delta.new)):
                apps.add(delta.key)
            elif delta.kind is Release and delta.old is None and delta.new is not None:
                self._apply_release(delta.new.record)
            elif delta.kind in (NodeLiveness, FabricNode) or (delta.kind is Node and _moved(delta)):
                for one in self.of_node(delta.key):
                    apps.add(f"{one.record.project}/{one.record.owner}")
        for app in apps:
            self._routings.pop(app, None)
            for listener in self._ingresses:
                listener.mark(app)

    def _apply_release(self, release: Release) -> None:
        """A release is there before its instances, but for one that was damaged and has come back."""
        for key, held in self._of_app(f"{release.project}/{release.app}").items():
            if held.record.node is not None and held.record.release == release.number:
                for listener in self._agents.get(held.record.node, ()):
                    listener.mark(key)

    def _apply_instance(self, key: str, old: Held[Instance] | None, new: Held[Instance] | None, apps: set[str]) -> None:
        either = new or old
        if either is None:
            return
        record = either.record
        if record.owner_kind is OwnerKind.APP:
            apps.add(f"{record.project}/{record.owner}")
        if old is not None and old.record.node is not None and (new is None or new.record.node != old.record.node):
            self._note_left(old.record.node, record.project)
        for node in {held.record.node for held in (old, new) if held is not None and held.record.node is not None}:
            for listener in self._agents.get(node, ()):
                listener.mark(key)

    def _note_left(self, node: str, project: str) -> None:
        self._left.pop((node, project), None)
        self._left[node, project] = self._context.clock.monotonic()
        if len(self._left) > LEFT_MAX:
            del self._left[next(iter(self._left))]


def _shares(held: Held[AppStatus] | None) -> object:
    """Return what the routing takes from an app's status."""
    rollout = held.record.rollout if held is not None else None
    return (rollout.weights, rollout.phase, rollout.serving) if rollout is not None else None


def _request_rate(held: Held[Project] | None) -> int | None:
    return held.record.quota.requests_per_s if held is not None and held.record.quota is not None else None


def _moved(delta: Delta) -> bool:
    return delta.old is None or delta.new is None or delta.old.record.site != delta.new.record.site
