"""What becomes of work whose device is sick, gone or silent: decisions, as tables, and the whole loop once."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from control_cell import Cell, node, run_virtual, succeeds
from msgspec.structs import replace
from test_control_decide import NOW, RULES, app_facts, app_status, decide, decision, of, seen

from atoll.control.actions import Ailment, Create, Decision, Remove, Seen, Tell, Update, WriteAppStatus, WriteJobStatus
from atoll.control.gpus import AGE_MIN_S, EXCUSES_MAX, LEAVING_MAX, Urgency, ailment_of, urgency_of
from atoll.control.jobs import JobFacts, decide_job
from atoll.model import keys
from atoll.model.devices import GpuDevice, GpuGrant, GpuHealth
from atoll.model.records import AppPhase, Instance, Job, JobPhase, JobStatus, OwnerKind
from atoll.model.spec import AppSpec, Gpu, JobSpec, Port, Resources, Rollout
from atoll.model.states import Desired, Phase
from atoll.model.units import Seconds

GRANTS = (GpuGrant(device="GPU-0"),)
GONE = Ailment(device="GPU-0", why="it has vanished", gone=True)
SICK = Ailment(device="GPU-0", why="rows wait for a reset")
SILENT = Ailment(device="GPU-0", why="the driver is silent", silent=True)


def device(id: str = "GPU-0", **more: Any) -> GpuDevice:
    return GpuDevice(id=id, model="H100", memory_bytes=80 << 30, **more)


def ailing(id: str, ailment: Ailment | None, phase: Phase | None = Phase.RUNNING, **more: Any) -> Seen:
    return replace(seen(id, phase, gpus=GRANTS, **more), ailment=ailment)


def holder(*devices: str) -> Instance:
    grants = tuple(GpuGrant(device=each) for each in devices)
    return Instance(id="a", project="p", owner_kind=OwnerKind.APP, owner="web", node="n", gpus=grants, created_at=NOW)


def replaced(made: Decision) -> list[str]:
    return [t.event.subject.removeprefix("instance/") for t in of(Tell, made.actions) if t.event.code == "gpu-replaced"]


def told_to(made: Decision) -> dict[str, Desired]:
    return {update.instance.id: update.instance.desired for update in of(Update, made.actions)}


QUARANTINED = {"health": GpuHealth.QUARANTINED, "reason": "XID 79"}


@pytest.mark.parametrize(
    ("devices", "kind"),
    [
        ([device()], None),
        ([device(health=GpuHealth.DEGRADED, reason="it is slow")], None),
        ([device(**QUARANTINED)], "sick"),
        ([device(**QUARANTINED, answers=False)], "silent"),
        ([device(**QUARANTINED, present=False)], "gone"),
        ([device("GPU-1")], "gone"),
        ([], "gone"),
    ],
)
def test_a_node_s_word_on_a_device_says_what_ails_its_holder(devices: list[GpuDevice], kind: str | None) -> None:
    found = ailment_of(holder("GPU-0"), devices)
    if kind is None:
        assert found is None
    else:
        assert found is not None
        assert "GPU-0" in found.why
        assert (found.gone, found.silent) == (kind == "gone", kind == "silent")


def test_the_worst_of_several_devices_counts() -> None:
    devices = [device("GPU-0", **QUARANTINED, answers=False), device("GPU-1", **QUARANTINED), device("GPU-2")]
    worst = ailment_of(holder("GPU-0", "GPU-1", "GPU-2"), devices)
    assert worst is not None
    assert (worst.device, worst.gone, worst.silent) == ("GPU-1", False, False)
    gone = ailment_of(holder("GPU-0", "GPU-1", "GPU-9"), devices)
    assert gone is not None
    assert gone.device == "GPU-9"


@pytest.mark.parametrize(
    ("ailment", "phase", "urgency"),
    [
        (None, Phase.RUNNING, None),
        (GONE, Phase.RUNNING, Urgency.NOW),
        (GONE, Phase.BACKOFF, Urgency.NOW),
        (GONE, Phase.FAILED, None),
        (SICK, Phase.RUNNING, Urgency.SERVING),
        (SICK, Phase.PREPARING, Urgency.NOW),
        (SILENT, Phase.RUNNING, None),
        (SILENT, Phase.PREPARING, None),
        (SILENT, Phase.BACKOFF, Urgency.NOW),
    ],
)
def test_how_soon_an_instance_is_replaced(ailment: Ailment | None, phase: Phase, urgency: Urgency | None) -> None:
    assert urgency_of(ailing("a", ailment, phase)) is urgency
    assert urgency_of(ailing("a", ailment, phase, desired=Desired.STOP)) is None


def test_what_holds_a_vanished_device_is_stopped_and_made_anew_at_once() -> None:
    made = decide(app_facts(ailing("a", GONE), status=app_status(ready=1, updated=1, total=1)))
    (update,) = of(Update, made.actions)
    assert (update.instance.desired, update.instance.excused, update.instance.reason) == (Desired.STOP, True, "it has vanished")
    assert len(of(Create, made.actions)) == 1
    assert replaced(made) == ["a"]


def test_what_serves_on_a_sick_device_leaves_only_when_another_serves() -> None:
    status = app_status(ready=1, updated=1, total=1)
    first = decide(app_facts(ailing("a", SICK), status=status))
    assert told_to(first) == {}
    assert len(of(Create, first.actions)) == 1
    (written,) = of(WriteAppStatus, first.actions)
    assert written.status.message == "a on n: rows wait for a reset"
    assert written.status.ready == 1
    waits = decide(app_facts(ailing("a", SICK), seen("b", Phase.PREPARING), status=status))
    assert told_to(waits) == {}
    assert of(Create, waits.actions) == []
    serves = decide(app_facts(ailing("a", SICK), seen("b"), status=status))
    assert told_to(serves) == {"a": Desired.DRAIN}
    assert replaced(serves) == ["a"]
    assert of(Create, serves.actions) == []


def test_of_many_on_sick_devices_as_many_go_at_a_time_as_in_a_rollout() -> None:
    instances = [ailing(f"a{n}", SICK) for n in range(6)]
    surge = decide(app_facts(*instances, replicas=6, status=app_status(ready=6, updated=6, total=6)))
    assert len(of(Create, surge.actions)) == 1, "max_surge is 1"
    assert told_to(surge) == {}
    rules = Rollout(max_surge=0, max_unavailable=2, drain=Seconds(30))
    facts = app_facts(*instances, replicas=6, status=app_status(ready=6, updated=6, total=6))
    tight = replace(facts, app=replace(facts.app, spec=replace(facts.app.spec, rollout=rules)))
    assert len(told_to(decide(tight))) == 2


def test_a_silent_driver_moves_nothing_that_runs() -> None:
    made = decide(app_facts(ailing("a", SILENT), status=app_status(ready=1, updated=1, total=1)))
    assert made.actions == []
    stuck = decide(app_facts(ailing("a", SILENT, Phase.BACKOFF), status=app_status(ready=0, updated=0, total=1)))
    assert told_to(stuck) == {"a": Desired.STOP}


def test_a_mass_failure_is_a_stream_and_no_flood() -> None:
    instances = [ailing(f"a{n:02}", GONE) for n in range(20)]
    status = app_status(ready=20, updated=20, total=20)
    first = decide(app_facts(*instances, replicas=20, status=status))
    assert sorted(told_to(first)) == [f"a{n:02}" for n in range(LEAVING_MAX)]
    leaving = [
        replace(each, instance=replace(each.instance, desired=Desired.STOP, excused=True)) if n < LEAVING_MAX else each
        for n, each in enumerate(instances)
    ]
    assert told_to(decide(app_facts(*leaving, replicas=20, status=status))) == {}
    ended = [replace(each, status=replace(each.status, phase=Phase.STOPPED)) if n == 0 else each for n, each in enumerate(leaving)]
    assert sorted(told_to(decide(app_facts(*ended, replicas=20, status=status)))) == [f"a{LEAVING_MAX:02}"]


def test_what_has_just_got_its_node_waits_so_that_a_release_does_not_break_every_device() -> None:
    young = ailing("a", GONE, created_at=NOW - 3, placed_at=NOW - 2)
    made = decide(app_facts(young, status=app_status(ready=1, updated=1, total=1)))
    assert told_to(made) == {}
    assert made.wake_at == NOW - 2 + AGE_MIN_S
    assert told_to(decide(app_facts(ailing("a", GONE, placed_at=NOW - AGE_MIN_S)))) == {"a": Desired.STOP}


def test_an_app_that_is_deleted_takes_those_on_sick_devices_along() -> None:
    made = decide(app_facts(ailing("a", SICK), ailing("b", GONE), seen("c"), replicas=3, deleting=True))
    assert sorted(told_to(made)) == ["a", "b", "c"]
    assert replaced(made) == []


def test_a_failed_rollout_keeps_what_served_at_its_number_though_a_device_is_sick() -> None:
    status = app_status(AppPhase.FAILED, release=2, served_release=1, progressed_at=NOW - 500)
    old = [ailing("a", SICK, release=1), seen("b", release=1)]
    made = decide(app_facts(*old, replicas=2, release=2, status=status))
    assert [c.instance.release for c in of(Create, made.actions)] == [1]
    assert told_to(made) == {}


def job(*instances: Seen, status: JobStatus | None = None, **spec: Any) -> Decision:
    told = JobSpec(name="sum", image="x", resources=Resources(gpu=Gpu()), **spec)
    record = Job(project="p", name="sum", spec=told, created_at=NOW - 1000)
    made = decision()
    last = status or JobStatus(project="p", name="sum", phase=JobPhase.RUNNING, active=len(instances), started_at=NOW - 400)
    decide_job(JobFacts(job=record, revision=3, status=last, instances=instances), made)
    return made


def a_try(id: str, ailment: Ailment | None, phase: Phase = Phase.RUNNING, **more: Any) -> Seen:
    return ailing(id, ailment, phase, kind=OwnerKind.JOB, **more)


@pytest.mark.parametrize("ailment", [GONE, SICK])
def test_a_try_on_a_device_that_is_sick_or_gone_is_ended_and_made_again_without_being_counted(ailment: Ailment) -> None:
    made = job(a_try("t0", ailment))
    (update,) = of(Update, made.actions)
    assert (update.instance.desired, update.instance.excused) == (Desired.STOP, True)
    assert replaced(made) == ["t0"]
    assert of(Create, made.actions) == [], "the same index never runs twice at a time"
    again = job(a_try("t0", ailment, Phase.STOPPED, desired=Desired.STOP, excused=True))
    assert [(c.instance.index, c.instance.attempt) for c in of(Create, again.actions)] == [(0, 0)]
    later = job(a_try("t0", None, Phase.STOPPED, desired=Desired.STOP, excused=True), a_try("t1", None))
    (written,) = of(WriteJobStatus, later.actions)
    assert written.status.failures == {}, "well again: it is still not counted"


def test_a_try_that_its_device_took_along_is_not_counted_either() -> None:
    made = job(a_try("t0", GONE, Phase.FAILED), retries=0)
    (update,) = of(Update, made.actions)
    assert update.instance.excused
    assert len(of(Create, made.actions)) == 1
    counted = job(a_try("t0", None, Phase.FAILED), retries=0)
    (written,) = of(WriteJobStatus, counted.actions)
    assert written.status.phase is JobPhase.FAILED


def test_a_job_that_breaks_one_device_after_another_runs_out_of_excuses() -> None:
    excused = [a_try(f"t{n}", GONE, Phase.FAILED, excused=True) for n in range(EXCUSES_MAX)]
    made = job(*excused, a_try("t9", GONE, Phase.FAILED), retries=0)
    assert of(Update, made.actions) == []
    (written,) = of(WriteJobStatus, made.actions)
    assert (written.status.phase, written.status.failures) == (JobPhase.FAILED, {0: 1})
    (last,) = of(Update, job(*excused, a_try("t9", GONE)).actions)
    assert (last.instance.desired, last.instance.excused) == (Desired.STOP, False)


def test_the_kept_tries_of_an_index_are_the_newest_though_excused_ones_share_a_number() -> None:
    tries = [a_try(f"t{n}", None, Phase.STOPPED, excused=True, created_at=NOW - n) for n in range(5)]
    made = job(*tries)
    assert sorted(each.instance.id for each in of(Remove, made.actions)) == ["t3", "t4"]


SERVES = AppSpec(name="web", image="x", ports=(Port(port=80),), resources=Resources(gpu=Gpu()), rollout=RULES)


async def add_gpus(cell: Cell, name: str, *devices: GpuDevice) -> None:
    """Register the node, or register it anew with other devices."""
    known = node(name)
    await cell.put(keys.node(name), replace(known, capacity=replace(known.capacity, gpus=devices)))


def devices_of(cell: Cell) -> list[str]:
    return [grant.device for instance in cell.instances() for grant in instance.gpus]


@pytest.mark.parametrize("well", [{**QUARANTINED}, {**QUARANTINED, "present": False}], ids=["sick", "gone"])
def test_a_node_s_word_moves_an_app_to_another_device_and_only_what_is_gone_is_not_waited_for(well: dict[str, Any]) -> None:
    async def main() -> None:
        async with Cell() as cell:
            cell.agents()
            cell.lead()
            await add_gpus(cell, "n1", device("GPU-0"), device("GPU-1"))
            await cell.deploy(SERVES)
            await cell.until(lambda: cell.ready() == 1)
            await asyncio.sleep(AGE_MIN_S)
            (first,) = devices_of(cell)
            least = [cell.ready()]
            cell.watchers.append(lambda: least.append(cell.ready()))
            others = [device(id) for id in ("GPU-0", "GPU-1") if id != first]
            await add_gpus(cell, "n1", device(first, **well), *others)
            await cell.until(lambda: cell.ready() == 1 and len(cell.instances()) == 1 and devices_of(cell) != [first])
            assert cell.codes().count("gpu-replaced") == 1
            assert min(least) == (1 if well.get("present", True) else 0)

    run_virtual(main())


def test_a_job_whose_device_vanishes_is_tried_again_on_another_and_loses_no_try() -> None:
    async def main() -> None:
        async with Cell() as cell:
            cell.agents()
            cell.lead()
            await add_gpus(cell, "n1", device("GPU-0"))
            await cell.submit(JobSpec(name="work", image="x", resources=Resources(gpu=Gpu()), retries=0))
            await cell.until(lambda: cell.ready() == 1)
            await asyncio.sleep(AGE_MIN_S)
            await add_gpus(cell, "n2", device("GPU-1"))
            cell.script = succeeds
            await add_gpus(cell, "n1")
            await cell.until(lambda: (status := cell.job_status()) is not None and status.phase.final)
            status = cell.job_status()
            assert status is not None
            assert (status.phase, status.failures) == (JobPhase.SUCCEEDED, {})
            assert "gpu-replaced" in cell.codes()

    run_virtual(main())


def test_the_same_devices_registered_again_disturb_nobody() -> None:
    async def main() -> None:
        async with Cell() as cell:
            cell.agents()
            cell.lead()
            await add_gpus(cell, "n1", device("GPU-0"))
            await cell.deploy(SERVES)
            await cell.until(lambda: (status := cell.app_status()) is not None and status.phase is AppPhase.RUNNING)
            await asyncio.sleep(AGE_MIN_S)
            await add_gpus(cell, "n1", device("GPU-0", ecc_errors=1, health=GpuHealth.DEGRADED, reason="errors were corrected"))
            assert await cell.quiet() == 0

    run_virtual(main())
