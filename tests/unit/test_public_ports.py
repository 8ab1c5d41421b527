"""Ports of ingresses: who may have which, and what an ingress makes of them."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Mapping
from pathlib import Path

import pytest
from envoy.config.endpoint.v3.endpoint_pb2 import ClusterLoadAssignment
from envoy.config.listener.v3.listener_pb2 import Listener
from msgspec.structs import replace
from test_cli_draining import call

from atoll.api.service import KINDS, SYSTEM, Service
from atoll.api.service.access import Caller
from atoll.api.service.routing import routing_of
from atoll.control.wishes import wishes_of
from atoll.ingress.resources import Kind
from atoll.ingress.table import RoutingTable
from atoll.model import codec
from atoll.model.errors import Conflict, Forbidden, Invalid
from atoll.model.ports.clock import SystemClock
from atoll.model.ports.control_plane import RoutingBatch
from atoll.model.records import Endpoint, Ingress, Listening, Project, Role, RouteClaim, Routing
from atoll.model.spec import AppSpec, IngressRules, Issuer, Port, PortProtocol, PublicPort, Quota, check_app
from atoll.sdk.fake import FakeApi
from atoll.store.cache import State
from atoll.store.memory import MemoryStore

TCP, UDP = PortProtocol.TCP, PortProtocol.UDP
PORTS = (Port(name="db", port=5432, protocol=TCP), Port(name="dns", port=53, protocol=UDP), Port(port=80))


def spec(project: str, *public: tuple[int, str], name: str = "db", ports: tuple[Port, ...] = PORTS[:2]) -> AppSpec:
    rules = IngressRules(ports=tuple(PublicPort(public=number, port=port) for number, port in public))
    return AppSpec(name=name, project=project, image="x.test/db:1", ports=ports, ingress=rules)


@pytest.fixture
async def service() -> AsyncIterator[Service]:
    clock = SystemClock()
    store = MemoryStore(clock)
    async with (
        State(store, KINDS) as state,
        Service(store, state, clock, random.Random(1), bytes(32), "apps.test") as made,
    ):
        for project in ("a", "b"):
            await made.projects.put(project)
            await made.projects.set_quota(project, Quota(public_ports="5000-6000"))
        yield made
    await store.close()


async def test_a_project_has_no_port_that_its_quota_does_not_name(service: Service) -> None:
    await service.projects.put("c")
    with pytest.raises(Forbidden) as denied:
        await service.apps.put(SYSTEM, spec("c", (5432, "db")))
    assert denied.value.field == "ingress.ports[0].public"
    assert "--public-ports" in (denied.value.mend or "")
    with pytest.raises(Forbidden, match="may not have port 5432"):
        await service.planning.plan(spec("c", (5432, "db")))
    for number in (4_999, 6_001, 22):
        with pytest.raises(Forbidden, match=f"may not have port {number}"):
            await service.apps.put(SYSTEM, spec("a", (5432, "db"), (number, "dns")))
    assert service.context.state.records(RouteClaim) == {}
    await service.apps.put(SYSTEM, spec("a", (5000, "db"), (6000, "db"), (5000, "dns")))
    assert set(service.context.state.records(RouteClaim)) == {"tcp:5000/", "tcp:6000/", "udp:5000/"}


@pytest.mark.parametrize(
    ("ports", "why"), [("20-10", "the first is above the last"), ("0-80", "from 1 to 65535"), ("80-70000", "from 1 to 65535")]
)
async def test_a_quota_with_a_range_of_ports_that_is_none_is_refused_by_its_field(service: Service, ports: str, why: str) -> None:
    with pytest.raises(Invalid, match=why) as refused:
        await service.projects.set_quota("a", Quota(public_ports=ports))
    assert refused.value.field == "public_ports"
    held = service.context.state.get(Project, "a")
    assert held is not None
    assert held.record.quota == Quota(public_ports="5000-6000")


async def test_a_port_has_one_app_and_another_project_hears_whose_it_is_only_if_it_may(service: Service) -> None:
    await service.apps.put(SYSTEM, spec("a", (5432, "db")))
    with pytest.raises(Conflict, match="tcp port 5432 of the ingresses belongs to app 'db' in project 'a'") as refused:
        await service.apps.put(SYSTEM, spec("b", (5432, "db")))
    assert refused.value.field == "ingress.ports"
    stranger = Caller(id="someone", role=Role.DEPLOY, project="b")
    with pytest.raises(Conflict, match="belongs to another project"):
        await service.apps.put(stranger, spec("b", (5432, "db")))
    await service.apps.put(SYSTEM, spec("b", (5432, "dns")))
    with pytest.raises(Conflict, match="belongs to app 'db'"):
        await service.apps.put(SYSTEM, spec("a", (5432, "db"), name="other"))
    # Given back, it is anyone's.
    await service.apps.put(SYSTEM, spec("a"))
    await service.apps.put(SYSTEM, spec("b", (5432, "db"), name="heir"))
    ends = await asyncio.gather(
        *(service.apps.put(SYSTEM, spec(project, (5500, "db"), name="late")) for project in ("a", "b")), return_exceptions=True
    )
    assert sorted(isinstance(end, Conflict) for end in ends) == [False, True]


async def test_it_makes_no_release_and_no_certificate_is_asked_for_it(service: Service) -> None:
    made = await service.apps.put(SYSTEM, spec("a"))
    changed = await service.apps.put(SYSTEM, spec("a", (5432, "db")))
    assert changed.app.release == made.app.release
    signed = spec("a", (5432, "db"), ports=PORTS)
    await service.apps.put(SYSTEM, replace(signed, ingress=replace(signed.ingress or IngressRules(), certificate=Issuer.OWN)))
    assert set(wishes_of(service.context.state)) == {"db.a.apps.test"}


async def test_where_an_ingress_answers_http_is_no_public_port(service: Service) -> None:
    ingress = Ingress(name="fra", http_port=5080, https_port=5443)
    await service.context.reach(await service.context.store.put("ingresses/fra", codec.encode(ingress)))
    for number in (5080, 5443):
        with pytest.raises(Invalid, match="ingress 'fra' answers HTTP"):
            await service.apps.put(SYSTEM, spec("a", (number, "db")))


@pytest.mark.parametrize(
    ("public", "field"),
    [
        (((5432, "none"),), "ingress.ports[0].port"),
        (((5432, "db"), (5433, "http")), "ingress.ports[1].port"),
        (((5432, "db"), (5432, "db")), "ingress.ports"),
    ],
)
def test_what_leads_nowhere_or_is_said_twice_is_refused_by_field(public: tuple[tuple[int, str], ...], field: str) -> None:
    with pytest.raises(Invalid) as refused:
        check_app(spec("a", *public, ports=PORTS))
    assert (refused.value.field or "").startswith(field)


async def test_an_ingress_is_told_of_an_app_that_has_nothing_but_such_ports(service: Service) -> None:
    view = await service.apps.put(SYSTEM, spec("a", (5432, "db"), (5053, "dns")))
    routing = routing_of(service.context.state, view.app, (), "apps.test")
    assert routing is not None
    assert routing.hosts == ()
    assert routing.listens == (Listening(public=5432, protocol=TCP, port=5432), Listening(public=5053, protocol=UDP, port=53))


def routing(app: str, *listens: Listening, wakes: bool = False) -> Routing:
    ports = tuple(Port(name=f"p{each.port}", port=each.port, protocol=each.protocol) for each in listens)
    places = () if wakes else (Endpoint(instance=f"{app}-1", node="n", address="10.0.0.1"),)
    return Routing(
        project="a",
        app=app,
        spec=AppSpec(name=app, image="x", ports=ports),
        hosts=(),
        listens=listens,
        endpoints=places,
        wakes=wakes,
    )


def test_a_port_becomes_a_listener_at_the_ingress_s_address_and_goes_with_its_app() -> None:
    table = RoutingTable()
    table.address = "192.0.2.1"
    both = (Listening(public=5432, protocol=TCP, port=5432), Listening(public=5432, protocol=UDP, port=53))
    table.apply(RoutingBatch(1, True, (routing("db", *both),)))
    assert set(table.resources[Kind.LISTENER]) == {"tcp:5432", "udp:5432"}
    for name, made in table.resources[Kind.LISTENER].items():
        address = Listener.FromString(made.body).address.socket_address
        assert (address.address, address.port_value) == ("192.0.2.1", 5432), name
    assert set(table.resources[Kind.ENDPOINTS]) == {"a/db/5432/tcp", "a/db/53/udp"}
    problems = table.apply(RoutingBatch(2, False, (routing("thief", both[0]),)))
    assert [(each.app, each.message) for each in problems] == [("a/thief", "tcp:5432/ belongs to a/db")]
    table.apply(RoutingBatch(3, False, (), removed=("a/db",)))
    assert set(table.resources[Kind.LISTENER]) == {"tcp:5432"}
    assert set(table.resources[Kind.ENDPOINTS]) == {"a/thief/5432/tcp"}


def test_a_connection_wakes_an_app_and_so_does_a_datagram() -> None:
    table = RoutingTable()
    table.udp_waker = lambda target: 40_000 + target.port
    both = (Listening(public=5432, protocol=TCP, port=5432), Listening(public=5053, protocol=UDP, port=53))
    table.apply(RoutingBatch(1, True, (routing("db", *both, wakes=True),)))
    assert {target.cluster for target in table.sleepers()} == {"a/db/5432/tcp", "a/db/53/udp"}
    assert b"wake/" in table.resources[Kind.ENDPOINTS]["a/db/5432/tcp"].body
    udp = ClusterLoadAssignment.FromString(table.resources[Kind.ENDPOINTS]["a/db/53/udp"].body)
    place = udp.endpoints[0].lb_endpoints[0].endpoint.address.socket_address
    assert (place.address, place.port_value) == ("127.0.0.1", 40_053)
    # Where no socket is to be had, datagrams are lost, and nothing else is.
    table.udp_waker = lambda target: 0
    table.apply(RoutingBatch(2, True, (routing("dns", both[1], wakes=True),)))
    assert not ClusterLoadAssignment.FromString(table.resources[Kind.ENDPOINTS]["a/dns/53/udp"].body).endpoints


class Denying(FakeApi):
    """Grants no port, as a server does whose project has none."""

    def handle(self, method: str, segments: list[str], query: dict[str, str], headers: Mapping[str, str], body: bytes) -> object:
        if segments == ["plan"]:
            raise Forbidden("ingress.ports[0].public: project 'default' may not have port 15432", mend="have an admin grant it")
        return super().handle(method, segments, query, headers, body)


@pytest.mark.parametrize("apps", ["", "[[apps]]\n"], ids=["one", "group"])
@pytest.mark.parametrize("asks", ["ports = [{ public = 15432, port = 'db' }]", ""], ids=["with a port", "without"])
def test_a_deploy_that_may_not_have_its_port_says_so_before_it_builds(tmp_path: Path, apps: str, asks: str) -> None:
    top = f"{apps}name = 'db'\nports = [{{ name = 'db', port = 5432, protocol = 'tcp' }}]\n"
    table = "apps." if apps else ""
    build = f"[{table}build]\nbase = 'scratch'\nfiles = ['nowhere.txt']\n"
    (tmp_path / "atoll.toml").write_text(f"{top}[{table}ingress]\n{asks}\n{build}")
    api = Denying()
    said = call(api, tmp_path, "deploy", str(tmp_path))
    assert said.exit_code != 0
    assert ("may not have port 15432" in said.stderr) == bool(asks)
    # The build of a file that is not there fails, where it comes to that.
    assert ("nowhere.txt" in said.stderr) == (not asks)
    assert not api.under("apps")


class Occupied(FakeApi):
    """An ingress says that it cannot have the port, a while after the deploy is over."""

    def __init__(self, looks: int) -> None:
        super().__init__()
        self.looks, self.looked = looks, 0

    def handle(self, method: str, segments: list[str], query: dict[str, str], headers: Mapping[str, str], body: bytes) -> object:
        if (method, segments[-2:]) == ("GET", ["apps", "db"]):
            self.looked += 1
            if self.looked == self.looks:
                self.refused["default/db"] = {"edge": "cannot bind '0.0.0.0:15432': Address already in use"}
        return super().handle(method, segments, query, headers, body)


@pytest.mark.parametrize("apps", ["", "[[apps]]\n"], ids=["one", "group"])
def test_a_deploy_whose_public_port_an_ingress_cannot_have_says_so_in_its_last_line_and_so_does_status(
    tmp_path: Path, apps: str
) -> None:
    table = "apps." if apps else ""
    top = f"{apps}name = 'db'\nimage = 'x'\nports = [{{ name = 'db', port = 5432, protocol = 'tcp' }}]\n"
    (tmp_path / "atoll.toml").write_text(f"{top}[{table}ingress]\nports = [{{ public = 15432, port = 'db' }}]\n")
    api = Occupied(looks=4)
    deployed = call(api, tmp_path, "deploy", str(tmp_path))
    assert deployed.exit_code == 0
    told = "! ingress edge leaves out a part of db's routing: cannot bind '0.0.0.0:15432': Address already in use"
    assert deployed.stderr.splitlines()[-1] == told
    shown = call(api, tmp_path, "status", "db").stdout
    assert "by ingress edge: cannot bind '0.0.0.0:15432'" in shown


def test_a_deploy_without_public_ports_waits_for_no_ingress(tmp_path: Path) -> None:
    api = Occupied(looks=2)
    done = call(api, tmp_path, "deploy", "--image", "x", "--name", "db", "--port", "80")
    assert (done.exit_code, api.looked) == (0, 1)
