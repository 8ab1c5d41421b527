"""GPUs on the command line: `atoll nodes`, `atoll nodes show`, `atoll ps`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from msgspec.structs import replace

from atoll.api.service.holdings import holdings_of
from atoll.cli.main import cli
from atoll.cli.session import Session
from atoll.model.devices import GpuDevice, GpuGrant, GpuHealth, GpuPartition, GpuSample, GpuSharing, MigProfile
from atoll.model.records import Capacity, Instance, Node, OwnerKind, Status
from atoll.model.spec import RuntimeName
from atoll.model.states import Phase
from atoll.sdk.fake import FakeApi

H100 = "GPU-1111aaaa-0000-0000-0000-000000000001"
MIG = "GPU-2222bbbb-0000-0000-0000-000000000002"
SICK = "GPU-3333cccc-0000-0000-0000-000000000003"
PROFILES = (
    MigProfile(name="1g.10gb", compute_slices=1, memory_slices=1, memory_bytes=10 << 30, starts=tuple(range(7)), most=7),
    MigProfile(name="7g.80gb", compute_slices=7, memory_slices=8, memory_bytes=80 << 30, starts=(0,), most=1),
)


def device(id: str, **more: Any) -> GpuDevice:
    facts = {"model": "NVIDIA H100 80GB HBM3", "memory_bytes": 80 << 30, "driver": "580.159.04", "cuda": "13.0"}
    return GpuDevice(**{"id": id} | facts | more)


DEVICES = (
    device(H100),
    device(MIG, mig=True, profiles=PROFILES, foreign=(GpuPartition(id="MIG-x", profile="1g.10gb", start=6, size=1),)),
    device(SICK, health=GpuHealth.QUARANTINED, reason="XID 79: it has fallen off the bus", present=False),
)


class Atoll:
    def __init__(self, directory: Path, *devices: GpuDevice) -> None:
        self.api = FakeApi()
        self.environment = {"ATOLL_API": "http://fake", "ATOLL_TOKEN": "t", "XDG_CONFIG_HOME": str(directory), "NO_COLOR": "1"}
        capacity = Capacity(cpu_milli=2000, memory_bytes=4 << 30, disk_bytes=50 << 30, gpus=devices)
        self.api.put("nodes", "n1", Node(name="n1", capacity=capacity, registered_at=1.0))

    def run(self, *arguments: str) -> str:
        session = Session(dial=lambda _: self.api)
        result = CliRunner().invoke(cli, list(arguments), obj=session, env=self.environment, catch_exceptions=False)
        assert result.exit_code == 0, result.stderr
        return result.stdout

    def json(self, *arguments: str) -> Any:
        return json.loads(self.run(*arguments, "--json"))

    def hold(self, id: str, *grants: GpuGrant) -> None:
        instance = Instance(
            id=id, project="default", owner_kind=OwnerKind.APP, owner="web", release=1, node="n1", gpus=grants, created_at=1.0
        )
        self.api.put("instances", f"default/{id}", instance)
        status = Status(instance=id, project="default", node="n1", phase=Phase.RUNNING, ready=True)
        self.api.put("statuses", f"default/{id}", status)


@pytest.fixture
def atoll(tmp_path: Path) -> Atoll:
    made = Atoll(tmp_path, *DEVICES)
    made.hold("web-a", GpuGrant(device=H100, memory_bytes=80 << 30))
    made.hold(
        "web-b",
        GpuGrant(device=MIG, sharing=GpuSharing.MIG, profile="1g.10gb", start=1, size=1, milli=142),
        GpuGrant(device=MIG, sharing=GpuSharing.MIG, profile="1g.10gb", start=0, size=1, milli=142),
    )
    made.api.gpu_samples["n1"] = (GpuSample(device=H100, busy_milli=870, memory_bytes=40 << 30, temperature_c=61),)
    return made


def test_a_node_s_gpus_are_shown_with_who_holds_them_and_how_they_fare(atoll: Atoll) -> None:
    shown = atoll.run("nodes", "show", "n1")
    parts = shown.splitlines()
    assert "3 × NVIDIA H100 80GB HBM3 with 80.0GiB" in shown
    whole = next(line for line in parts if line.startswith(H100[:12]))
    for words in ("ok", "whole", "40.0GiB/80.0GiB", "87 %", "61 °C", "580.159.04, CUDA 13.0", "web-a"):
        assert words in whole
    partitioned = next(line for line in parts if line.startswith(MIG[:12]))
    assert "(MIG)" in partitioned
    assert "2/8 slices" in partitioned
    assert "web-b (1g.10gb at 0), web-b (1g.10gb at 1)" in partitioned
    sick = next(line for line in parts if line.startswith(SICK[:12]))
    assert "gone" in sick
    assert "free" in sick
    assert f"{SICK[:12]} gone: XID 79: it has fallen off the bus" in parts
    assert f"{MIG[:12]} can be partitioned as 1g.10gb (up to 7), 7g.80gb (up to 1)" in parts
    assert f"{MIG[:12]} has partitions that Atoll did not make and leaves alone: 1g.10gb at 6" in parts


def test_what_is_held_of_a_device_that_is_not_listed_any_more_is_shown_too(atoll: Atoll) -> None:
    atoll.hold("web-c", GpuGrant(device="GPU-9999dddd-0"))
    line = next(line for line in atoll.run("nodes", "show", "n1").splitlines() if line.startswith("GPU-9999dddd"))
    assert "gone" in line
    assert "web-c" in line


def test_the_list_of_nodes_counts_gpus_only_where_there_are_any(atoll: Atoll, tmp_path: Path) -> None:
    heading, line = atoll.run("nodes").splitlines()[:2]
    assert "GPUS" in heading
    assert "2/3 (1 out)" in line
    assert "GPUS" not in Atoll(tmp_path).run("nodes")


def test_programs_get_devices_grants_and_samples(atoll: Atoll) -> None:
    view = atoll.json("nodes", "show", "n1")
    assert [each["id"] for each in view["node"]["capacity"]["gpus"]] == [H100, MIG, SICK]
    assert view["node"]["capacity"]["gpus"][2]["health"] == "quarantined"
    assert view["heartbeat"]["gpus"][0]["busy_milli"] == 870
    held = {each["device"]: each for each in view["gpus"]}
    assert [holder["instance"] for holder in held[H100]["holders"]] == ["web-a"]
    assert held[MIG]["milli"] == 250
    assert [holder["grant"].get("start", 0) for holder in held[MIG]["holders"]] == [0, 1]


def test_instances_are_listed_with_their_devices_only_where_one_has_any(atoll: Atoll, tmp_path: Path) -> None:
    lines = atoll.run("ps").splitlines()
    assert "GPU" in lines[0].split()
    assert H100[:12] in next(line for line in lines if line.startswith("web-a"))
    assert f"{MIG[:12]} 1g.10gb at 1" in next(line for line in lines if line.startswith("web-b"))
    plain = Atoll(tmp_path)
    plain.hold("web-a")
    assert "GPU" not in plain.run("ps").splitlines()[0].split()


def test_holders_of_projects_that_one_does_not_see_have_no_names() -> None:
    grant = GpuGrant(device=H100, sharing=GpuSharing.TIME_SLICE, milli=250, memory_bytes=20 << 30)
    mine = Instance(id="a", project="p", owner_kind=OwnerKind.APP, owner="web", node="n1", gpus=(grant,), created_at=1.0)
    (holding,) = holdings_of([mine, replace(mine, id="b", project="q")], DEVICES, lambda project: project == "p")
    assert [holder.instance for holder in holding.holders] == ["", "a"]
    assert (holding.milli, holding.memory_bytes) == (500, 40 << 30)


@pytest.mark.parametrize(("starts", "milli"), [((0, 2, 4, 6), 250), ((0, 3, 6, 9), 181)])
def test_a_partition_is_that_part_of_its_device_which_it_has_of_its_slices(starts: tuple[int, ...], milli: int) -> None:
    profile = MigProfile(name="1g", compute_slices=1, memory_slices=2, memory_bytes=1, starts=starts, most=4)
    device = GpuDevice(id=MIG, model="x", memory_bytes=8, mig=True, profiles=(profile,))
    grant = GpuGrant(device=MIG, sharing=GpuSharing.MIG, profile="1g", start=0, size=2, memory_bytes=1)
    one = Instance(id="a", project="p", owner_kind=OwnerKind.APP, owner="web", node="n1", gpus=(grant,), created_at=1.0)
    assert [holding.milli for holding in holdings_of([one], [device])] == [milli]


@pytest.mark.parametrize(
    ("gpu", "devices", "words"),
    [
        ("{ count = 1 }", (), ("no-gpu", "without GPU (1 GPU asked for)", "add a node with GPUs")),
        ('{ model = "B999" }', DEVICES, ("of model B999", "the models there are NVIDIA H100 80GB HBM3")),
        ('{ profile = "3g.77gb" }', DEVICES, ("MIG partition 3g.77gb", "the profiles there are 1g.10gb")),
        ('{ driver = "999" }', DEVICES, ("driver 999 or newer", "the drivers there are 580.159.04")),
        ("{ count = 1 }", DEVICES[2:], ("there are 1, but quarantined", "atoll nodes show NODE")),
        ('{ profile = "9x" }', DEVICES, ("resources.gpu.profile: '9x' is no MIG partition", "as in 1g.10gb")),
        ('{ profile = "1g.10gb\\n" }', DEVICES, ("resources.gpu.profile", "is no MIG partition")),
        ('{ driver = "new" }', DEVICES, ("resources.gpu.driver: 'new' is no version", "550.54.15")),
        ('{ count = 0.5, sharing = "mps", memory = 0 }', DEVICES, ("resources.gpu.memory: below 1MiB", "leave it out")),
        ("{ count = 1.5 }", DEVICES, ("resources.gpu.count: 1.5", "less than 1")),
        ('{ count = 2, sharing = "mps" }', DEVICES, ("resources.gpu.sharing", "count below 1")),
        ('{ profile = "1g.10gb", count = 0.5 }', DEVICES, ("resources.gpu.count", "share of a partition")),
    ],
)
def test_a_wish_that_no_node_can_grant_is_answered_with_what_there_is(
    tmp_path: Path, gpu: str, devices: tuple[GpuDevice, ...], words: tuple[str, ...]
) -> None:
    atoll = Atoll(tmp_path, *devices)
    node, _ = atoll.api.get("nodes", "n1")
    atoll.api.put("nodes", "n1", replace(node, runtimes=(RuntimeName.RUNC,)))
    (tmp_path / "atoll.toml").write_text(f'name = "web"\nimage = "r/x:1"\n[resources]\ngpu = {gpu}\n')
    session = Session(dial=lambda _: atoll.api)
    said = CliRunner().invoke(cli, ["plan", str(tmp_path)], obj=session, env=atoll.environment)
    for each in words:
        assert each in said.stdout + said.stderr
