"""Ingresses over the API: what they leave out becomes an event, one that is gone for good is forgotten, rules reach the routing."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Mapping

import pytest
from test_rollouts_service import Cell, FakeClock, cell

from atoll.api.service import KINDS, SYSTEM, Caller, Service
from atoll.api.service.ingress_heartbeats import ALIVE_S
from atoll.ingress.fake import FakeRouting
from atoll.ingress.heartbeat import Heart
from atoll.ingress.probe import Prober
from atoll.model import codec, keys
from atoll.model.errors import Conflict, Invalid, NotFound, TooLarge, Unavailable
from atoll.model.fabric import FabricNode
from atoll.model.ports.control_plane import Peers
from atoll.model.records import Ingress, IngressHeartbeat, Role, RoundTrips, Routing, Site, Status
from atoll.model.spec import AppSpec, IngressRules, Port, Quota, Rate, Route, Scale
from atoll.model.states import Phase
from atoll.model.views import TokenRequest
from atoll.sdk.control_plane import HttpControlPlane
from atoll.sdk.failover import Failover
from atoll.sdk.http import HttpTransport
from atoll.sdk.transport import Answer
from atoll.store.cache import State

__all__ = ["cell"]
EDGE = Ingress(name="edge", site="here", http_port=80, address="192.0.2.1")


def beat(**more: object) -> IngressHeartbeat:
    return IngressHeartbeat(ingress="edge", site="here", at=0.0, **more)  # type: ignore[arg-type]


async def register(cell: Cell) -> None:
    await cell.service.control_plane.register_ingress(EDGE)


async def events(cell: Cell) -> list[str]:
    page = cell.service.events.all("default", subject="app/web", limit=100)
    return [event.message for event in page.items if event.code == "route-refused"]


async def test_what_an_ingress_leaves_out_is_an_event_of_the_app_once_for_each_reason(cell: Cell) -> None:
    await register(cell)
    await cell.deploy()
    for words in ("taken", "taken", "too long", "too long"):
        cell.clock.at += 10.0
        await cell.service.control_plane.ingress_heartbeat(beat(problems={"default/web": words, "default/gone": "whatever"}))
    told = await events(cell)
    assert [message.rpartition(": ")[2] for message in told] == ["too long", "taken"]
    assert all("'edge'" in message for message in told)
    (view,) = cell.service.ingress_records.all()
    assert (view.problems, view.silent_s) == (2, 0.0)
    assert cell.service.apps.get("default", "web").refused == {"edge": "too long"}
    with pytest.raises(TooLarge):
        await cell.service.control_plane.ingress_heartbeat(beat(problems={f"default/a{n}": "x" for n in range(101)}))


async def test_an_app_shows_what_ingresses_leave_out_of_it_now_and_not_what_a_dead_one_said_last(cell: Cell) -> None:
    await register(cell)
    await cell.deploy()
    await cell.service.control_plane.ingress_heartbeat(beat(problems={"default/web": "tcp 15432 is taken"}))
    cell.clock.at += ALIVE_S
    assert cell.service.apps.all("default", limit=10).items[0].refused == {"edge": "tcp 15432 is taken"}
    cell.clock.at += 1.0
    assert cell.service.apps.get("default", "web").refused == {}
    await cell.service.control_plane.ingress_heartbeat(beat())
    assert cell.service.apps.get("default", "web").refused == {}


async def test_an_ingress_hears_how_far_the_sites_are(cell: Cell) -> None:
    await register(cell)
    await cell.put(keys.site("here"), Site(name="here", round_trips_ms={"ams": 12.0}))
    await cell.put(keys.site("ams"), Site(name="ams"))
    await cell.put(keys.site("nowhere"), Site(name="nowhere"))
    answer = await cell.service.control_plane.ingress_heartbeat(beat())
    assert answer.sites == {"ams": 12.0}


async def test_an_ingress_that_is_heard_of_is_not_forgotten_and_one_that_is_silent_is_with_all_that_let_it_in(cell: Cell) -> None:
    await register(cell)
    await cell.service.tokens.create(SYSTEM, TokenRequest(name="edge", role=Role.INGRESS, subject="edge"))
    await cell.service.control_plane.ingress_heartbeat(beat(round_trips_ms={"ams": 5.0}))
    with pytest.raises(Conflict, match="heard of"):
        await cell.service.ingress_records.forget("edge", SYSTEM)
    cell.clock.at += ALIVE_S
    await cell.service.ingress_records.forget("edge", SYSTEM)
    assert cell.service.ingress_records.all() == ()
    assert cell.service.context.state.get(RoundTrips, "edge") is None
    assert "edge" not in {token.name for token in cell.service.tokens.all(SYSTEM, limit=100).items}
    with pytest.raises(NotFound):
        await cell.service.ingress_records.forget("edge", SYSTEM)
    with pytest.raises(NotFound):
        await cell.service.control_plane.ingress_heartbeat(beat())


class Way(HttpTransport):
    """The way to one server, for heartbeats of ingresses; it takes a second."""

    def __init__(self, service: Service, clock: FakeClock) -> None:
        super().__init__("http://server")
        self._service, self._clock = service, clock

    async def request(
        self, method: str, path: str, *, headers: Mapping[str, str] | None = None, body: bytes = b"", timeout_s: float = 30.0
    ) -> Answer:
        assert (method, path) == ("POST", "/v1/ingresses/edge/heartbeat")
        self._clock.at += 1.0
        peers = await self._service.control_plane.ingress_heartbeat(codec.decode(body, IngressHeartbeat))
        return Answer(200, {}, codec.encode(peers))


async def test_every_server_knows_that_an_ingress_is_there_and_one_that_began_lately_forgets_none(cell: Cell) -> None:
    await register(cell)
    await cell.deploy()
    store = cell.service.context.store
    async with (
        State(store, KINDS) as state,
        Service(store, state, cell.clock, random.Random(2), bytes(32)) as second,
    ):
        control = HttpControlPlane("", None, transport=Failover([Way(cell.service, cell.clock), Way(second, cell.clock)]))
        cell.clock.at += ALIVE_S - 1
        with pytest.raises(Conflict, match="started only now") as caught:
            await second.ingress_records.forget("edge", SYSTEM)
        assert "again in 1 s" in (caught.value.mend or "")
        for _ in range(4):
            cell.clock.at += 8.0
            problems = {"default/web": "taken"}
            await control.ingress_heartbeat(IngressHeartbeat(ingress="edge", site="here", at=cell.clock.at, problems=problems))
        for service in (cell.service, second):
            with pytest.raises(Conflict, match="heard of"):
                await service.ingress_records.forget("edge", SYSTEM)
        assert len(await events(cell)) == 1, "what two servers heard happened once"
        cell.clock.at += ALIVE_S
        assert (await second.ingress_records.forget("edge", SYSTEM)).ingress.name == "edge"
        await control.close()


class Nothing:
    async def get(self, path: str) -> bytes:
        return b""


class Forgetful(FakeRouting):
    """Has forgotten every ingress, until one registers."""

    async def ingress_heartbeat(self, heartbeat: IngressHeartbeat) -> Peers:
        if heartbeat.ingress not in self.ingresses:
            raise NotFound("no such ingress")
        return await super().ingress_heartbeat(heartbeat)


async def test_an_ingress_that_was_forgotten_by_mistake_says_who_it_is_again(cell: Cell) -> None:
    control = Forgetful()
    heard: list[Mapping[str, float]] = []
    tries = 0

    async def again() -> None:
        nonlocal tries
        tries += 1
        if tries == 1:
            raise Unavailable("not now")
        await control.register_ingress(EDGE)

    prober = Prober("here", cell.clock)
    heart = Heart(
        Nothing(), control, prober, ingress="edge", site="here", clock=cell.clock, moved=heard.append, register=again,
        problems=lambda: {"p/a": "words"},
    )  # fmt: skip
    control.peers = Peers(sites={"ams": 3.0})
    for _ in range(3):
        await heart.beat()
    assert (tries, heard) == (2, [{"ams": 3.0}])
    assert control.heartbeats[0].problems == {"p/a": "words"}


@pytest.fixture
async def routed(cell: Cell) -> AsyncIterator[AsyncIterator[list[Routing]]]:
    async def changes() -> AsyncIterator[list[Routing]]:
        async for batch in cell.service.control_plane.routing("edge"):
            yield list(batch.put)

    stream = changes()
    yield stream
    await stream.aclose()


async def test_rules_and_routes_by_header_reach_the_routing_without_a_new_release(
    cell: Cell, routed: AsyncIterator[list[Routing]]
) -> None:
    ports = (Port(port=80), Port(name="beta", port=81))
    spec = AppSpec(name="shop", image="registry.test/web:1", ports=ports)
    assert (await cell.service.apps.put(SYSTEM, spec)).app.release == 1
    assert [found.rules for found in await anext(routed)] == [(), ()]
    rules = IngressRules(rate=Rate(requests=5))
    again = AppSpec(name="shop", image="registry.test/web:1", ports=ports, ingress=rules)
    assert (await cell.service.apps.put(SYSTEM, again)).app.release == 1
    assert (await anext(routed))[0].spec.ingress == rules
    routes = (
        Route(host="shop.localhost", path="/", port="beta", headers={"x-beta": "1"}),
        Route(host="shop.example", path="/api/", headers={"x-a": "*"}),
    )
    await cell.service.apps.put(
        SYSTEM, AppSpec(name="shop", image="registry.test/web:1", ports=ports, routes=routes, ingress=rules)
    )
    (found,) = await anext(routed)
    assert found.hosts == (("shop.localhost", "/", 80, False),)
    assert [(rule.host, rule.path, rule.port, rule.headers) for rule in found.rules] == [
        ("shop.localhost", "/", 81, {"x-beta": "1"}),
        ("shop.example", "/api", 80, {"x-a": "*"}),
    ]
    other = AppSpec(name="other", image="registry.test/web:1", ports=ports, routes=(Route(host="shop.example", path="/api"),))
    with pytest.raises(Conflict, match="app 'shop'"):
        await cell.service.apps.put(SYSTEM, other)
    await cell.service.projects.put("theirs")
    stranger = Caller(id="t", name="eve", role=Role.DEPLOY, project="theirs")
    with pytest.raises(Conflict, match="another project") as caught:
        await cell.service.apps.put(
            stranger, AppSpec(name="x", project="theirs", image="registry.test/x:1", ports=ports, routes=other.routes)
        )
    assert "shop'" not in str(caught.value)
    assert (await cell.service.apps.put(SYSTEM, again)).app.release == 3
    back = await cell.service.apps.rollback(SYSTEM, "default", "shop", 1)
    assert back.app.spec.ingress == rules


async def test_a_project_s_rate_reaches_the_routing_of_all_its_apps(cell: Cell, routed: AsyncIterator[list[Routing]]) -> None:
    await cell.deploy()
    assert (await anext(routed))[0].project_rate is None
    await cell.service.projects.set_quota("default", Quota(requests_per_s=50))
    assert (await anext(routed))[0].project_rate == 50


@pytest.mark.parametrize("wakes", [False, True])
@pytest.mark.parametrize(
    ("prefixes", "address", "led"),
    [
        ({"n": "10.64.16.0/20"}, "10.64.16.2", True),
        ({"n": "10.64.16.0/20"}, "10.64.16.1", False),  # the node itself
        ({"n": "10.64.16.0/20", "other": "10.64.32.0/20"}, "10.64.32.2", False),
        ({"n": "10.64.16.0/20"}, "127.0.0.1", False),
        ({}, "10.64.32.2", True),
        ({"other": "10.64.32.0/20"}, "10.64.16.2", True),
        ({"other": "10.64.32.0/20"}, "10.64.32.2", True),  # two that had one subnet before there was a fabric
        ({}, "127.0.0.1", False),
        ({}, "169.254.169.254", False),
        ({}, "0.0.0.0", False),
        ({}, "192.0.2.80", False),
    ],
)
async def test_no_node_can_lead_an_ingress_to_an_address_that_none_of_its_instances_can_have(
    cell: Cell, prefixes: dict[str, str], address: str, led: bool, wakes: bool
) -> None:
    for name, prefix in prefixes.items():
        await cell.put(keys.fabric_node(name), FabricNode(name=name, prefix=prefix))
    await cell.runs("i", 2)
    if wakes:
        spec = AppSpec(name="web", image="registry.test/web:2", ports=(Port(port=8000),), scale=Scale(replicas=0, max=1))
        await cell.service.apps.put(SYSTEM, spec)
    status = Status(instance="i", project="default", node="n", phase=Phase.RUNNING, ready=not wakes, address=address)
    await cell.put(keys.status("default", "i"), status)
    routing = cell.routing()
    found = routing.starting if wakes else routing.endpoints
    assert [endpoint.address for endpoint in found] == ([address] if led else [])


async def test_an_ingress_hears_at_once_that_a_node_has_a_prefix(cell: Cell, routed: AsyncIterator[list[Routing]]) -> None:
    await cell.runs("i", 2)
    assert len((await anext(routed))[0].endpoints) == 1
    await cell.put(keys.fabric_node("n"), FabricNode(name="n", prefix="10.64.16.0/20"))
    assert (await anext(routed))[0].endpoints == ()


async def test_rules_that_contradict_themselves_are_refused_at_the_api(cell: Cell) -> None:
    spec = AppSpec(
        name="web", image="registry.test/web:1", ports=(Port(port=80),), ingress=IngressRules(rate=Rate(requests=9, burst=1))
    )
    with pytest.raises(Invalid, match="burst"):
        await cell.service.apps.put(SYSTEM, spec)
