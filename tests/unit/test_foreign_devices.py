"""Devices of CDI specs that others wrote: allowed by the operator, offered by the node, placed by the scheduler."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from atoll.devices.foreign import ForeignDevices, parse_allowed
from atoll.model.devices import OfferedDevice
from atoll.model.errors import Forbidden, Invalid, NotFound, Unsupported
from atoll.model.ports.devices import DeviceNode, Edits
from atoll.model.records import Capacity, Node
from atoll.model.spec import AppSpec, Isolation, Resources, RuntimeName, check_app
from atoll.scheduling.demand import Pending, demand_of
from atoll.scheduling.plan import plan
from atoll.scheduling.snapshot import Snapshot

KIND = "vendor.com/nic"
A, B = f"{KIND}=a", f"{KIND}=b"


def write(directory: Path, kind: str = KIND, *, name: str = "spec.json", **more: Any) -> None:
    directory.mkdir(exist_ok=True)
    devices = [
        {"name": name, "containerEdits": {"deviceNodes": [{"path": f"/dev/nic-{name}", "hostPath": "/dev/null"}], **more}}
        for name in ("a", "b")
    ]
    (directory / name).write_text(json.dumps({"cdiVersion": "0.5.0", "kind": kind, "devices": devices}))


def foreign(directory: Path, allowed: str = KIND) -> ForeignDevices:
    return ForeignDevices(parse_allowed(allowed), [directory, directory / "none"])


# the node


def test_nothing_is_offered_unless_its_kind_is_allowed(tmp_path: Path) -> None:
    write(tmp_path)
    assert foreign(tmp_path, "").offered() == ()
    assert foreign(tmp_path, "vendor.com/other").offered() == ()
    assert foreign(tmp_path).offered() == (OfferedDevice(name=A), OfferedDevice(name=B))
    assert [device.shared for device in foreign(tmp_path, f"{KIND}:shared").offered()] == [True, True]
    with pytest.raises(Forbidden, match="has not allowed") as caught:
        foreign(tmp_path, "vendor.com/other").add(Edits(), [A])
    assert caught.value.field == "resources.devices"


@pytest.mark.parametrize("text", ["nic", "vendor.com", "vendor.com/", "/nic", "vendor.com/nic=a", "*"])
def test_an_allow_list_that_names_no_kind_is_refused(text: str) -> None:
    with pytest.raises(Invalid, match=r"vendor\.com/class"):
        parse_allowed(text)


def test_the_devices_appear_beside_what_the_instance_has_already(tmp_path: Path) -> None:
    write(tmp_path)
    own = Edits(nodes=(DeviceNode("/dev/nvidia0", "/dev/nvidia0", 195, 0),), devices=("nvidia.com/gpu=GPU-1",))
    edits = foreign(tmp_path).add(own, [A, B])
    assert [node.path for node in edits.nodes] == ["/dev/nvidia0", "/dev/nic-a", "/dev/nic-b"]
    assert (edits.nodes[1].major, edits.nodes[1].minor) == (1, 3)
    assert edits.devices == ("nvidia.com/gpu=GPU-1", A, B)


def test_an_unknown_device_names_what_exists(tmp_path: Path) -> None:
    write(tmp_path)
    with pytest.raises(NotFound) as caught:
        foreign(tmp_path).add(Edits(), [f"{KIND}=c"])
    assert A in str(caught.value.mend)


def test_a_device_that_cannot_be_handed_on_is_not_offered_and_refused_in_words(tmp_path: Path) -> None:
    write(tmp_path, hooks=[{"hookName": "createContainer", "path": "/usr/bin/theirs"}])
    assert foreign(tmp_path).offered() == ()
    with pytest.raises(Unsupported, match="foreign program"):
        foreign(tmp_path).add(Edits(), [A])


def test_a_wrong_spec_takes_out_its_directory_only(tmp_path: Path) -> None:
    write(tmp_path / "wrong")
    (tmp_path / "wrong/bad.json").write_text("{")
    write(tmp_path / "well")
    found = ForeignDevices(parse_allowed(KIND), [tmp_path / "wrong", tmp_path / "well"])
    assert [device.name for device in found.offered()] == [A, B]


# the spec


def app(*devices: str, **more: Any) -> AppSpec:
    return AppSpec(name="web", image="registry.example/web:1", resources=Resources(devices=devices), **more)


def test_a_spec_may_name_devices_once_each_for_runtimes_that_can_hand_them_on() -> None:
    check_app(app(A, B))
    with pytest.raises(Invalid, match=r"resources\.devices"):
        check_app(app(A, A))
    with pytest.raises(Invalid, match="cannot hand on") as caught:
        check_app(app(A, isolation=Isolation.VM))
    assert caught.value.field == "resources.devices"
    assert demand_of(app(A)).runtimes == (RuntimeName.RUNC, RuntimeName.CRUN, RuntimeName.LXC)


# the scheduler


def node(name: str, *offered: OfferedDevice) -> Node:
    capacity = Capacity(cpu_milli=8000, memory_bytes=8 << 30, disk_bytes=1 << 40, devices=offered)
    return Node(name=name, capacity=capacity, runtimes=(RuntimeName.RUNC,))


def planned(nodes: list[Node], *asks: tuple[str, ...], snapshot: Snapshot | None = None) -> tuple[list[str | None], dict[str, Any]]:
    """Return the node of each ask, and what is said of those without one."""
    snapshot = snapshot or Snapshot()
    for one in nodes:
        snapshot.upsert_node(one)
    pending = [Pending(id=f"i{at}", group=f"g{at}", demand=demand_of(app(*ask))) for at, ask in enumerate(asks)]
    made = plan(snapshot, pending)
    where = {one.id: one.node for one in made.placed}
    return [where.get(one.id) for one in pending], made.rejected


def placed(nodes: list[Node], *asks: tuple[str, ...], snapshot: Snapshot | None = None) -> list[str | None]:
    return planned(nodes, *asks, snapshot=snapshot)[0]


def test_an_instance_goes_where_its_device_is_and_an_exclusive_one_has_one_holder() -> None:
    nodes = [node("n1"), node("n2", OfferedDevice(name=A)), node("n3", OfferedDevice(name=A), OfferedDevice(name=B))]
    assert placed(nodes, (A, B)) == ["n3"]
    assert sorted(str(name) for name in placed(nodes, (A,), (A,), (A,))) == ["None", "n2", "n3"]


def test_a_shared_device_has_any_number_of_holders() -> None:
    assert placed([node("n1"), node("n2", OfferedDevice(name=A, shared=True))], (A,), (A,), (A,)) == ["n2"] * 3


def test_what_is_placed_already_holds_its_device_until_it_is_gone() -> None:
    snapshot = Snapshot()
    nodes = [node("n1", OfferedDevice(name=A), OfferedDevice(name=B))]
    snapshot.upsert_node(nodes[0])
    snapshot.allocate("old", "n1", "default/app/old/1", demand_of(app(A)))
    assert placed(nodes, (A,), (B,), snapshot=snapshot) == [None, "n1"]
    snapshot.release("old")
    assert placed(nodes, (A,), snapshot=snapshot) == ["n1"]


def test_equal_instances_share_out_the_nodes_with_the_device() -> None:
    snapshot = Snapshot()
    for name in ("n1", "n2", "n3"):
        snapshot.upsert_node(node(name, OfferedDevice(name=A)))
    pending = [Pending(id=f"i{at}", group="g", demand=demand_of(app(A))) for at in range(5)]
    made = plan(snapshot, pending)
    assert sorted(one.node for one in made.placed) == ["n1", "n2", "n3"]
    assert len(made.rejected) == 2
    assert all("another instance has" in said.message for said in made.rejected.values())


def test_a_device_that_no_node_offers_is_refused_with_those_that_there_are() -> None:
    where, rejected = planned([node("n1", OfferedDevice(name=A)), node("n2")], (B,))
    assert where == [None]
    assert f"without {B}" in rejected["i0"].message
    assert A in rejected["i0"].mend
    assert rejected["i0"].failed == {"device": 2}
    _, rejected = planned([node("n1")], (B,))
    assert "--cdi-devices" in rejected["i0"].mend
