"""Apps that are near their users: where their instances should be, and which one moves next.

A new app gets a layout at once, by the quick way, so that nothing waits. An optimiser beside the loop goes on from what runs and is
asked again as requests shift. What runs elsewhere than it should moves one by one: another is started where it should be, and the
old one leaves when that serves. An answer that gains less than moving costs changes nothing (`layout.MOVE_MS`).
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Iterable, Mapping

import structlog
from msgspec import Struct
from msgspec.structs import replace

from atoll.control.actions import Seen
from atoll.control.facts import AppFacts
from atoll.control.optimiser import Optimiser
from atoll.control.placement import Placement
from atoll.control.world import Owner, World
from atoll.model.errors import Invalid, Unavailable
from atoll.model.evacuation import Evacuation
from atoll.model.ports.clock import Clock
from atoll.model.records import App, AppStatus, Ingress, IngressHeartbeat, Instance, Node, OwnerKind, RoundTrips, Site
from atoll.model.states import Desired
from atoll.scheduling.assembly import app_owner, entrances_of
from atoll.scheduling.demand import Demand, Pending, demand_of
from atoll.scheduling.geography import Geography
from atoll.scheduling.interface import View
from atoll.scheduling.layout import Question, ask, lay_out
from atoll.scheduling.near import wants_users
from atoll.scheduling.plan import plan
from atoll.scheduling.whereabouts import Layout, traffic_of
from atoll.store.cache import Deltas

LOOK_S = 10.0
"""How often requests by site are summed up."""
RECONSIDER_S = 60.0
"""How often the optimiser is asked about an app again."""
FAILED_S = 60.0
"""The pause after it has not answered."""
IDLE_S = 300.0
"""After so long without a question the optimiser rests."""
MOVE_PAUSE_S = 30.0
"""Between two moves of one app."""
MOVE_S = 600.0
"""For so long at most another is waited for; then the move is given up, and the app left alone for as long."""
MOVES_MAX = 10
"""Apps that have an instance on the move at a time."""

IngressHeartbeats = Mapping[str, IngressHeartbeat]
"""Ingress → its latest word. Owned by whoever takes them, and read live."""

log = structlog.get_logger()


class Move(Struct, frozen=True):
    instance: str
    to: str
    """The site that should have it."""
    until: float


class Layouts:
    """Keeps the snapshot's whereabouts current. Everything happens on one event loop; only the optimiser works beside it."""

    def __init__(
        self,
        world: World,
        placement: Placement,
        clock: Clock,
        heartbeats: IngressHeartbeats,
        optimiser: Optimiser,
        changed: Callable[[Owner], None],
    ) -> None:
        self._world = world
        self._placement = placement
        self._clock = clock
        self._heartbeats = heartbeats
        self._optimiser = optimiser
        self._changed = changed
        self._moved_sites = True
        """Whether records of sites have changed since the last look."""
        self._looked_at = float("-inf")
        self._asked_at: dict[str, float] = {}
        """App → when the optimiser was asked last, on the monotonic clock."""
        self._settled: set[str] = set()
        """Apps whose layout is the optimiser's."""
        self._question: tuple[str, Question] | None = None
        self._work = asyncio.Event()
        self._moves: dict[str, Move] = {}
        self._rests: dict[str, float] = {}
        """App → until when nothing of it moves."""
        placement.before_plan = self.ensure

    def rebuild(self) -> None:
        """Start from the cache: layouts are those that the apps' statuses name."""
        layouts = self._placement.snapshot.whereabouts.layouts
        layouts.clear()
        for key, held in self._world.state.records(AppStatus).items():
            if held.record.sites and key in self._world.near:
                layouts[app_owner(key)] = Layout(wanted=dict(held.record.sites))
        self._asked_at.clear()
        self._settled.clear()
        self._moves.clear()
        self._moved_sites, self._looked_at = True, float("-inf")
        self.look()

    def apply(self, deltas: Deltas) -> None:
        """Take over one revision's changes."""
        for delta in deltas.deltas:
            if delta.kind in (Site, RoundTrips, Ingress):
                self._moved_sites = True
                if delta.kind is Site:
                    self._look_at_sites()
            elif delta.kind is App and delta.key not in self._world.near:
                self._forget(delta.key)

    def look(self) -> None:
        """Take over sites and requests, and see whom to ask about. Called with each tick."""
        now = self._clock.monotonic()
        self._look_at_sites()
        if now - self._looked_at >= LOOK_S or now < self._looked_at:
            self._looked_at = now
            self._sum_up()
        if self._question is None:
            self._question = self._next_question(now)
            if self._question is not None:
                self._work.set()
        for key in self._settled:
            if key not in self._moves and self._rests.get(key, 0.0) <= now and self._uneven(key):
                self._world.dirty[(OwnerKind.APP, key)] = None

    async def run(self) -> None:
        """Have the optimiser answer what is asked, for ever."""
        try:
            while True:
                try:
                    async with asyncio.timeout(IDLE_S):
                        await self._work.wait()
                except TimeoutError:
                    await self._optimiser.rest()
                    await self._work.wait()
                self._work.clear()
                if self._question is not None:
                    await self._answer(*self._question)
                    self._question = None
        finally:
            await self._optimiser.rest()

    def ensure(self, pending: Iterable[Pending]) -> None:
        """See that the apps of which something is to be placed have a layout with room for all that they should have."""
        classes = dict.fromkeys((item.group, item.demand) for item in pending if wants_users(item.demand))
        if classes:
            # One that is new may have been asked for already; the cache may show it before `world` has taken it over.
            self._sum_up({"/".join(group.split("/")[1:3]) for group, _ in classes})
        for group, demand in classes:
            key = "/".join(group.split("/")[1:3])
            held = self._world.state.get(App, key)
            if held is None or not group.startswith(f"{OwnerKind.APP}/"):
                continue
            status = self._world.state.get(AppStatus, key)
            count = held.record.wanted(status.record if status is not None else None)
            layouts, owner = self._placement.snapshot.whereabouts.layouts, app_owner(key)
            before = layouts.get(owner)
            if before is not None and before.count >= count:
                continue
            current = self._sites(key) if before is None else before.wanted
            found = lay_out(View(self._placement.snapshot), group, demand, count, current)
            if found is not None:
                layouts[owner] = found

    def join(self, facts: AppFacts) -> AppFacts:
        """Return `facts` with the app's layout, and with the instance that is to move told to leave its node."""
        key = f"{facts.app.project}/{facts.app.name}"
        if key not in self._world.near:
            return facts
        layout = self._placement.snapshot.whereabouts.layouts.get(app_owner(key))
        facts = replace(facts, sites=dict(sorted(layout.wanted.items())) if layout is not None else {})
        move = self._move(key, facts, layout)
        if move is None:
            return facts
        why = Evacuation(why=f"site {move.to} is nearer to its users", since=self._clock.now(), deadline=float("inf"))
        return replace(
            facts,
            instances=tuple(
                replace(seen, evacuation=why) if seen.instance.id == move.instance and seen.evacuation is None else seen
                for seen in facts.instances
            ),
        )

    def _forget(self, key: str) -> None:
        self._placement.snapshot.whereabouts.layouts.pop(app_owner(key), None)
        self._settled.discard(key)
        for index in (self._asked_at, self._moves, self._rests):
            index.pop(key, None)

    def _look_at_sites(self) -> None:
        if not self._moved_sites:
            return
        self._moved_sites = False
        state = self._world.state
        sites = [held.record for held in state.records(Site).values()]
        measured = [held.record for held in state.records(RoundTrips).values()]
        self._placement.set_geography(Geography(sites, measured))
        entrances = entrances_of(held.record for held in state.records(Ingress).values())
        self._placement.snapshot.whereabouts.entrances = entrances

    def _sum_up(self, new: Iterable[str] = ()) -> None:
        """Sum up the requests of apps that are near their users, by site."""
        beats = list(self._heartbeats.values())
        self._placement.snapshot.whereabouts.traffic = traffic_of(beats, self._world.near.union(new))

    def _next_question(self, now: float) -> tuple[str, Question] | None:
        """Return what to ask about the app that has waited longest, if it is its time."""
        due = [key for key in self._world.near if now - self._asked_at.get(key, float("-inf")) >= RECONSIDER_S]
        for key in sorted(due, key=lambda key: (self._asked_at.get(key, float("-inf")), key)):
            self._asked_at[key] = now
            question = self._ask(key)
            if question is not None:
                return key, question
        return None

    def _ask(self, key: str) -> Question | None:
        held = self._world.state.get(App, key)
        layout = self._placement.snapshot.whereabouts.layouts.get(app_owner(key))
        if held is None or held.record.deleting or layout is None or key in self._moves:
            return None
        status = self._world.state.get(AppStatus, key)
        count = held.record.wanted(status.record if status is not None else None)
        group, demand = self._group(held.record), demand_of(held.record.spec)
        current = self._sites(key)
        # While a rollout or a start is under way, what is meant counts.
        settled = sum(current.values()) == count
        return ask(View(self._placement.snapshot), group, demand, count, current if settled else layout.wanted)

    async def _answer(self, key: str, question: Question) -> None:
        try:
            layout = await self._optimiser.solve(question)
        except (Unavailable, Invalid) as error:
            log.warning("no better layout for now", app=key, cause=error.message)
            self._asked_at[key] = self._clock.monotonic() + FAILED_S - RECONSIDER_S
            return
        held = self._world.state.get(App, key)
        status = self._world.state.get(AppStatus, key)
        if key not in self._world.near or held is None or layout.count != question.count:
            return
        if held.record.wanted(status.record if status is not None else None) != question.count:
            return
        self._placement.snapshot.whereabouts.layouts[app_owner(key)] = layout
        self._settled.add(key)
        self._changed((OwnerKind.APP, key))

    def _move(self, key: str, facts: AppFacts, layout: Layout | None) -> Move | None:
        """Return what is on the move, or what begins to move now."""
        now = self._clock.monotonic()
        move = self._moves.get(key)
        if move is not None:
            seen = next((seen for seen in facts.instances if seen.instance.id == move.instance), None)
            there = seen is not None and seen.instance.desired is Desired.RUN and not seen.ended
            if there and now < move.until and seen is not None and _is_current(facts, seen):
                return move
            del self._moves[key]
            self._rests[key] = now + (MOVE_S if there else MOVE_PAUSE_S)
        if layout is None or key not in self._settled or self._rests.get(key, 0.0) > now or len(self._moves) >= MOVES_MAX:
            return None
        move = self._begin(key, facts, layout, now)
        if move is not None:
            self._moves[key] = move
        return move

    def _begin(self, key: str, facts: AppFacts, layout: Layout, now: float) -> Move | None:
        """Choose what moves: the youngest at the site that has most too many, if another would go where one is missing."""
        run = [seen for seen in facts.instances if seen.instance.desired is Desired.RUN and not seen.instance.standby]
        steady = facts.status is not None and facts.status.served_release == facts.app.release and not facts.app.deleting
        wanted = facts.app.wanted(facts.status)
        if not steady or len(run) != wanted != 0 or not all(seen.ready and _is_current(facts, seen) for seen in run):
            return None
        if any(seen.evacuation is not None for seen in run):
            return None
        sites = Counter(self._site_of(seen.instance.node) for seen in run)
        too_many = {site: count - layout.wanted.get(site, 0) for site, count in sites.items() if count > layout.wanted.get(site, 0)}
        missing = {site for site, count in layout.wanted.items() if count > sites[site]}
        demand = demand_of(facts.app.spec)
        if not too_many or not missing or demand.pinned:
            return None
        to = self._would_go(self._group(facts.app), demand)
        if to not in missing:
            self._rests[key] = now + MOVE_PAUSE_S
            return None
        site = max(sorted(too_many), key=lambda site: too_many[site])
        there = [seen for seen in run if self._site_of(seen.instance.node) == site]
        youngest = max(there, key=lambda seen: (seen.instance.created_at, seen.instance.id))
        return Move(youngest.instance.id, to, now + MOVE_S)

    def _would_go(self, group: str, demand: Demand) -> str:
        answer = plan(self._placement.snapshot, (Pending(id="?", group=group, demand=demand),), self._clock.now())
        return self._site_of(answer.placed[0].node) if answer.placed else ""

    def _uneven(self, key: str) -> bool:
        layout = self._placement.snapshot.whereabouts.layouts.get(app_owner(key))
        if layout is None:
            return False
        sites = self._sites(key)
        return any(count > layout.wanted.get(site, 0) for site, count in sites.items())

    def _sites(self, key: str) -> dict[str, int]:
        """Return how many instances of an app that are meant to run each site has."""
        found: Counter[str] = Counter()
        for instance in self._world.owned.get((OwnerKind.APP, key), ()):
            held = self._world.state.get(Instance, instance)
            if held is not None and held.record.node is not None and held.record.desired is Desired.RUN and not held.record.standby:
                found[self._site_of(held.record.node)] += 1
        return dict(found)

    def _site_of(self, node: str | None) -> str:
        held = self._world.state.get(Node, node) if node is not None else None
        return held.record.site if held is not None else ""

    def _group(self, app: App) -> str:
        return f"{OwnerKind.APP}/{app.project}/{app.name}/{app.release}/{app.generation}"


def _is_current(facts: AppFacts, seen: Seen) -> bool:
    return (seen.instance.release, seen.instance.generation) == (facts.app.release, facts.app.generation)
