"""`atoll top`, `atoll apps` and `atoll status` with GPUs and with apps that scale by a metric, on wide and narrow terminals."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from msgspec.structs import replace
from rich.console import Console

from atoll.cli.main import cli
from atoll.cli.progress import Progress
from atoll.cli.session import Session
from atoll.cli.top import METRICS_SHOWN, figure, tables
from atoll.model import codec
from atoll.model.devices import GpuDevice, GpuGrant, GpuSample, GpuSharing
from atoll.model.records import (
    App,
    AppPhase,
    AppStatus,
    Capacity,
    Heartbeat,
    Instance,
    Node,
    OwnerKind,
    Status,
    Usage,
)
from atoll.model.spec import AppSpec, Metrics, Port, Resources, Scale
from atoll.model.states import Phase
from atoll.model.units import Bytes, Cores
from atoll.model.views import AppView, InstanceView, NodeView, WatchLine
from atoll.sdk.fake import FakeApi

GIB = 1 << 30
SPEC = AppSpec(
    name="llm",
    image="registry.example/llm:1",
    ports=(Port(port=80),),
    metrics=Metrics(),
    scale=Scale(replicas=1, max=4, metric="queue_depth", target=8),
)
LIMITS = {"app/llm": Resources(cpu=Cores(8), memory=Bytes(64 * GIB))}


def node(name: str = "n1", gpus: int = 2) -> NodeView:
    devices = tuple(GpuDevice(id=f"GPU-{n}", model="H200", memory_bytes=100 * GIB) for n in range(gpus))
    samples = tuple(GpuSample(device=f"GPU-{n}", busy_milli=700, memory_bytes=30 * GIB) for n in range(gpus))
    capacity = Capacity(cpu_milli=8_000, memory_bytes=64 * GIB, disk_bytes=1, gpus=devices)
    beat = Heartbeat(node=name, at=1.0, cpu_milli=500, memory_bytes=GIB, gpus=samples)
    return NodeView(node=Node(name=name, capacity=capacity), heartbeat=beat, instances=2, revision=1)


def instance(id: str, *grants: GpuGrant) -> InstanceView:
    made = Instance(id=id, project="p", owner_kind=OwnerKind.APP, owner="llm", release=1, node="n1", gpus=grants, created_at=1.0)
    return InstanceView(
        instance=made, status=Status(instance=id, project="p", node="n1", phase=Phase.RUNNING, ready=True), revision=1
    )


WHOLE = instance("llm-1", GpuGrant(device="GPU-0", memory_bytes=100 * GIB))
HALF = instance("llm-2", GpuGrant(device="GPU-1", sharing=GpuSharing.TIME_SLICE, milli=500, memory_bytes=50 * GIB))
USAGE = {
    "llm-1": Usage(
        instance="llm-1",
        cpu_milli=100,
        gpu_milli=730,
        gpu_memory_bytes=40 * GIB,
        metrics={"queue_depth": 2.5, "tokens_per_second": 2345.6},
    ),
    "llm-2": Usage(instance="llm-2", cpu_milli=900, gpu_memory_bytes=10 * GIB, metrics={"queue_depth": 11.0}),
}


def shown(width: int | None, *instances: InstanceView, nodes: tuple[NodeView, ...] | None = None, **usage: Usage) -> list[str]:
    console = Console(file=io.StringIO(), width=width or 400, force_terminal=False, color_system=None)
    parts = tables(list(nodes or (node(),)), list(instances), usage or USAGE, LIMITS, width=width)
    for part in parts:
        console.print(part)
    return [line.rstrip() for line in console.file.getvalue().splitlines()]  # type: ignore[attr-defined]


def test_gpus_and_metrics_have_columns_of_their_own() -> None:
    lines = shown(None, WHOLE, HALF)
    assert lines[0].split() == ["NODE", "STATE", "CPU", "MEMORY", "GPU", "GPU", "MEMORY", "INSTANCES"]
    assert "1.40/2" in lines[1]
    assert "60.0GiB/200.0GiB" in lines[1]
    assert lines[3].split()[4:] == ["GPU", "GPU", "MEMORY", "QUEUE_DEPTH", "TOKENS/S", "PROCESSES", "DISK", "NODE"]
    assert lines[4].startswith("llm-1"), "who keeps a GPU busy comes first, whatever its cores do"
    for words in ("━━━━━━━━ 0.73/1 ", "40.0GiB/100.0GiB", " 2.5 ", " 2.35k "):
        assert words in lines[4]
    assert "–/0.5" in lines[5], "how busy a shared device is, nobody tells apart"
    assert "10.0GiB/50.0GiB" in lines[5]


def test_a_narrow_terminal_keeps_what_the_app_says_before_bars_places_and_disks() -> None:
    lines = shown(80, WHOLE, HALF)
    assert lines[3].split()[4:] == ["GPU", "QUEUE_DEPTH", "TOKENS/S"]
    assert "━" not in "".join(lines)
    assert all(len(line) <= 80 for line in lines)
    assert shown(50, WHOLE)[3].split() == ["INSTANCE", "STATE", "CPU", "MEMORY", "GPU"]


def test_without_gpus_and_metrics_there_is_nothing_of_them() -> None:
    usage = Usage(instance="llm-1", cpu_milli=100)
    lines = shown(100, instance("llm-1"), nodes=(node(gpus=0),), **{"llm-1": usage})
    assert lines[0].split() == ["NODE", "STATE", "CPU", "MEMORY", "INSTANCES"]
    assert lines[3].split() == ["INSTANCE", "STATE", "CPU", "MEMORY", "PROCESSES", "DISK", "NODE"]
    assert "━" in lines[4]


def test_what_is_not_known_yet_is_a_dash() -> None:
    silent = replace(node(), heartbeat=None)
    lines = shown(None, WHOLE, nodes=(silent,), other=Usage(instance="other"))
    assert lines[1].split() == ["n1", "●", "ready", "–", "–", "–", "–", "2"]
    assert lines[4].split() == ["llm-1", "●", "ready", "–", "–", "–/1", "–", "n1"]


def test_what_a_silent_driver_does_not_say_is_a_dash_and_not_nought() -> None:
    lines = shown(None, WHOLE, **{"llm-1": Usage(instance="llm-1", cpu_milli=100, memory_bytes=GIB, gpu_silent=True)})
    assert "–/1" in lines[4]
    assert "0.00/1" not in lines[4]


def test_only_so_many_metrics_have_columns_and_none_with_a_strange_name() -> None:
    metrics = {f"metric_{n}": float(n) for n in range(METRICS_SHOWN + 2)} | {"[red]": 1.0, "a_very_long_name_of_a_metric": 5.0}
    lines = shown(None, instance("llm-1"), nodes=(node(gpus=0),), **{"llm-1": Usage(instance="llm-1", metrics=metrics)})
    headings = lines[3].split()[4:-3]
    assert headings == ["…_NAME_OF_A_METRIC", *(f"METRIC_{n}" for n in range(METRICS_SHOWN - 1))]


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (0.0, "0"),
        (0.00012, "0.00012"),
        (0.125, "0.125"),
        (12.0, "12"),
        (999.4, "999"),
        (999.6, "1k"),
        (12_345.0, "12.3k"),
        (-2e6, "-2M"),
        (1e15, "1P"),
        (None, ""),
    ],
)
def test_figures_have_three_digits(value: float | None, words: str) -> None:
    assert figure(value) == words


class Atoll:
    """`atoll` over an API in memory with one app that scales between 1 and 4, of which 3 are wanted."""

    def __init__(self, directory: Path) -> None:
        self.api = FakeApi()
        self.environment = {"ATOLL_API": "http://fake", "ATOLL_TOKEN": "t", "XDG_CONFIG_HOME": str(directory), "NO_COLOR": "1"}
        app = App(project="default", name="llm", spec=SPEC, release=1, replicas=1, created_at=1.0, updated_at=1.0)
        self.api.put("apps", "default/llm", app)
        status = AppStatus(project="default", name="llm", phase=AppPhase.RUNNING, release=1, ready=2, scaled=3)
        self.api.put("app-statuses", "default/llm", status)

    def run(self, *arguments: str) -> str:
        session = Session(dial=lambda _: self.api)
        result = CliRunner().invoke(cli, list(arguments), obj=session, env=self.environment, catch_exceptions=False)
        assert result.exit_code == 0, result.stderr
        return result.stdout


@pytest.fixture
def atoll(tmp_path: Path) -> Atoll:
    return Atoll(tmp_path)


def test_an_app_that_scales_shows_between_what(atoll: Atoll) -> None:
    assert " 2/3 of 1–4 " in atoll.run("apps")
    assert "2/3 of 1–4, by queue_depth ≤ 8 each" in atoll.run("status", "llm")


def test_json_carries_grants_samples_and_metrics(atoll: Atoll) -> None:
    atoll.api.put("nodes", "n1", node().node)
    atoll.api.put("instances", "default/llm-1", replace(WHOLE.instance, project="default"))
    atoll.api.usage = [USAGE["llm-1"]]
    atoll.api.gpu_samples["n1"] = (GpuSample(device="GPU-0", busy_milli=5),)
    told: Any = json.loads(atoll.run("top", "--json"))
    assert told["nodes"][0]["heartbeat"]["gpus"] == [{"device": "GPU-0", "busy_milli": 5}]
    (one,) = told["instances"]
    assert one["gpus"] == [{"device": "GPU-0", "memory_bytes": 100 * GIB}]
    assert one["usage"]["metrics"] == {"queue_depth": 2.5, "tokens_per_second": 2345.6}
    assert one["usage"]["gpu_milli"] == 730


def test_a_rollout_is_done_when_as_many_are_ready_as_the_metric_asks_for() -> None:
    app = App(project="p", name="llm", spec=SPEC, release=1, replicas=1, created_at=1.0, updated_at=1.0)
    view = AppView(app=app, revision=1)
    progress = Progress(view)

    def tell(revision: int, kind: str, key: str, record: Any) -> None:
        progress.apply(WatchLine(revision=revision, kind=kind, key=f"p/{key}", record=codec.to_plain(record)), 0.0)

    tell(2, "app-statuses", "llm", AppStatus(project="p", name="llm", phase=AppPhase.RUNNING, release=1, scaled=2))
    for number in (1, 2):
        assert progress.verdict(view, 0.0) is None
        one = instance(f"llm-{number}")
        tell(3, "instances", f"llm-{number}", replace(one.instance, generation=1))
        tell(4, "statuses", f"llm-{number}", one.status)
    verdict = progress.verdict(view, 0.0)
    assert verdict is not None
    assert verdict.error is None


def test_what_stands_by_is_shown_beside_what_serves(atoll: Atoll) -> None:
    scale = Scale(max=4, metric="queue_depth", target=8, standby=2)
    spec = replace(SPEC, scale=scale)
    atoll.api.put(
        "apps", "default/llm", App(project="default", name="llm", spec=spec, release=1, replicas=1, created_at=1.0, updated_at=1.0)
    )
    assert "2/3 of 1–4, by queue_depth ≤ 8 each, 0 of 2 parked" in atoll.run("status", "llm")
    for id, standby, parked in (("llm-1", True, True), ("llm-2", True, False), ("llm-3", False, True)):
        facts = {"owner_kind": OwnerKind.APP, "owner": "llm", "release": 1, "generation": 1, "node": "n1", "created_at": 1.0}
        atoll.api.put("instances", f"default/{id}", Instance(id=id, project="default", standby=standby, **facts))
        status = Status(instance=id, project="default", node="n1", phase=Phase.RUNNING, ready=not parked, parked=parked)
        atoll.api.put("statuses", f"default/{id}", status)
    words = {line.split()[0]: line.split()[4] for line in atoll.run("ps", "llm").splitlines()[1:]}
    assert words == {"llm-1": "parked", "llm-2": "standby", "llm-3": "waking"}
    status = AppStatus(project="default", name="llm", phase=AppPhase.RUNNING, release=1, ready=2, scaled=3, parked=2)
    atoll.api.put("app-statuses", "default/llm", status)
    assert " 2/3 of 1–4, 2 parked " in atoll.run("apps")
