"""Jobs with a schedule: decisions as tables, the loop on a virtual clock, and what the API takes."""

from __future__ import annotations

import itertools
import random
from typing import Any

import pytest
from control_cell import START, Cell, run_virtual
from msgspec import structs

from atoll.api.service import KINDS, SYSTEM, Service
from atoll.control.actions import CreateJob, Decision, Tell, UpdateJob, WriteJobStatus
from atoll.control.schedules import Run, decide_schedule, run_name
from atoll.model import keys
from atoll.model.errors import Conflict, Invalid
from atoll.model.records import Instance, Job, JobPhase, JobStatus
from atoll.model.spec import JobSpec, Overlap, check_job
from atoll.model.states import Phase
from atoll.model.units import Seconds
from atoll.store.cache import State
from atoll.store.memory import MemoryStore

MINUTE = 60.0
T = 1_000_200.0
"""A time of `*/5 * * * *`."""
SPEC = JobSpec(name="report", image="x", schedule="*/5 * * * *")


def decide(
    *runs: Run,
    now: float = T,
    since: float = T - 60,
    overlap: Overlap = Overlap.SKIP,
    late: float | None = None,
    last: JobStatus | None = None,
    forward_since: float | None = None,
    **more: Any,
) -> list[Any]:
    numbers = itertools.count()
    decision = Decision(now, lambda: f"{next(numbers):06d}", forward_since=forward_since)
    spec = structs.replace(SPEC, overlap=overlap, starting_deadline=Seconds(late) if late is not None else None)
    job = Job(project="p", name="report", spec=spec, created_at=since, scheduled_from=since, **more)
    decide_schedule(job, 7, last, runs, decision, taken=False)
    return decision.actions


def run(phase: JobPhase | None, *, active: int = 0, cancelled: bool = False) -> Run:
    name = run_name("report", T - 300)
    job = Job(project="p", name=name, spec=SPEC, created_at=T - 300, parent="report", tick=T - 300, cancelled=cancelled)
    return Run(job=job, revision=5, status=JobStatus(project="p", name=name, phase=phase, active=active) if phase else None)


def kinds(actions: list[Any]) -> list[str]:
    return [type(action).__name__ for action in actions if not isinstance(action, Tell)]


def status_in(actions: list[Any]) -> JobStatus:
    (found,) = [action.status for action in actions if isinstance(action, WriteJobStatus)]
    assert isinstance(found, JobStatus)
    return found


@pytest.mark.parametrize(
    ("runs", "overlap", "done"),
    [
        ((), Overlap.SKIP, ["CreateJob", "WriteJobStatus"]),
        ((run(JobPhase.SUCCEEDED),), Overlap.SKIP, ["CreateJob", "WriteJobStatus"]),
        ((run(JobPhase.RUNNING, active=1),), Overlap.SKIP, ["WriteJobStatus"]),
        ((run(None),), Overlap.SKIP, ["WriteJobStatus"]),
        ((run(JobPhase.RUNNING, active=1),), Overlap.ALLOW, ["CreateJob", "WriteJobStatus"]),
        ((run(JobPhase.RUNNING, active=1),), Overlap.REPLACE, ["UpdateJob", "WriteJobStatus"]),
        ((run(JobPhase.RUNNING, active=1, cancelled=True),), Overlap.REPLACE, ["WriteJobStatus"]),
        ((run(JobPhase.CANCELLED, active=1, cancelled=True),), Overlap.REPLACE, ["WriteJobStatus"]),
        ((run(JobPhase.CANCELLED, cancelled=True),), Overlap.REPLACE, ["CreateJob", "WriteJobStatus"]),
    ],
)
def test_a_time_that_has_come_makes_one_run_or_what_the_overlap_says(
    runs: tuple[Run, ...], overlap: Overlap, done: list[str]
) -> None:
    assert kinds(decide(*runs, overlap=overlap)) == done


def test_while_one_is_replaced_its_time_stays_due_and_a_skipped_one_is_counted() -> None:
    running = run(JobPhase.RUNNING, active=1)
    assert status_in(decide(running, overlap=Overlap.REPLACE)).ticked_at is None
    skipped = status_in(decide(running))
    assert (skipped.ticked_at, skipped.skipped, skipped.active, skipped.next_at) == (T, 1, 1, T + 300)
    (cancelled,) = [a for a in decide(running, overlap=Overlap.REPLACE) if isinstance(a, UpdateJob)]
    assert (cancelled.job.cancelled, cancelled.revision) == (True, 5)


def codes(actions: list[Any]) -> list[str]:
    return [action.event.code for action in actions if isinstance(action, Tell)]


def test_what_was_missed_is_told_once_and_not_while_the_last_waits_for_what_it_replaces() -> None:
    since = T - 601
    waits = decide(run(JobPhase.RUNNING, active=1), since=since, overlap=Overlap.REPLACE)
    assert codes(waits) == []
    cancelled = run(JobPhase.CANCELLED, active=1, cancelled=True)
    again = decide(cancelled, since=since, overlap=Overlap.REPLACE, last=status_in(waits))
    assert (kinds(again), codes(again)) == ([], [])
    ended = run(JobPhase.CANCELLED, cancelled=True)
    made = decide(ended, since=since, overlap=Overlap.REPLACE, last=status_in(waits))
    assert codes(made) == ["runs-missed", "run-made"]
    assert status_in(made).missed == 2


@pytest.mark.parametrize("later", [T + 60, T + 360])
def test_the_wait_for_what_is_replaced_does_not_make_it_late(later: float) -> None:
    waits = status_in(decide(run(JobPhase.RUNNING, active=1), overlap=Overlap.REPLACE, late=10.0))
    still = decide(run(JobPhase.CANCELLED, active=1, cancelled=True), now=later, overlap=Overlap.REPLACE, late=10.0, last=waits)
    assert "run-missed" not in codes(still)
    ended = run(JobPhase.CANCELLED, cancelled=True)
    made = decide(ended, now=later, overlap=Overlap.REPLACE, late=10.0, last=waits)
    assert [action.job.tick for action in made if isinstance(action, CreateJob)] == [T + (later - T) // 300 * 300]
    following = decide(ended, now=T + 620, overlap=Overlap.REPLACE, late=10.0, last=status_in(made))
    assert kinds(following) == ["WriteJobStatus"], "the next is late by itself"
    assert "run-missed" in codes(following)


@pytest.mark.parametrize(
    ("now", "since", "late", "ran_for", "missed"),
    [
        (T, T - 1, None, T, 0),
        (T, T, None, None, 0),
        (T + 299, T - 1, None, T, 0),
        (T + 3600, T - 1, None, T + 3600, 12),
        (T + 3599, T - 1, None, T + 3300, 11),
        (T + 20, T - 1, 10.0, None, 1),
        (T + 20, T - 1, 30.0, T, 0),
        (T + 3599, T - 1, 60.0, None, 12),
        (T - 1000, T, None, None, 0),
    ],
)
def test_after_an_outage_only_the_last_time_is_run_and_the_rest_is_counted(
    now: float, since: float, late: float | None, ran_for: float | None, missed: int
) -> None:
    actions = decide(now=now, since=since, late=late)
    made = [action.job for action in actions if isinstance(action, CreateJob)]
    assert [job.tick for job in made] == ([ran_for] if ran_for is not None else [])
    assert status_in(actions).missed == missed
    for job in made:
        assert (job.name, job.parent) == (run_name("report", ran_for or 0), "report")
        assert (job.spec.name, job.spec.schedule) == (job.name, None)
        check_job(job.spec)


@pytest.mark.parametrize("ahead_s", [300.0, 1e9])
@pytest.mark.parametrize(("made_ahead", "ticked_ahead"), [(True, False), (False, True), (True, True)])
def test_what_was_stamped_before_the_date_went_back_holds_up_no_run(ahead_s: float, made_ahead: bool, ticked_ahead: bool) -> None:
    since = T + ahead_s if made_ahead else T - 600
    ticked_at = T + ahead_s if ticked_ahead else None
    last = JobStatus(project="p", name="report", phase=JobPhase.SCHEDULED, ticked_at=ticked_at)
    actions = decide(since=since, last=last, forward_since=T - 100)
    assert [action.job.tick for action in actions if isinstance(action, CreateJob)] == [T]
    assert status_in(actions).ticked_at == T
    assert "CreateJob" not in kinds(decide(since=since, last=status_in(actions), now=T + 1, forward_since=T - 100))


def test_one_that_is_suspended_makes_none_and_says_so() -> None:
    actions = decide(suspended=True)
    assert kinds(actions) == ["WriteJobStatus"]
    assert (status_in(actions).phase, status_in(actions).next_at) == (JobPhase.SUSPENDED, None)


def works(instance: Instance) -> list[tuple[float, dict[str, Any]]]:
    return [(0.03, {"phase": Phase.RUNNING, "started_at": 0.0}), (10.0, {"phase": Phase.SUCCEEDED})]


async def schedule(cell: Cell, **more: Any) -> None:
    spec = structs.replace(SPEC, **more)
    now = cell.clock.now()
    job = Job(project="default", name="report", spec=spec, created_at=now, scheduled_from=now)
    await cell.put(keys.job("default", "report"), job)


def runs(cell: Cell) -> list[Job]:
    return sorted((held.record for held in cell.state.records(Job).values() if held.record.parent), key=lambda job: job.created_at)


def test_each_time_has_one_run_though_leaders_change_and_a_time_without_any_is_caught_up_once() -> None:
    async def main() -> None:
        async with Cell() as cell:
            cell.script = works
            await cell.add_node("n1")
            cell.agents()
            cell.lead("one")
            cell.lead("two")
            await schedule(cell, runs_kept=100)
            made: set[str] = set()
            cell.watchers.append(lambda: made.update(job.name for job in runs(cell)))
            for number in range(6):
                await cell.quiet(290)
                cell.stop_leading()
                cell.lead(f"next-{number}")
                await cell.quiet(30)
            ticks = [job.tick or 0.0 for job in runs(cell)]
            first = -(-(START + 1) // 300) * 300
            assert ticks == [first + 300 * number for number in range(len(ticks))]
            assert len(ticks) == 6
            assert made == {job.name for job in runs(cell)}
            cell.stop_leading()
            await cell.quiet(3600)
            assert len(runs(cell)) == 6, "nobody leads"
            cell.lead("last")
            await cell.until(lambda: len(runs(cell)) == 7)
            status = cell.job_status("report")
            assert status is not None
            assert status.missed == 11
            assert "runs-missed" in cell.codes()

    run_virtual(main())


def test_the_newest_runs_that_have_finished_are_kept_and_no_other() -> None:
    async def main() -> None:
        async with Cell() as cell:
            cell.script = works
            await cell.add_node("n1")
            cell.agents()
            cell.lead()
            await schedule(cell, runs_kept=2, keep=Seconds(1))
            await cell.quiet(2650)
            names = [job.name for job in runs(cell)]
            assert len(names) in (2, 3)
            newest = int((START + 2650) // 300 * 5)
            assert names[-1] == f"report-{newest}"
            assert {i.owner for i in cell.instances()} == set(names)

    run_virtual(main())


def test_what_replaces_begins_only_when_what_it_replaces_has_ended() -> None:
    def for_ever(instance: Instance) -> list[tuple[float, dict[str, Any]]]:
        return [(0.03, {"phase": Phase.RUNNING, "started_at": 0.0})]

    async def main() -> None:
        async with Cell() as cell:
            cell.script = for_ever
            await cell.add_node("n1")
            cell.agents()
            cell.lead()
            await schedule(cell, overlap=Overlap.REPLACE)
            most: list[int] = []

            def running() -> int:
                live = ((i, cell.status(i)) for i in cell.instances())
                return sum(s is None or not s.phase.final for _, s in live)

            cell.watchers.append(lambda: most.append(running()))
            await cell.until(lambda: len(runs(cell)) == 3, within_s=2000)
            await cell.quiet(10)
            assert max(most) == 1
            assert running() == 1

    run_virtual(main())


class StillClock:
    at = START

    def now(self) -> float:
        return self.at

    def monotonic(self) -> float:
        return self.at


async def test_the_api_makes_changes_suspends_triggers_and_forgets_a_schedule() -> None:
    clock, seeded = StillClock(), random.Random(1)
    store = MemoryStore(clock)
    async with State(store, KINDS) as state, Service(store, state, clock, seeded, bytes(32), entropy=seeded.randbytes) as service:
        spec = structs.replace(SPEC, image="x/y:1")
        made = await service.jobs.put(SYSTEM, spec)
        assert made.job.scheduled_from == START
        clock.at += 100
        assert (await service.jobs.put(SYSTEM, spec)).revision == made.revision, "the same again changes nothing"
        changed = await service.jobs.put(SYSTEM, structs.replace(spec, schedule="@hourly"))
        assert (changed.job.scheduled_from, changed.job.created_at) == (START + 100, START)
        assert (await service.jobs.suspend("default", "report", True)).job.suspended is True
        clock.at += 100
        resumed = await service.jobs.suspend("default", "report", False)
        assert (resumed.job.suspended, resumed.job.scheduled_from) == (False, START + 200)
        by_hand = await service.jobs.trigger("default", "report")
        assert (by_hand.job.parent, by_hand.job.tick, by_hand.job.spec.schedule) == ("report", None, None)
        with pytest.raises(Conflict) as refused:
            await service.jobs.cancel("default", "report")
        assert "atoll jobs suspend report" in (refused.value.mend or "")
        await service.jobs.create(SYSTEM, JobSpec(name="once", image="x/y:1"))
        for call in (service.jobs.trigger("default", "once"), service.jobs.suspend("default", "once", True)):
            with pytest.raises(Conflict):
                await call
        with pytest.raises(Conflict):
            await service.jobs.put(SYSTEM, structs.replace(spec, name="once"))
        with pytest.raises(Invalid):
            await service.jobs.put(SYSTEM, JobSpec(name="other", image="x/y:1"))
        await service.jobs.delete("default", "report")
        left = service.jobs.get("default", by_hand.job.name)
        assert left.job.cancelled is True, "what still ran of it is cancelled in the same write"
    await store.close()


@pytest.mark.parametrize(
    ("more", "field"),
    [
        ({"schedule": "often"}, "schedule"),
        ({"schedule": "0 0 30 2 *"}, "schedule"),
        ({"timezone": "Mars/Olympus"}, "timezone"),
        ({"name": "r" * 32}, "name"),
    ],
)
def test_a_schedule_that_makes_no_sense_is_refused_by_name(more: dict[str, Any], field: str) -> None:
    with pytest.raises(Invalid) as refused:
        check_job(structs.replace(SPEC, **more))
    assert refused.value.field == field
