"""Rules about where other instances are: what each allows, and what it says when it does not."""

from __future__ import annotations

import time
from typing import Any

import pytest
from msgspec import structs

from atoll.model import codec
from atoll.model.errors import Invalid
from atoll.model.records import Capacity, Node
from atoll.model.spec import Affinity, AppSpec, Constraint, Operator, Placement, RuntimeName, SpreadBy, Volume, check_app
from atoll.scheduling.constraints import holds
from atoll.scheduling.demand import Demand, Pending, demand_of
from atoll.scheduling.explain import explain
from atoll.scheduling.plan import Plan, plan
from atoll.scheduling.snapshot import Snapshot, Standing

GROUP = "app/p/web/1/1"


def rule(label: str, operator: Operator, value: str = "") -> Constraint:
    return Constraint(label=label, operator=operator, value=value)


def nodes(count: int, per_site: int = 1, **more: Any) -> Snapshot:
    made = Snapshot()
    for number in range(count):
        capacity = Capacity(cpu_milli=4000, memory_bytes=1 << 30, disk_bytes=1 << 33)
        facts = {"site": f"s{number // per_site}", "runtimes": (RuntimeName.RUNC,), **more}
        made.upsert_node(Node(name=f"n{number}", capacity=capacity, **facts))
    return made


def demand(**placement: Any) -> Demand:
    return Demand(cpu_milli=100, memory_bytes=1 << 20, placement=Placement(**placement))


def place(snapshot: Snapshot, asked: Demand, count: int, group: str = GROUP) -> Plan:
    return plan(snapshot, [Pending(id=f"i{number:03d}", group=group, demand=asked) for number in range(count)])


def where(answer: Plan) -> list[str]:
    return [placed.node for placed in answer.placed]


@pytest.mark.parametrize(
    ("operator", "value", "fits", "fits_not"),
    [
        (Operator.IS, "a", "a", "ab"),
        (Operator.LIKE, "a.", "ab", "abc"),
        (Operator.UNLIKE, "a.", "abc", "ab"),
        (Operator.UNLIKE, "a.", None, "ab"),
        (Operator.UNIQUE, "", "x", None),
        (Operator.GROUP_BY, "", "x", None),
        (Operator.MAX_PER, "2", "x", None),
        (Operator.CLUSTER, "", "x", None),
        (Operator.CLUSTER, "x", "x", "y"),
    ],
)
def test_marathons_operators_mean_what_they_meant(operator: Operator, value: str, fits: str | None, fits_not: str | None) -> None:
    assert holds(rule("l", operator, value), fits)
    assert not holds(rule("l", operator, value), fits_not)


def test_unique_gives_each_node_one_and_says_what_to_do_for_more() -> None:
    answer = place(nodes(3), demand(constraints=(rule("node", Operator.UNIQUE),)), 4)
    assert where(answer) == ["n0", "n1", "n2"]
    said = answer.rejected["i003"]
    assert said.code == "no-max-per"
    assert said.message == "none of 3 nodes fits: 3 whose node has one instance of it already, the most allowed"
    assert "scale.replicas" in said.mend


def test_unique_counts_the_old_release_too() -> None:
    snapshot = nodes(2)
    asked = demand(constraints=(rule("node", Operator.UNIQUE),))
    snapshot.allocate("old", "n0", "app/p/web/1/1", asked)
    assert where(place(snapshot, asked, 2, "app/p/web/2/1")) == ["n1"]


def test_max_per_site_holds_over_the_site() -> None:
    answer = place(nodes(6, per_site=3), demand(constraints=(rule("site", Operator.MAX_PER, "2"),)), 9)
    assert sorted(where(answer)) == ["n0", "n1", "n3", "n4"]


def test_cluster_stays_where_the_first_went() -> None:
    answer = place(nodes(6, per_site=2), demand(constraints=(rule("site", Operator.CLUSTER),)), 4)
    assert sorted(where(answer)) == ["n0", "n0", "n1", "n1"]


def test_group_by_is_even_and_waits_for_as_many_places_as_it_names() -> None:
    assert sorted(where(place(nodes(3), demand(constraints=(rule("site", Operator.GROUP_BY),)), 7))) == sorted(
        ["n0", "n1", "n2"] * 2 + ["n0"]
    )
    answer = place(nodes(3), demand(constraints=(rule("site", Operator.GROUP_BY, "4"),)), 7)
    assert sorted(where(answer)) == ["n0", "n1", "n2"]
    assert answer.rejected["i006"].code == "no-skew"


def test_a_skew_holds_even_where_the_place_with_fewest_is_full() -> None:
    snapshot = nodes(2)
    snapshot.allocate("big", "n0", "app/p/other/1/1", Demand(cpu_milli=3900, memory_bytes=1))
    answer = place(snapshot, demand(spread=SpreadBy.SITE, max_skew=2), 9)
    assert sorted(where(answer)) == ["n0", "n1", "n1", "n1"]
    said = answer.rejected["i008"]
    assert said.failed == {"cpu": 1, "skew": 1}
    assert said.mend == "make room on s0, or raise the skew"


def test_affinity_goes_only_where_the_other_is() -> None:
    snapshot = nodes(4, per_site=2)
    asked = demand(affinity=(Affinity(app="db", by="site"),))
    said = place(snapshot, asked, 1).rejected["i000"]
    assert (said.code, said.mend) == ("no-affinity", "start db first, or give the affinity a weight")
    snapshot.allocate("db", "n3", "app/p/db/1/1", demand())
    assert sorted(where(place(snapshot, asked, 2))) == ["n2", "n3"]


def test_anti_affinity_holds_for_whoever_comes_second() -> None:
    snapshot = nodes(2)
    shy = demand(anti_affinity=(Affinity(app="db"),))
    snapshot.allocate("web", "n0", GROUP, shy)
    answer = plan(snapshot, [Pending(id="db", group="app/p/db/1/1", demand=demand())])
    assert where(answer) == ["n1"]
    snapshot.release("web")
    snapshot.allocate("db", "n1", "app/p/db/1/1", demand())
    assert where(place(snapshot, shy, 1)) == ["n0"]


def test_no_project_can_keep_anothers_instances_off_a_node() -> None:
    snapshot = nodes(1)
    snapshot.allocate("web", "n0", "app/p/web/1/1", demand(anti_affinity=(Affinity(app="db"),)))
    assert where(place(snapshot, demand(), 1, "app/q/db/1/1")) == ["n0"]
    assert not where(place(snapshot, demand(), 1, "app/p/db/1/1"))


def test_a_wish_is_followed_where_it_can_be_and_given_up_where_it_cannot() -> None:
    snapshot = nodes(3)
    snapshot.allocate("db", "n2", "app/p/db/1/1", demand())
    assert where(place(snapshot, demand(affinity=(Affinity(app="db", weight=50),)), 1)) == ["n2"]
    assert where(place(nodes(3), demand(affinity=(Affinity(app="db", weight=50),)), 1)) == ["n0"]
    away = demand(anti_affinity=(Affinity(app="db", weight=50),))
    assert where(place(snapshot, away, 2)) == ["n0", "n1"]


def test_the_cheapest_node_is_chosen_when_asked_for() -> None:
    snapshot = Snapshot()
    for name, price in (("a", "3"), ("b", "0.5"), ("c", "nan"), ("d", "-1"), ("e", "dear")):
        capacity = Capacity(cpu_milli=4000, memory_bytes=1 << 30, disk_bytes=1 << 33)
        snapshot.upsert_node(Node(name=name, capacity=capacity, labels={"price": price}, runtimes=(RuntimeName.RUNC,)))
    assert where(place(snapshot, demand(cost=100), 1)) == ["b"]
    assert where(place(snapshot, demand(), 1)) == ["a"]
    scores = {candidate.node: candidate.scores["cost"] for candidate in explain(snapshot, GROUP, demand(cost=100)).candidates}
    assert scores["a"] == scores["c"] == scores["d"] == scores["e"] < scores["b"]


def test_an_app_with_volumes_comes_back_to_the_node_that_has_them() -> None:
    snapshot = nodes(4)
    asked = structs.replace(demand(), pinned=True)
    snapshot.homes["app/p/web"] = ("n2", "gone")
    assert where(place(snapshot, asked, 1)) == ["n2"]
    snapshot.upsert_node(snapshot.nodes["n2"], Standing.LOST)
    said = place(snapshot, asked, 1).rejected["i000"]
    assert said.failed == {"standing": 1, "volume": 3}
    assert said.message.endswith("3 without the app's volumes, which are on n2")
    assert "follow_volumes" in said.mend


def test_a_new_release_goes_beside_the_volumes_of_the_old() -> None:
    snapshot = nodes(3)
    asked = structs.replace(demand(), pinned=True)
    snapshot.allocate("old", "n1", "app/p/web/1/1", asked)
    assert where(place(snapshot, asked, 2, "app/p/web/2/1")) == ["n1", "n0"]


def test_only_volumes_that_are_written_bind() -> None:
    volume = Volume(name="data", path="/data")
    assert demand_of(AppSpec(name="x", image="y", volumes=(volume,))).pinned
    assert not demand_of(AppSpec(name="x", image="y", volumes=(structs.replace(volume, read_only=True),))).pinned
    free = Placement(follow_volumes=False)
    assert not demand_of(AppSpec(name="x", image="y", volumes=(volume,), placement=free)).pinned


@pytest.mark.parametrize(
    ("placement", "field"),
    [
        ({"constraints": [{"label": "node", "operator": "MAX_PER", "value": "0"}]}, "placement.constraints[0].value"),
        ({"constraints": [{"label": "node", "operator": "MAX_PER", "value": "x"}]}, "placement.constraints[0].value"),
        ({"constraints": [{"label": "node", "operator": "GROUP_BY", "value": "-1"}]}, "placement.constraints[0].value"),
        ({"constraints": [{"label": "node", "operator": "UNIQUE", "value": "x"}]}, "placement.constraints[0].value"),
        ({"constraints": [{"label": "node", "operator": "CLUSTER", "value": ["x", "y"]}]}, "placement.constraints[0].value"),
        ({"affinity": [{"app": "x", "weight": 5}]}, "placement.affinity[0].weight"),
        ({"anti_affinity": [{"app": "x", "weight": 5}]}, "placement.anti_affinity[0].weight"),
        ({"anti_affinity": [{"app": "y", "weight": 0}]}, "placement.anti_affinity[0].weight"),
        ({"anti_affinity": [{"app": "y", "weight": 10**30}]}, "placement.anti_affinity[0].weight"),
        ({"max_skew": 0}, "placement.max_skew"),
        ({"max_skew": float("nan")}, "placement.max_skew"),
        ({"cost": -1}, "placement.cost"),
        ({"affinity": [{"app": "y"}] * 17}, "placement.affinity"),
    ],
)
def test_absurd_rules_are_refused_with_their_place(placement: dict[str, Any], field: str) -> None:
    with pytest.raises(Invalid) as error:
        check_app(codec.convert({"name": "x", "image": "y", "placement": placement}, AppSpec))
    assert error.value.field == field


@pytest.mark.parametrize(
    "asked",
    [
        demand(constraints=(rule("node", Operator.UNIQUE),)),
        demand(constraints=(rule("site", Operator.MAX_PER, "5"),)),
        demand(spread=SpreadBy.SITE, max_skew=1),
        demand(anti_affinity=(Affinity(app="web"), Affinity(app="db", by="site"))),
        demand(affinity=(Affinity(app="db", by="site"),)),
    ],
)
def test_a_thousand_with_rules_are_placed_on_twenty_thousand_nodes_in_time(asked: Demand) -> None:
    snapshot = nodes(20_000, per_site=60)
    snapshot.allocate("db", "n77", "app/p/db/1/1", demand())
    place(snapshot, asked, 1000)
    began = time.perf_counter()
    answer = place(snapshot, asked, 1000)
    assert time.perf_counter() - began < 2.0
    assert answer.placed


def test_a_node_that_has_the_image_is_chosen_among_equals_but_spreading_comes_first() -> None:
    snapshot = nodes(3)
    snapshot.set_images("n2", ("sha256:1", "sha256:2"))
    spec = AppSpec(name="web", image="host/a:1@sha256:1", volumes=(Volume(name="w", path="/w", image="host/w@sha256:2"),))
    asked = demand_of(spec)
    assert asked.images == ("sha256:1", "sha256:2")
    assert where(place(snapshot, asked, 1)) == ["n2"]
    assert sorted(where(place(snapshot, asked, 3))) == ["n0", "n1", "n2"]
    assert explain(snapshot, GROUP, asked).candidates[0].scores["images"] == 5
    snapshot.set_images("n2", ("sha256:3",))
    snapshot.set_images("n1", ("sha256:2",))
    assert where(place(snapshot, asked, 1)) == ["n1"]
    snapshot.set_images("n1", ())
    assert where(place(snapshot, asked, 1)) == ["n0"]


def test_together_by_two_labels_of_which_only_one_is_chosen_yet_holds_in_bulk() -> None:
    snapshot = nodes(1, labels={})
    capacity = Capacity(cpu_milli=4000, memory_bytes=1 << 30, disk_bytes=1 << 33)
    snapshot.upsert_node(Node(name="n9", site="s9", capacity=capacity, runtimes=(RuntimeName.RUNC,), labels={"disk": "a"}))
    asked = demand(affinity=(Affinity(app="web", by="node"), Affinity(app="web", by="disk")))
    snapshot.allocate("held", "n0", GROUP, asked)
    assert where(place(snapshot, asked, 1)) == where(place(snapshot, asked, 2)) == []
