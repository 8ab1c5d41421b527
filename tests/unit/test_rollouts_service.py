"""Rollouts over the API: what is asked is written down, shares and previews reach the routing, and reports of ingresses add up."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator
from typing import Any

import pytest
from msgspec.structs import replace

from atoll.api.service import KINDS, SYSTEM, Caller, Service
from atoll.api.service.routing import routing_of
from atoll.api.service.speakers import LATE_S
from atoll.api.service.traffic import RECENT_S, Traffic
from atoll.ingress.resources import SLOTS
from atoll.model import codec, keys
from atoll.model.errors import Conflict, Invalid, NotFound
from atoll.model.records import AppPhase, AppStatus, Instance, OwnerKind, Role, RouteClaim, Routing, Status
from atoll.model.rollouts import RolloutOrder, RolloutPhase, RolloutStatus
from atoll.model.spec import AppSpec, CanaryStep, Port, Rollout, Strategy
from atoll.model.states import Desired, Phase
from atoll.model.traffic import Counts, ReleaseTraffic, TrafficReport
from atoll.store.cache import State
from atoll.store.memory import MemoryStore

CANARY = Rollout(strategy=Strategy.CANARY, steps=(CanaryStep(weight=5), CanaryStep(weight=50)))
BLUE_GREEN = Rollout(strategy=Strategy.BLUE_GREEN)
ANN = Caller(id="t1", name="ann", role=Role.DEPLOY, project="default")


class FakeClock:
    def __init__(self) -> None:
        self.at = 1_000_000.0

    def now(self) -> float:
        return self.at

    def monotonic(self) -> float:
        return self.at


class Cell:
    def __init__(self, service: Service, clock: FakeClock) -> None:
        self.service, self.clock = service, clock

    async def put(self, key: str, record: object) -> None:
        await self.service.context.reach(await self.service.context.store.put(key, codec.encode(record)))

    async def deploy(self, rollout: Rollout = CANARY, version: int = 1, port: int = 8000) -> int:
        spec = AppSpec(name="web", image=f"registry.test/web:{version}", ports=(Port(port=port),), rollout=rollout)
        return (await self.service.apps.put(SYSTEM, spec)).app.release

    async def stands(self, phase: RolloutPhase | None, *, served: int = 1, **more: Any) -> None:
        """Write what the controller would say of release 2 in place of 1."""
        usual = {"release": 2, "stable": 1, "strategy": Strategy.CANARY, "weight": 5, "since": 1.0}
        rollout = RolloutStatus(**{**usual, "phase": phase, **more}) if phase is not None else None
        status = AppStatus(
            project="default", name="web", phase=AppPhase.DEPLOYING, release=2, served_release=served, rollout=rollout
        )
        await self.put(keys.app_status("default", "web"), status)

    async def runs(self, id: str, release: int, *, desired: Desired = Desired.RUN) -> None:
        instance = Instance(
            id=id,
            project="default",
            owner_kind=OwnerKind.APP,
            owner="web",
            release=release,
            node="n",
            desired=desired,
            created_at=1.0,
        )
        await self.put(keys.instance("default", id), instance)
        address = f"10.0.{release}.{ord(id[-1])}"
        status = Status(instance=id, project="default", node="n", phase=Phase.RUNNING, ready=True, address=address)
        await self.put(keys.status("default", id), status)

    @property
    def order(self) -> RolloutOrder | None:
        return self.service.apps.get("default", "web").app.order

    def routing(self) -> Routing:
        state = self.service.context.state
        instances = [held.record for held in state.records(Instance).values()]
        found = routing_of(state, self.service.apps.get("default", "web").app, instances, "localhost")
        assert found is not None
        return found


@pytest.fixture
async def cell() -> AsyncIterator[Cell]:
    clock = FakeClock()
    store = MemoryStore(clock)
    async with State(store, KINDS) as state, Service(store, state, clock, random.Random(1), bytes(32)) as service:
        made = Cell(service, clock)
        await made.deploy()
        await made.deploy(version=2)
        yield made
    await store.close()


@pytest.mark.parametrize(
    ("wish", "phase", "asked"),
    [
        ("pause", RolloutPhase.PROGRESSING, {"paused": True}),
        ("resume", RolloutPhase.WAITING, {"step": 2}),
        ("promote", RolloutPhase.WAITING, {"promoted": True}),
        ("abort", RolloutPhase.PROMOTING, {"aborted": True}),
        ("undo", RolloutPhase.WAITING, {"aborted": True}),
        ("undo", RolloutPhase.KEEPING, {"aborted": True}),
        ("resume", RolloutPhase.REVERTED, {"attempt": 1}),
    ],
)
async def test_what_is_asked_is_written_with_who_asked_and_asking_again_changes_nothing(
    cell: Cell, wish: str, phase: RolloutPhase, asked: dict[str, Any]
) -> None:
    await cell.stands(phase, step=1)
    ask = getattr(cell.service.rollouts, wish)
    first = await ask(ANN, "default", "web")
    assert cell.order == RolloutOrder(release=2, by="ann", **asked)
    told = [event.code for event in cell.service.events.all("default", limit=9).items]
    assert f"rollout-{wish}-asked" in told
    if wish != "resume":
        assert (await ask(ANN, "default", "web")).revision == first.revision


@pytest.mark.parametrize(
    ("wish", "phase"),
    [
        ("pause", RolloutPhase.COMPLETE),
        ("pause", RolloutPhase.REVERTED),
        ("resume", RolloutPhase.PROGRESSING),
        ("promote", RolloutPhase.REVERTED),
        ("promote", RolloutPhase.KEEPING),
        ("abort", RolloutPhase.KEEPING),
        ("undo", RolloutPhase.REVERTED),
    ],
)
async def test_what_cannot_be_is_refused_with_what_can(cell: Cell, wish: str, phase: RolloutPhase) -> None:
    await cell.stands(phase, served=2 if phase in (RolloutPhase.COMPLETE, RolloutPhase.KEEPING) else 1)
    with pytest.raises(Conflict):
        await getattr(cell.service.rollouts, wish)(ANN, "default", "web")
    assert cell.order is None


async def test_a_first_release_has_nothing_to_go_back_to(cell: Cell) -> None:
    await cell.stands(None, served=0)
    with pytest.raises(Conflict, match="no release before it"):
        await cell.service.rollouts.abort(ANN, "default", "web")
    with pytest.raises(NotFound):
        await cell.service.rollouts.pause(ANN, "default", "nobody")


async def test_a_rolling_rollout_can_be_steered_though_it_has_no_status_yet(cell: Cell) -> None:
    await cell.stands(None)
    await cell.service.rollouts.pause(ANN, "default", "web")
    assert cell.order is not None
    assert cell.order.paused
    await cell.service.rollouts.resume(ANN, "default", "web")
    assert not cell.order.paused


async def test_undo_of_what_is_over_is_a_rollback_past_all_steps(cell: Cell) -> None:
    await cell.stands(RolloutPhase.COMPLETE, served=2)
    view = await cell.service.rollouts.undo(ANN, "default", "web")
    assert (view.app.release, view.app.order) == (1, RolloutOrder(release=1, attempt=1, promoted=True))


async def test_a_new_release_and_a_restart_know_of_the_rollout(cell: Cell) -> None:
    await cell.stands(RolloutPhase.WAITING)
    await cell.service.rollouts.pause(ANN, "default", "web")
    with pytest.raises(Conflict, match="canary rollout"):
        await cell.service.apps.restart("default", "web")
    assert await cell.deploy(version=3) == 3
    assert cell.order is None, "what was asked of another release means nothing"
    with pytest.raises(Invalid, match="a canary shares it"):
        await cell.deploy(version=4, port=9000)
    assert await cell.deploy(Rollout(), version=4, port=9000) == 4


async def test_weights_and_releases_reach_the_routing(cell: Cell) -> None:
    for id, release in (("a", 1), ("b", 1), ("c", 2)):
        await cell.runs(id, release)
    await cell.stands(RolloutPhase.PROGRESSING)
    assert cell.routing().weights == {2: 5, 1: 95}
    assert {(each.instance, each.release) for each in cell.routing().endpoints} == {("a", 1), ("b", 1), ("c", 2)}
    await cell.stands(RolloutPhase.REVERTED, weight=None)
    assert cell.routing().weights == {1: 100}
    await cell.runs("a", 1, desired=Desired.DRAIN)
    await cell.runs("b", 1, desired=Desired.DRAIN)
    assert cell.routing().weights == {}, "rather a release that was taken back than none"
    await cell.stands(RolloutPhase.WAITING, weight=0)
    assert cell.routing().weights == {2: 0, 1: 100}, "but never one that nobody has promoted"


async def test_a_preview_leads_to_the_new_release_and_is_nobody_else_s_name(cell: Cell) -> None:
    assert await cell.deploy(BLUE_GREEN, version=3, port=9000) == 3
    await cell.runs("a", 1)
    await cell.runs("c", 3)
    await cell.stands(RolloutPhase.WAITING, release=3, weight=0)
    routing = cell.routing()
    assert [each.instance for each in routing.endpoints] == ["a"], "its port is the old one's until the switch"
    assert routing.preview is not None
    assert (routing.preview.host, routing.preview.port) == ("preview--web.localhost", 9000)
    assert [each.instance for each in routing.preview.endpoints] == ["c"]
    claim = cell.service.context.state.get(RouteClaim, "preview--web.localhost/")
    assert claim is not None
    with pytest.raises(Conflict):
        await cell.service.apps.put(SYSTEM, AppSpec(name="preview--web", image="x", ports=(Port(port=80),)))
    await cell.stands(RolloutPhase.KEEPING, release=3, weight=100)
    assert [each.instance for each in cell.routing().endpoints] == ["c"], "and the new one's after it"
    await cell.deploy(Rollout(), version=4)
    assert cell.service.context.state.get(RouteClaim, "preview--web.localhost/") is None


def report(started: float, counts: Counts, *, ingress: str = "g", release: int = 1) -> TrafficReport:
    one = ReleaseTraffic(project="default", app="web", release=release, counts=counts)
    return TrafficReport(ingress=ingress, started=started, releases=(one,))


def test_reports_of_all_ingresses_add_up_whatever_comes_twice_late_or_after_a_restart() -> None:
    traffic = Traffic(FakeClock())
    for each in (
        report(1.0, Counts(10, 1, (10,))),
        report(1.0, Counts(10, 1, (10,))),
        report(1.0, Counts(30, 2, (30,))),
        report(1.0, Counts(10, 1, (10,))),
        report(1.0, Counts(5, 0, (5,)), ingress="h"),
        report(2.0, Counts(7, 0, (7,))),
        report(1.0, Counts(90, 0, (90,))),
    ):
        traffic.note(each)
    assert traffic.totals()["default/web"] == {1: Counts(42, 2, (42,))}
    with pytest.raises(Invalid):
        traffic.note(report(2.0, Counts(8, 9)))


def test_an_ingress_that_was_restarted_by_an_earlier_date_is_heard_once_the_one_before_has_been_silent() -> None:
    clock = FakeClock()
    traffic = Traffic(clock)
    for later_s, started, requests, heard in (
        (0.0, 5.0, 10, 10),
        (LATE_S - 1, 5.0, 20, 20),
        (LATE_S - 1, 4.0, 3, 20),
        (1.0, 4.0, 3, 23),
        (0.0, 4.0, 2, 23),
        (LATE_S, 4.0, 7, 27),
        (0.0, 6.0, 1, 28),
    ):
        clock.at += later_s
        traffic.note(report(started, Counts(requests)))
        assert traffic.totals()["default/web"][1].requests == heard


def test_what_people_see_is_of_the_last_minute_and_releases_are_bounded() -> None:
    clock = FakeClock()
    traffic = Traffic(clock)
    for second in range(300):
        clock.at = 1_000.0 + second
        traffic.note(report(1.0, Counts(10 * (second + 1), second // 100)))
    counts, seconds = traffic.recent("default/web")[1]
    assert seconds == RECENT_S
    assert 590 <= counts.requests <= 610
    for release in range(2, 2 + 2 * SLOTS):
        traffic.note(report(1.0, Counts(1), release=release))
    assert len(traffic.totals()["default/web"]) <= SLOTS
    traffic.forget("default/web")
    assert not traffic.recent("default/web")


def test_counts_give_quantiles_within_their_classes() -> None:
    classes = tuple(99 if index == 5 else 1 if index == 13 else 0 for index in range(20))
    counts = replace(Counts(100, 0, classes))
    assert counts.quantile_s(0.99) == pytest.approx(0.010)
    assert counts.quantile_s(1.0) == pytest.approx(0.125)
    assert Counts().quantile_s(0.5) is None
