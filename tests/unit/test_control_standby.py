"""Instances that stand by: when they are made, for whom they step in, and to whom they give way."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from control_cell import Cell, healthy, run_virtual
from msgspec.structs import replace
from test_control_decide import NOW, RULES, SPEC, app_facts, app_status, decide, of, seen

from atoll.control.actions import Ailment, Create, Decision, Remove, Seen, Tell, Update, WriteAppStatus
from atoll.control.apps import AppFacts
from atoll.control.standby import SERVED_MIN_S
from atoll.model.records import AppPhase, Instance, Rejection
from atoll.model.spec import AppSpec, Port, Resources, Scale
from atoll.model.states import Desired, Phase
from atoll.model.units import Cores

PARKED = {"ready": False, "parked": True, "ready_at": None}
NO_ROOM = Rejection(code="no-room", message="no node has room")


def standby(id: str, phase: Phase | None = Phase.RUNNING, *, status: dict[str, Any] | None = None, **more: Any) -> Seen:
    return seen(id, phase, standby=True, status=PARKED if status is None and phase is Phase.RUNNING else status, **more)


def facts(*instances: Seen, standby: int = 1, replicas: int = 1, release: int = 1, **more: Any) -> AppFacts:
    spec = replace(SPEC, scale=Scale(replicas=1, standby=standby))
    more.setdefault("status", app_status(ready=replicas))
    return app_facts(*instances, replicas=replicas, release=release, spec=spec, **more)


def promoted(made: Decision) -> list[str]:
    return [update.instance.id for update in of(Update, made.actions) if update.instance.desired is Desired.RUN]


def retired(made: Decision) -> list[str]:
    told = [update.instance.id for update in of(Update, made.actions) if update.instance.desired is not Desired.RUN]
    return told + [remove.instance.id for remove in of(Remove, made.actions)]


def created(made: Decision) -> list[bool]:
    """Return of each instance that was made whether it stands by."""
    return [create.instance.standby for create in of(Create, made.actions)]


def test_standbys_are_made_when_all_that_is_wanted_serves_and_not_before() -> None:
    made = decide(facts(seen("a"), standby=2))
    assert created(made) == [True, True]
    assert created(decide(facts(seen("a", Phase.STARTING, status={"ready": False}), standby=2))) == []
    assert created(decide(facts(standby=2))) == [False]


def test_they_are_in_no_number_but_their_own() -> None:
    made = decide(facts(seen("a"), standby("s"), standby("t", status={"ready": True}), standby=2, status=None))
    (written,) = of(WriteAppStatus, made.actions)
    assert (written.status.ready, written.status.updated, written.status.total, written.status.parked) == (1, 1, 1, 1)
    assert written.status.phase is AppPhase.RUNNING
    assert created(made) == []


@pytest.mark.parametrize(
    ("why", "gone"),
    [
        ("scaled up", ()),
        ("lost", (seen("b", lost_at=NOW - 1),)),
        ("told to stop", (seen("b", desired=Desired.STOP),)),
        ("its device is gone", (replace(seen("b"), ailment=Ailment(device="GPU-0", why="it has vanished", gone=True)),)),
    ],
)
def test_where_one_is_missing_a_parked_one_steps_in_and_none_is_started_cold(why: str, gone: tuple[Seen, ...]) -> None:
    made = decide(facts(seen("a"), *gone, standby("s"), replicas=2))
    assert promoted(made) == ["s"]
    assert created(made) == [], "a new one stands by only when this one serves"
    (told,) = [tell.event for tell in of(Tell, made.actions) if tell.event.code == "promoted"]
    assert told.subject == "instance/s"
    after = decide(facts(seen("a"), seen("s"), replicas=2))
    assert created(after) == [True]


def test_the_one_that_serves_soonest_is_taken_and_one_that_fails_is_not() -> None:
    starting, failing = standby("t", Phase.STARTING, status={"ready": False}), standby("f", Phase.BACKOFF, status={"ready": False})
    awake = standby("w", status={"ready": True})
    assert promoted(decide(facts(failing, starting, standby("s"), awake, standby=4))) == ["w"]
    assert promoted(decide(facts(failing, starting, standby("s"), standby=3))) == ["s"]
    assert promoted(decide(facts(failing, starting, standby=2))) == ["t"]
    made = decide(facts(failing, standby=1))
    assert (promoted(made), created(made)) == ([], [False])


def crashed(id: str, served_s: float) -> Seen:
    return seen(id, Phase.BACKOFF, status={"ready": False, "ready_at": NOW - served_s, "phase_at": NOW, "restarts": 0})


def test_one_that_crashed_after_it_served_is_replaced_at_once_and_one_in_a_crash_loop_is_not() -> None:
    made = decide(facts(crashed("a", SERVED_MIN_S), standby("s")))
    assert (promoted(made), retired(made), created(made)) == (["s"], ["a"], [])
    made = decide(facts(crashed("a", SERVED_MIN_S - 1), standby("s")))
    assert (promoted(made), retired(made), created(made)) == ([], [], [])


def test_one_that_ends_for_good_right_after_its_start_uses_up_no_standby() -> None:
    ended = {"ready": False, "ready_at": NOW - 100, "phase_at": NOW - 99}
    made = decide(facts(seen("a", Phase.FAILED, status=ended), standby("s")))
    assert (promoted(made), created(made)) == ([], [False])
    ended["ready_at"] = NOW - 200
    assert promoted(decide(facts(seen("a", Phase.FAILED, status=ended), standby("s")))) == ["s"]


def test_one_that_finds_no_place_gives_way_to_a_standby_that_has_one() -> None:
    made = decide(facts(seen("a"), seen("b", None, node=None, rejection=NO_ROOM), standby("s"), replicas=2))
    assert (promoted(made), retired(made), created(made)) == (["s"], ["b"], [])


def test_a_rollout_replaces_standbys_last() -> None:
    during = (seen("a"), seen("b", Phase.STARTING, release=2, status={"ready": False}), standby("s"))
    made = decide(facts(*during, release=2))
    assert (promoted(made), retired(made), created(made)) == ([], [], [])
    made = decide(facts(seen("b", release=2), standby("s"), release=2, status=app_status(release=2, served_release=2)))
    assert (retired(made), created(made)) == (["s"], [True])
    (old,) = [update.instance for update in of(Update, made.actions)]
    assert old.desired is Desired.STOP, "it has no request that could end"


def test_while_a_release_fails_standbys_of_the_one_before_step_in_for_it() -> None:
    failed = app_status(AppPhase.FAILED, release=2, served_release=1, progressed_at=NOW - 1000)
    bad = seen("b", Phase.BACKOFF, release=2, status={"ready": False, "ready_at": None, "restarts": 3})
    made = decide(facts(bad, standby("s"), standby("t"), release=2, standby=2, status=failed, updated_at=NOW - 1000))
    assert promoted(made) == ["s"]
    assert False not in created(made)


@pytest.mark.parametrize("how", ["stopped", "deleted", "not wanted"])
def test_they_go_when_the_app_is_stopped_or_deleted_or_wants_none(how: str) -> None:
    more: dict[str, dict[str, Any]] = {"stopped": {"replicas": 0}, "deleted": {"deleting": True}, "not wanted": {"standby": 0}}
    made = decide(facts(seen("a"), standby("s"), standby("u", None, node=None), **more[how]))
    assert {"s", "u"} <= set(retired(made))
    assert created(made) == []


def test_a_lost_or_ailing_standby_is_replaced_by_another() -> None:
    made = decide(facts(seen("a"), standby("s", lost_at=NOW - 1)))
    assert (retired(made), created(made)) == (["s"], [True])
    sick = replace(standby("s"), ailment=Ailment(device="GPU-0", why="rows wait for a reset"))
    made = decide(facts(seen("a"), sick))
    assert retired(made) == ["s"]
    after = decide(facts(seen("a"), standby("s", desired=Desired.STOP, excused=True)))
    assert created(after) == [True]


def test_a_standby_that_failed_for_good_is_made_again_with_growing_delays() -> None:
    just = standby("s", Phase.FAILED, status={"ready": False, "ready_at": None, "phase_at": NOW - 0.5}, attempt=2)
    made = decide(facts(seen("a"), just))
    assert (retired(made), created(made), made.wake_at) == ([], [], NOW - 0.5 + 4)
    old = standby("s", Phase.FAILED, status={"ready": False, "ready_at": None, "phase_at": NOW - 5}, attempt=2)
    made = decide(facts(seen("a"), old))
    (create,) = of(Create, made.actions)
    assert (retired(made), create.instance.standby, create.instance.attempt) == (["s"], True, 3)


def test_a_waking_one_does_not_make_its_app_look_degraded() -> None:
    made = decide(facts(seen("a"), seen("s", status=PARKED), replicas=2))
    (written,) = of(WriteAppStatus, made.actions)
    assert written.status.phase is AppPhase.DEPLOYING


def test_an_app_s_standby_gives_its_room_to_any_app_that_wants_it() -> None:
    async def main() -> None:
        async with Cell() as cell:
            cell.script = parks
            cell.lead()
            cell.agents()
            await cell.add_node("n1", cpu=2000)
            half = Resources(cpu=Cores(1))
            waits = AppSpec(name="web", image="x", ports=(Port(port=80),), resources=half, scale=Scale(standby=1), rollout=RULES)
            await cell.deploy(waits)
            await until(lambda: (status := cell.app_status("web")) is not None and status.parked == 1)
            await cell.deploy(AppSpec(name="api", image="x", ports=(Port(port=80),), resources=half, rollout=RULES))
            await until(lambda: (status := cell.app_status("api")) is not None and status.ready == 1)
            web = cell.app_status("web")
            assert web is not None
            assert (web.ready, web.parked) == (1, 0)
            (left,) = [instance for instance in cell.instances() if instance.standby and instance.node is None]
            assert left.rejection is not None, "another would stand by as soon as there is room"

    run_virtual(main())


def parks(instance: Instance) -> list[tuple[float, dict[str, Any]]]:
    if not instance.standby:
        return healthy(instance)
    return [(0.03, {"phase": Phase.RUNNING, "started_at": 0.0, "address": "10.64.0.3"}), (0.02, {"parked": True})]


async def until(holds: Any, timeout_s: float = 120.0) -> None:
    async with asyncio.timeout(timeout_s):
        while not holds():  # noqa: ASYNC110 - what is waited for has no event
            await asyncio.sleep(0.05)
