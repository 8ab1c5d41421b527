"""What each rule turns away, what it says of it, and who wins among those that fit."""

from __future__ import annotations

import time
from typing import Any

import pytest
from msgspec import structs

from atoll.model.devices import GpuDevice
from atoll.model.records import Capacity, Node
from atoll.model.spec import AppSpec, Constraint, Gpu, Isolation, Operator, Placement, Resources, RuntimeName, SpreadBy
from atoll.model.units import Bytes, Cores
from atoll.scheduling.constraints import holds, problem
from atoll.scheduling.demand import Demand, Pending, demand_of
from atoll.scheduling.explain import explain
from atoll.scheduling.plan import plan
from atoll.scheduling.snapshot import Snapshot, Standing

MIB = 1 << 20


def node(name: str, *, cpu: int = 4000, memory: int = 1024 * MIB, gpus: tuple[GpuDevice, ...] = (), **more: Any) -> Node:
    capacity = Capacity(cpu_milli=cpu, memory_bytes=memory, disk_bytes=1 << 33, gpus=gpus)
    return Node(name=name, capacity=capacity, **{"runtimes": (RuntimeName.RUNC,), **more})


def snapshot(*nodes: Node) -> Snapshot:
    made = Snapshot()
    for one in nodes:
        made.upsert_node(one)
    return made


def demand(**more: Any) -> Demand:
    return Demand(**{"cpu_milli": 100, "memory_bytes": 128 * MIB, **more})


def place(nodes: Snapshot, asked: Demand, count: int = 1) -> Any:
    return plan(nodes, [Pending(id=f"i{number:03d}", group="g", demand=asked) for number in range(count)])


def rejection(nodes: Snapshot, asked: Demand) -> Any:
    return place(nodes, asked).rejected["i000"]


def test_without_a_node_it_says_so() -> None:
    said = rejection(snapshot(), demand())
    assert said.code == "no-nodes"
    assert "atoll agent" in said.mend


def test_too_little_memory_says_how_much_is_missing_and_where_least() -> None:
    nodes = snapshot(node("a", memory=600 * MIB), node("b", memory=700 * MIB))
    nodes.allocate("x", "a", "g", demand(memory_bytes=300 * MIB))
    nodes.allocate("y", "b", "g", demand(memory_bytes=300 * MIB))
    said = rejection(nodes, demand(memory_bytes=512 * MIB))
    assert said.code == "no-memory"
    assert said.message == "none of 2 nodes fits: 2 with too little memory free for 512.0MiB"
    assert said.mend == "needs 112.0MiB more memory on the best node, b"
    assert said.failed == {"memory": 2}


def test_more_than_any_node_has_says_what_the_largest_has() -> None:
    said = rejection(snapshot(node("a", cpu=2000), node("b", cpu=8000)), demand(cpu_milli=64_000))
    assert said.code == "no-cpu"
    assert said.message == "none of 2 nodes fits: 2 too small (64 cores of cpu asked for, the largest has 8 cores)"
    assert said.mend == "ask for at most 8 cores of cpu, or add a larger node"


def test_each_node_counts_for_the_first_filter_that_turned_it_away() -> None:
    nodes = snapshot(node("a"), node("b", region="far"), node("c", taints=("db",)), node("d", runtimes=()), node("e", memory=MIB))
    nodes.upsert_node(node("a"), Standing.CORDONED)
    said = rejection(nodes, demand(placement=Placement(regions=("local",))))
    assert said.failed == {"standing": 1, "region": 1, "taint": 1, "runtime": 1, "memory": 1}
    assert said.code == "no-memory"
    assert said.message == (
        "none of 5 nodes fits: 1 cordoned; 1 not in region local; 1 tainted db; 1 without runtime runc; "
        "1 too small (128.0MiB of memory asked for, the largest has 1.0MiB)"
    )


@pytest.mark.parametrize(
    ("standing", "word"), [(Standing.CORDONED, "cordoned"), (Standing.UNREACHABLE, "unreachable"), (Standing.LOST, "lost")]
)
def test_a_node_that_takes_nothing_new_is_named_as_such(standing: Standing, word: str) -> None:
    nodes = Snapshot()
    nodes.upsert_node(node("a"), standing)
    said = rejection(nodes, demand())
    assert said.code == "no-standing"
    assert said.message == f"the only node does not fit: {word}"
    assert said.mend


def test_a_gpu_where_there_is_none_is_refused_clearly() -> None:
    said = rejection(snapshot(node("a")), demand(gpu=Gpu(model="H200")))
    assert said.code == "no-gpu"
    assert said.message == "the only node does not fit: without GPU (1 GPU of model H200 asked for)"
    assert said.mend == "remove resources.gpu, or add a node with GPUs"


def test_whole_gpus_are_counted_and_never_given_twice() -> None:
    devices = tuple(GpuDevice(id=str(n), model="A", memory_bytes=1 << 34) for n in range(3))
    answer = place(snapshot(node("a", gpus=devices)), demand(gpu=Gpu()), 5)
    assert [[grant.device for grant in placed.gpus] for placed in answer.placed] == [["0"], ["1"], ["2"]]
    assert answer.rejected["i004"].code == "no-gpu-free"
    assert rejection(snapshot(node("a", gpus=devices)), demand(gpu=Gpu(model="B"))).mend == (
        "the models there are A: change resources.gpu.model, or leave it out"
    )
    assert rejection(snapshot(node("a", gpus=devices)), demand(gpu=Gpu(memory=Bytes(1 << 40)))).code == "no-gpu"
    assert rejection(snapshot(node("a", gpus=devices)), demand(gpu=Gpu(profile="1g.10gb"))).code == "no-gpu"


def test_the_preferred_runtime_among_those_offered_is_chosen() -> None:
    asked = demand_of(AppSpec(name="x", image="y", isolation=Isolation.CONTAINER))
    for offered, chosen in (
        ((RuntimeName.LXC, RuntimeName.CRUN), RuntimeName.CRUN),
        ((RuntimeName.LXC, RuntimeName.RUNC), RuntimeName.RUNC),
        ((RuntimeName.LXC,), RuntimeName.LXC),
    ):
        assert place(snapshot(node("a", runtimes=offered)), asked).placed[0].runtime is chosen
    sandbox = demand_of(AppSpec(name="x", image="y", isolation=Isolation.SANDBOX))
    said = rejection(snapshot(node("a")), sandbox)
    assert said.message == "the only node does not fit: without runtime gvisor"
    assert said.mend == "these nodes offer runc: install gvisor or change isolation"


def test_a_spec_becomes_a_demand() -> None:
    spec = AppSpec(name="x", image="y", resources=Resources(cpu=Cores(0.25), memory=Bytes(5), disk=Bytes(7)))
    asked = demand_of(spec)
    assert (asked.cpu_milli, asked.memory_bytes, asked.disk_bytes, asked.runtimes[0]) == (250, 5, 7, RuntimeName.RUNC)


def test_a_disk_is_a_limit_and_not_set_aside() -> None:
    nodes = snapshot(node("a"))
    assert len(place(nodes, demand(cpu_milli=1, memory_bytes=1, disk_bytes=1 << 32), 10).placed) == 10
    assert rejection(nodes, demand(disk_bytes=1 << 34)).code == "no-disk"


def test_instances_are_spread_over_nodes_and_then_fill_them() -> None:
    nodes = snapshot(*(node(f"n{n}") for n in range(4)))
    assert [p.node for p in place(nodes, demand(), 6).placed] == ["n0", "n1", "n2", "n3", "n0", "n1"]
    other = plan(nodes, [Pending(id="a", group="a", demand=demand()), Pending(id="b", group="b", demand=demand())])
    assert {p.node for p in other.placed} == {"n0"}, "different apps share a node rather than open another"


def test_spread_over_sites_comes_before_spread_over_nodes() -> None:
    nodes = snapshot(node("a1", site="a"), node("a2", site="a"), node("a3", site="a"), node("b1", site="b"))
    spread = demand(placement=Placement(spread=SpreadBy.SITE))
    assert [p.node for p in place(nodes, spread, 4).placed] == ["a1", "b1", "a2", "b1"]


def test_regions_are_used_in_order_while_they_have_room() -> None:
    nodes = snapshot(node("e", region="eu", memory=300 * MIB), node("u", region="us"), node("x", region="asia"))
    order = demand(placement=Placement(regions=("eu", "us", "any")))
    assert [p.node for p in place(nodes, order, 11).placed] == ["e"] * 2 + ["u"] * 8 + ["x"]


def test_removing_and_adding_nodes_keeps_what_is_allocated() -> None:
    nodes = snapshot(node("a", memory=200 * MIB))
    nodes.allocate("x", "a", "g", demand())
    nodes.remove_node("a")
    assert rejection(nodes, demand()).code == "no-nodes"
    nodes.upsert_node(node("b"))
    nodes.upsert_node(node("a", memory=200 * MIB))
    assert {p.node for p in place(nodes, demand(), 2).placed} == {"b"}
    assert nodes.release("x")
    assert not nodes.release("x")
    assert {p.node for p in place(nodes, demand(), 2).placed} == {"a", "b"}


def test_a_node_that_has_shrunk_gets_nothing_and_breaks_nothing() -> None:
    nodes = snapshot(node("a"))
    nodes.allocate("x", "a", "g", demand(memory_bytes=1000 * MIB))
    nodes.upsert_node(node("a", memory=10 * MIB))
    assert rejection(nodes, demand(memory_bytes=5 * MIB)).code == "no-memory"


def test_absurd_capacities_break_nothing() -> None:
    nodes = snapshot(node("a", cpu=-5, memory=1 << 80), node("b", cpu=10**30))
    assert [p.node for p in place(nodes, demand(), 2).placed] == ["b", "b"]


def test_an_explanation_has_every_candidate_with_its_scores() -> None:
    nodes = snapshot(node("a"), node("b", memory=512 * MIB), node("c", memory=MIB))
    nodes.allocate("x", "a", "g", demand())
    said = explain(nodes, "g", demand())
    assert [c.node for c in said.candidates] == ["b", "a"]
    assert said.candidates[0].room == 4
    assert said.candidates[1].scores["spread"] == -10
    assert said.failed == {"memory": 1}
    assert (said.feasible, said.nodes, said.rejection) == (2, 3, None)
    assert said.candidates[0].node == place(nodes, demand()).placed[0].node
    assert explain(nodes, "g", demand(memory_bytes=1 << 40)).rejection is not None
    by_site = explain(nodes, "g", demand(placement=Placement(spread=SpreadBy.SITE)))
    assert by_site.candidates[0].scores["spread-places"] == -100_000


@pytest.mark.parametrize(
    ("operator", "wanted", "fits", "fits_not"),
    [
        (Operator.EQUAL, "ssd", ["ssd"], ["hdd", None, ""]),
        (Operator.NOT_EQUAL, "ssd", ["hdd", None], ["ssd"]),
        (Operator.IN, ("a", "b"), ["a", "b"], ["c", None]),
        (Operator.NOT_IN, ("a", "b"), ["c", None], ["a", "b"]),
        (Operator.EXISTS, "", ["", "x"], [None]),
        (Operator.NOT_EXISTS, "", [None], ["", "x"]),
        (Operator.REGEXP, "^eu-(west|north)-[0-9]+$", ["eu-west-1", "eu-north-12"], ["us-west-1", "eu-west-", None]),
        (Operator.REGEXP, "west", ["eu-west-1"], ["east"]),
        (Operator.VERSION, ">= 1.2, < 2", ["1.2", "1.10.3", "v1.9"], ["1.1.9", "2", "2.0.0", "x", None]),
        (Operator.VERSION, "~> 1.2", ["1.2", "1.9"], ["2.0", "1.1"]),
        (Operator.VERSION, "~> 1.2.3", ["1.2.3", "1.2.9"], ["1.3", "1.2.2"]),
        (Operator.VERSION, "1.0", ["1", "1.0.0"], ["1.0.1", "1.0-rc1"]),
        (Operator.VERSION, ("1", "3"), ["1", "3.0"], ["2"]),
    ],
)
def test_operators(operator: Operator, wanted: Any, fits: list[str | None], fits_not: list[str | None]) -> None:
    rule = Constraint(label="l", operator=operator, value=wanted)
    assert problem(rule) is None
    assert [value for value in fits if not holds(rule, value)] == []
    assert [value for value in fits_not if holds(rule, value)] == []
    for value in [*fits, *fits_not]:
        labels = {} if value is None else {"l": value}
        placed = place(snapshot(node("a", labels=labels)), demand(placement=Placement(constraints=(rule,)))).placed
        assert bool(placed) is (value in fits)


@pytest.mark.parametrize("label", ["node", "site", "region", "arch"])
def test_every_node_has_the_labels_of_its_own_place_and_cannot_claim_others(label: str) -> None:
    one = node("a", site="s", region="r", arch="arm64", labels={label: "lie"})
    truth = {"node": "a", "site": "s", "region": "r", "arch": "arm64"}[label]
    rule = Constraint(label=label, value=truth)
    assert place(snapshot(one), demand(placement=Placement(constraints=(rule,)))).placed
    assert rejection(snapshot(one), demand(placement=Placement(constraints=(structs.replace(rule, value="lie"),))))


def test_a_constraint_that_no_node_satisfies_names_the_values_that_there_are() -> None:
    nodes = snapshot(node("a", labels={"disk": "hdd"}), node("b", labels={"disk": "tape"}))
    said = rejection(nodes, demand(placement=Placement(constraints=(Constraint(label="disk", value="ssd"),))))
    assert said.code == "no-constraint"
    assert said.message == "none of 2 nodes fits: 2 not satisfying disk = ssd"
    assert said.mend == "values of 'disk' there: hdd, tape"


@pytest.mark.parametrize(
    "pattern", ["(", "[", "a{2,1}", "(a+)+$", "(a|a)*b", "(?:a*)*", "(x+x+)+y", r"(a)\1", "a" * 300, ".*.*.*.*x"]
)
def test_an_expression_that_is_wrong_or_could_hold_up_the_planner_is_refused_with_a_reason(pattern: str) -> None:
    rule = Constraint(label="disk", operator=Operator.REGEXP, value=pattern)
    said = rejection(snapshot(node("a", labels={"disk": "a" * 250})), demand(placement=Placement(constraints=(rule,))))
    assert said.code == "no-constraint"
    assert "expression" in said.message or "too long" in said.message


@pytest.mark.parametrize(
    "pattern", ["^a.*b.*c$", "(?:eu|us)-west", r"\d+\.\d+", "[a+*|(]+x", "a{2,3}b?", "[a-b]*[a-c]*[!z]", "a?b?c?[ad]*[ae]*[!z]"]
)
def test_plain_expressions_are_accepted_and_matched_quickly(pattern: str) -> None:
    rule = Constraint(label="disk", operator=Operator.REGEXP, value=pattern)
    assert problem(rule) is None
    began = time.perf_counter()
    holds(rule, "a" * 1000)
    assert time.perf_counter() - began < 0.5


def test_a_version_rule_that_is_none_is_refused_with_a_reason() -> None:
    rule = Constraint(label="kernel", operator=Operator.VERSION, value="latest")
    said = rejection(snapshot(node("a", labels={"kernel": "6.1"})), demand(placement=Placement(constraints=(rule,))))
    assert "not a version rule" in said.message
    assert ">= 1.2" in said.mend


def test_higher_priority_and_then_age_decide_who_gets_the_last_place() -> None:
    nodes = snapshot(node("a", memory=128 * MIB))
    low, high = demand(placement=Placement(priority=10)), demand(placement=Placement(priority=90))
    waiting = [
        Pending(id="old", group="a", demand=low, created_at=1.0),
        Pending(id="young", group="b", demand=high, created_at=3.0),
        Pending(id="younger", group="c", demand=high, created_at=4.0),
    ]
    assert [p.id for p in plan(nodes, waiting).placed] == ["young"]
