"""Beats over real sockets: agents that get their keys over HTTP, a server that leads, and one agent that dies."""

from __future__ import annotations

import asyncio
import random
import socket
import time
from pathlib import Path

from atoll.api.http.app import create_app
from atoll.api.http.serve import listen, serving
from atoll.api.service import SYSTEM, Service
from atoll.api.service.context import KINDS
from atoll.control.controllers import run_control
from atoll.control.detection.decide import Standing
from atoll.control.detection.listening import listen_for_beats
from atoll.control.world import KINDS as CONTROL_KINDS
from atoll.entry.exchange import exchange_of
from atoll.model.ports.clock import SystemClock
from atoll.model.ports.datagrams import Udp
from atoll.model.records import Capacity, Instance, Node, NodeHealth, NodeLiveness, Role
from atoll.model.spec import AppSpec, RuntimeName, Scale
from atoll.model.views import TokenRequest
from atoll.node.beating import Beating
from atoll.node.contact import Contact
from atoll.sdk.control_plane import HttpControlPlane
from atoll.store.cache import State
from atoll.store.memory import MemoryStore

CAPACITY = Capacity(cpu_milli=4_000, memory_bytes=8 << 30, disk_bytes=1 << 40)


def _listener() -> socket.socket:
    """Return a listening socket at whose port nobody takes datagrams either."""
    for _ in range(50):
        listener = listen("127.0.0.1", 0)
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            try:
                probe.bind(listener.getsockname())
            except OSError:
                listener.close()
            else:
                return listener
    raise RuntimeError("no port is free for both")


async def test_an_agent_that_dies_is_found_by_its_silence_and_its_work_has_another_place_in_five_seconds(tmp_path: Path) -> None:
    clock = SystemClock()
    store = MemoryStore(clock)
    listener = _listener()
    host, port = listener.getsockname()[:2]
    tasks: list[asyncio.Task[None]] = []
    agents: dict[str, Beating] = {}
    async with State(store, {**KINDS, **CONTROL_KINDS}) as state:
        service = Service(store, state, clock, random.Random(), bytes(range(32)))
        await service.start()
        detection = exchange_of(service, state, clock)
        async with serving(create_app(service), service, listener):
            control = run_control(store, state, clock, random.Random(), service.heartbeats.last_seen(), detection=detection)
            tasks += [asyncio.create_task(control), asyncio.create_task(listen_for_beats(detection, Udp(), (host, port)))]
            try:
                for name in ("n1", "n2", "n3"):
                    made = await service.tokens.create(SYSTEM, TokenRequest(name=name, role=Role.AGENT, subject=name))
                    plane = HttpControlPlane(f"http://{host}:{port}", made.token, node=name)
                    await plane.register_node(Node(name=name, capacity=CAPACITY, runtimes=(RuntimeName.RUNC,)))
                    contact = Contact(tmp_path / name)
                    agents[name] = Beating(
                        name, control=plane, opener=Udp(), clock=clock, servers=[f"{host}:{port}"], contact=contact, bind=(host, 0)
                    )
                    tasks.append(asyncio.create_task(agents[name].run()))
                await service.apps.put(SYSTEM, AppSpec(name="web", image="host.example/web:1", scale=Scale(replicas=3)))

                def placed() -> list[str]:
                    return [held.record.node or "" for held in state.records(Instance).values()]

                def settled() -> bool:
                    heard = all(detection.standing(name) is not None for name in agents)
                    return (
                        heard and sorted(placed()) == ["n1", "n2", "n3"] and all(a.contact.at is not None for a in agents.values())
                    )

                for _ in range(150):
                    if settled():
                        break
                    await asyncio.sleep(0.1)
                assert settled()
                assert all(agent.contact.cut_off_s(clock.monotonic()) < 3 for agent in agents.values())
                agents["n2"].pulse.send_to = lambda _data, _to: None  # as a dead machine: it says nothing, and no goodbye
                died = time.monotonic()
                async with asyncio.timeout(15):
                    while sum(node in ("n1", "n3") for node in placed()) < 3:
                        await state.wait_past(state.revision)
                took_s = time.monotonic() - died
                health = {name: held.record.health for name, held in state.records(NodeLiveness).items()}
                assert health == {"n2": NodeHealth.LOST}
                assert took_s > 3.0, "a pause of three seconds is none's death"
                assert detection.standing("n1") is Standing.HEARD
                assert detection.traffic.refused == 0
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
    await store.close()
