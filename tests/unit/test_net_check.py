"""`net check`: every thing that stops one app from reaching another is named, from the records that nodes make their rules of."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator

import pytest
from msgspec.structs import replace

from atoll.api.service import KINDS, Service
from atoll.model import codec, keys
from atoll.model.errors import Conflict, Invalid, NotFound
from atoll.model.fabric import FabricOffer, FabricPaths, ReachView
from atoll.model.membership import Server
from atoll.model.ports.clock import SystemClock
from atoll.model.records import App, Capacity, Instance, Node, OwnerKind, Status
from atoll.model.spec import Allow, AppSpec, NetworkRules, Port
from atoll.model.states import Phase
from atoll.store.cache import State
from atoll.store.memory import MemoryStore


def key_of(number: int) -> str:
    return chr(ord("A") + number) * 42 + "A="


class Cell:
    def __init__(self, service: Service) -> None:
        self.service = service

    async def put(self, key: str, record: object) -> None:
        store = self.service.context.store
        await self.service.context.reach(await store.put(key, codec.encode(record)))

    async def app(self, name: str, node: str, address: str, *, project: str = "shop", rules: NetworkRules | None = None) -> None:
        spec = AppSpec(name=name, project=project, image="x", ports=(Port(port=80),), network=rules)
        app = App(project=project, name=name, spec=spec, release=1, replicas=1, created_at=1.0, updated_at=1.0)
        instance = Instance(
            id=f"{name}-1", project=project, owner_kind=OwnerKind.APP, owner=name, release=1, node=node, created_at=1.0
        )
        status = Status(instance=instance.id, project=project, node=node, phase=Phase.RUNNING, ready=True, address=address)
        await self.put(keys.app(project, name), app)
        await self.put(keys.instance(project, instance.id), instance)
        await self.put(keys.status(project, instance.id), status)

    async def join(self, node: str, number: int, subnet: str = "") -> str:
        offer = FabricOffer(site=node, endpoint=f"192.0.2.{number}", public_key=key_of(number), subnet=subnet)
        return (await self.service.fabrics.join(node, offer)).prefix

    def check(self, source: str = "web", target: str = "db", port: int = 80, to: str = "shop") -> ReachView:
        return self.service.fabrics.reach("shop", source, target, port, "tcp", to)

    def stops(self, **given: object) -> list[str]:
        return [step.what for step in self.check(**given).steps if not step.ok]  # type: ignore[arg-type]


@pytest.fixture
async def cell() -> AsyncIterator[Cell]:
    clock = SystemClock()
    store = MemoryStore(clock)
    async with State(store, KINDS) as state, Service(store, state, clock, random.Random(1), bytes(32)) as service:
        yield Cell(service)
    await store.close()


async def both(cell: Cell) -> None:
    await cell.join("n1", 1)
    await cell.join("n2", 2)
    await cell.app("web", "n1", "10.64.0.2")
    await cell.app("db", "n2", "10.64.16.2")


async def test_what_nothing_stops_is_reached(cell: Cell) -> None:
    await both(cell)
    assert cell.stops() == []
    assert cell.check().ok


async def test_another_project_an_undeclared_port_and_rules_of_either_side_are_each_named(cell: Cell) -> None:
    await both(cell)
    await cell.app("spy", "n1", "10.64.0.3", project="spy")
    assert cell.stops(target="spy", to="spy") == ["project"]
    assert cell.stops(port=81) == ["port"]
    await cell.app("web", "n1", "10.64.0.2", rules=NetworkRules(egress=(Allow(app="db", ports=(443,)),)))
    assert cell.stops() == ["egress"]
    await cell.app("web", "n1", "10.64.0.2", rules=NetworkRules(egress=(Allow(cidr="10.64.16.0/24"),)))
    await cell.app("db", "n2", "10.64.16.2", rules=NetworkRules(ingress=(Allow(app="api"),)))
    assert cell.stops() == ["ingress"]
    await cell.app("db", "n2", "10.64.16.2", rules=NetworkRules(ingress=(Allow(app="web"),)))
    assert cell.check().ok


async def test_a_link_that_is_cut_is_named_and_one_that_is_gone_around_is_told(cell: Cell) -> None:
    await both(cell)
    await cell.service.fabrics.tell_paths("n1", FabricPaths(node="n1", relayed={"n2": "n3"}))
    assert "through n3" in cell.check().steps[-1].detail
    await cell.service.fabrics.tell_paths("n2", FabricPaths(node="n2", cut=("n1",)))
    assert cell.stops() == ["link"]


async def test_a_node_outside_of_the_fabric_is_named(cell: Cell) -> None:
    await cell.join("n1", 1)
    await cell.app("web", "n1", "10.64.0.2")
    await cell.app("db", "n9", "10.99.0.2")
    assert cell.stops() == ["link"]
    assert "n9" in cell.check().steps[-1].detail


async def test_what_does_not_run_is_not_found(cell: Cell) -> None:
    with pytest.raises(NotFound):
        cell.check()


async def test_each_node_gets_a_prefix_of_its_own_and_keeps_it(cell: Cell) -> None:
    given = [await cell.join(f"n{number}", number) for number in range(1, 6)]
    assert given[:2] == ["10.64.0.0/20", "10.64.16.0/20"]
    assert len(set(given)) == 5
    assert await cell.join("n3", 3) == given[2]


async def test_a_subnet_that_overlaps_another_nodes_is_refused_by_its_name(cell: Cell) -> None:
    await cell.join("n1", 1)
    with pytest.raises(Conflict, match="n1"):
        await cell.join("n2", 2, subnet="10.64.0.0/16")
    assert await cell.join("n2", 2, subnet="10.99.0.0/16") == "10.99.0.0/16"


@pytest.mark.parametrize(
    "subnet", ["128.0.0.0/1", "8.8.8.0/24", "10.0.0.0/30", "127.0.0.0/8", "169.254.0.0/16", "224.0.0.0/8", "172.0.0.0/8"]
)
async def test_a_node_gets_no_subnet_but_a_private_one_of_fitting_size(cell: Cell, subnet: str) -> None:
    with pytest.raises(Invalid) as refused:
        await cell.join("n1", 1, subnet=subnet)
    assert refused.value.field == "subnet"


async def test_no_subnet_holds_the_address_of_a_server_or_a_node(cell: Cell) -> None:
    await cell.put(keys.server("s1"), Server(id="s1", urls=("https://10.1.0.9:7600",), version="1", started_at=1.0))
    await cell.put(
        keys.node("n8"), Node(name="n8", capacity=Capacity(cpu_milli=1, memory_bytes=1, disk_bytes=1), address="10.2.0.9")
    )
    await cell.service.fabrics.join("n9", FabricOffer(endpoint="10.3.0.9"))
    for taken, whose in (("10.1.0.0/16", "s1"), ("10.2.0.0/16", "n8"), ("10.3.0.0/16", "n9")):
        with pytest.raises(Conflict, match=whose):
            await cell.join("n1", 1, subnet=taken)
    assert await cell.join("n1", 1, subnet="10.4.0.0/16") == "10.4.0.0/16"


async def test_an_address_told_later_shuts_no_node_out_of_its_subnet(cell: Cell) -> None:
    await cell.join("n1", 1, subnet="10.4.0.0/16")
    with pytest.raises(Invalid, match="n1"):
        await cell.service.fabrics.join("n2", FabricOffer(endpoint="10.4.0.9"))
    await cell.put(
        keys.node("n3"), Node(name="n3", capacity=Capacity(cpu_milli=1, memory_bytes=1, disk_bytes=1), address="10.4.0.9")
    )
    assert await cell.join("n1", 1, subnet="10.4.0.0/16") == "10.4.0.0/16"


async def test_a_prefix_that_the_cell_gives_holds_no_known_address(cell: Cell) -> None:
    await cell.put(keys.server("s1"), Server(id="s1", urls=("https://10.64.0.9:7600",), version="1", started_at=1.0))
    assert await cell.join("n1", 1) == "10.64.16.0/20"
    assert (await cell.service.fabrics.join("n2", FabricOffer(endpoint="10.64.32.9"))).prefix == "10.64.48.0/20"


async def test_another_nodes_key_is_refused_and_a_nodes_own_is_not(cell: Cell) -> None:
    await cell.join("n1", 1)
    with pytest.raises(Conflict, match="n1") as refused:
        await cell.service.fabrics.join("n2", FabricOffer(endpoint="192.0.2.2", public_key=key_of(1)))
    assert refused.value.field == "public_key"
    await cell.join("n1", 1)
    await cell.join("n2", 2)


def test_a_key_can_be_written_in_one_way_only() -> None:
    with pytest.raises(Invalid):
        codec.decode(codec.encode(FabricOffer(public_key=key_of(1)[:-2] + "B=")), FabricOffer)


async def test_a_node_hears_of_all_nodes_but_only_of_its_own_projects_instances(cell: Cell) -> None:
    await both(cell)
    await cell.app("spy", "n2", "10.64.16.3", project="spy")
    feed = cell.service.fabrics.feed("n1", 0.05)
    first = await anext(feed)
    assert first.complete
    assert {node.name for node in first.nodes} == {"n1", "n2"}
    assert {member.id for member in first.members} == {"web-1", "db-1"}
    await cell.app("spy2", "n1", "10.64.0.9", project="spy")
    heard: set[str] = set()
    async for batch in feed:
        heard |= {member.id for member in batch.members}
        if heard >= {"spy-1", "spy2-1"}:
            break
    await feed.aclose()  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("address", "ipv6"), [("10.64.0", None), ("fd00::1", None), ("", None), ("10.64.0.2", "10.64.0.2"), (None, "x")]
)
async def test_a_node_that_says_what_is_no_address_is_refused_and_the_way_is_told_as_before(
    cell: Cell, address: str | None, ipv6: str | None
) -> None:
    await both(cell)
    await cell.put(keys.node("n1"), Node(name="n1", capacity=Capacity(cpu_milli=1, memory_bytes=1, disk_bytes=1)))
    await cell.app("db", "n2", "10.64.16.2", rules=NetworkRules(ingress=(Allow(cidr="fd00::/8"),)))
    said = Status(
        instance="web-1", project="shop", node="n1", phase=Phase.RUNNING, ready=True, address="10.64.0.2", ipv6="fd00::a40:2"
    )
    await cell.service.control_plane.report("n1", [said])
    assert cell.stops() == []
    with pytest.raises(Invalid, match="no address") as refused:
        await cell.service.control_plane.report("n1", [replace(said, address=address, ipv6=ipv6)])
    assert refused.value.field in ("statuses.address", "statuses.ipv6")
    assert cell.stops() == []
