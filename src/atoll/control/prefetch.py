"""Tells nodes which images they will need: looks at a few apps at a time, and writes a prediction down when it has seen all.

What is asked of each app is where the scheduler would put one more instance now. Nothing is remembered but what is in the store:
the next leader goes on from there.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

import structlog

from atoll.control.actions import Action, WritePrefetch
from atoll.control.placement import Placement
from atoll.control.prediction import NODES_PER_APP_MAX, STAY, Likelihood, Wish, predict
from atoll.control.readings import Heartbeats
from atoll.control.world import World
from atoll.model.ports.clock import Clock
from atoll.model.records import App, AppStatus, Instance, Node, OwnerKind, Prefetch, Status
from atoll.model.spec import AppSpec
from atoll.scheduling.demand import demand_of
from atoll.scheduling.explain import explain

ROUND_S = 15.0
"""Between two predictions at least; with many apps it is longer."""
APPS_PER_TICK = 4
"""Apps that are looked at in one tick of a second: each costs a dry run of the scheduler over all nodes."""
TICK_WORK_S = 0.02
"""Time after which a tick begins with no further app: the leader's loop has other things to do."""
LOOKS_PER_TICK = 200
"""The same, those among them for which nothing is to be fetched."""
INSTANCES_MAX = 1_000
"""Instances of one app that are looked at."""
HOLDERS_MAX = 100
"""Nodes that run an app already and are looked past."""

log = structlog.get_logger()


class Prefetching:
    """One term's predictions; `tick` is called about once a second and does its share."""

    def __init__(self, world: World, placement: Placement, clock: Clock, heartbeats: Heartbeats) -> None:
        self._world = world
        self._clock = clock
        self._placement = placement
        self._heartbeats = heartbeats
        self._left: list[str] = []
        self._wishes: list[Wish] = []
        self._under_way = False
        self._next_at = float("-inf")

    def tick(self) -> list[Action]:
        """Look at some apps; return what to write, which is nothing but at the end of a round."""
        began = self._clock.monotonic()
        if not self._under_way:
            if began < self._next_at:
                return []
            self._under_way, self._next_at = True, began + ROUND_S
            self._left, self._wishes = sorted(self._world.state.records(App), reverse=True), []
        looked = wished = 0
        while self._left and wished < APPS_PER_TICK and looked < LOOKS_PER_TICK:
            if looked and self._clock.monotonic() - began > TICK_WORK_S:
                break
            key, looked = self._left.pop(), looked + 1
            try:
                wish = self._wish(key)
            except Exception:  # the edge of one app's part: others' images are fetched all the same
                log.exception("no prediction for an app", app=key)
                wish = None
            if wish is not None:
                wished += 1
                self._wishes.append(wish)
        if self._left:
            return []
        self._under_way = False
        return list(self._changes())

    def _changes(self) -> Iterable[Action]:
        state = self._world.state
        before = {name: held.record.images for name, held in state.records(Prefetch).items()}
        has = {node: frozenset(beat.images) for node, beat in self._heartbeats.items()}
        lists = predict(self._wishes, before, has)
        for node in sorted(before.keys() | lists.keys() | state.broken(Prefetch)):
            images = lists.get(node, ())
            if images != before.get(node, ()) or node in state.broken(Prefetch):
                yield WritePrefetch(Prefetch(node=node, images=images))

    def _wish(self, key: str) -> Wish | None:
        """Return what an app may need; None where there is nothing to fetch for it, or nowhere to fetch it to."""
        world = self._world
        held = world.state.get(App, key)
        if held is None or held.record.deleting or held.record.replicas == 0 or len(world.state.records(Node)) < 2:
            return None
        app = held.record
        spec = world.release_spec(app, app.release)
        runs = Counter(i.node for i in self._instances(key) if i.node is not None and i.release == app.release)
        if spec is None or not runs:
            return None  # nothing of it runs: its first instances have their places before a prediction is made
        images, arch = self._images(spec, key, app.release)
        if not images:
            return None
        likelihood, nodes = self._chance(app, runs)
        demand = demand_of(spec)
        if demand.pinned and likelihood is Likelihood.REPLACED:
            return None  # it waits for the node that holds its volumes
        window = STAY * NODES_PER_APP_MAX + min(len(runs), HOLDERS_MAX)
        group = f"{OwnerKind.APP}/{key}/{app.release}/{app.generation}"
        found = explain(self._placement.snapshot, group, demand, limit=window).candidates
        candidates = tuple(c.node for c in found if c.node not in runs and (arch is None or self._arch(c.node) == arch))
        return Wish(app=key, images=images, likelihood=likelihood, nodes=nodes, candidates=candidates) if candidates else None

    def _chance(self, app: App, runs: Counter[str]) -> tuple[Likelihood, int]:
        together = max(runs.values())
        """Instances that the loss of one node would bring to others."""
        status = self._world.state.get(AppStatus, f"{app.project}/{app.name}")
        wanted = app.wanted(status.record if status is not None else None)
        if app.most is not None and app.most > wanted:
            return Likelihood.SCALED, max(together, app.most - wanted)
        if app.standby:
            return Likelihood.STOOD_BY, max(together, app.standby)
        return Likelihood.REPLACED, together

    def _instances(self, key: str) -> Iterable[Instance]:
        for name in sorted(self._world.owned.get((OwnerKind.APP, key), ()))[:INSTANCES_MAX]:
            held = self._world.state.get(Instance, name)
            if held is not None:
                yield held.record

    def _images(self, spec: AppSpec, key: str, release: int) -> tuple[tuple[str, ...], str | None]:
        """Return the references to fetch, and the architecture that they are for where that is not open.

        A tag is no reference to fetch: its digest is that which an instance of the release reports, and is one machine's. What a
        tag of a volume means, no instance reports.
        """
        images = [volume.image for volume in spec.volumes if volume.image is not None and "@" in volume.image]
        arch = None
        if spec.image is not None and "@" in spec.image:
            images.insert(0, spec.image)
        elif spec.image is not None:
            for instance in self._instances(key):
                status = self._world.state.get(Status, f"{instance.project}/{instance.id}")
                if instance.release == release and status is not None and status.record.image_digest is not None:
                    images.insert(0, f"{spec.image}@{status.record.image_digest}")
                    arch = self._arch(status.record.node)
                    break
        return tuple(dict.fromkeys(images)), arch

    def _arch(self, node: str) -> str | None:
        held = self._world.state.get(Node, node)
        return held.record.arch if held is not None else None
