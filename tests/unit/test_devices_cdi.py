"""CDI specs: written with the least version, read with strictness, and foreign programs are never run."""

from __future__ import annotations

import json
import os
import stat
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from jsonschema import Draft7Validator
from referencing import Registry, Resource
from referencing.jsonschema import DRAFT7

from atoll.devices.cdi import (
    VERSIONS,
    checked,
    find_device,
    make_spec,
    minimum_version,
    read_directories,
    read_spec,
    write_inventory,
    write_spec,
)
from atoll.devices.cdi_edits import container_edits, edits_of, linked_mounts
from atoll.model.devices import GpuDevice, GpuVendor
from atoll.model.errors import AtollError, Invalid, NotFound, Unsupported
from atoll.model.ports.devices import DeviceNode, Edits, FileMount
from atoll.model.ports.runtime import Feature
from atoll.model.spec import RuntimeName
from atoll.runtimes.offer import require

KIND = "nvidia.com/gpu"
LIBRARIES = "/usr/local/nvidia/lib64"


def edits_for(minor: int) -> Edits:
    return Edits(
        nodes=(
            DeviceNode(f"/dev/nvidia{minor}", f"/dev/nvidia{minor}", 195, minor),
            DeviceNode("/dev/nvidiactl", "/dev/nvidiactl", 195, 255),
        ),
        mounts=(FileMount("/opt/libcuda.so.580.1", f"{LIBRARIES}/libcuda.so.580.1"),),
        env=(("NVIDIA_VISIBLE_DEVICES", "void"),),
        library_directories=(LIBRARIES,),
        links=((f"{LIBRARIES}/libcuda.so.1", "libcuda.so.580.1"), (f"{LIBRARIES}/libcuda.so", "libcuda.so.1")),
    )


def spec(**changes: Any) -> dict[str, Any]:
    body: dict[str, Any] = {
        "cdiVersion": "1.1.0",
        "kind": "vendor.com/device",
        "devices": [{"name": "first", "containerEdits": {"deviceNodes": [{"path": "/dev/v0", "major": 1, "minor": 5}]}}],
    }
    return body | changes


def with_edits(**edits: Any) -> dict[str, Any]:
    return spec(devices=[{"name": "first", "containerEdits": edits}])


def official() -> Draft7Validator:
    """Return a validator of the schema as it was published."""
    data = resources.files("atoll.devices") / "data"

    def retrieve(uri: str) -> Resource[Any]:
        name = "cdi-defs.json" if uri.endswith("defs.json") else "cdi-schema.json"
        return Resource(json.loads((data / name).read_text()), DRAFT7)

    registry: Registry[Any] = Registry(retrieve=retrieve)  # type: ignore[call-arg]
    return Draft7Validator(json.loads((data / "cdi-schema.json").read_text()), registry=registry)


def test_what_is_made_here_holds_the_published_schema_and_needs_no_hook() -> None:
    made = make_spec(KIND, {"GPU-a": edits_for(0), "GPU-b": edits_for(1)})
    assert list(official().iter_errors(made.body)) == []
    assert "hooks" not in json.dumps(made.body)
    assert made.body["cdiVersion"] == "0.3.0"
    assert made.devices == ("nvidia.com/gpu=GPU-a", "nvidia.com/gpu=GPU-b")
    assert len(made.body["containerEdits"]["mounts"]) == 3  # what both share stands there once
    assert all("mounts" not in device["containerEdits"] for device in made.body["devices"])
    paths = [[node["path"] for node in device["containerEdits"]["deviceNodes"]] for device in made.body["devices"]]
    assert paths == [["/dev/nvidia0", "/dev/nvidiactl"], ["/dev/nvidia1", "/dev/nvidiactl"]]


def test_a_device_of_a_spec_gives_back_the_edits_that_it_was_made_of() -> None:
    edits = edits_for(1)
    found = make_spec(KIND, {"GPU-a": edits_for(0), "GPU-b": edits}).edits("nvidia.com/gpu=GPU-b")
    assert found.nodes == edits.nodes
    assert found.env == edits.env
    assert found.library_directories == edits.library_directories
    assert set(found.mounts) == {*edits.mounts, *linked_mounts(edits)}
    assert found.devices == ("nvidia.com/gpu=GPU-b",)


names = st.text("abcz09", min_size=1, max_size=8)
nodes = st.builds(
    lambda name, major, minor, permissions, mode: DeviceNode(f"/dev/{name}", f"/dev/h{name}", major, minor, permissions, mode),
    names,
    st.integers(0, 4095),
    st.integers(0, 1 << 20),
    st.sampled_from(["r", "rw", "rwm"]),
    st.sampled_from([0o666, 0o444, 0o600]),
)
mounts = st.builds(lambda name: FileMount(f"/opt/{name}", f"/usr/lib/{name}"), names)
some_edits = st.builds(
    lambda nodes, mounts, env, directories: Edits(
        nodes=tuple(nodes),
        mounts=tuple(mounts),
        env=tuple(env.items()),
        library_directories=tuple(f"/{each}" for each in directories),
    ),
    st.lists(nodes, max_size=4, unique_by=lambda node: node.path),
    st.lists(mounts, max_size=4, unique_by=lambda mount: mount.target),
    st.dictionaries(st.text("ABC_", min_size=1, max_size=6), st.text("xyz=: ", max_size=6), max_size=3),
    st.lists(names, max_size=2, unique=True),
)


@given(some_edits)
def test_edits_without_links_go_to_cdi_and_back_unchanged(edits: Edits) -> None:
    content = container_edits(edits)
    assert list(official().iter_errors(spec(containerEdits=content))) == []
    back = edits_of([("containerEdits", content)], name="v.com/d=x", source="x")
    assert back == Edits(
        nodes=edits.nodes, mounts=edits.mounts, env=edits.env, library_directories=edits.library_directories, devices=("v.com/d=x",)
    )


NEEDS = [
    ({}, "0.3.0"),
    ({"mounts": [{"hostPath": "/a", "containerPath": "/b", "type": "bind"}]}, "0.4.0"),
    ({"deviceNodes": [{"path": "/dev/a", "hostPath": "/dev/b"}]}, "0.5.0"),
    ({"additionalGids": [5]}, "0.7.0"),
    ({"intelRdt": {"closID": "x"}}, "0.7.0"),
    ({"intelRdt": {"enableMonitoring": True}}, "1.1.0"),
    ({"netDevices": [{"hostInterfaceName": "a", "name": "b"}]}, "1.1.0"),
]


@pytest.mark.parametrize(("content", "needed"), NEEDS)
@pytest.mark.parametrize("common", [True, False])
def test_the_least_version_follows_from_what_is_used(content: dict[str, Any], needed: str, common: bool) -> None:
    body = spec(containerEdits=content) if common else with_edits(**content)
    assert minimum_version(body) == needed
    checked(body | {"cdiVersion": needed}, "x")
    if needed != "0.3.0":
        older = VERSIONS[VERSIONS.index(needed) - 1]
        with pytest.raises(Invalid, match=f"needs CDI {needed}, but cdiVersion says {older}"):
            checked(body | {"cdiVersion": older}, "x")


def test_names_and_notes_need_a_version_too() -> None:
    assert minimum_version(spec(annotations={"a": "b"})) == "0.6.0"
    assert minimum_version(spec(kind="vendor.com/with.dot")) == "0.6.0"
    assert minimum_version(spec(devices=[{"name": "0", "containerEdits": {}}])) == "0.5.0"
    assert minimum_version(spec(devices=[{"name": "a", "annotations": {"x": "y"}, "containerEdits": {}}])) == "0.6.0"


WRONG: list[tuple[dict[str, Any], str]] = [
    (spec(unknown=1), "unknown"),
    (spec(cdiVersion="2.0.0"), "cdiVersion"),
    (spec(cdiVersion=1), "cdiVersion"),
    (spec(kind="gpu"), "kind"),
    (spec(kind="vendor.com/"), "kind"),
    (spec(kind="vendor.com/a/b"), "kind"),
    (spec(kind="-bad.com/a"), "kind"),
    (spec(kind=f"{'a.' * 130}com/a"), "kind"),
    (spec(devices=[]), "devices"),
    (spec(devices={}), "devices"),
    (spec(devices=[{"name": "a"}]), "devices[0].containerEdits"),
    (spec(devices=[{"name": "-a", "containerEdits": {}}]), "devices[0].name"),
    (spec(devices=[{"name": "a\n", "containerEdits": {}}]), "devices[0].name"),
    (spec(devices=[{"name": "a", "containerEdits": {}}] * 2), "devices[1].name"),
    (with_edits(deviceNodes=[{"hostPath": "/dev/a"}]), "devices[0].containerEdits.deviceNodes[0].path"),
    (with_edits(deviceNodes=[{"path": "/dev/a", "major": "1"}]), "devices[0].containerEdits.deviceNodes[0].major"),
    (with_edits(deviceNodes=[{"path": "/dev/a", "major": True}]), "devices[0].containerEdits.deviceNodes[0].major"),
    (with_edits(deviceNodes=[{"path": "/dev/a", "uid": -1}]), "devices[0].containerEdits.deviceNodes[0].uid"),
    (with_edits(deviceNodes=[{"path": "/dev/a", "owner": 1}]), "devices[0].containerEdits.deviceNodes[0].owner"),
    (with_edits(env=[1]), "devices[0].containerEdits.env[0]"),
    (with_edits(env="A=1"), "devices[0].containerEdits.env"),
    (with_edits(intelRdt={"enableMBM": True}), "devices[0].containerEdits.intelRdt.enableMBM"),
    (spec(annotations={"a": 1}), "annotations.a"),
    (spec(annotations={"": "x"}), "annotations."),
]


@pytest.mark.parametrize(("body", "field"), WRONG, ids=[field for _, field in WRONG])
def test_a_wrong_spec_is_refused_with_file_and_field(body: dict[str, Any], field: str) -> None:
    with pytest.raises(Invalid) as raised:
        read_spec(json.dumps(body).encode(), "/etc/cdi/x.json")
    assert str(raised.value).startswith(f"/etc/cdi/x.json: {field}")
    assert raised.value.field == field


@pytest.mark.parametrize("data", [b"", b"{", b"[1]", b"\xff\xfe", b"null", b"[" * 100_000])
@pytest.mark.parametrize("ending", ["json", "yaml"])
def test_what_is_no_spec_at_all_is_refused_with_its_file(data: bytes, ending: str) -> None:
    with pytest.raises(Invalid, match=rf"^/etc/cdi/x\.{ending}: "):
        read_spec(data, f"/etc/cdi/x.{ending}")


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner)
    )
)
def test_whatever_is_read_ends_in_a_spec_or_in_one_error(body: Any) -> None:
    for wrapped in (body, spec(devices=body), with_edits(deviceNodes=body), with_edits(mounts=[body], env=[body])):
        assert refusal(wrapped).startswith(("x: ", "none"))


def refusal(body: Any) -> str:
    """Return the words with which `body` is refused; anything but the project's own errors goes through."""
    try:
        checked(body, "x").edits("first")
    except AtollError as error:
        return str(error)
    return "none"


TOOLKIT = """
cdiVersion: 0.5.0
kind: nvidia.com/gpu
devices:
- name: GPU-a
  containerEdits:
    deviceNodes:
    - {path: /dev/nvidia0, major: 195, minor: 0, fileMode: 438, permissions: rw}
containerEdits:
  env: [NVIDIA_VISIBLE_DEVICES=void]
  hooks:
  - {hookName: createContainer, path: /usr/bin/nvidia-cdi-hook,
     args: [nvidia-cdi-hook, create-symlinks, --link, libcuda.so.1::/usr/lib64/libcuda.so, --link=a.so.2::/usr/lib64/a.so]}
  - {hookName: createContainer, path: /usr/bin/nvidia-ctk, args: [nvidia-ctk, hook, update-ldcache, --folder, /usr/lib64]}
  - {hookName: createContainer, path: /usr/bin/nvidia-ctk, args: [nvidia-ctk, hook, disable-device-node-modification]}
  mounts:
  - {hostPath: /usr/lib64/libcuda.so.1, containerPath: /usr/lib64/libcuda.so.1, options: [ro, nosuid, nodev, bind]}
"""


def test_a_spec_of_the_vendor_s_toolkit_is_done_without_its_programs() -> None:
    edits = read_spec(TOOLKIT.encode(), "/etc/cdi/nvidia.yaml").edits("nvidia.com/gpu=GPU-a")
    assert edits.links == (("/usr/lib64/libcuda.so", "libcuda.so.1"), ("/usr/lib64/a.so", "a.so.2"))
    assert edits.library_directories == ("/usr/lib64",)
    assert edits.nodes == (DeviceNode("/dev/nvidia0", "/dev/nvidia0", 195, 0),)
    assert edits.env == (("NVIDIA_VISIBLE_DEVICES", "void"),)


@pytest.mark.parametrize(
    "hook",
    [
        {"hookName": "createContainer", "path": "/tmp/evil", "args": ["evil", "update-ldcache"]},
        {"hookName": "prestart", "path": "/usr/bin/nvidia-cdi-hook", "args": ["nvidia-cdi-hook", "enable-cuda-compat"]},
        {
            "hookName": "createContainer",
            "path": "/usr/bin/nvidia-ctk",
            "args": ["nvidia-ctk", "hook", "update-ldcache", "--run", "x"],
        },
        {"hookName": "createContainer", "path": "/usr/bin/nvidia-ctk"},
        {"hookName": "createContainer", "path": "/usr/bin/nvidia-ctk", "args": ["nvidia-ctk", "hook", "create-symlinks", "stray"]},
    ],
)
def test_a_hook_whose_work_is_not_known_is_refused_and_named(hook: dict[str, Any]) -> None:
    with pytest.raises(Unsupported, match=Path(hook["path"]).name) as raised:
        checked(with_edits(hooks=[hook]), "x").edits("first")
    assert raised.value.field == "devices[0].containerEdits.hooks[0]"


@pytest.mark.parametrize(
    ("content", "field"),
    [
        ({"netDevices": [{"hostInterfaceName": "a", "name": "b"}]}, "netDevices"),
        ({"additionalGids": [44]}, "additionalGids"),
        ({"intelRdt": {"closID": "x"}}, "intelRdt"),
        ({"deviceNodes": [{"path": "/dev/sda", "type": "b", "major": 8, "minor": 0}]}, "deviceNodes[0].type"),
        ({"deviceNodes": [{"path": "/etc/x", "major": 1, "minor": 5}]}, "deviceNodes[0].path"),
        ({"deviceNodes": [{"path": "/dev/../etc/x", "major": 1, "minor": 5}]}, "deviceNodes[0].path"),
        ({"deviceNodes": [{"path": "/dev/x", "major": 1}]}, "deviceNodes[0]"),
        ({"deviceNodes": [{"path": "/dev/x", "major": 1, "minor": 5, "permissions": "x"}]}, "deviceNodes[0].permissions"),
        ({"deviceNodes": [{"path": "/dev/x", "major": 1, "minor": 5, "gid": 44}]}, "deviceNodes[0].gid"),
        ({"mounts": [{"hostPath": "/a", "containerPath": "/proc/x"}]}, "mounts[0].containerPath"),
        ({"mounts": [{"hostPath": "/a", "containerPath": "b"}]}, "mounts[0].containerPath"),
        ({"mounts": [{"hostPath": "a", "containerPath": "/b", "type": "tmpfs"}]}, "mounts[0].hostPath"),
        ({"mounts": [{"hostPath": "/a", "containerPath": "/b", "type": "tmpfs"}]}, "mounts[0].type"),
        ({"mounts": [{"hostPath": "/a", "containerPath": "/b", "options": ["rshared"]}]}, "mounts[0].options[0]"),
        ({"env": ["NOVALUE"]}, "env[0]"),
    ],
)
def test_what_an_instance_cannot_be_given_is_refused_and_not_dropped(content: dict[str, Any], field: str) -> None:
    with pytest.raises((Unsupported, Invalid)) as raised:
        checked(with_edits(**content), "x").edits("first")
    assert raised.value.field == f"devices[0].containerEdits.{field}"


def test_numbers_that_a_spec_leaves_out_are_those_of_the_node_s_file(tmp_path: Path) -> None:
    (tmp_path / "dev").mkdir()
    try:
        os.mknod(tmp_path / "dev/real", stat.S_IFCHR | 0o666, os.makedev(241, 7))
    except PermissionError:
        pytest.skip("making device files needs root")
    found = checked(with_edits(deviceNodes=[{"path": "/dev/shown", "hostPath": "/dev/real"}]), "x")
    node = found.edits("first", root=tmp_path).nodes[0]
    assert (node.path, node.host_path, node.major, node.minor) == ("/dev/shown", "/dev/real", 241, 7)
    with pytest.raises(Unsupported, match="/dev/real"):
        found.edits("first", root=tmp_path / "elsewhere")


def test_a_spec_is_written_whole_and_read_again(tmp_path: Path) -> None:
    made = make_spec(KIND, {"GPU-a": edits_for(0)})
    path = write_spec(tmp_path / "cdi", made)
    assert path.name == "nvidia.com-gpu.json"
    write_spec(tmp_path / "cdi", made)
    assert [each.name for each in (tmp_path / "cdi").iterdir()] == [path.name]
    (found,) = read_directories([tmp_path / "nothing", tmp_path / "cdi"])
    assert found.body == made.body
    assert found.source == str(path)


def test_the_inventory_s_spec_names_whole_devices_and_goes_with_the_last(tmp_path: Path) -> None:
    devices = [
        GpuDevice(id="GPU-a", model="H200", memory_bytes=1, minor=0),
        GpuDevice(id="GPU-b", model="H200", memory_bytes=1, minor=1, mig=True),
        GpuDevice(id="0000:5e:00.0", model="MI300X", memory_bytes=1, minor=128, vendor=GpuVendor.AMD),
    ]
    path = write_inventory(tmp_path, GpuVendor.NVIDIA, devices, lambda device: edits_for(device.minor))
    assert path is not None
    assert read_spec(path.read_bytes(), str(path)).devices == ("nvidia.com/gpu=GPU-a",)
    amd = write_inventory(tmp_path, GpuVendor.AMD, devices, lambda device: edits_for(device.minor))
    assert amd is not None
    assert json.loads(amd.read_text())["cdiVersion"] == "0.5.0"  # a name that begins with a digit
    assert write_inventory(tmp_path, GpuVendor.NVIDIA, [], lambda device: edits_for(device.minor)) is None
    assert not path.exists()
    assert amd.exists()


def test_of_two_specs_with_one_device_the_later_directory_s_counts(tmp_path: Path) -> None:
    for name in ("etc", "run"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "v.yaml").write_text(yaml.safe_dump(spec()))
    (tmp_path / "etc/notes.txt").write_text("not a spec")
    specs = read_directories([tmp_path / "etc", tmp_path / "run"])
    assert find_device(specs, "vendor.com/device=first").source.startswith(str(tmp_path / "run"))
    with pytest.raises(NotFound) as raised:
        find_device(specs, "vendor.com/device=second")
    assert "vendor.com/device=first" in (raised.value.mend or "")
    with pytest.raises(NotFound, match="second"):
        specs[0].edits("second")


def test_a_link_to_what_is_not_mounted_cannot_be_written() -> None:
    with pytest.raises(Invalid, match="/a/b leads to /a/c"):
        make_spec(KIND, {"x": Edits(links=(("/a/b", "c"),))})
    with pytest.raises(Invalid):
        make_spec(KIND, {"x": Edits(links=(("/a/b", "c"), ("/a/c", "b")))})


def test_firecracker_refuses_a_gpu_with_those_that_can() -> None:
    with pytest.raises(Unsupported, match="firecracker has no gpu") as raised:
        require(RuntimeName.FIRECRACKER, Feature.GPU)
    assert set((raised.value.mend or "").removeprefix("use one of: ").split(", ")) >= {"runc", "crun", "gvisor"}
    require(RuntimeName.RUNC, Feature.GPU)
