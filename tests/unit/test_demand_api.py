"""What ingresses say of apps that sleep, over the API: only what is there counts, and a deploy without a scale wakes for good."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator
from typing import Any

import pytest
from msgspec.structs import replace

from atoll.api.service import KINDS, SYSTEM, Service
from atoll.api.service.routing import routing_of
from atoll.api.service.speakers import LATE_S
from atoll.model import codec, keys
from atoll.model.errors import NotFound, TooLarge
from atoll.model.ports.clock import SystemClock
from atoll.model.records import Ingress, Instance, OwnerKind, Status
from atoll.model.spec import AppSpec, Health, Port, Scale
from atoll.model.states import Phase
from atoll.model.traffic import DEMAND_APPS_MAX, AppLoad, DemandReport, Load
from atoll.store.cache import State
from atoll.store.memory import MemoryStore

SLEEPY = AppSpec(name="web", image="registry.test/web:1", ports=(Port(port=80),), scale=Scale(replicas=0, max=1))
STEADY = AppSpec(name="steady", image="registry.test/web:1", ports=(Port(port=80),))


class LaterClock(SystemClock):
    later_s = 0.0

    def monotonic(self) -> float:
        return super().monotonic() + self.later_s


@pytest.fixture
def clock() -> LaterClock:
    return LaterClock()


@pytest.fixture
async def service(clock: LaterClock) -> AsyncIterator[Service]:
    store = MemoryStore(clock)
    state = State(store, KINDS)
    await state.start()
    service = Service(store, state, clock, random.Random(1), b"k" * 32)
    await service.start()
    yield service
    await service.close()
    await state.close()
    await store.close()


async def test_only_apps_that_sleep_are_woken_and_only_a_whole_report_says_that_the_rest_is_idle(service: Service) -> None:
    for spec in (SLEEPY, STEADY):
        await service.apps.put(SYSTEM, spec)
    woken: list[str] = []
    service.demand.changed = woken.append
    report = DemandReport(ingress="g", apps=("default/web", "default/steady", "default/nobody"))
    with pytest.raises(NotFound):
        await service.control_plane.demand(report)
    await service.control_plane.register_ingress(Ingress(name="g", http_port=1))
    await service.control_plane.demand(report)
    assert (woken, set(service.demand.last), set(service.demand.heard)) == (["default/web"], {"default/web"}, set())
    await service.control_plane.demand(DemandReport(ingress="g", complete=True))
    assert set(service.demand.heard) == {"g"}
    with pytest.raises(TooLarge):
        await service.control_plane.demand(DemandReport(ingress="g", apps=("default/web",) * (DEMAND_APPS_MAX + 1)))


async def test_an_app_that_sleeps_is_not_stopped_by_a_deploy_without_a_scale(
    service: Service,
) -> None:
    app = (await service.apps.put(SYSTEM, SLEEPY)).app
    assert (app.replicas, app.sleeps, app.most, app.wanted(None)) == (0, True, 1, 1)
    routing = routing_of(service.context.state, app, (), "localhost")
    assert routing is not None
    assert routing.wakes
    kept = (await service.apps.scale("default", "web", 1)).app
    assert (kept.sleeps, kept.wanted(None)) == (False, 1)
    app = (await service.apps.scale("default", "web", 0)).app
    assert app.sleeps
    without = AppSpec(name="web", image="registry.test/web:2", ports=(Port(port=80),))
    app = (await service.apps.put(SYSTEM, without)).app
    assert (app.replicas, app.sleeps) == (1, False)


@pytest.mark.parametrize(
    ("changes", "status", "told"),
    [
        ({}, {"phase": Phase.STARTING}, True),
        ({}, {"phase": Phase.RUNNING}, True),
        ({}, {"phase": Phase.STARTING, "address": None}, False),
        ({}, {"phase": Phase.BACKOFF}, False),
        ({}, {"phase": Phase.STOPPING}, False),
        ({"health": Health()}, {"phase": Phase.STARTING}, False),
        ({"scale": Scale(replicas=1)}, {"phase": Phase.STARTING}, False),
    ],
)
async def test_where_an_instance_of_an_app_that_wakes_will_be_is_told_where_a_connection_says_that_it_is_ready(
    service: Service, changes: dict[str, Any], status: dict[str, Any], told: bool
) -> None:
    app = (await service.apps.put(SYSTEM, replace(SLEEPY, **changes))).app
    instance = Instance(id="web-1", project="default", owner_kind=OwnerKind.APP, owner="web", release=1, node="n", created_at=1.0)
    seen = Status(**({"instance": "web-1", "project": "default", "node": "n", "address": "10.64.0.7"} | status))
    context = service.context
    for key, record in ((keys.instance("default", "web-1"), instance), (keys.status("default", "web-1"), seen)):
        await context.reach(await context.store.put(key, codec.encode(record)))
    routing = routing_of(context.state, app, (instance,), "localhost")
    assert routing is not None
    assert ([each.address for each in routing.starting], routing.endpoints) == (["10.64.0.7"] if told else [], ())
    ready = replace(seen, phase=Phase.RUNNING, ready=True, address="10.64.0.7")
    await context.reach(await context.store.put(keys.status("default", "web-1"), codec.encode(ready)))
    routing = routing_of(context.state, app, (instance,), "localhost")
    assert routing is not None
    assert (len(routing.endpoints), routing.starting) == (1, ())


async def test_loads_are_kept_of_apps_that_are_there_and_a_late_or_lost_report_takes_nothing_back(
    service: Service, clock: LaterClock
) -> None:
    await service.apps.put(SYSTEM, STEADY)
    await service.control_plane.register_ingress(Ingress(name="g", http_port=1))

    async def say(uptime_s: float, requests: int, *, started: float = 5.0, app: str = "default/steady") -> None:
        load = AppLoad(app, requests, 2.5)
        await service.control_plane.demand(DemandReport(ingress="g", started=started, uptime_s=uptime_s, loads=(load,)))

    await say(2, 10)
    await say(6, 30)
    await say(4, 20)
    await say(8, 1, app="default/nobody")
    assert service.demand.loads == {"g": {"default/steady": Load(5.0, 6, 30, 2.5)}}
    await say(1, 0, started=9.0)
    assert service.demand.loads["g"]["default/steady"] == Load(9.0, 1, 0, 2.5)
    await say(8, 40)
    assert service.demand.loads["g"]["default/steady"] == Load(9.0, 1, 0, 2.5), "the one before has ended"
    clock.later_s += LATE_S
    await say(1, 3, started=7.0)
    assert service.demand.loads["g"]["default/steady"] == Load(7.0, 1, 3, 2.5), "restarted, by a date that was set back"
    clock.later_s += LATE_S
    await say(0.5, 2, started=7.0)
    assert service.demand.loads["g"]["default/steady"] == Load(7.0, 1, 3, 2.5)
    assert service.demand.heard == {}, "loads do not say that the rest is idle"
    loads = (AppLoad("default/steady"),) * (DEMAND_APPS_MAX + 1)
    with pytest.raises(TooLarge):
        await service.control_plane.demand(DemandReport(ingress="g", loads=loads))
