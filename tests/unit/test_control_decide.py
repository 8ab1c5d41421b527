"""Single decisions, as tables: what is seen, and what is asked for."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from msgspec import structs

from atoll.control.actions import (
    AGAIN_S,
    Action,
    Create,
    Decision,
    Remove,
    RemoveApp,
    RemoveJob,
    Seen,
    Tell,
    Update,
    WriteAppStatus,
    WriteJobStatus,
    WriteLiveness,
)
from atoll.control.apps import UNPLACED_MAX, AppFacts, decide_app
from atoll.control.detection.decide import Standing
from atoll.control.jobs import JobFacts, decide_job, decide_orphans
from atoll.control.nodes import LOST_S, UNREACHABLE_S, NodeFacts, decide_node, is_to_be_lost
from atoll.control.timers import Timers
from atoll.model.records import (
    App,
    AppPhase,
    AppStatus,
    Capacity,
    Exit,
    Instance,
    Job,
    JobPhase,
    JobStatus,
    Node,
    NodeHealth,
    NodeLiveness,
    OwnerKind,
    Rejection,
    Status,
)
from atoll.model.spec import AppSpec, Health, JobSpec, Port, Rollout
from atoll.model.states import Desired, Phase
from atoll.model.units import Seconds

NOW = 10_000.0
RULES = Rollout(deadline=Seconds(100), drain=Seconds(30))
SPEC = AppSpec(name="web", image="x", ports=(Port(port=80),), rollout=RULES, health=Health())


def decision(now: float = NOW) -> Decision:
    numbers = itertools.count()
    return Decision(now, lambda: f"{next(numbers):06d}")


def seen(
    id: str,
    phase: Phase | None = Phase.RUNNING,
    *,
    desired: Desired = Desired.RUN,
    node: str | None = "n",
    release: int = 1,
    lost_at: float | None = None,
    drained: frozenset[str] = frozenset(),
    kind: OwnerKind = OwnerKind.APP,
    status: dict[str, Any] | None = None,
    **more: Any,
) -> Seen:
    generation = 1 if kind is OwnerKind.APP else 0
    instance = Instance(
        **{"id": id, "project": "p", "owner_kind": kind, "owner": "web", "generation": generation, "created_at": NOW - 500}
        | {"node": node, "desired": desired, "release": release if kind is OwnerKind.APP else 0}
        | more
    )
    said = None
    if phase is not None:
        facts = {"ready": phase is Phase.RUNNING, "phase_at": NOW - 400, "started_at": NOW - 400, "ready_at": NOW - 400}
        said = Status(**{"instance": id, "project": "p", "node": node or "", "phase": phase, **facts, **(status or {})})
    return Seen(instance=instance, revision=7, status=said, lost_at=lost_at, drained=drained)


def app_facts(*instances: Seen, replicas: int = 1, release: int = 1, ingresses: str = "g", **more: Any) -> AppFacts:
    told = more.pop("status", None)
    app = App(
        **{"project": "p", "name": "web", "spec": SPEC, "release": release, "replicas": replicas}
        | {"created_at": NOW - 1000, "updated_at": NOW - 1000}
        | more
    )
    return AppFacts(
        app=app, revision=3, status=told, instances=instances, specs={1: SPEC, 2: SPEC}, ingresses=frozenset(ingresses.split())
    )


def app_status(phase: AppPhase = AppPhase.RUNNING, **more: Any) -> AppStatus:
    usual = {"release": 1, "served_release": 1, "progressed_at": NOW - 900}
    return AppStatus(**{"project": "p", "name": "web", "phase": phase, **usual, **more})


def of(kind: type[Any], actions: list[Action]) -> list[Any]:
    return [action for action in actions if isinstance(action, kind)]


def decide(facts: AppFacts) -> Decision:
    made = decision()
    decide_app(facts, made)
    return made


@pytest.mark.parametrize(
    ("what", "ingresses", "after"),
    [
        (seen("a", desired=Desired.DRAIN, drain_until=NOW + 5), "g", None),
        (seen("a", desired=Desired.DRAIN, drain_until=NOW + 5, drained=frozenset({"g"})), "g", Desired.STOP),
        (seen("a", desired=Desired.DRAIN, drain_until=NOW + 5, drained=frozenset({"g"})), "g h", None),
        (seen("a", desired=Desired.DRAIN, drain_until=NOW), "g", Desired.STOP),
        (seen("a", desired=Desired.DRAIN, drain_until=NOW + 5), "", Desired.STOP),
        (seen("a", Phase.BACKOFF, desired=Desired.DRAIN, drain_until=NOW + 5), "g", Desired.STOP),
        (seen("a", desired=Desired.DRAIN), "", Desired.STOP),
        (seen("a", desired=Desired.DRAIN), "g", Desired.DRAIN),
        (seen("a", desired=Desired.STOP), "g", None),
        (seen("a", Phase.STOPPED, desired=Desired.STOP), "g", "removed"),
        (seen("a", None, desired=Desired.STOP, node=None), "g", "removed"),
        (seen("a", desired=Desired.STOP, lost_at=NOW - 1), "g", "removed"),
        (seen("a", desired=Desired.DRAIN, drain_until=NOW + 5, lost_at=NOW - 1), "g", "removed"),
    ],
)
def test_the_way_of_an_instance_that_leaves(what: Seen, ingresses: str, after: Any) -> None:
    made = decide(app_facts(what, replicas=0, ingresses=ingresses, status=app_status(AppPhase.STOPPED)))
    updates, removals = of(Update, made.actions), of(Remove, made.actions)
    if after is None:
        assert not updates
        assert not removals
    elif after == "removed":
        assert [r.instance.id for r in removals] == ["a"]
        assert not updates
    else:
        assert [u.instance.desired for u in updates] == [after]
        assert all(u.revision == 7 for u in updates)
    if after is Desired.DRAIN:
        assert updates[0].instance.drain_until == NOW + 30
    if after is None and what.instance.desired is Desired.DRAIN:
        assert made.wake_at == NOW + 5


def test_an_app_made_new_gets_all_its_instances_and_a_status() -> None:
    made = decide(app_facts(replicas=3))
    assert [(c.instance.release, c.instance.generation, c.instance.node) for c in of(Create, made.actions)] == [(1, 1, None)] * 3
    (written,) = of(WriteAppStatus, made.actions)
    assert written.status.phase is AppPhase.DEPLOYING
    assert written.status.progressed_at == NOW
    assert [t.event.code for t in of(Tell, made.actions)] == ["instances-created", "app-deployed"]


def test_ids_are_never_given_twice_though_chance_repeats_itself() -> None:
    chance = itertools.cycle("aab")
    made = Decision(NOW, lambda: next(chance), taken={"web-x"}, given=set())
    assert [made.new_id("web"), made.new_id("web"), made.new_id("other")] == ["web-a", "web-b", "other-a"]


def test_an_app_that_is_as_it_should_be_is_left_alone() -> None:
    status = app_status(ready=1, updated=1, total=1)
    made = decide(app_facts(seen("a"), status=status))
    assert made.actions == []
    assert made.wake_at is None


@pytest.mark.parametrize(
    ("instances", "phase", "words"),
    [
        ([seen("a")], AppPhase.RUNNING, ""),
        ([seen("a", Phase.PREPARING, created_at=NOW - 5)], AppPhase.DEPLOYING, ""),
        (
            [seen("a", Phase.BACKOFF, status={"restarts": 4, "exit": Exit(code=139, at=NOW, signal="SIGSEGV")})],
            AppPhase.DEGRADED,
            "a on n: was ended by SIGSEGV (4 restarts)",
        ),
        (
            [seen("a", Phase.BACKOFF, status={"restarts": 1, "exit": Exit(code=137, at=NOW, oom=True)})],
            AppPhase.DEGRADED,
            "a on n: was killed for going over its memory limit (1 restarts)",
        ),
        ([seen("a", status={"ready": False, "restarts": 1})], AppPhase.DEGRADED, "a on n: runs, but is not ready (1 restarts)"),
        ([seen("a", lost_at=NOW - 1)], AppPhase.DEGRADED, "a: node n is lost"),
        (
            [seen("a", None, node=None, created_at=NOW - 5, rejection=Rejection(code="no-memory", message="too little"))],
            AppPhase.DEPLOYING,
            "a has no node: too little",
        ),
    ],
)
def test_the_status_says_how_the_app_stands_and_why(instances: list[Seen], phase: AppPhase, words: str) -> None:
    made = decide(app_facts(*instances, status=app_status(AppPhase.STOPPED)))
    (written,) = of(WriteAppStatus, made.actions)
    assert (written.status.phase, written.status.message) == (phase, words)


@pytest.mark.parametrize(
    ("ran_s", "attempt", "waits_s"), [(1.0, 0, 1.0), (1.0, 1, 2.0), (1.0, 5, 32.0), (1.0, 40, 60.0), (600.0, 40, 1.0)]
)
def test_what_failed_for_good_is_replaced_after_a_delay_that_grows_unless_it_had_run_long(
    ran_s: float, attempt: int, waits_s: float
) -> None:
    ended = {"phase_at": NOW, "ready_at": NOW - ran_s, "ready": False}
    failed = seen("a", Phase.FAILED, attempt=attempt, status=ended)
    made = decide(app_facts(failed, status=app_status()))
    assert not of(Create, made.actions)
    assert made.wake_at == NOW + waits_s
    later = decision(NOW + waits_s)
    decide_app(app_facts(failed, status=app_status()), later)
    assert [r.instance.id for r in of(Remove, later.actions)] == ["a"]
    assert [c.instance.attempt for c in of(Create, later.actions)] == [1 if ran_s > 100 else attempt + 1]


@pytest.mark.parametrize("ahead_s", [5.0, 3600.0])
def test_a_node_whose_clock_is_ahead_holds_nothing_up(ahead_s: float) -> None:
    later = {"phase_at": NOW + ahead_s, "ready_at": NOW + ahead_s, "started_at": NOW + ahead_s}
    made = decide(app_facts(seen("a", Phase.FAILED, status=later | {"ready": False}), status=app_status()))
    assert len(of(Create, made.actions)) == 1
    old, new = seen("a"), seen("b", release=2, status=later)
    made = decide(app_facts(old, new, release=2, status=app_status(AppPhase.DEPLOYING, release=2)))
    assert [u.instance.id for u in of(Update, made.actions)] == ["a"]
    tried = try_("a", Phase.FAILED, status=later)
    assert job_status(run_job(job_facts(tried, retries=2))).retry_at == {0: NOW + 1}


def test_lost_instances_are_kept_until_others_serve_in_their_place() -> None:
    made = decide(app_facts(seen("a", lost_at=NOW - 1), status=app_status()))
    assert len(of(Create, made.actions)) == 1
    assert not of(Remove, made.actions)
    done = decide(app_facts(seen("a", lost_at=NOW - 1), seen("b"), status=app_status()))
    assert not of(Create, done.actions)
    assert [r.instance.id for r in of(Remove, done.actions)] == ["a"]


def test_when_lost_ones_come_back_the_youngest_and_idle_go() -> None:
    replacement = seen("new", None, node=None, created_at=NOW - 1)
    made = decide(app_facts(seen("a"), replacement, status=app_status()))
    assert [r.instance.id for r in of(Remove, made.actions)] == ["new"]


def test_a_rollout_past_its_deadline_fails_and_says_why() -> None:
    new = seen("b", Phase.BACKOFF, release=2, status={"restarts": 3, "exit": Exit(code=1, at=NOW)})
    told = app_status(AppPhase.DEPLOYING, release=2, progressed_at=NOW - 101)
    made = decide(app_facts(seen("a"), new, release=2, status=told, updated_at=NOW - 101))
    (written,) = of(WriteAppStatus, made.actions)
    assert written.status.phase is AppPhase.FAILED
    assert written.status.message == "release 2 made no progress for 1m40s: b on n: exited with status 1 (3 restarts)"
    assert not of(Update, made.actions)
    assert not of(Create, made.actions)
    assert [t.event.code for t in of(Tell, made.actions)] == ["rollout-failed"]


def test_past_its_deadline_a_rollout_of_which_all_there_is_serves_is_not_decided_again_at_once() -> None:
    told = app_status(AppPhase.DEPLOYING, release=2, progressed_at=NOW - 101, updated=1)
    facts = app_facts(seen("a"), seen("b", release=2), release=2, replicas=3, status=told, updated_at=NOW - 101)
    assert decide(facts).wake_at is None


def test_a_decision_of_which_nothing_came_is_not_made_again_at_once() -> None:
    late = Decision(NOW, lambda: "x")
    late.wake(NOW + 5)
    assert late.again_at == NOW + 5
    late.wake(NOW - 7)
    assert late.again_at == NOW + AGAIN_S
    late.tell("default", "app/web", "code", "words")
    assert late.again_at == NOW - 7


def test_a_deleted_app_goes_only_when_its_last_instance_has() -> None:
    made = decide(app_facts(seen("a"), seen("b", None, node=None), deleting=True, status=app_status()))
    assert [u.instance.desired for u in of(Update, made.actions)] == [Desired.DRAIN]
    assert [r.instance.id for r in of(Remove, made.actions)] == ["b"]
    assert not of(RemoveApp, made.actions)
    last = decide(app_facts(deleting=True, status=app_status(AppPhase.DELETING)))
    assert of(RemoveApp, last.actions) == [RemoveApp("p", "web", 3)]


def job_facts(*instances: Seen, status: JobStatus | None = None, cancelled: bool = False, **spec: Any) -> JobFacts:
    job = Job(project="p", name="web", spec=JobSpec(name="web", image="x", **spec), created_at=NOW - 500, cancelled=cancelled)
    return JobFacts(job=job, revision=3, created=5, status=status, instances=instances)


def try_(id: str, phase: Phase | None, index: int = 0, attempt: int = 0, created: int = 6, **more: Any) -> Seen:
    made = seen(id, phase, kind=OwnerKind.JOB, index=index, attempt=attempt, **more)
    return structs.replace(made, created=created)


def run_job(facts: JobFacts) -> Decision:
    made = decision()
    decide_job(facts, made)
    return made


def job_status(made: Decision) -> JobStatus:
    (written,) = of(WriteJobStatus, made.actions)
    assert written.revision == 3
    status: JobStatus = written.status
    return status


def test_a_job_starts_as_many_as_may_run_side_by_side() -> None:
    made = run_job(job_facts(try_("a", Phase.RUNNING, 1), completions=5, parallelism=3))
    assert [(c.instance.index, c.instance.attempt) for c in of(Create, made.actions)] == [(0, 0), (2, 0)]
    assert job_status(made).active == 3


def test_a_failed_try_counts_once_however_often_it_is_seen() -> None:
    failed = try_("a", Phase.FAILED, status={"phase_at": NOW, "exit": Exit(code=2, at=NOW)})
    first = run_job(job_facts(failed, retries=2))
    status = job_status(first)
    assert (status.failures, status.retry_at) == ({0: 1}, {0: NOW + 1})
    assert not of(Create, first.actions)
    again = run_job(job_facts(failed, retries=2, status=status))
    assert not of(WriteJobStatus, again.actions)
    assert again.wake_at == NOW + 1
    later = decision(NOW + 1)
    decide_job(job_facts(failed, retries=2, status=status), later)
    assert [(c.instance.index, c.instance.attempt) for c in of(Create, later.actions)] == [(0, 1)]


def test_a_try_that_is_due_by_a_date_which_is_none_any_more_is_made_now() -> None:
    """A leader whose date was an hour ahead said when. (Found by the simulator, seed 5009.)"""
    status = JobStatus(project="p", name="web", phase=JobPhase.RUNNING, failures={0: 1}, retry_at={0: NOW + 3600})
    failed = try_("a", Phase.FAILED, status={"phase_at": NOW - 5, "exit": Exit(code=2, at=NOW - 5)})
    made = run_job(job_facts(failed, retries=2, status=status))
    assert [(c.instance.index, c.instance.attempt) for c in of(Create, made.actions)] == [(0, 1)]


def test_a_try_whose_node_was_shut_down_in_order_is_made_again_and_counts_as_no_failure() -> None:
    made = run_job(job_facts(try_("a", Phase.STOPPED), retries=0))
    assert job_status(made).failures == {}
    assert [(c.instance.index, c.instance.attempt) for c in of(Create, made.actions)] == [(0, 0)]


@pytest.mark.parametrize(
    ("facts", "phase", "words"),
    [
        (job_facts(try_("a", Phase.SUCCEEDED)), JobPhase.SUCCEEDED, ""),
        (
            job_facts(try_("a", Phase.FAILED, status={"exit": Exit(code=2, at=NOW)})),
            JobPhase.FAILED,
            "index 0: exited with status 2 (after 1 try)",
        ),
        (job_facts(try_("a", Phase.RUNNING), cancelled=True), JobPhase.CANCELLED, "cancelled"),
        (job_facts(try_("a", Phase.RUNNING), deadline=Seconds(500)), JobPhase.FAILED, "not done within its deadline of 8m20s"),
        (job_facts(try_("a", Phase.RUNNING, lost_at=NOW - 1)), JobPhase.FAILED, "index 0: node n was lost (after 1 try)"),
        (job_facts(try_("a", Phase.RUNNING)), JobPhase.RUNNING, ""),
    ],
)
def test_how_a_job_ends(facts: JobFacts, phase: JobPhase, words: str) -> None:
    made = run_job(facts)
    status = job_status(made)
    assert (status.phase, status.message) == (phase, words)
    assert (status.finished_at is not None) is phase.final
    stopped = [u.instance.desired for u in of(Update, made.actions)]
    running = any(not s.ended or s.lost for s in facts.instances)
    assert stopped == ([Desired.STOP] if phase.final and running else [])


def test_a_finished_job_is_kept_for_its_time_and_then_goes_with_its_instances() -> None:
    over = JobStatus(project="p", name="web", phase=JobPhase.SUCCEEDED, succeeded=(0,), finished_at=NOW - 10)
    kept = run_job(job_facts(try_("a", Phase.SUCCEEDED), status=over, keep=Seconds(11)))
    assert kept.actions == []
    assert kept.wake_at == NOW + 1
    gone = run_job(job_facts(try_("a", Phase.SUCCEEDED), status=over, keep=Seconds(10)))
    assert [r.instance.id for r in of(Remove, gone.actions)] == ["a"]
    assert of(RemoveJob, run_job(job_facts(status=over, keep=Seconds(10))).actions) == [RemoveJob("p", "web", 3)]


def test_instances_of_an_earlier_job_of_that_name_count_for_nothing() -> None:
    old = try_("old", Phase.SUCCEEDED, created=4)
    made = run_job(job_facts(old))
    assert [r.instance.id for r in of(Remove, made.actions)] == ["old"]
    assert [c.instance.index for c in of(Create, made.actions)] == [0]
    assert job_status(made).succeeded == ()


def test_only_the_newest_tries_of_an_index_are_kept() -> None:
    tries = [try_(f"t{n}", Phase.FAILED, attempt=n) for n in range(6)]
    made = run_job(job_facts(*tries, retries=10))
    assert [r.instance.id for r in of(Remove, made.actions)] == ["t0", "t1", "t2"]


def test_orphans_are_stopped_and_then_removed() -> None:
    made = decision()
    decide_orphans((seen("a"), seen("b", Phase.STOPPED, desired=Desired.STOP), seen("c", None, node=None)), made)
    assert [(u.instance.id, u.instance.desired) for u in of(Update, made.actions)] == [("a", Desired.STOP)]
    assert [r.instance.id for r in of(Remove, made.actions)] == ["b", "c"]


@pytest.mark.parametrize(
    ("before", "heard_ago", "watched_for", "after", "next_in"),
    [
        (None, 1.0, 100.0, None, UNREACHABLE_S - 1),
        (None, UNREACHABLE_S, 100.0, NodeHealth.UNREACHABLE, LOST_S - UNREACHABLE_S),
        (None, LOST_S, 100.0, NodeHealth.LOST, None),
        (NodeHealth.UNREACHABLE, 0.0, 100.0, NodeHealth.READY, UNREACHABLE_S),
        (NodeHealth.UNREACHABLE, 20.0, 100.0, None, LOST_S - 20),
        (NodeHealth.LOST, 1.0, 100.0, NodeHealth.UNREACHABLE, UNREACHABLE_S - 1),
        (NodeHealth.LOST, 20.0, 100.0, None, LOST_S - 20),
        (NodeHealth.LOST, None, 5.0, None, UNREACHABLE_S - 5),
        (NodeHealth.READY, None, 5.0, None, UNREACHABLE_S - 5),
        (NodeHealth.READY, None, 16.0, NodeHealth.UNREACHABLE, LOST_S - 16),
        (None, None, 61.0, NodeHealth.LOST, None),
    ],
)
def test_the_health_of_a_node(
    before: NodeHealth | None, heard_ago: float | None, watched_for: float, after: NodeHealth | None, next_in: float | None
) -> None:
    node = Node(name="n", capacity=Capacity(cpu_milli=1, memory_bytes=1, disk_bytes=1))
    liveness = NodeLiveness(name="n", health=before, since=0.0) if before else None
    monotonic = 5000.0
    heard = None if heard_ago is None else monotonic - heard_ago
    made = decision()
    facts = NodeFacts(node=node, liveness=liveness, heard=heard, watched_since=monotonic - watched_for)
    decide_node(facts, monotonic, made)
    assert [w.liveness.health for w in of(WriteLiveness, made.actions)] == ([after] if after else [])
    assert made.wake_at == (None if next_in is None else NOW + next_in)
    assert len(of(Tell, made.actions)) == (after is not None)


@pytest.mark.parametrize(
    ("standing", "after"),
    [(Standing.SUSPECT, NodeHealth.UNREACHABLE), (Standing.SILENT, NodeHealth.LOST), (None, NodeHealth.LOST)],
)
def test_long_silence_alone_gives_up_no_node_of_which_the_detection_is_not_sure(
    standing: Standing | None, after: NodeHealth
) -> None:
    node = Node(name="n", capacity=Capacity(cpu_milli=1, memory_bytes=1, disk_bytes=1))
    made = decision()
    facts = NodeFacts(node=node, liveness=None, heard=None, watched_since=0.0, standing=standing, silence_s=2 * LOST_S)
    assert is_to_be_lost(facts, 2 * LOST_S) is (after is NodeHealth.LOST)
    decide_node(facts, 2 * LOST_S, made)
    assert [w.liveness.health for w in of(WriteLiveness, made.actions)] == [after]


@pytest.mark.parametrize(("since_ago", "after"), [(0.0, None), (14.0, None), (15.0, NodeHealth.READY), (-5.0, NodeHealth.READY)])
def test_a_node_that_was_lost_gets_nothing_new_until_what_was_replaced_has_stopped(
    since_ago: float, after: NodeHealth | None
) -> None:
    node = Node(name="n", capacity=Capacity(cpu_milli=1, memory_bytes=1, disk_bytes=1))
    liveness = NodeLiveness(name="n", health=NodeHealth.UNREACHABLE, since=NOW - since_ago)
    made = decision()
    decide_node(NodeFacts(node=node, liveness=liveness, heard=50.0, watched_since=0.0), 50.0, made)
    assert [w.liveness.health for w in of(WriteLiveness, made.actions)] == ([after] if after else [])
    assert made.wake_at == NOW + (15.0 - since_ago if after is None else 15.0)


def test_timers_hold_one_time_for_each_owner_and_no_more_memory_than_that() -> None:
    timers = Timers()
    a, b = (OwnerKind.APP, "p/a"), (OwnerKind.APP, "p/b")
    for number in range(100_000):
        timers.set(a, 1000.0 - number / 1000)
    timers.set(b, 5.0)
    timers.set_sooner(b, 7.0)
    assert timers.next() == 5.0
    assert timers.take(5.0) == [b]
    assert timers.take(900.0) == []
    timers.set_sooner(a, 50.0)
    assert timers.take(60.0) == [a]
    assert timers.next() is None
    timers.set(a, 3.0)
    timers.set(a, None)
    assert timers.take(10_000.0) == []


def test_a_wish_that_no_fleet_can_fulfil_makes_no_more_than_may_wait_for_a_place() -> None:
    first = decide(app_facts(replicas=99_999))
    assert len(of(Create, first.actions)) == UNPLACED_MAX
    assert first.wake_at == NOW, "the rest follows at once if these fit"
    refusal = Rejection(code="no-cpu", message="too little")
    waiting = [seen(f"w{number}", None, node=None, rejection=refusal) for number in range(UNPLACED_MAX)]
    later = decide(app_facts(*waiting, replicas=99_999))
    assert not of(Create, later.actions)
    assert later.wake_at != NOW
