"""Routing records to Envoy's resources: what leads where, and what is left out because Envoy would refuse everything."""

from __future__ import annotations

from typing import TypeVar

import pytest
from envoy.config.cluster.v3.cluster_pb2 import Cluster
from envoy.config.core.v3.health_check_pb2 import DRAINING, HEALTHY
from envoy.config.endpoint.v3.endpoint_pb2 import ClusterLoadAssignment
from envoy.config.route.v3.route_components_pb2 import VirtualHost
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from atoll.ingress.resources import Kind
from atoll.ingress.table import RoutingTable
from atoll.model.ports.control_plane import RoutingBatch
from atoll.model.records import Endpoint, Routing
from atoll.model.spec import AppSpec, Health, IngressRules, InstanceTls
from atoll.model.units import Seconds

T = TypeVar("T", Cluster, ClusterLoadAssignment, VirtualHost)
Hosts = tuple[tuple[str, str, int, bool], ...]
FIXED = {"http/nobody.invalid", "http/*"}


def routing(app: str, *endpoints: Endpoint, hosts: Hosts | None = None) -> Routing:
    places = hosts if hosts is not None else ((f"{app}.localhost", "/", 80, False),)
    return Routing(project="p", app=app, spec=AppSpec(name=app, image="x"), hosts=places, endpoints=endpoints)


def at(address: str, *, draining: bool = False) -> Endpoint:
    return Endpoint(instance=f"i-{address}", node="n", address=address, draining=draining)


def parsed(table: RoutingTable, kind: Kind, name: str, message: type[T]) -> T:
    return message.FromString(table.resources[kind][name].body)


def paths(table: RoutingTable, host: str) -> list[tuple[str, str]]:
    routes = parsed(table, Kind.HOST, f"http/{host}", VirtualHost).routes
    return [(route.match.prefix or route.match.path_separated_prefix, route.route.cluster) for route in routes]


def hosts(table: RoutingTable) -> set[str]:
    return set(table.resources[Kind.HOST]) - FIXED


def test_an_app_becomes_a_cluster_its_endpoints_and_a_host() -> None:
    table = RoutingTable()
    assert table.apply(RoutingBatch(1, True, (routing("a", at("10.0.0.2"), at("10.0.0.3", draining=True)),))) == ()
    assignment = parsed(table, Kind.ENDPOINTS, "p/a/80", ClusterLoadAssignment)
    found = {each.endpoint.address.socket_address.address: each.health_status for each in assignment.endpoints[0].lb_endpoints}
    assert found == {"10.0.0.2": HEALTHY, "10.0.0.3": DRAINING}
    assert paths(table, "a.localhost") == [("/", "p/a/80")]
    cluster = parsed(table, Kind.CLUSTER, "p/a/80", Cluster)
    assert cluster.common_lb_config.healthy_panic_threshold.value == 0
    assert cluster.circuit_breakers.thresholds[0].max_retries.value > 3


def test_one_host_may_lead_to_several_apps_the_longest_path_first() -> None:
    table = RoutingTable()
    table.apply(
        RoutingBatch(
            1,
            True,
            (
                routing("web", hosts=(("x.example", "/", 80, False),)),
                routing("api", hosts=(("x.example", "/api", 81, True), ("x.example", "/api/v2/", 82, False))),
            ),
        )
    )
    assert paths(table, "x.example") == [("/api/v2/", "p/api/82"), ("/api", "p/api/81/h2"), ("/", "p/web/80")]
    table.apply(RoutingBatch(2, False, removed=("p/api",)))
    assert paths(table, "x.example") == [("/", "p/web/80")]
    assert set(table.resources[Kind.CLUSTER]) == {"p/web/80"}


def test_who_had_a_place_first_keeps_it_and_it_passes_on_when_they_go() -> None:
    table = RoutingTable()
    mine: Hosts = (("x.example", "/", 80, False),)
    table.apply(RoutingBatch(1, True, (routing("b", hosts=mine),)))
    problems = table.apply(RoutingBatch(2, False, (routing("a", hosts=mine),)))
    assert [(problem.app, problem.message) for problem in problems] == [("p/a", "x.example/ belongs to p/b")]
    assert paths(table, "x.example") == [("/", "p/b/80")]
    table.apply(RoutingBatch(3, False, removed=("p/b",)))
    assert paths(table, "x.example") == [("/", "p/a/80")]
    assert table.problems == ()


@pytest.mark.parametrize(
    "host", ["", "UPPER.example", "a b", "-a", "a..b", "*", "*.", "a.*.b", "x" * 64, "a:80", "é.example", "a.invalid"]
)
def test_a_bad_host_is_left_out_and_said(host: str) -> None:
    table = RoutingTable()
    problems = table.apply(RoutingBatch(1, True, (routing("a", hosts=((host, "/", 80, False), ("ok.example", "/", 80, False))),)))
    assert len(problems) == 1
    assert hosts(table) == {"http/ok.example"}


@pytest.mark.parametrize("path", ["", "x", "/a?b", "/a#b", "/a b", "/\n", "/é", "/" + "x" * 2000])
def test_a_bad_path_is_left_out_and_said(path: str) -> None:
    table = RoutingTable()
    assert len(table.apply(RoutingBatch(1, True, (routing("a", hosts=(("x.example", path, 80, False),)),)))) == 1
    assert hosts(table) == set()


def test_an_endpoint_without_a_good_address_is_left_out_and_said() -> None:
    table = RoutingTable()
    problems = table.apply(RoutingBatch(1, True, (routing("a", at("nonsense"), at("0.0.0.0"), at("10.0.0.2")),)))
    assert len(problems) == 2
    assignment = parsed(table, Kind.ENDPOINTS, "p/a/80", ClusterLoadAssignment)
    assert len(assignment.endpoints[0].lb_endpoints) == 1


def test_a_complete_batch_removes_what_it_does_not_name() -> None:
    table = RoutingTable()
    table.apply(RoutingBatch(1, True, (routing("a"), routing("b"))))
    table.take_changes()
    table.apply(RoutingBatch(2, True, (routing("b"),)))
    assert hosts(table) == {"http/b.localhost"}
    assert {name for _, name in table.take_changes()} == {"http/a.localhost", "p/a/80"}


def test_only_what_changed_is_sent_again() -> None:
    table = RoutingTable()
    table.apply(RoutingBatch(1, True, (routing("a", at("10.0.0.2")), routing("b"))))
    table.take_changes()
    table.apply(RoutingBatch(2, False, (routing("a", at("10.0.0.3")), routing("b"))))
    assert table.take_changes() == {(Kind.ENDPOINTS, "p/a/80")}


_APPS = st.sampled_from(["a", "b", "c"])
_PLACES = st.tuples(
    st.sampled_from(["x.example", "y.example", "BAD"]), st.sampled_from(["/", "/p", "/p?"]), st.integers(79, 81), st.booleans()
)
_STEPS = st.one_of(
    st.tuples(
        _APPS, st.lists(_PLACES, max_size=4).map(tuple), st.lists(st.sampled_from(["10.0.0.2", "10.0.0.3", "?"]), max_size=2)
    ),
    _APPS,
)


@settings(deadline=None)
@given(st.lists(_STEPS, max_size=12), st.booleans())
def test_the_resources_are_always_whole(steps: list[tuple[str, Hosts, list[str]] | str], complete_last: bool) -> None:
    """Every host leads to clusters that exist and have endpoints, no host is there twice, and the way there does not matter."""
    table, held = RoutingTable(), dict[str, Routing]()
    for revision, step in enumerate(steps):
        if isinstance(step, str):
            held.pop(step, None)
            table.apply(RoutingBatch(revision, False, removed=(f"p/{step}",)))
        else:
            app, places, addresses = step
            held[app] = routing(app, *map(at, addresses), hosts=places)
            table.apply(RoutingBatch(revision, False, (held[app],)))
        domains: list[str] = []
        for name in hosts(table):
            message = VirtualHost.FromString(table.resources[Kind.HOST][name].body)
            domains += message.domains
            assert len({route.match.SerializeToString() for route in message.routes}) == len(message.routes)
            assert all(route.route.cluster in table.resources[Kind.CLUSTER] for route in message.routes)
        assert len(set(domains)) == len(domains)
        assert set(table.resources[Kind.CLUSTER]) == set(table.resources[Kind.ENDPOINTS])
        assert {key.split("/")[1] for key in table.resources[Kind.CLUSTER]} <= set(held)
    if complete_last:
        table.apply(RoutingBatch(99, True))
        assert hosts(table) == set()
        assert table.resources[Kind.CLUSTER] == {}
        assert table.problems == ()


def test_an_app_that_sleeps_has_the_activator_while_nothing_of_it_serves_and_never_beside_it() -> None:
    table = RoutingTable()
    asleep = replace(routing("a"), wakes=True)
    for endpoints, expected in (
        ((), ["pipe"]),
        ((at("10.0.0.2"),), ["10.0.0.2"]),
        ((at("10.0.0.2", draining=True), at("10.0.0.3")), ["10.0.0.2", "10.0.0.3"]),
        ((at("10.0.0.2", draining=True),), ["10.0.0.2", "pipe"]),
        ((at("nonsense"),), ["pipe"]),
    ):
        table.apply(RoutingBatch(1, False, (replace(asleep, endpoints=endpoints),)))
        assert {target.cluster for target in table.sleepers()} == {"p/a/80"}
        groups = parsed(table, Kind.ENDPOINTS, "p/a/80", ClusterLoadAssignment).endpoints
        places = [each.endpoint.address for group in groups for each in group.lb_endpoints]
        assert sorted("pipe" if place.pipe.path else place.socket_address.address for place in places) == expected
        assert {group.load_balancing_weight.value for group in groups if group.locality.zone == "asleep"} <= {1}
    table.apply(RoutingBatch(2, False, (replace(asleep, wakes=False),)))
    assert not table.sleepers()
    assert not parsed(table, Kind.ENDPOINTS, "p/a/80", ClusterLoadAssignment).endpoints
    table.apply(RoutingBatch(3, False, (asleep,)))
    table.apply(RoutingBatch(4, False, removed=("p/a",)))
    assert not table.sleepers()


def test_a_handshake_may_last_as_long_as_its_app_may_take_to_wake_and_no_other_waits_longer_to_connect() -> None:
    table = RoutingTable()
    secret, far = IngressRules(instance_tls=InstanceTls(pins=("x",))), replace(at("10.0.0.3"), site="far")
    for rules, wakes, endpoints, expected_s in (
        (secret, True, (), 45.0),
        (secret, True, (at("10.0.0.2"), far), 45.0),
        (secret, False, (at("10.0.0.2"), far), 0.6),
        (IngressRules(), True, (), 0.6),
    ):
        spec = AppSpec(name="a", image="x", ingress=rules, health=Health(start=Seconds(40)))
        table.apply(RoutingBatch(1, False, (replace(routing("a", *endpoints), spec=spec, wakes=wakes),)))
        found = parsed(table, Kind.CLUSTER, "p/a/80", Cluster).connect_timeout
        assert found.seconds + found.nanos / 1e9 == expected_s
