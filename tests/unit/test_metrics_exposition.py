"""GET /metrics: what is in it, for whom, that it is in the format whatever people call their things, and its bound."""

from __future__ import annotations

import random
import re
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from atoll.api.http.app import create_app
from atoll.api.service import KINDS, SYSTEM, Caller, Service
from atoll.api.service.exposition import FAMILIES, FRESH_S
from atoll.model import codec, keys
from atoll.model.devices import GpuDevice, GpuGrant, GpuHealth, GpuSample
from atoll.model.records import (
    App,
    AppPhase,
    AppStatus,
    Capacity,
    Heartbeat,
    Ingress,
    Instance,
    Node,
    NodeHealth,
    NodeLiveness,
    OwnerKind,
    Role,
    Status,
    Usage,
)
from atoll.model.rollouts import RolloutStatus
from atoll.model.spec import AppSpec, Metrics, Port, Scale
from atoll.model.states import Phase
from atoll.model.traffic import BOUNDS_MS, AppLoad, Counts, DemandReport, ReleaseTraffic, TrafficReport
from atoll.model.views import TokenRequest
from atoll.store.cache import State
from atoll.store.memory import MemoryStore

SPEC = AppSpec(name="llm", image="x", ports=(Port(port=80),), metrics=Metrics(), scale=Scale(max=4, metric="queue_depth", target=8))
_LABEL = r'[a-zA-Z_][a-zA-Z0-9_]*="(?:[^"\\\n]|\\["\\n])*"'
SAMPLE = re.compile(rf"([a-z_]+)(?:\{{({_LABEL}(?:,{_LABEL})*)\}})? (-?[0-9.]+(?:e[-+][0-9]+)?)")


class StillClock:
    def __init__(self) -> None:
        self.at = 1_000.0

    def now(self) -> float:
        return self.at

    def monotonic(self) -> float:
        return self.at


class Cell:
    def __init__(self, service: Service, clock: StillClock) -> None:
        self.service = service
        self.clock = clock

    async def put(self, key: str, record: object) -> None:
        context = self.service.context
        await context.state.reach(await context.store.put(key, codec.encode(record)))

    async def instance(self, id: str, project: str = "default", **more: Any) -> None:
        facts = {"owner_kind": OwnerKind.APP, "owner": "llm", "node": "n1", "created_at": 1.0} | more
        await self.put(keys.instance(project, id), Instance(id=id, project=project, **facts))
        status = Status(instance=id, project=project, node="n1", phase=Phase.RUNNING, ready=True, restarts=2)
        await self.put(keys.status(project, id), status)

    async def text(self, caller: Caller = SYSTEM, project: str | None = None) -> str:
        return (await self.service.exposition.text(caller, project)).decode()

    async def lines(self, caller: Caller = SYSTEM, project: str | None = None) -> list[str]:
        return (await self.text(caller, project)).splitlines()


@pytest.fixture
async def cell() -> AsyncIterator[Cell]:
    clock = StillClock()
    store = MemoryStore(clock)
    async with State(store, KINDS) as state, Service(store, state, clock, random.Random(1), bytes(32)) as service:
        made = Cell(service, clock)
        gpu = GpuDevice(id="GPU-1", model="NVIDIA H200", memory_bytes=150 << 30, health=GpuHealth.DEGRADED)
        capacity = Capacity(cpu_milli=8_000, memory_bytes=64 << 30, disk_bytes=1, gpus=(gpu,))
        await made.put(keys.node("n1"), Node(name="n1", capacity=capacity))
        app = App(project="default", name="llm", spec=SPEC, release=1, replicas=1, created_at=1.0, updated_at=1.0)
        await made.put(keys.app("default", "llm"), app)
        canary = RolloutStatus(release=2, stable=1, weight=5)
        status = AppStatus(
            project="default", name="llm", phase=AppPhase.RUNNING, release=1, ready=2, scaled=3, parked=1, rollout=canary
        )
        await made.put(keys.app_status("default", "llm"), status)
        await made.instance("llm-1", gpus=(GpuGrant(device="GPU-1", memory_bytes=150 << 30),))
        await made.instance("llm-2", project="shop", owner_kind=OwnerKind.JOB, owner="train")
        usage = Usage(
            instance="llm-1",
            cpu_milli=250,
            memory_bytes=64,
            gpu_milli=500,
            gpu_memory_bytes=1 << 30,
            metrics={"queue_depth": 2.5},
        )
        sample = GpuSample(device="GPU-1", busy_milli=730, memory_bytes=1 << 31, power_milliwatts=350_500, temperature_c=61)
        beat = Heartbeat(node="n1", at=1.0, cpu_milli=1_500, memory_bytes=1 << 30, usage=(usage,), gpus=(sample,))
        service.heartbeats.note(beat)
        classes = tuple(100 if bound == 10 else 0 for bound in BOUNDS_MS)
        counted = ReleaseTraffic(project="default", app="llm", release=1, counts=Counts(100, 3, classes))
        await made.put(keys.ingress("g"), Ingress(name="g", site="ams", http_port=80))
        service.traffic.note(TrafficReport(ingress="g", started=1.0, releases=(counted,)))
        load = AppLoad("default/llm", 100, 12.5)
        await service.control_plane.demand(DemandReport(ingress="g", started=1.0, uptime_s=2.0, loads=(load,)))
        yield made
    await store.close()


async def test_nodes_devices_apps_and_instances_are_told(cell: Cell) -> None:
    lines = await cell.lines()
    for expected in (
        'atoll_node_health{node="n1",site="local",region="local",health="ready"} 1',
        'atoll_node_health{node="n1",site="local",region="local",health="lost"} 0',
        'atoll_node_cpu_cores{node="n1",site="local",region="local"} 1.5',
        'atoll_node_cpu_capacity_cores{node="n1",site="local",region="local"} 8.0',
        'atoll_gpu_health{node="n1",device="GPU-1",model="NVIDIA H200",health="degraded"} 1',
        'atoll_gpu_health{node="n1",device="GPU-1",model="NVIDIA H200",health="ok"} 0',
        'atoll_gpu_busy_ratio{node="n1",device="GPU-1",model="NVIDIA H200"} 0.73',
        'atoll_gpu_memory_bytes{node="n1",device="GPU-1",model="NVIDIA H200"} 2147483648',
        'atoll_gpu_power_watts{node="n1",device="GPU-1",model="NVIDIA H200"} 350.5',
        'atoll_gpu_temperature_celsius{node="n1",device="GPU-1",model="NVIDIA H200"} 61',
        'atoll_app_replicas_wanted{project="default",app="llm"} 3',
        'atoll_app_replicas_ready{project="default",app="llm"} 2',
        'atoll_app_replicas_most{project="default",app="llm"} 4',
        'atoll_app_parked{project="default",app="llm"} 1',
        'atoll_app_requests_total{project="default",app="llm",release="1"} 100',
        'atoll_app_errors_total{project="default",app="llm",release="1"} 3',
        'atoll_ingress_requests_total{project="default",app="llm",release="1",ingress="g",site="ams"} 100',
        'atoll_ingress_request_seconds_total{project="default",app="llm",ingress="g",site="ams"} 12.5',
        'atoll_ingress_errors_total{project="default",app="llm",release="1",ingress="g",site="ams"} 3',
        'atoll_app_latency_seconds{project="default",app="llm",release="1",quantile="0.5"} 0.0085',
        'atoll_app_weight_ratio{project="default",app="llm",release="2"} 0.05',
        'atoll_instance_ready{project="default",app="llm",instance="llm-1",node="n1"} 1',
        'atoll_instance_restarts_total{project="default",app="llm",instance="llm-1",node="n1"} 2',
        'atoll_instance_cpu_cores{project="default",app="llm",instance="llm-1",node="n1"} 0.25',
        'atoll_instance_gpu_busy_devices{project="default",app="llm",instance="llm-1",node="n1"} 0.5',
        'atoll_instance_gpu_memory_bytes{project="default",app="llm",instance="llm-1",node="n1"} 1073741824',
        'atoll_app_metric{project="default",app="llm",instance="llm-1",node="n1",name="queue_depth"} 2.5',
        'atoll_instance_ready{project="shop",job="train",instance="llm-2",node="n1"} 1',
        "atoll_instances_left_out 0",
    ):
        assert expected in lines
    told = {line.split()[2] for line in lines if line.startswith("# TYPE ")}
    assert told == set(FAMILIES), "every family is in this cell's answer"


async def test_each_family_stands_together_under_its_type(cell: Cell) -> None:
    order = []
    for line in await cell.lines():
        if line.startswith("# TYPE "):
            order.append(line.split()[2])
        elif not line.startswith("#"):
            match = SAMPLE.fullmatch(line)
            assert match is not None, line
            assert match[1] == order[-1]
    assert len(order) == len(set(order))


async def test_a_project_s_token_sees_the_nodes_and_its_own(cell: Cell) -> None:
    shop = await cell.text(Caller(id="t", role=Role.READ, project="shop"))
    assert 'instance="llm-2"' in shop
    assert 'node="n1"' in shop
    assert "default" not in shop
    assert "queue_depth" not in shop
    one = await cell.text(SYSTEM, "shop")
    assert "llm-1" not in one


async def test_a_node_s_heartbeat_tells_a_project_s_token_of_its_own_instances_only(cell: Cell) -> None:
    stranger = Caller(id="t", role=Role.READ, project="shop")
    for view in (cell.service.nodes.get("n1", stranger), cell.service.nodes.all(limit=9, caller=stranger).items[0]):
        assert view.heartbeat is not None
        assert view.heartbeat.usage == ()
    own = cell.service.nodes.get("n1", Caller(id="t", role=Role.READ, project="default")).heartbeat
    assert own is not None
    assert [usage.instance for usage in own.usage] == ["llm-1"]
    assert cell.service.nodes.get("n1").heartbeat == cell.service.heartbeats.latest("n1")


async def test_any_name_is_escaped(cell: Cell) -> None:
    evil = 'a"} 1\nb\\'
    device = GpuDevice(id="GPU-2", model=evil, memory_bytes=1)
    node = Node(name="n2", capacity=Capacity(cpu_milli=1, memory_bytes=1, disk_bytes=1, gpus=(device,)), site=evil)
    await cell.put(keys.node("n2"), node)
    usage = Usage(instance="llm-1", metrics={evil: 1e300})
    cell.service.heartbeats.note(Heartbeat(node="n1", at=2.0, usage=(usage,)))
    lines = await cell.lines()
    assert all(line.startswith("#") or SAMPLE.fullmatch(line) for line in lines)
    assert r'name="a\"} 1\nb\\"} 1e+300' in next(line for line in lines if line.startswith("atoll_app_metric"))


async def test_what_a_node_said_long_ago_is_left_out(cell: Cell) -> None:
    cell.clock.at += FRESH_S + 1
    await cell.put(keys.node_liveness("n1"), NodeLiveness(name="n1", health=NodeHealth.LOST, since=1.0))
    text = await cell.text()
    assert 'region="local",health="lost"} 1' in text
    assert "atoll_node_cpu_cores{" not in text
    assert "atoll_instance_cpu_cores{" not in text
    assert "atoll_app_metric{" not in text
    assert "atoll_app_replicas_wanted{" in text


async def test_a_node_speaks_only_of_its_own_instances(cell: Cell) -> None:
    cell.service.heartbeats.note(Heartbeat(node="n2", at=2.0, usage=(Usage(instance="llm-1", cpu_milli=9_000_000),)))
    assert 'instance="llm-1",node="n1"} 0.25' in await cell.text()


async def test_beyond_its_bound_it_says_how_many_are_left_out(cell: Cell) -> None:
    extra = [Instance(id=f"z-{n:05d}", project="z", owner_kind=OwnerKind.APP, owner="z", created_at=1.0) for n in range(100)]
    store, state = cell.service.context.store, cell.service.context.state
    revision = 0
    for instance in extra:
        revision = await store.put(keys.instance("z", instance.id), codec.encode(instance))
    await state.reach(revision)
    cell.service.exposition.instances_max = 50
    text = await cell.text(SYSTEM, "z")
    assert "atoll_instances_left_out 50\n" in text
    assert text.count("atoll_instance_ready{") == 50


async def test_it_is_served_as_prometheus_wants_it(cell: Cell) -> None:
    made = await cell.service.tokens.create(SYSTEM, TokenRequest(name="prometheus", role=Role.READ, project="shop"))
    transport = httpx.ASGITransport(create_app(cell.service))  # type: ignore[arg-type]
    async with httpx.AsyncClient(transport=transport, base_url="http://api") as client:
        assert (await client.get("/metrics")).status_code == 401
        headers = {"authorization": f"Bearer {made.token}"}
        answer = await client.get("/metrics", headers=headers)
        assert answer.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
        assert answer.text.endswith("\n")
        assert "llm-2" in answer.text
        assert (await client.get("/metrics?project=default", headers=headers)).status_code == 403


async def test_of_a_silent_driver_there_is_no_line_instead_of_nought(cell: Cell) -> None:
    cell.service.heartbeats.note(Heartbeat(node="n1", at=2.0, usage=(Usage(instance="llm-1", gpu_silent=True),)))
    lines = await cell.lines()
    assert any(line.startswith("atoll_instance_cpu_cores{") for line in lines)
    assert not any(line.startswith(("atoll_instance_gpu_", "atoll_gpu_busy_ratio{")) for line in lines)
