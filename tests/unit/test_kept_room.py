"""What is booked for heads of the queue and what is reserved is shown where it keeps something waiting: plan and explain."""

from __future__ import annotations

from pathlib import Path

from msgspec.structs import replace
from test_cli_draining import api as api  # a fixture
from test_cli_draining import call

from atoll.api.service.access import SYSTEM, Caller
from atoll.api.service.planning import seen_by
from atoll.model import codec
from atoll.model.records import Capacity, Instance, Job, Node, OwnerKind, Role
from atoll.model.reservation import Reservation, ReservationSpec
from atoll.model.spec import AppSpec, JobSpec, Placement, Resources, RuntimeName, Scale
from atoll.model.units import Bytes, Cores, Seconds
from atoll.model.views import Explanation, KeptFor
from atoll.scheduling.assembly import Records, group_of, snapshot_from
from atoll.scheduling.demand import Pending, demand_of
from atoll.scheduling.dry_run import explain_instance, plan_spec
from atoll.scheduling.plan import plan
from atoll.scheduling.snapshot import Snapshot
from atoll.sdk.fake import FakeApi

GIB = 1 << 30
NOW = 1_000.0
ENDS = 5_000.0


def job(name: str, cores: int, *, deadline: float | None = None, gang: int = 0, project: str = "ml") -> JobSpec:
    count = max(1, gang)
    return JobSpec(
        name=name,
        project=project,
        image="x/y:1",
        resources=Resources(cpu=Cores(cores), memory=Bytes(1 << 20)),
        placement=Placement(gang=bool(gang)),
        completions=count,
        parallelism=count,
        deadline=Seconds(deadline) if deadline is not None else None,
    )


class Cell:
    """Two nodes of 8 cores. `busy` has 6 of n0 until ENDS; `big` asks for 8 on one, `late` for 2."""

    def __init__(self, big: JobSpec) -> None:
        capacity = Capacity(cpu_milli=8_000, memory_bytes=64 * GIB, disk_bytes=GIB)
        names = ("n0", "n1")
        self.nodes = {name: Node(name=name, capacity=capacity, runtimes=(RuntimeName.RUNC,)) for name in names}
        self.jobs: dict[str, Job] = {}
        self.instances: dict[str, Instance] = {}
        self.reservations: dict[str, Reservation] = {}
        busy = job("busy", 6, deadline=ENDS - 10.0)
        for number, node in enumerate(names):
            self.add(busy, f"busy-{number}", 0.0, node)
        for number in range(big.parallelism):
            self.add(big, f"big-{number}", 10.0)

    def add(self, spec: JobSpec, id: str, at: float, node: str | None = None) -> None:
        made = Instance(id=id, project=spec.project, owner_kind=OwnerKind.JOB, owner=spec.name, node=node, created_at=at)
        self.instances[f"{spec.project}/{id}"] = made
        self.jobs.setdefault(f"{spec.project}/{spec.name}", Job(project=spec.project, name=spec.name, spec=spec, created_at=at))

    def snapshot(self) -> Snapshot:
        records = Records(
            nodes=self.nodes,
            policies={},
            liveness={},
            statuses={},
            app_statuses={},
            instances=self.instances,
            jobs=self.jobs,
            reservations=self.reservations,
            now=NOW,
        )
        return snapshot_from(records, self.spec_of)

    def spec_of(self, instance: Instance) -> JobSpec:
        return self.jobs[f"{instance.project}/{instance.owner}"].spec

    def lead(self) -> None:
        """Plan as the leader does, and write down what was not placed and why, as text."""
        pending = [
            Pending(id=key, group=group_of(one), demand=demand_of(self.spec_of(one)), created_at=one.created_at, ends_at=None)
            for key, one in self.instances.items()
            if one.node is None
        ]
        for key, rejection in plan(self.snapshot(), pending, NOW).rejected.items():
            written = replace(self.instances[key], rejection=rejection)
            self.instances[key] = codec.decode(codec.encode(written), Instance)

    def explain(self, key: str) -> Explanation:
        one = self.instances[key]
        owner = self.jobs[f"{one.project}/{one.owner}"]
        return explain_instance(self.snapshot(), key, one, owner.spec, job=owner).explanation


def test_what_comes_after_a_head_is_told_for_whom_the_room_is_kept_and_from_when() -> None:
    there = Cell(job("big", 8))
    there.add(job("late", 2), "late-0", 20.0)
    there.nodes["n1"] = replace(there.nodes["n1"], capacity=Capacity(cpu_milli=6_000, memory_bytes=64 * GIB, disk_bytes=GIB))
    there.lead()
    said = there.explain("ml/late-0")
    assert said.rejection is not None
    assert said.rejection.code == "no-booked"
    own, room = said.kept
    assert (own.own, own.instances, own.start) == (True, ("late-0",), ENDS)
    assert (room.why, room.project, room.instances, room.own) == (KeptFor.WAITING, "ml", ("big-0",), False)
    assert (room.nodes, room.turns_away, room.cpu_milli, room.start) == (("n0",), 1, 8_000, ENDS)


def test_a_head_is_told_what_is_booked_for_it_and_a_gang_is_told_by_any_of_its_members() -> None:
    there = Cell(job("big", 8, gang=2))
    there.lead()
    assert [one.rejection.booked is not None for one in there.instances.values() if one.rejection] == [True, False]
    for member in ("ml/big-0", "ml/big-1"):
        said = there.explain(member)
        [room] = said.kept
        assert (room.own, room.count, room.nodes, room.start) == (True, 2, ("n0", "n1"), ENDS)
        assert said.failed == {"cpu": 2}


def test_an_older_instance_is_not_held_back_by_what_is_booked_for_a_younger_one() -> None:
    there = Cell(job("big", 8))
    there.add(job("early", 2), "early-0", 5.0)
    there.lead()
    assert there.instances["ml/big-0"].rejection is not None
    assert there.explain("ml/early-0").feasible > 0


def test_a_plan_of_a_spec_comes_after_all_that_waits_unless_its_deadline_is_before_that() -> None:
    there = Cell(job("big", 8, gang=2))
    there.lead()
    new = AppSpec(
        name="new", image="x", resources=Resources(cpu=Cores(1), memory=Bytes(1 << 20)), scale=Scale(replicas=1), project="shop"
    )
    kept_out = plan_spec(there.snapshot(), new)
    assert (kept_out.unplaced, kept_out.rejection.code if kept_out.rejection else "") == (1, "no-booked")
    assert [(room.turns_away, room.nodes) for room in kept_out.explanation.kept] == [(2, ("n0", "n1"))]
    short = job("short", 1, deadline=ENDS - NOW - 100)
    assert plan_spec(there.snapshot(), short).unplaced == 0
    assert plan_spec(there.snapshot(), job("long", 1, deadline=ENDS)).unplaced == 1


def test_a_reservation_is_shown_to_those_that_it_keeps_out_and_to_its_own_project() -> None:
    there = Cell(job("big", 8))
    spec = ReservationSpec(name="sales", project="shop", nodes="node=n0", start=NOW - 1, end=ENDS, cpu=Cores(1))
    there.reservations["sales"] = Reservation(spec=spec, created_at=0.0)
    other = plan_spec(there.snapshot(), job("other", 2))
    [room] = other.explanation.kept
    assert (room.why, room.name, room.project, room.turns_away, room.own) == (KeptFor.RESERVED, "sales", "shop", 1, False)
    assert (room.cpu_milli, room.start, room.end) == (1_000, NOW - 1, ENDS)
    own = plan_spec(there.snapshot(), job("own", 2, project="shop"))
    assert [(room.own, room.turns_away) for room in own.explanation.kept] == [(True, 0)]


def test_who_does_not_see_a_project_is_not_told_what_waits_in_it() -> None:
    there = Cell(job("big", 8, gang=2))
    there.lead()
    said = plan_spec(there.snapshot(), job("new", 1, project="shop")).explanation
    [hidden] = seen_by(Caller(id="t", role=Role.READ, project="shop"), said).kept
    assert (hidden.project, hidden.instances, hidden.count, hidden.turns_away) == ("", (), 2, 2)
    assert seen_by(SYSTEM, said).kept[0].instances == ("big-0", "big-1")


def test_people_are_shown_what_is_kept_and_for_whom(api: FakeApi, tmp_path: Path) -> None:
    there = Cell(job("big", 8, gang=2))
    there.add(job("late", 2), "late-0", 20.0)
    there.lead()
    for kind, records in (("nodes", there.nodes), ("jobs", there.jobs), ("instances", there.instances)):
        for key, record in records.items():
            api.put(kind, key, record)
    spec = ReservationSpec(name="sales", project="shop", nodes="node=n1", start=0.0, end=api.now + 1e6)
    api.put("reservations", "sales", Reservation(spec=spec, created_at=0.0))
    late = call(api, tmp_path, "explain", "late-0", "-p", "ml")
    assert late.exit_code == 0
    shown = " ".join(late.stdout.split())
    assert "big-0, big-1, which wait ml n0, n1 8 cores, 1.0MiB" in shown
    assert "reservation sales shop n1 the whole node now" in shown
    assert "room on these nodes is kept for others" in late.stderr
    head = call(api, tmp_path, "explain", "big-1", "-p", "ml")
    assert "room is booked for all 2 of it on n0, n1: it has it by 1970-01-01 01:23 UTC" in head.stderr
