"""Labels and taints of nodes: how they are written, who says them, what they do, and that they stay."""

from __future__ import annotations

import asyncio
import json
import random
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace
from test_cli_draining import call

from atoll.api.service.access import SYSTEM
from atoll.entry.config import Config
from atoll.entry.preflight import check_settings
from atoll.entry.process import parse
from atoll.model import keys
from atoll.model.errors import Invalid, NotFound
from atoll.model.labels import LABELS_MAX, check_labels, check_taints, described, labelled, read_taint, tainted, tolerated
from atoll.model.maintenance import MaintenanceSpec
from atoll.model.records import Capacity, Instance, Node, NodePolicy
from atoll.model.spec import AppSpec, Constraint, Placement, RuntimeName, Scale
from atoll.model.units import Seconds
from atoll.model.views import DrainRequest, LabelRequest, TaintRequest
from atoll.scheduling.demand import Demand, Pending
from atoll.scheduling.plan import plan
from atoll.scheduling.snapshot import Snapshot
from atoll.sdk.fake import FakeApi
from atoll.sim.loop import run_virtual
from atoll.sim.replay_cell import Cell
from atoll.sim.replay_fleet import Fleet

CAPACITY = Capacity(cpu_milli=4000, memory_bytes=8 << 30, disk_bytes=1 << 40)


def node(name: str = "n1", **more: object) -> Node:
    return Node(name=name, capacity=CAPACITY, runtimes=(RuntimeName.RUNC,), **more)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("taint", "toleration", "holds"),
    [
        ("spot", "spot", True),
        ("spot", "*", True),
        ("spot", "other", False),
        ("gpu=only", "gpu=only", True),
        ("gpu=only", "gpu", True),
        ("gpu=only", "gpu=other", False),
        ("gpu", "gpu=only", False),
        ("gpu=only", "gpu:no-schedule", True),
        ("gpu=only", "gpu=only:NoSchedule", True),
        ("gpu=only", "gpu:prefer-no-schedule", False),
        ("gpu=only:prefer-no-schedule", "gpu", True),
        ("gpu=only:prefer-no-schedule", "gpu:no-schedule", False),
        ("gpuonly", "gpu", False),
    ],
)
def test_a_toleration_tolerates_its_key_its_value_and_its_effect(taint: str, toleration: str, holds: bool) -> None:
    assert tolerated(taint, (toleration,)) is holds


def test_taints_are_kept_as_one_writes_them_shortest() -> None:
    written = ("spot", "spot:NoSchedule", "a=b:no-schedule", "a=b:PreferNoSchedule")
    assert check_taints(written) == ("spot", "a=b", "a=b:prefer-no-schedule")


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("", "no key"),
        ("-x", "no key"),
        ("a b", "no key"),
        ("a" * 254, "no key"),
        ("spot:never", "no effect"),
        ("spot:NoExecute", "ends nothing that runs"),
        ("a=b,c", "cannot be one"),
        ("a=b\nc", "cannot be one"),
    ],
)
def test_what_cannot_be_a_taint_is_refused_with_its_cause(text: str, word: str) -> None:
    with pytest.raises(Invalid, match=word) as refused:
        read_taint(text)
    assert refused.value.mend


@pytest.mark.parametrize(
    ("labels", "word"),
    [
        ({"site": "x"}, "every node has 'site'"),
        ({"a/": "x"}, "no key"),
        ({"a": "x,y"}, "cannot be one"),
        ({"a": " x"}, "cannot be one"),
        ({"a": "x" * 254}, "cannot be one"),
        ({"a": "x\0"}, "cannot be one"),
        ({f"k{number}": "x" for number in range(LABELS_MAX + 1)}, "more than"),
    ],
)
def test_what_cannot_be_labels_is_refused_with_its_cause(labels: dict[str, str], word: str) -> None:
    with pytest.raises(Invalid, match=word):
        check_labels(labels)
    check_labels({"a": "", "topology.example/zone": "Tesla T4 (2)"})


def test_what_an_operator_says_goes_before_what_the_agent_was_started_with() -> None:
    there = node(labels={"rack": "a", "disk": "hdd"}, taints=("spot", "gpu=only"))
    policy = labelled(there, NodePolicy(name="n1"), {"disk": "ssd", "rack": None, "new": "x", "none": None})
    policy = tainted(there, policy, ("gpu=none", "own:prefer-no-schedule"), ("spot",))
    shown = described(there, policy)
    assert (shown.labels, shown.taints) == ({"disk": "ssd", "new": "x"}, ("gpu=none", "own:prefer-no-schedule"))
    assert described(there, None) is there
    assert "none" not in policy.labels, "what hides nothing is not kept"
    policy = tainted(there, policy, ("spot",), ())
    assert described(there, policy).taints == ("spot", "gpu=none", "own:prefer-no-schedule")
    policy = tainted(there, labelled(there, policy, {}, reset=True), (), (), reset=True)
    assert described(there, policy) == there
    with pytest.raises(Invalid, match="no taint 'other'"):
        tainted(there, policy, (), ("other",))


def test_work_goes_to_a_tainted_node_only_where_it_tolerates_that_or_where_it_is_a_wish_and_all_else_is_full() -> None:
    def placed(taint: str, tolerations: tuple[str, ...], count: int) -> list[str]:
        snapshot = Snapshot()
        snapshot.upsert_node(node("a", taints=(taint,)))
        snapshot.upsert_node(node("b"))
        demand = Demand(cpu_milli=1000, memory_bytes=1, placement=Placement(tolerations=tolerations))
        group = "app/p/web/1/1"
        answer = plan(snapshot, [Pending(id=f"i{number}", group=group, demand=demand) for number in range(count)])
        return sorted(one.node for one in answer.placed)

    assert placed("spot", (), 8) == ["b"] * 4
    assert placed("spot", ("spot",), 2) == ["a", "b"]
    assert placed("spot:prefer-no-schedule", (), 4) == ["b"] * 4
    assert placed("spot:prefer-no-schedule", (), 6) == ["a", "a", "b", "b", "b", "b"]
    assert placed("spot:prefer-no-schedule", ("spot",), 2) == ["a", "b"]


def test_labels_and_taints_said_of_a_node_count_at_once_and_outlast_its_agent() -> None:
    chance = random.Random(1)

    async def main() -> None:
        async with Cell(chance) as cell:
            service = cell.service
            nodes = [node("n1", labels={"disk": "hdd"}), node("n2")]
            fleet = Fleet(nodes, service.control_plane, cell.detection, cell.clock, lambda after_s, node, instance: None)
            await fleet.start()
            wish = Placement(constraints=(Constraint(label="disk", value="ssd"),))
            await service.apps.put(SYSTEM, AppSpec(name="web", image="x", placement=wish, scale=Scale(replicas=2)))
            await asyncio.sleep(3)
            assert {held.record.node for held in cell.state.records(Instance).values()} == {None}
            view = await service.nodes.label("n1", LabelRequest(labels={"disk": "ssd"}))
            assert view.node.labels == {"disk": "ssd"}
            await asyncio.sleep(3)
            assert {held.record.node for held in cell.state.records(Instance).values()} == {"n1"}
            await service.control_plane.register_node(replace(nodes[0], labels={"disk": "hdd", "rack": "r1"}))
            assert service.nodes.get("n1").node.labels == {"disk": "ssd", "rack": "r1"}
            await service.nodes.taint("n1", TaintRequest(add=("gpu=only",)))
            await service.apps.put(SYSTEM, AppSpec(name="other", image="x", scale=Scale(replicas=3)))
            await asyncio.sleep(3)
            where = [held.record.node for held in cell.state.records(Instance).values() if held.record.owner == "other"]
            assert where == ["n2"] * 3
            assert (await service.nodes.cordon("n1", True)).node.taints == ("gpu=only",), "a cordon leaves it"
            spec = MaintenanceSpec(name="m", nodes="disk=ssd", start=cell.clock.now() + 1e5, length=Seconds(60))
            assert (await service.maintenances.put(spec)).nodes == ("n1",)
            with pytest.raises(NotFound):
                await service.nodes.label("gone", LabelRequest())
            with pytest.raises(Invalid, match="every node has 'node'"):
                await service.nodes.label("n1", LabelRequest(labels={"node": "x"}))
            with pytest.raises(Invalid, match="no effect"):
                await service.control_plane.register_node(node("n3", taints=("a:b",)))
            await fleet.close()

    run_virtual(main, chance)


def test_what_a_newer_server_says_of_a_node_stays_when_an_older_one_cordons_drains_or_labels_it() -> None:
    chance = random.Random(1)

    async def main() -> None:
        async with Cell(chance) as cell:
            nodes = cell.service.nodes
            await cell.service.control_plane.register_node(node("n1"))
            newer = {"name": "n1", "labels": {"disk": "ssd"}, "later": {"than": ["this"]}}
            await cell.store.put(keys.node_policy("n1"), json.dumps(newer).encode())
            await nodes.cordon("n1", True)
            assert await said(cell) == {**newer, "cordoned": True}
            await cell.service.drains.start("n1", DrainRequest())
            assert (await said(cell))["later"] == newer["later"]
            await cell.service.drains.undo("n1")
            await nodes.label("n1", LabelRequest(labels={"disk": "hdd"}))
            await nodes.cordon("n1", False)
            assert await said(cell) == {**newer, "labels": {"disk": "hdd"}}
            assert nodes.get("n1").node.labels == {"disk": "hdd"}

    async def said(cell: Cell) -> dict[str, Any]:
        item = await cell.store.get(keys.node_policy("n1"))
        assert item is not None
        found: dict[str, Any] = json.loads(item.value)
        return found

    run_virtual(main, chance)


@pytest.fixture
def api() -> FakeApi:
    made = FakeApi()
    made.put("nodes", "n1", node(labels={"disk": "hdd"}, taints=("spot",)))
    return made


def test_the_command_line_says_shows_and_takes_away(api: FakeApi, tmp_path: Path) -> None:
    shown = call(api, tmp_path, "nodes", "label", "n1", "rack=a7", "disk=ssd")
    assert [line.split() for line in shown.stdout.splitlines()[1:]] == [["disk", "ssd", "operator"], ["rack", "a7", "operator"]]
    shown = call(api, tmp_path, "nodes", "taint", "n1", "gpu=only", "slow:PreferNoSchedule")
    rows = [line.split(maxsplit=1) for line in shown.stdout.splitlines()[1:]]
    assert [row[0] for row in rows] == ["spot", "gpu=only", "slow"]
    assert [row[1].split()[0] for row in rows] == ["nothing", "nothing", "only"]
    assert call(api, tmp_path, "nodes", "taint", "n1", "gpu-", "spot-").exit_code == 0
    call(api, tmp_path, "nodes", "label", "n1", "rack-")
    view = json.loads(call(api, tmp_path, "nodes", "show", "n1", "--json").stdout)["node"]
    assert (view["labels"], view["taints"]) == ({"disk": "ssd"}, ["slow:prefer-no-schedule"])
    call(api, tmp_path, "nodes", "label", "n1", "--reset")
    assert "disk   hdd    its agent" in call(api, tmp_path, "nodes", "label", "n1").stdout


def test_nodes_are_listed_by_their_labels_with_their_taints(api: FakeApi, tmp_path: Path) -> None:
    api.put("nodes", "n2", node("n2", site="fra"))
    call(api, tmp_path, "nodes", "label", "n2", "rack=a7")
    assert "TAINTS" in call(api, tmp_path, "nodes").stdout
    assert "spot" in call(api, tmp_path, "nodes").stdout
    for rules, there in (("rack=a7", ["n2"]), ("rack!=a7", ["n1"]), ("site=fra,arch=amd64", ["n2"]), ("disk=ssd", [])):
        found = json.loads(call(api, tmp_path, "nodes", "list", "--where", rules, "--json").stdout)
        assert [view["node"]["name"] for view in found] == there
    for rule in ("rack", "rack ==", "rack==a7", "arch>=3", "arch>3,rack=a7", "rack!"):
        refused = call(api, tmp_path, "nodes", "list", "--where", rule)
        assert refused.exit_code == 2, rule
        assert "is no rule on a label" in refused.stderr


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (("label", "n1", "rack"), "'rack' is not KEY=VALUE"),
        (("label", "n1", "region=x"), "every node has 'region' already"),
        (("taint", "n1", "spot:NoExecute"), "atoll nodes drain"),
        (("taint", "n1", "other-"), "no taint 'other'"),
    ],
)
def test_what_is_wrong_is_said_once_and_changes_nothing(
    api: FakeApi, tmp_path: Path, arguments: tuple[str, ...], word: str
) -> None:
    done = call(api, tmp_path, "nodes", *arguments)
    assert done.exit_code == 2
    assert word in done.stderr
    assert ("node-policies", "n1") not in api.records


def test_an_agent_is_started_with_labels_and_taints_and_one_that_is_none_ends_it_before_it_begins(tmp_path: Path) -> None:
    config = parse("agent", Config(labels=("rack=a7", "disk=ssd"), taints=("gpu=only", "slow:prefer-no-schedule")).arguments())
    assert config.node_labels == {"rack": "a7", "disk": "ssd"}
    assert config.node_taints == ("gpu=only", "slow:prefer-no-schedule")
    for wrong in (Config(data=tmp_path, labels=("rack",)), Config(data=tmp_path, taints=("a:b",))):
        with pytest.raises(Invalid, match=r"--(label|taint)"):
            check_settings(wrong)
