"""A GPU that was taken out for an error comes back on an operator's word: over the API, the tunnel, the agent and the driver."""

from __future__ import annotations

import asyncio
import functools
import json
import random
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, ParamSpec

import httpx
import pytest
from click.testing import CliRunner
from control_cell import LoopClock, run_virtual

from atoll.api.http.app import create_app
from atoll.api.service import KINDS, SYSTEM, Service
from atoll.cli.main import cli
from atoll.cli.session import Session
from atoll.devices.fake import FakeHardware
from atoll.devices.node import NodeDevices
from atoll.devices.sysfs import AmdHardware
from atoll.images.fake import FakeImages
from atoll.model import codec
from atoll.model.devices import GpuDevice, GpuGrant, GpuHealth
from atoll.model.errors import AtollError, Conflict, Invalid, NotFound, OutcomeUnknown, Unavailable, Unsupported
from atoll.model.records import Capacity, Event, Node, Role
from atoll.model.spec import Gpu, RuntimeName
from atoll.model.streams import ErrorBody, Kind, pack
from atoll.model.views import TokenRequest
from atoll.network.fake import FakeNetwork
from atoll.node.agent import Agent
from atoll.node.fake import FakeMachine, FakeProber, MemoryLogs
from atoll.node.record import MemoryRecord
from atoll.runtimes.fake import FakeRuntime
from atoll.sdk.fake import FakeApi
from atoll.store.cache import State
from atoll.store.memory import MemoryStore

CLOCK = LoopClock()
DRAM = 119
"""An XID that no counter goes down after."""
P = ParamSpec("P")


def virtual(test: Callable[P, Coroutine[Any, Any, None]]) -> Callable[P, None]:
    """Let a test run on time that passes by itself."""

    @functools.wraps(test)
    def run(*arguments: P.args, **named: P.kwargs) -> None:
        run_virtual(test(*arguments, **named))

    return run


class Cell:
    """A server and one agent with two GPUs, joined without a network."""

    def __init__(self, service: Service, devices: NodeDevices, hardware: FakeHardware, client: httpx.AsyncClient) -> None:
        self.service, self.devices, self.hardware, self.client = service, devices, hardware, client
        self.tokens: dict[Role, str] = {}

    async def ask(self, gpu: str, *, reset: bool = False, node: str = "n1", role: Role = Role.ADMIN) -> httpx.Response:
        headers = {"authorization": f"Bearer {self.tokens[role]}"}
        return await self.client.post(f"/v1/nodes/{node}/gpus/{gpu}/reinstate", json={"reset": reset}, headers=headers)

    async def broken(self) -> str:
        """Return a device that was taken out for an error."""
        device = self.hardware.ids[0]
        self.hardware.xid(device, DRAM)
        await self.until(lambda: self.listed(device).health is GpuHealth.QUARANTINED)
        return device

    def listed(self, device: str) -> GpuDevice:
        """Return the device as the control plane knows it."""
        node = self.service.context.state.records(Node)["n1"].record
        return next(one for one in node.capacity.gpus if one.id == device)

    def events(self, code: str) -> list[Event]:
        return [held.record for held in self.service.context.state.records(Event).values() if held.record.code == code]

    async def until(self, holds: Callable[[], object]) -> None:
        async with asyncio.timeout(100):
            while not holds():  # noqa: ASYNC110 - what is waited for has no event
                await asyncio.sleep(0.1)


@asynccontextmanager
async def cell(directory: Path) -> AsyncIterator[Cell]:
    store = MemoryStore(CLOCK)
    hardware = FakeHardware(count=2, clock=CLOCK)
    devices = NodeDevices([hardware], directory=directory, clock=CLOCK, boot="1")
    async with State(store, KINDS) as state, Service(store, state, CLOCK, random.Random(1), bytes(32)) as service:
        agent = Agent(
            node="n1",
            control=service.control_plane,
            runtimes=[FakeRuntime()],
            images=FakeImages(),
            network=FakeNetwork(),
            clock=CLOCK,
            random=random.Random(1),
            data=directory,
            record=MemoryRecord(),
            logs=MemoryLogs(),
            prober=FakeProber(),
            machine=FakeMachine(),
            devices=devices,
        )
        running = asyncio.create_task(agent.run())
        transport = httpx.ASGITransport(create_app(service))  # type: ignore[arg-type]
        async with httpx.AsyncClient(transport=transport, base_url="http://api") as client:
            made = Cell(service, devices, hardware, client)
            for role in (Role.ADMIN, Role.DEPLOY):
                view = await service.tokens.create(SYSTEM, TokenRequest(name=f"ann-{role}", role=role, project="*"))
                made.tokens[role] = view.token or ""
            await made.until(lambda: "n1" in state.records(Node) and service.tunnels.connected("n1"))
            yield made
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
    await store.close()


@virtual
async def test_an_operators_word_brings_a_device_back_and_is_told_with_the_name(tmp_path: Path) -> None:
    async with cell(tmp_path) as c:
        device = await c.broken()
        answer = await c.ask(device[:12])
        assert (answer.status_code, answer.json().get("health", "ok"), answer.json()["id"]) == (200, "ok", device)
        await c.until(lambda: c.listed(device).health is GpuHealth.OK and c.events("gpu-reinstated"))
        (event,) = c.events("gpu-reinstated")
        assert (event.subject, event.message) == ("node/n1", f"GPU {device} was reinstated by ann-admin")
        assert c.hardware.resets == []
        assert (await c.ask(device)).status_code == 200, "to say it twice is no error"


@virtual
async def test_a_reset_comes_before_the_device_is_offered_again(tmp_path: Path) -> None:
    async with cell(tmp_path) as c:
        device = await c.broken()
        assert (await c.ask(device, reset=True)).status_code == 200
        assert c.hardware.resets == [device]
        await c.until(lambda: c.events("gpu-reinstated"))
        assert "reset and reinstated" in c.events("gpu-reinstated")[0].message
        assert c.events("gpu-silent") == [], "a driver that is set aside is not silent"


@virtual
async def test_what_the_driver_still_says_against_a_device_stands(tmp_path: Path) -> None:
    async with cell(tmp_path) as c:
        device = await c.broken()
        c.hardware.change(device, remap_failed=True)
        answer = (await c.ask(device)).json()
        assert (answer["health"], "replaced" in answer["reason"]) == ("quarantined", True)


@virtual
async def test_a_device_that_something_holds_or_uses_is_not_reset(tmp_path: Path) -> None:
    async with cell(tmp_path) as c:
        first, second = c.hardware.ids
        await c.devices.claim("web-1", [GpuGrant(device=first)], Gpu(), RuntimeName.RUNC)
        c.hardware.use(second, 4321, 1 << 30)
        for device, name in ((first, "web-1"), (second, "process 4321")):
            answer = await c.ask(device, reset=True)
            assert (answer.status_code, name in answer.json()["error"]["message"]) == (409, True)
        assert c.hardware.resets == []
        await c.devices.release("web-1")
        assert (await c.ask(first, reset=True)).status_code == 200


@virtual
async def test_a_drivers_refusal_is_told_in_its_words_and_leaves_the_device_out(tmp_path: Path) -> None:
    async with cell(tmp_path) as c:
        device = await c.broken()
        c.hardware.refuses_reset = "the secondary bus reset failed"
        answer = await c.ask(device, reset=True)
        assert (answer.status_code, answer.json()["error"]["message"]) == (503, "the secondary bus reset failed")
        assert (await c.devices.inventory())[0].health is GpuHealth.QUARANTINED
        assert c.events("gpu-reinstated") == []


@virtual
async def test_who_may_not_or_names_nothing_that_is_there_is_refused(tmp_path: Path) -> None:
    async with cell(tmp_path) as c:
        device = c.hardware.ids[0]
        assert (await c.ask(device, role=Role.DEPLOY)).status_code == 403
        assert (await c.ask(device, node="n2")).json()["error"]["code"] == "not-found"
        error = (await c.ask("GPU-nothing")).json()["error"]
        assert (error["code"], error["field"], device in error["mend"]) == ("not-found", "gpu", True)
        with pytest.raises(Invalid, match="several"):
            await c.service.nodes.reinstate("n1", device[:3])
        assert (await c.ask("a b")).status_code == 400


@virtual
async def test_a_node_that_says_nothing_or_is_too_old_or_not_there_is_told_apart(tmp_path: Path) -> None:
    store = MemoryStore(CLOCK)
    async with State(store, KINDS) as state, Service(store, state, CLOCK, random.Random(1), bytes(32)) as service:
        gpu = GpuDevice(id="GPU-1", model="H100", memory_bytes=1)
        await service.nodes.register(Node(name="n1", capacity=Capacity(cpu_milli=1, memory_bytes=1, disk_bytes=1, gpus=(gpu,))))
        with pytest.raises(Unavailable, match="no connection"):
            await service.nodes.reinstate("n1", "GPU-1")
        requests = service.tunnels.requests("n1")

        async def answer(*messages: bytes) -> None:
            channel = service.tunnels.accept("n1", (await anext(requests)).id)
            for message in messages:
                await channel.send(message)
            await channel.close()

        old = ErrorBody(code="not-found", message="instance  is not on this node")
        expected: list[tuple[type[AtollError], tuple[bytes, ...]]] = [
            (OutcomeUnknown, ()),
            (Unsupported, (pack(Kind.ERROR, codec.encode(old)),)),
        ]
        for kind, messages in expected:
            agent = asyncio.create_task(answer(*messages))
            with pytest.raises(kind):
                await service.nodes.reinstate("n1", "GPU-1")
            await agent
        await requests.aclose()  # type: ignore[attr-defined]
    await store.close()


@virtual
async def test_a_device_that_is_not_known_is_not_found(tmp_path: Path) -> None:
    devices = NodeDevices([FakeHardware(clock=CLOCK)], directory=tmp_path, clock=CLOCK, boot="1")
    await devices.inventory()
    with pytest.raises(NotFound, match="no GPU"):
        await devices.reinstate("GPU-none")
    await devices.close()


async def test_only_nvidias_devices_are_reset(tmp_path: Path) -> None:
    with pytest.raises(Unsupported, match="only NVIDIA"):
        await AmdHardware(root=tmp_path).reset("GPU-1")


async def test_a_fake_that_is_in_use_is_not_reset() -> None:
    hardware = FakeHardware()
    hardware.use(hardware.ids[0], 7, 1)
    with pytest.raises(Conflict, match="process 7"):
        await hardware.reset(hardware.ids[0])


def test_the_command_says_how_the_device_stands_afterwards(tmp_path: Path) -> None:
    api = FakeApi()
    sick = GpuDevice(id="GPU-0123456789ab", model="H100", memory_bytes=1, health=GpuHealth.QUARANTINED, reason="XID 74")
    worse = GpuDevice(
        id="GPU-ffff", model="H100", memory_bytes=1, health=GpuHealth.QUARANTINED, remap_failed=True, reason="have it replaced"
    )
    capacity = Capacity(cpu_milli=2000, memory_bytes=4 << 30, disk_bytes=50 << 30, gpus=(sick, worse))
    api.put("nodes", "n1", Node(name="n1", capacity=capacity))

    def run(*arguments: str) -> Any:
        environment = {"ATOLL_API": "http://fake", "ATOLL_TOKEN": "t", "XDG_CONFIG_HOME": str(tmp_path), "NO_COLOR": "1"}
        return CliRunner().invoke(cli, ["nodes", "reinstate", "n1", *arguments], obj=Session(dial=lambda _: api), env=environment)

    assert "GPU-01234567 of n1 was reset and is offered again" in run("GPU-01234567", "--reset").stderr
    assert "GPU-ffff of n1 is still quarantined: have it replaced" in run("GPU-ffff").stderr
    assert run("GPU-nothing").exit_code != 0
    result = run("GPU-01234567", "--json")
    assert json.loads(result.stdout)["id"] == sick.id
