"""Nodes that are taken out of use: the decisions as tables, then the whole loop on a virtual clock."""

from __future__ import annotations

from typing import Any

import pytest
from control_cell import START, Cell, node, run_virtual

from atoll.control.evacuation import NO_ROOM_S
from atoll.model import keys
from atoll.model.cron import check_cron, tick_after, tick_before, ticks_between, zone_of
from atoll.model.errors import Invalid
from atoll.model.evacuation import evacuation_of, evacuations, in_force
from atoll.model.maintenance import Drain, Maintenance, MaintenanceSpec, Window, check_maintenance, selects, window_at
from atoll.model.records import Instance, Node, NodePolicy, OwnerKind
from atoll.model.spec import (
    AppSpec,
    Constraint,
    Disruption,
    Health,
    JobSpec,
    Operator,
    Placement,
    Port,
    Rollout,
    Scale,
    Volume,
    check_app,
)
from atoll.model.states import Desired, Phase
from atoll.model.units import Seconds
from atoll.scheduling.budget import least_in_move, least_in_rollout, least_ready

HOUR = 3600.0
SUNDAY_0200 = 1_795_917_600.0
"""2026-11-29 02:00 UTC."""
WEB = AppSpec(name="web", image="x", ports=(Port(port=80),), health=Health(), rollout=Rollout(drain=Seconds(5)))


def app(*, surge: int = 1, unavailable: int = 0, **disruption: Any) -> AppSpec:
    rule = Disruption(**disruption) if disruption else None
    return AppSpec(name="web", image="x", rollout=Rollout(max_surge=surge, max_unavailable=unavailable), disruption=rule)


@pytest.mark.parametrize(
    ("spec", "wanted", "ready", "rollout", "move", "move_no_room"),
    [
        (app(), 4, 3, 4, 4, 3),
        (app(), 1, 0, 1, 1, 1),
        (app(), 0, 0, 0, 0, 0),
        (app(unavailable=2), 4, 2, 2, 2, 2),
        (app(surge=0, unavailable=1), 1, 0, 0, 0, 0),
        (app(surge=0, unavailable=2), 4, 2, 2, 2, 2),
        (app(max_unavailable=2), 4, 2, 4, 2, 2),
        (app(max_unavailable=0), 4, 4, 4, 4, 4),
        (app(max_unavailable="10%"), 4, 3, 4, 3, 3),
        (app(max_unavailable="50%"), 5, 2, 5, 2, 2),
        (app(max_unavailable="100%"), 4, 0, 4, 1, 1),
        (app(min_ready="80%", unavailable=4), 5, 4, 4, 4, 4),
        (app(min_ready="80%"), 6, 5, 6, 5, 5),
        (app(min_ready=3), 2, 2, 2, 2, 2),
        (app(min_ready=0, unavailable=1), 3, 0, 2, 1, 1),
    ],
)
def test_how_many_must_stay_ready(spec: AppSpec, wanted: int, ready: int, rollout: int, move: int, move_no_room: int) -> None:
    assert least_ready(spec, wanted) == ready
    assert least_in_rollout(spec, wanted) == rollout
    assert least_in_move(spec, wanted, no_room=False) == move
    assert least_in_move(spec, wanted, no_room=True) == move_no_room


@pytest.mark.parametrize(
    ("more", "field"),
    [
        ({"disruption": Disruption()}, "disruption.max_unavailable"),
        ({"disruption": Disruption(max_unavailable=1, min_ready=1)}, "disruption.max_unavailable"),
        (
            {"disruption": Disruption(max_unavailable=0), "rollout": Rollout(max_surge=0, max_unavailable=1)},
            "disruption.max_unavailable",
        ),
        ({"disruption": Disruption(min_ready="100%"), "rollout": Rollout(max_surge=0, max_unavailable=1)}, "disruption.min_ready"),
        (
            {"disruption": Disruption(min_ready=3), "rollout": Rollout(max_surge=0, max_unavailable=1), "scale": Scale(replicas=3)},
            "disruption.min_ready",
        ),
        ({"depends_on": ("web",)}, "depends_on"),
    ],
)
def test_a_budget_that_contradicts_itself_or_lets_nothing_go_is_refused_by_name(more: dict[str, Any], field: str) -> None:
    with pytest.raises(Invalid) as refused:
        check_app(AppSpec(name="web", image="x", **more))
    assert refused.value.field == field


def weekly(**more: Any) -> MaintenanceSpec:
    values = {"name": "weekly", "nodes": "site=fra", "every": "0 2 * * SUN", "length": Seconds(2 * HOUR), "lead": Seconds(HOUR)}
    return MaintenanceSpec(**{**values, **more})


@pytest.mark.parametrize(
    ("now", "begins_at"),
    [
        (SUNDAY_0200 - 3 * HOUR, SUNDAY_0200),
        (SUNDAY_0200 - 1, SUNDAY_0200),
        (SUNDAY_0200, SUNDAY_0200),
        (SUNDAY_0200 + 2 * HOUR - 1, SUNDAY_0200),
        (SUNDAY_0200 + 2 * HOUR, SUNDAY_0200 + 7 * 24 * HOUR),
    ],
)
def test_a_window_that_comes_again_is_the_one_in_force_or_else_the_next(now: float, begins_at: float) -> None:
    window = window_at(weekly(), now)
    assert window == Window(drains=begins_at - HOUR, start=begins_at, end=begins_at + 2 * HOUR)


def test_a_window_is_in_force_from_its_lead_to_its_end_and_a_single_one_is_then_over_for_good() -> None:
    once = Maintenance(spec=weekly(every=None, start=SUNDAY_0200), created_at=0.0)
    moments = [(-HOUR - 1, 0), (-HOUR, 1), (0, 1), (2 * HOUR - 1, 1), (2 * HOUR, 0)]
    assert [len(in_force([once], SUNDAY_0200 + at)) for at, _ in moments] == [count for _, count in moments]
    assert window_at(once.spec, SUNDAY_0200 + 2 * HOUR) is None


@pytest.mark.parametrize(
    ("selector", "means"),
    [
        ("*", True),
        ("site=fra", True),
        ("site=fra,arch!=arm64", True),
        ("site=fra, disk=nvme", True),
        ("node=n2", False),
        ("disk!=nvme", False),
    ],
)
def test_a_selector_holds_where_each_of_its_rules_does(selector: str, means: bool) -> None:
    labels = {"node": "n1", "site": "fra", "arch": "amd64", "disk": "nvme"}
    assert selects(selector, labels) is means


@pytest.mark.parametrize(
    ("more", "field"),
    [
        ({"start": 5.0}, "start"),
        ({"every": None}, "start"),
        ({"every": "0 0 30 2 *"}, "every"),
        ({"every": "soon"}, "every"),
        ({"timezone": "Mars/Olympus"}, "timezone"),
        ({"length": Seconds(0)}, "length"),
        ({"nodes": "fra"}, "nodes"),
        ({"nodes": "arch>=3"}, "nodes"),
    ],
)
def test_a_window_that_makes_no_sense_is_refused_by_name(more: dict[str, Any], field: str) -> None:
    with pytest.raises(Invalid) as refused:
        check_maintenance(weekly(**more))
    assert refused.value.field == field


def test_times_that_come_again_follow_the_clock_of_their_place() -> None:
    berlin = "Europe/Berlin"
    spring = 1_774_745_999.0  # 2026-03-29 01:59:59 there; an hour later it is 03:59:59
    assert tick_after("30 2 * * *", berlin, spring) == spring + 1, "a time that is left out comes right after"
    assert tick_after("@hourly", "UTC", 3600.0) == 7200.0
    assert tick_before("@hourly", "UTC", 3600.0) == 3600.0
    assert tick_before("@hourly", "UTC", 3599.5) == 0.0
    assert ticks_between("*/5 * * * *", "UTC", 0.0, 900.0) == 3
    assert zone_of("utc") is zone_of("UTC")
    for bad in ("* * * *", "@soon", "61 * * * *", "0 0 0 0 0 0 0"):
        with pytest.raises(Invalid):
            check_cron(bad, "UTC", field="schedule")


def test_a_drain_and_a_window_together_have_the_first_end_of_patience_and_the_last_end() -> None:
    drain = Drain(since=1.0, deadline=SUNDAY_0200 - 10, leave_volumes=True)
    window = Maintenance(spec=weekly(), created_at=0.0)
    there = node("n1", site="fra")
    found = evacuation_of(there, NodePolicy(name="n1", drain=drain), in_force([window], SUNDAY_0200 - HOUR))
    assert found is not None
    assert (found.deadline, found.end, found.leave_volumes) == (SUNDAY_0200 - 10, SUNDAY_0200 + 2 * HOUR, True)
    elsewhere = {"n2": node("n2", site="par")}
    assert evacuations(elsewhere, {}, [window], SUNDAY_0200) == {}
    assert list(evacuations({"n1": there, **elsewhere}, {}, [window], SUNDAY_0200)) == ["n1"]


async def drain(cell: Cell, name: str, *, within_s: float = HOUR, leave_volumes: bool = False) -> None:
    wish = Drain(since=cell.clock.now(), deadline=cell.clock.now() + within_s, leave_volumes=leave_volumes)
    await cell.put(keys.node_policy(name), NodePolicy(name=name, drain=wish))


async def begin(cell: Cell, *nodes: str, **more: Any) -> None:
    for name in nodes:
        await cell.add_node(name, **more)
    await cell.add_ingress()
    cell.lead()
    cell.agents()


def on(cell: Cell, name: str) -> list[Instance]:
    return [i for i in cell.instances() if i.node == name]


def least_ready_seen(cell: Cell) -> list[int]:
    seen: list[int] = []
    cell.watchers.append(lambda: seen.append(cell.ready()))
    return seen


def test_a_drained_node_is_emptied_and_never_fewer_serve_than_before() -> None:
    async def main() -> None:
        async with Cell() as cell:
            await begin(cell, "n1", "n2", "n3")
            await cell.deploy(WEB, replicas=6)
            await cell.until(lambda: cell.ready() == 6)
            seen = least_ready_seen(cell)
            assert on(cell, "n1")
            await drain(cell, "n1")
            await cell.until(lambda: not on(cell, "n1"))
            assert min(seen) == 6, "each was replaced before it left"
            await cell.until(lambda: "node-drained" in cell.codes())
            assert cell.codes().count("node-drained") == 1
            status = cell.app_status()
            assert status is not None
            assert str(status.phase) == "running"

    run_virtual(main())


def test_an_undone_drain_leaves_what_is_there_and_the_node_is_used_again() -> None:
    async def main() -> None:
        async with Cell() as cell:
            await begin(cell, "n1", "n2", cpu=400)
            await cell.deploy(WEB, replicas=6)
            await cell.until(lambda: cell.ready() == 6)
            await drain(cell, "n1")
            await cell.quiet(20)
            left = {i.id for i in on(cell, "n1") if i.desired is Desired.RUN}
            assert left, "there is room for one of them only, and none is taken before another serves"
            await cell.put(keys.node_policy("n1"), NodePolicy(name="n1"))
            await cell.quiet(5)
            await cell.until(lambda: cell.ready() == 6 and len(cell.instances()) == 6)
            assert left <= {i.id for i in on(cell, "n1")}

    run_virtual(main())


def test_without_room_elsewhere_the_budget_goes_after_a_while_and_the_rest_at_the_deadline() -> None:
    async def main() -> None:
        async with Cell() as cell:
            await begin(cell, "n1")
            await cell.deploy(WEB, replicas=3)
            await cell.until(lambda: cell.ready() == 3)
            await drain(cell, "n1", within_s=600)
            await cell.quiet(NO_ROOM_S - 5)
            assert cell.ready() == 3
            await cell.quiet(60)
            assert cell.ready() == 2, "one is the budget where nothing is said"
            await cell.quiet(400)
            assert cell.ready() == 2
            await cell.quiet(200)
            assert cell.ready() == 0
            assert not on(cell, "n1")

    run_virtual(main())


def test_the_last_one_that_serves_stays_until_the_deadline_where_it_has_no_other_place() -> None:
    async def main() -> None:
        async with Cell() as cell:
            await begin(cell, "n1")
            await cell.deploy(WEB, replicas=1)
            await cell.until(lambda: cell.ready() == 1)
            await drain(cell, "n1", within_s=600)
            await cell.quiet(500)
            assert cell.ready() == 1
            await cell.add_node("n2")
            await cell.until(lambda: [i.node for i in cell.instances()] == ["n2"] and cell.ready() == 1)

    run_virtual(main())


DATA = AppSpec(
    name="db",
    image="x",
    health=Health(),
    volumes=(Volume(name="data", path="/data"),),
    rollout=Rollout(max_surge=0, max_unavailable=1),
)


def test_what_writes_to_volumes_of_the_node_stays_until_someone_agrees_to_leave_them_behind() -> None:
    async def main() -> None:
        async with Cell() as cell:
            await begin(cell, "n1", "n2")
            await cell.deploy(DATA, replicas=1)
            await cell.until(lambda: cell.ready() == 1)
            (home,) = {i.node for i in cell.instances()}
            assert home is not None
            before = cell.instances()
            await drain(cell, home, within_s=60)
            await cell.quiet(120)
            assert cell.instances() == before, "past the deadline, too"
            await drain(cell, home, within_s=60, leave_volumes=True)
            await cell.until(lambda: [i.node for i in cell.instances()] not in ([home], []) and cell.ready() == 1)
            assert {i.node for i in cell.instances()} == {"n1", "n2"} - {home}

    run_virtual(main())


def test_a_job_is_waited_for_until_the_deadline_and_then_tried_again_elsewhere_without_counting() -> None:
    def works(instance: Instance) -> list[tuple[float, dict[str, Any]]]:
        return [(0.03, {"phase": Phase.RUNNING, "started_at": 0.0}), (100.0, {"phase": Phase.SUCCEEDED})]

    async def main() -> None:
        async with Cell() as cell:
            cell.script = works
            await begin(cell, "n1", "n2", cpu=100)
            await cell.submit(JobSpec(name="work", image="x", completions=2, parallelism=2))
            await cell.until(lambda: {i.node for i in cell.instances() if (s := cell.status(i)) and s.started_at} == {"n1", "n2"})
            await drain(cell, "n1", within_s=600)
            await drain(cell, "n2", within_s=30)
            await cell.quiet(29)
            assert all(i.desired is Desired.RUN for i in cell.instances())
            await cell.quiet(5)
            gone = [i for i in cell.instances() if i.excused]
            assert [i.node for i in gone] == ["n2"]
            await cell.put(keys.node_policy("n2"), NodePolicy(name="n2"))
            await cell.until(lambda: (s := cell.job_status()) is not None and s.phase.final, within_s=1000)
            status = cell.job_status()
            assert status is not None
            assert (str(status.phase), status.failures) == ("succeeded", {}), "retries is 0, and none was needed"
            finished = [i for i in cell.instances() if not i.excused and (s := cell.status(i)) and s.phase is Phase.SUCCEEDED]
            assert sorted(i.node or "" for i in finished) == ["n1", "n2"]

    run_virtual(main())


def test_what_stands_by_goes_at_once_and_another_stands_by_elsewhere() -> None:
    async def main() -> None:
        async with Cell() as cell:
            await begin(cell, "n1", "n2")
            spec = AppSpec(name="web", image="x", ports=(Port(port=80),), health=Health(), scale=Scale(replicas=1, standby=1))
            await cell.deploy(spec, replicas=1)
            await cell.until(lambda: any(i.standby and i.node for i in cell.instances()))
            (standby,) = [i for i in cell.instances() if i.standby]
            assert standby.node is not None
            await drain(cell, standby.node)
            await cell.until(lambda: not on(cell, standby.node or ""))
            await cell.until(lambda: any(i.standby and i.node not in (None, standby.node) for i in cell.instances()))

    run_virtual(main())


def test_a_gang_in_one_place_goes_as_a_whole_and_only_at_the_deadline() -> None:
    async def main() -> None:
        async with Cell() as cell:
            await begin(cell, "n1", "n2")
            spec = AppSpec(name="web", image="x", health=Health(), placement=Placement(gang=True, together="node"))
            await cell.deploy(spec, replicas=3)
            await cell.until(lambda: cell.ready() == 3)
            (place,) = {i.node for i in cell.instances()}
            assert place is not None
            seen = least_ready_seen(cell)
            await drain(cell, place, within_s=300)
            await cell.quiet(290)
            assert min(seen, default=3) == 3
            await cell.until(lambda: cell.ready() == 3 and {i.node for i in cell.instances()} == {"n1", "n2"} - {place})

    run_virtual(main())


def test_before_a_window_nodes_are_emptied_in_it_they_take_nothing_and_after_it_they_are_used_again() -> None:
    async def main() -> None:
        async with Cell() as cell:
            await begin(cell, "n1", site="fra")
            await cell.add_node("n2", site="par")
            await cell.deploy(WEB, replicas=2)
            await cell.until(lambda: cell.ready() == 2)
            assert on(cell, "n1")
            start = START + 2 * HOUR
            spec = weekly(every=None, start=start)
            await cell.put(keys.maintenance("weekly"), Maintenance(spec=spec, created_at=START))
            await cell.quiet(start - HOUR - 60 - cell.clock.now())
            assert on(cell, "n1"), "an hour before is early enough"
            await cell.until(lambda: not on(cell, "n1"))
            assert START + HOUR <= cell.clock.now() < START + HOUR + 30
            long = JobSpec(name="long", image="x", placement=at("fra"))
            short = JobSpec(name="short", image="x", deadline=Seconds(600), placement=at("fra"))
            await cell.submit(long)
            await cell.submit(short)
            await cell.until(lambda: any(i.owner == "short" and i.node == "n1" for i in cell.instances()))
            await cell.quiet(10)
            (waits,) = [i for i in cell.instances() if i.owner == "long"]
            assert waits.node is None
            assert waits.rejection is not None
            assert "in maintenance until 1970-01-12 17:46 UTC: n1" in waits.rejection.message
            await cell.until(lambda: any(i.owner == "long" and i.node == "n1" for i in cell.instances()), within_s=5 * HOUR)
            assert start + 2 * HOUR <= cell.clock.now() < start + 2 * HOUR + 30

    run_virtual(main())


def at(site: str) -> Placement:
    return Placement(constraints=(Constraint(label="site", operator=Operator.EQUAL, value=site),))


def test_a_node_that_is_drained_says_so_to_what_would_have_gone_there() -> None:
    async def main() -> None:
        async with Cell() as cell:
            await begin(cell, "n1")
            await drain(cell, "n1")
            await cell.deploy(WEB, replicas=1)
            await cell.until(lambda: any(i.rejection for i in cell.instances()))
            (waits,) = cell.instances()
            assert waits.rejection is not None
            assert (waits.rejection.code, waits.rejection.mend) == ("no-evacuation", "undrain a node: atoll nodes undrain NODE")
            assert waits.owner_kind is OwnerKind.APP

    run_virtual(main())


def test_nodes_are_found_by_their_own_labels_too() -> None:
    machine = Node(name="n1", site="fra", region="eu", capacity=node("n1").capacity, labels={"site": "elsewhere", "rack": "r1"})
    window = Maintenance(spec=weekly(nodes="site=fra,region=eu,rack=r1,arch=amd64"), created_at=0.0)
    assert list(evacuations({"n1": machine}, {}, [window], SUNDAY_0200)) == ["n1"]
