"""Places: the planner against slow rules about where a node may be, and layouts against what they must never do."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from atoll.model.records import Capacity, Node, RoundTrips, Site
from atoll.model.spec import AREAS, Placement, RuntimeName, SpreadBy
from atoll.model.units import Seconds
from atoll.scheduling.demand import Demand, Pending
from atoll.scheduling.explain import explain
from atoll.scheduling.geography import Geography
from atoll.scheduling.interface import View
from atoll.scheduling.layout import Question, lay_out, layout_of, quick
from atoll.scheduling.optimiser import decode_question, encode_question, solve
from atoll.scheduling.plan import plan
from atoll.scheduling.snapshot import Snapshot
from atoll.scheduling.whereabouts import Layout

GROUP, OWNER, DB = "app/p/web/1/1", "app/p/web", "app/p/db/1/1"
SITES = {
    "ams": Site(name="ams", country="NL", region="weur", latitude=52.31, longitude=4.76),
    "fra": Site(name="fra", country="DE", region="weur", latitude=50.03, longitude=8.57),
    "zrh": Site(name="zrh", country="CH", region="weur", latitude=47.46, longitude=8.55),
    "iad": Site(name="iad", country="US", region="enam", latitude=38.94, longitude=-77.46),
    "gru": Site(name="gru", country="BR", region="sam", latitude=-23.43, longitude=-46.47),
    "bare": Site(name="bare"),
}
NAMES = (*SITES, "unknown")
"""`unknown` has no record at all."""
MEASURED = RoundTrips(ingress="i", site="iad", ms={"gru": 117.5, "bare": 20.0}, at=0.0)
LOCAL_MS = 0.5


def slow_ms(a: str, b: str) -> float:
    """The round trip by plain arithmetic."""
    if a == b:
        return LOCAL_MS
    if {a, b} in ({"iad", "gru"}, {"iad", "bare"}):
        return MEASURED.ms[b if a == "iad" else a]
    one, two = SITES.get(a), SITES.get(b)
    if one is None or two is None or one.latitude is None or two.latitude is None:
        return math.inf
    assert one.longitude is not None
    assert two.longitude is not None
    p, q = math.radians(one.latitude), math.radians(two.latitude)
    lon = math.radians(one.longitude - two.longitude)
    chord = math.sin((p - q) / 2) ** 2 + math.cos(p) * math.cos(q) * math.sin(lon / 2) ** 2
    return 3.0 + 0.0154 * 2 * 6371.0088 * math.asin(math.sqrt(min(1.0, chord)))


def slow_allows(site: str, demand: Demand, users: dict[str, float], db: set[str]) -> bool:
    """Both hard rules about places, for one node."""
    placement, record = demand.placement, SITES.get(site)
    if placement.residency:
        inside = any(
            record is not None and (record.country in AREAS.get(name, {name}) or (name not in AREAS and record.region == name))
            for name in placement.residency
        )
        if not inside:
            return False
    if placement.latency_max is None or placement.near is None:
        return True
    bound = max(placement.latency_max * 1000, LOCAL_MS)
    if placement.near == "users":
        total = sum(users.values())
        return not total or sum(rate for place, rate in users.items() if slow_ms(place, site) <= bound) / total >= 0.01 - 1e-12
    if placement.near == "app:db":
        return any(slow_ms(place, site) <= bound for place in db)
    return slow_ms(placement.near.removeprefix("site:"), site) <= bound


BOUNDS = st.sampled_from([None, Seconds(0.0004), Seconds(0.012), Seconds(0.05), Seconds(0.12), Seconds(0.2)])
RESIDENCY = st.lists(st.sampled_from(["eu", "eea", "CH", "US", "weur", "sam"]), max_size=2, unique=True).map(tuple)
RATES = st.dictionaries(st.sampled_from(NAMES), st.sampled_from([0.0, 0.05, 1.0, 7.0, 200.0]), max_size=4)


@st.composite
def placements(draw: st.DrawFn) -> Placement:
    near = draw(st.sampled_from([None, "users", "app:db", "site:fra", "site:nowhere"]))
    spread = SpreadBy.NODE if near == "users" else draw(st.sampled_from(list(SpreadBy)))
    regions = draw(st.sampled_from([(), ("weur",), ("enam", "any"), ("weur", "sam")]))
    return Placement(
        near=near,
        latency_max=draw(BOUNDS) if near is not None else None,
        residency=draw(RESIDENCY),
        regions=regions,
        spread=spread,
    )


@st.composite
def worlds(draw: st.DrawFn) -> tuple[list[Node], dict[str, float], list[str], Demand]:
    nodes = [
        Node(
            name=f"n{number}",
            site=draw(st.sampled_from(NAMES)),
            region=draw(st.sampled_from(["weur", "enam"])),
            capacity=Capacity(cpu_milli=1000 * draw(st.integers(1, 3)), memory_bytes=8 << 30, disk_bytes=1 << 40),
            runtimes=(RuntimeName.RUNC,),
        )
        for number in range(draw(st.integers(1, 8)))
    ]
    db = draw(st.lists(st.sampled_from([node.name for node in nodes]), max_size=2, unique=True))
    return nodes, draw(RATES), db, Demand(cpu_milli=500, memory_bytes=1 << 30, placement=draw(placements()))


def snapshot_of(nodes: list[Node], rates: dict[str, float], db: list[str], wanted: dict[str, int] | None = None) -> Snapshot:
    snapshot = Snapshot()
    for node in nodes:
        snapshot.upsert_node(node)
    snapshot.set_geography(Geography(SITES.values(), [MEASURED]))
    snapshot.whereabouts.traffic = {OWNER: rates}
    for number, name in enumerate(db):
        snapshot.allocate(f"db{number}", name, DB, Demand(cpu_milli=100, memory_bytes=1 << 20))
    if wanted:
        snapshot.whereabouts.layouts = {OWNER: Layout(wanted=wanted)}
    return snapshot


def pending(demand: Demand, count: int) -> list[Pending]:
    return [Pending(id=f"{number:03d}", group=GROUP, demand=demand) for number in range(count)]


WANTED = st.dictionaries(st.sampled_from(NAMES), st.integers(1, 3), max_size=3)


@given(worlds(), WANTED, st.integers(1, 8))
@settings(max_examples=150, deadline=None)
def test_no_instance_is_where_residency_or_the_bound_on_latency_forbids_and_none_is_refused_a_place_that_they_allow(
    world: tuple[list[Node], dict[str, float], list[str], Demand], wanted: dict[str, int], count: int
) -> None:
    nodes, rates, db, demand = world
    snapshot = snapshot_of(nodes, rates, db, wanted)
    site_of = {node.name: node.site for node in nodes}
    users = {site: rate for site, rate in rates.items() if rate} if sum(rates.values()) >= 0.01 else {}
    there = {site_of[name] for name in db}
    answer = plan(snapshot, pending(demand, count))
    for placed in answer.placed:
        assert slow_allows(site_of[placed.node], demand, users, there)
    free = {node.name: node.capacity.cpu_milli // 500 - (1 if node.name in db else 0) for node in nodes}
    regions = demand.placement.regions
    region_of = {node.name: (SITES[node.site].region if node.site in SITES else "") or node.region for node in nodes}
    allowed = sum(
        free[node.name]
        for node in nodes
        if slow_allows(node.site, demand, users, there) and (not regions or "any" in regions or region_of[node.name] in regions)
    )
    assert len(answer.placed) == min(count, allowed)
    told = explain(snapshot, GROUP, demand)
    assert bool(told.candidates) == (allowed > 0)
    assert all(slow_allows(one.site, demand, users, there) for one in told.candidates)


@given(worlds(), WANTED, st.integers(1, 8), st.randoms(use_true_random=False))
@settings(max_examples=100, deadline=None)
def test_a_class_near_something_is_placed_in_bulk_as_one_by_one_whatever_the_order(
    world: tuple[list[Node], dict[str, float], list[str], Demand], wanted: dict[str, int], count: int, chance: object
) -> None:
    nodes, rates, db, demand = world
    bulk = {placed.id: placed.node for placed in plan(snapshot_of(nodes, rates, db, wanted), pending(demand, count)).placed}
    shuffled, items = nodes[:], pending(demand, count)
    chance.shuffle(shuffled)  # type: ignore[attr-defined]
    chance.shuffle(items)  # type: ignore[attr-defined]
    snapshot = snapshot_of(shuffled, dict(reversed(rates.items())), db, wanted)
    assert {placed.id: placed.node for placed in plan(snapshot, items).placed} == bulk
    one_by_one: dict[str, str] = {}
    for item in pending(demand, count):
        for placed in plan(snapshot, [item]).placed:
            snapshot.allocate(placed.id, placed.node, GROUP, demand)
            one_by_one[placed.id] = placed.node
    assert one_by_one == bulk


@given(worlds(), st.integers(1, 10))
@settings(max_examples=100, deadline=None)
def test_instances_go_where_the_layout_wants_them_as_long_as_there_is_room(
    world: tuple[list[Node], dict[str, float], list[str], Demand], count: int
) -> None:
    nodes, rates, db, demand = world
    demand = replace(demand, placement=replace(demand.placement, near="users", spread=SpreadBy.NODE, regions=()))
    snapshot = snapshot_of(nodes, rates, db)
    layout = lay_out(View(snapshot), GROUP, demand, count, {})
    answer = plan(snapshot, pending(demand, count))
    if layout is None:
        assert not answer.placed or sum(rates.values()) < 0.01
        return
    assert layout.count == len(answer.placed)
    snapshot.whereabouts.layouts = {OWNER: layout}
    site_of = {node.name: node.site for node in nodes}
    again = plan(snapshot, pending(demand, count))
    assert Counter(site_of[placed.node] for placed in again.placed) == Counter(layout.wanted)


@st.composite
def questions(draw: st.DrawFn) -> Question:
    places, sites = draw(st.integers(1, 6)), draw(st.integers(1, 5))
    ms = st.floats(0.5, 300, allow_nan=False)
    count = draw(st.integers(1, 6))
    room = np.array(draw(st.lists(st.integers(0, count), min_size=sites, max_size=sites)), dtype=np.int64)
    demand = np.array(draw(st.lists(st.floats(0.01, 1), min_size=places, max_size=places)))
    latency = draw(st.lists(st.lists(ms, min_size=sites, max_size=sites), min_size=places, max_size=places))
    return Question(
        sites=tuple(f"s{number}" for number in range(sites)),
        latency_ms=np.array(latency),
        demand=demand / demand.sum(),
        room=room,
        count=count,
        current=np.array(draw(st.lists(st.integers(0, 3), min_size=sites, max_size=sites)), dtype=np.int64),
        site_cost=np.array(draw(st.lists(st.sampled_from([0.0, 0.0, 1000.0]), min_size=sites, max_size=sites))),
        latency_ms_max=draw(st.sampled_from([math.inf, 100.0, 20.0])),
        move_cost=draw(st.sampled_from([0.5, 5.0])) / count,
    )


@given(questions())
@settings(max_examples=120, deadline=None)
def test_a_layout_keeps_to_room_and_bound_and_the_same_question_has_the_same_answer(question: Question) -> None:
    quickly = quick(question)
    usable = (question.latency_ms <= question.latency_ms_max).any(axis=0)
    room = np.where(usable, question.room, 0)
    assert (np.array(quickly) <= room).all()
    assert sum(quickly) == min(question.count, int(room.sum()))
    if question.current.sum() <= question.count:
        # What may stay stays: the quick way moves nothing.
        assert (np.array(quickly) >= np.minimum(question.current, room)).all()
    exactly = solve(decode_question(encode_question(question)))
    assert exactly == solve(question)
    counts = [exactly.wanted.get(site, 0) for site in question.sites]
    assert (np.array(counts) <= room).all()
    assert sum(counts) == sum(quickly)
    assert 0 <= exactly.unserved <= 1


@given(questions())
@settings(max_examples=80, deadline=None)
def test_an_answer_that_is_what_runs_stays_as_it_is(question: Question) -> None:
    answer = solve(question)
    counts = np.array([answer.wanted.get(site, 0) for site in question.sites], dtype=np.int64)
    assert solve(replace(question, current=counts)).wanted == answer.wanted


@given(questions())
@settings(max_examples=80, deadline=None)
def test_nothing_moves_for_less_than_it_costs(question: Question) -> None:
    question = replace(question, site_cost=np.zeros(len(question.sites)), latency_ms_max=math.inf)
    before = np.array(quick(replace(question, current=np.zeros_like(question.current))), dtype=np.int64)
    if before.sum() < question.count:
        return
    question = replace(question, current=before)
    stay, go = layout_of(question, before.tolist(), _flow(question, before)), solve(question)
    left = sum(max(0, int(count) - go.wanted.get(site, 0)) for site, count in zip(question.sites, before, strict=True))
    if left and not stay.unserved and not go.unserved:
        assert stay.latency_ms - go.latency_ms >= left * question.move_cost - 0.01


def _flow(question: Question, replicas: np.ndarray) -> np.ndarray:
    """The best assignment to these replicas: the solver's, with nowhere else to go."""
    from atoll.scheduling.world import Problem, choose

    fixed = Problem(
        latency_ms=question.latency_ms,
        demand=question.demand,
        room=replicas,
        count=int(replicas.sum()),
        replica_capacity=question.replica_capacity,
    )
    return choose(fixed).flow
