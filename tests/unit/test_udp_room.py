"""A bound on the clients of all UDP ports of an ingress: who has room keeps it, and who has none is told."""

from __future__ import annotations

import pytest
from envoy.config.cluster.v3.cluster_pb2 import Cluster
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace
from test_public_ports import routing

from atoll.ingress.clusters import UDP_CLIENTS_MAX, UDP_SESSIONS_MAX
from atoll.ingress.resources import Kind
from atoll.ingress.table import RoutingTable
from atoll.ingress.udp_room import UdpRoom
from atoll.model.ports.control_plane import RoutingBatch
from atoll.model.records import Listening, Routing
from atoll.model.spec import IngressRules, PortProtocol
from atoll.model.spec.ingress import Limits

PORTS = ("udp:1", "udp:2", "udp:3", "udp:4")
STEPS = st.lists(st.tuples(st.sampled_from(PORTS), st.sampled_from(("a", "b", "c")), st.integers(0, 8)), max_size=30)


@settings(deadline=None)
@given(STEPS)
def test_no_order_of_changes_gives_out_more_than_there_is_or_takes_it_from_who_asks_for_no_more(
    steps: list[tuple[str, str, int]],
) -> None:
    room = UdpRoom(10)
    asked: dict[str, tuple[str, int]] = {}
    for port, cluster, clients in steps:
        before = {each for each in PORTS if room.is_open(each)}
        if clients:
            room.ask(port, cluster, clients)
            asked[port] = (cluster, clients)
        else:
            room.leave(port)
            asked.pop(port, None)
        touched = room.settle()
        now = {each for each in PORTS if room.is_open(each)}
        assert before ^ now <= touched
        assert now <= asked.keys()
        most: dict[str, int] = {}
        for each in now:
            name, count = asked[each]
            most[name] = max(most.get(name, 0), count)
        assert sum(most.values()) <= 10
        assert all((room.why_not(each) is None) == (each in now or each not in asked) for each in PORTS)
        assert before - now <= {port}


def dns(app: str, public: int, connections: int | None = None) -> Routing:
    made = routing(app, Listening(public=public, protocol=PortProtocol.UDP, port=53))
    rules = IngressRules(limits=Limits(connections=connections)) if connections is not None else None
    return replace(made, spec=replace(made.spec, ingress=rules))


def clients_of(table: RoutingTable) -> int:
    """Return how many clients Envoy would take, by what it is told of the clusters that open ports lead to."""
    total = 0
    for name in table.resources[Kind.LISTENER]:
        (cluster,) = table.clusters_of(table.owner_of(name) or "")
        (threshold,) = Cluster.FromString(table.resources[Kind.CLUSTER][cluster].body).circuit_breakers.thresholds
        total += threshold.max_connections.value
    return total


def test_ports_beyond_the_room_are_said_and_open_when_there_is_some() -> None:
    table = RoutingTable()
    fits = UDP_CLIENTS_MAX // UDP_SESSIONS_MAX
    table.apply(RoutingBatch(1, True, tuple(dns(f"d{n:02}", 5_000 + n) for n in range(fits))))
    assert len(table.resources[Kind.LISTENER]) == fits
    assert clients_of(table) == UDP_CLIENTS_MAX
    (problem,) = table.apply(RoutingBatch(2, False, (dns("late", 6_000),)))
    assert problem.app == "a/late"
    assert f"{UDP_CLIENTS_MAX} clients" in problem.message
    assert "ingress.limits.connections" in problem.message
    assert "udp:6000" not in table.resources[Kind.LISTENER]
    # One that wants less makes room for as much.
    table.apply(RoutingBatch(3, False, (dns("d00", 5_000, 96),)))
    assert "udp:6000" not in table.resources[Kind.LISTENER]
    table.apply(RoutingBatch(4, False, (dns("late", 6_000, UDP_SESSIONS_MAX - 96),)))
    assert "udp:6000" in table.resources[Kind.LISTENER]
    assert table.problems == ()
    assert clients_of(table) == UDP_CLIENTS_MAX
    # Who wants more than is left goes itself, and nobody else does.
    (problem,) = table.apply(RoutingBatch(5, False, (dns("d00", 5_000, 97),)))
    assert problem.app == "a/d00"
    assert set(table.resources[Kind.LISTENER]) == {"udp:6000", *(f"udp:{5_000 + n}" for n in range(1, fits))}
    table.take_changes()
    table.apply(RoutingBatch(6, False, (), removed=("a/d01",)))
    assert "udp:5000" in table.resources[Kind.LISTENER]
    assert table.problems == ()
    assert (Kind.LISTENER, "udp:5000") in table.take_changes()


def test_a_limit_that_waits_for_a_drain_counts_once_envoy_has_it() -> None:
    table = RoutingTable()
    table.udp_room.clients_max = UDP_SESSIONS_MAX
    table.apply(RoutingBatch(1, True, (dns("one", 5_000),)))
    draining = replace(dns("one", 5_000, 10), endpoints=tuple(replace(each, draining=True) for each in dns("one", 1).endpoints))
    table.apply(RoutingBatch(2, False, (draining, dns("two", 5_001, 20))))
    assert clients_of(table) == UDP_SESSIONS_MAX
    assert set(table.resources[Kind.LISTENER]) == {"udp:5000"}
    table.apply(RoutingBatch(3, False, (dns("one", 5_000, 10),)))
    assert set(table.resources[Kind.LISTENER]) == {"udp:5000", "udp:5001"}
    assert clients_of(table) == 30


@pytest.mark.parametrize("protocol", [PortProtocol.TCP, PortProtocol.UDP])
def test_tcp_ports_need_no_room(protocol: PortProtocol) -> None:
    table = RoutingTable()
    table.udp_room.clients_max = 1
    table.apply(RoutingBatch(1, True, (routing("db", Listening(public=5_432, protocol=protocol, port=5_432)),)))
    assert ("tcp:5432" in table.resources[Kind.LISTENER]) is (protocol is PortProtocol.TCP)
    assert bool(table.problems) is (protocol is PortProtocol.UDP)
