"""Heads of the queue are not starved by what comes after them, and what comes after them fills only the gaps."""

from __future__ import annotations

import heapq
import math
from dataclasses import dataclass, field

from hypothesis import given, settings
from hypothesis import strategies as st

from atoll.model.devices import GpuDevice
from atoll.model.records import Capacity, Node
from atoll.model.spec import Gpu, Placement, RuntimeName
from atoll.scheduling.bookings import Booking
from atoll.scheduling.demand import Demand, Pending
from atoll.scheduling.plan import Plan, plan
from atoll.scheduling.snapshot import Snapshot

CORES = 8
LIMIT = 3
GIB = 1 << 30


@dataclass
class Job:
    pending: Pending
    lasts: int


@dataclass
class Cluster:
    """Nodes, a clock in whole steps, a queue; everything ends when it says, or sooner."""

    snapshot: Snapshot
    now: int = 0
    waiting: dict[str, Job] = field(default_factory=dict)
    running: list[tuple[int, str]] = field(default_factory=list)
    began: dict[str, int] = field(default_factory=dict)
    bookings: tuple[Booking, ...] = ()

    def submit(self, id: str, demand: Demand, lasts: int, *, group: str = "", known: bool = True, limit: int = 0) -> None:
        """`limit` is how much longer than it lasts the job says that it may."""
        ends_at = float(self.now + lasts + limit) if known else math.inf
        item = Pending(id=id, group=group or f"job/p/{id}/0/0", demand=demand, created_at=float(self.now), ends_at=ends_at)
        self.waiting[id] = Job(item, lasts)

    def plan(self, ids: set[str] | None = None) -> Plan:
        """Plan all that waits, or just `ids` of it beside what the last plan has booked."""
        some = [job.pending for id, job in self.waiting.items() if ids is None or id in ids]
        answer = plan(self.snapshot, some, float(self.now), self.bookings)
        self.bookings = answer.bookings
        for placed in answer.placed:
            job = self.waiting.pop(placed.id)
            item = job.pending
            # A job's deadline counts from its creation: it ends then, however long it waited.
            ends = self.now + job.lasts if item.ends_at == math.inf else int(min(self.now + job.lasts, item.ends_at or 0))
            heapq.heappush(self.running, (max(ends, self.now + 1), placed.id))
            self.began[placed.id] = self.now
            self.snapshot.allocate(placed.id, placed.node, item.group, item.demand, placed.gpus, item.ends_at, float(self.now))
        return answer

    def tick(self) -> None:
        self.now += 1
        while self.running and self.running[0][0] <= self.now:
            self.snapshot.release(heapq.heappop(self.running)[1])
        for id in [id for id, job in self.waiting.items() if (job.pending.ends_at or 0) <= self.now]:
            del self.waiting[id]  # past its deadline before it had a place
        self.bookings = tuple(one for one in self.bookings if any(id in self.waiting for id in one.ids))


def cluster(nodes: int, gpus: int = 0) -> Cluster:
    snapshot = Snapshot()
    for number in range(nodes):
        devices = tuple(GpuDevice(id=f"GPU-{number}-{index}", model="X", memory_bytes=GIB) for index in range(gpus))
        capacity = Capacity(cpu_milli=CORES * 1000, memory_bytes=64 * GIB, disk_bytes=GIB, gpus=devices)
        snapshot.upsert_node(Node(name=f"n{number}", capacity=capacity, runtimes=(RuntimeName.RUNC,)))
    return Cluster(snapshot)


def cores(count: int, *, gang: bool = False, gpu: float = 0) -> Demand:
    return Demand(
        cpu_milli=count * 1000, memory_bytes=1, gpu=Gpu(count=gpu) if gpu else None, placement=Placement(gang=gang, priority=50)
    )


def submit_gang(there: Cluster, members: int, size: int, lasts: int = 5) -> set[str]:
    ids = {f"gang-{index}" for index in range(members)}
    for id in ids:
        there.submit(id, cores(size, gang=True), lasts, group="job/p/gang/0/0", known=False)
    return ids


@given(
    st.integers(1, 4),
    st.lists(st.tuples(st.integers(1, 3), st.integers(1, 6), st.booleans()), min_size=1, max_size=5),
    st.booleans(),
    st.integers(1, 3),
)
@settings(max_examples=40, deadline=None)
def test_a_gang_as_large_as_the_cluster_is_placed_once_all_that_ran_before_it_has_ended(
    nodes: int, stream: list[tuple[int, int, bool]], one_by_one: bool, per_step: int
) -> None:
    there = cluster(nodes)
    number = 0

    def small() -> set[str]:
        nonlocal number
        ids = set()
        for _ in range(per_step * nodes * 2):
            size, lasts, known = stream[number % len(stream)]
            ids.add(f"s{number:06d}")
            there.submit(f"s{number:06d}", cores(size), lasts, known=known, limit=LIMIT)
            number += 1
        return ids

    for _ in range(8):
        small()
        there.plan()
        there.tick()
    # Who waited before the gang has its turn before it; here nobody.
    there.waiting.clear()
    there.bookings = ()
    # From here on the stream is endless, and would keep every node busy for ever.
    ids = submit_gang(there, nodes, CORES)
    oldest = there.now
    # Work that says when it ends may go in until the last that does not has gone, and then what ends before all of that does.
    bound = 2 * max(lasts for _, lasts, _ in stream) + LIMIT + 2
    while there.now <= oldest + bound and not ids <= there.began.keys():
        fresh = small()
        there.plan()
        if one_by_one:
            # What comes in between is planned without the gang, as the leader does.
            there.plan(small() | fresh & there.waiting.keys())
        there.tick()
    assert ids <= there.began.keys(), f"not placed within {bound} steps"


@given(st.data(), st.integers(2, 4), st.sampled_from([0, 2]))
@settings(max_examples=40, deadline=None)
def test_what_is_backfilled_never_delays_the_head_beyond_what_was_booked_for_it(data: st.DataObject, nodes: int, gpus: int) -> None:
    there = cluster(nodes, gpus)
    number = 0
    sizes = st.tuples(st.integers(1, CORES), st.integers(1, 12), st.integers(0, 6), st.sampled_from([0.0, 0.5, 1.0, 2.0]))
    promised: dict[str, float] = {}
    for _ in range(14):
        for size, lasts, limit, gpu in data.draw(st.lists(sizes, max_size=4)):
            there.submit(f"s{number:06d}", cores(size, gpu=gpu if gpus else 0), lasts, limit=limit)
            number += 1
        if number % 3 == 0:
            ids = {f"g{number}-{index}" for index in range(nodes)}
            for id in ids:
                there.submit(id, cores(CORES // 2 + 1, gang=True), 6, group=f"job/p/g{number}/0/0", known=False)
            number += 1
        answer = there.plan()
        head = min((job.pending for job in there.waiting.values()), key=lambda item: item.order, default=None)
        for booking in answer.bookings:
            if head is not None and head.id in booking.ids and booking.starts.at < math.inf:
                for id in booking.ids:
                    assert booking.starts.at <= promised.get(id, math.inf), "what was booked has moved away"
                    promised[id] = booking.starts.at
        there.tick()
    for id, began in there.began.items():
        assert began <= promised.get(id, math.inf), f"{id} was promised a place"


def test_short_work_goes_where_room_is_booked_and_long_work_does_not() -> None:
    there = cluster(2)
    there.submit("long", cores(CORES), 100)
    there.plan()
    submit_gang(there, 2, CORES)
    there.submit("w-short", cores(2), 50)
    there.submit("w-longer", cores(2), 150)
    there.submit("w-endless", cores(2), 50, known=False)
    answer = there.plan()
    assert "w-short" in there.began
    assert {"w-longer", "w-endless"} <= answer.rejected.keys()
    assert answer.rejected["w-longer"].code == "no-booked"
    assert "booked for 2 before it in the queue" in answer.rejected["w-longer"].message
    assert "1970-01-01 00:01 UTC" in answer.rejected["w-longer"].message
    assert "booked for it: room on n0, n1" in answer.rejected["gang-0"].message


def test_a_large_instance_keeps_what_it_needs_of_a_node_and_leaves_the_rest_to_others() -> None:
    there = cluster(1)
    there.submit("half", cores(5), 10)
    there.plan()
    there.submit("large", cores(6), 10)
    there.submit("beside", cores(2), 100)
    there.submit("more", cores(1), 100)
    answer = there.plan()
    # 6 of 8 cores are booked: 2 are nobody's.
    assert "beside" in there.began
    assert answer.rejected["more"].code == "no-booked"


def test_nothing_is_booked_for_what_could_fit_only_if_apps_went() -> None:
    there = cluster(2)
    app = Pending(id="web", group="app/p/web/1/1", demand=cores(5))
    answer = plan(there.snapshot, [app])
    there.snapshot.allocate("web", answer.placed[0].node, app.group, app.demand)
    there.submit("job", cores(4), 5, known=False)
    there.plan()
    submit_gang(there, 2, 6)
    there.submit("small", cores(1), 5, known=False)
    answer = there.plan()
    assert answer.bookings == ()
    assert "small" in there.began


def test_what_is_more_urgent_than_the_head_takes_its_room() -> None:
    there = cluster(1)
    there.submit("half", cores(4), 10)
    there.plan()
    there.submit("large", cores(8), 10)
    there.plan()
    urgent = Demand(cpu_milli=4000, memory_bytes=1, placement=Placement(priority=60))
    answer = plan(there.snapshot, [Pending(id="u", group="app/p/u/1/1", demand=urgent)], 0.0, there.bookings)
    assert [placed.id for placed in answer.placed] == ["u"]
    assert [booking.ids for booking in answer.bookings] == [("large",)]
