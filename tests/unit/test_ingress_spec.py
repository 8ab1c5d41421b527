"""`[ingress]` and `[[routes]]` of a spec: what contradicts itself, or what Envoy would refuse, is refused first, by name."""

from __future__ import annotations

from typing import Any

import pytest
from envoy.config.cluster.v3.cluster_pb2 import Cluster
from envoy.config.core.v3.extension_pb2 import TypedExtensionConfig
from envoy.config.endpoint.v3.endpoint_pb2 import ClusterLoadAssignment
from envoy.config.route.v3.route_components_pb2 import VirtualHost
from envoy.extensions.filters.http.local_ratelimit.v3.local_rate_limit_pb2 import LocalRateLimit
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from atoll.ingress.clusters import SPILL, UDP_SESSIONS_MAX, WHOLE, Nearness, cluster, endpoints, levels_of
from atoll.ingress.hosts import Leg, virtual_host
from atoll.ingress.refused import Refused
from atoll.ingress.resources import BREAKER_MAX, Kind, Target
from atoll.ingress.spill import BACK_S, Spill
from atoll.ingress.table import RoutingTable
from atoll.model import codec
from atoll.model.errors import Invalid
from atoll.model.ports.control_plane import RoutingBatch
from atoll.model.records import Endpoint, Routing, Rule
from atoll.model.spec import AppSpec, IngressRules, Limits, Outliers, Port, Rate, check_app

TARGET = Target("p", "a", 80)


def spec(**more: Any) -> AppSpec:
    made: AppSpec = codec.convert({"name": "a", "image": "x.example/a:1", "ports": [{"port": 80}], **more}, AppSpec)
    check_app(made)
    return made


@pytest.mark.parametrize(
    ("rules", "field"),
    [
        ({"timeout": 0}, "ingress.timeout"),
        ({"timeout": "25h"}, "ingress.timeout"),
        ({"timeout": "1s", "try_timeout": "2s"}, "ingress.try_timeout"),
        ({"retries": 0, "retry_statuses": [503]}, "ingress.retries"),
        ({"body_max": "1B"}, "ingress.body_max"),
        ({"body_max": "2GiB"}, "ingress.body_max"),
        ({"rate": {"requests": 10, "burst": 5}}, "ingress.rate.burst"),
        ({"outliers": {"eject": "6m"}}, "ingress.outliers.eject"),
        ({"sticky": {"cookie": "a b"}}, "ingress.sticky.cookie"),
        ({"sticky": {"ttl": "0s"}}, "ingress.sticky.ttl"),
        ({"request_headers": {"set": {"Host": "x"}}}, "ingress.request_headers.set"),
        ({"request_headers": {"set": {"host": "x"}}}, "ingress.request_headers.set"),
        ({"request_headers": {"set": {"transfer-encoding": "chunked"}}}, "ingress.request_headers.set"),
        ({"request_headers": {"remove": ["x-envoy-retry-on"]}}, "ingress.request_headers.remove"),
        ({"request_headers": {"set": {":path": "/"}}}, "ingress.request_headers.set"),
        ({"response_headers": {"set": {"x-a": "one\r\ntwo: 2"}}}, "ingress.response_headers.set"),
        ({"response_headers": {"set": {f"x-{n}": "" for n in range(33)}}}, "ingress.response_headers.set"),
    ],
)
def test_rules_that_envoy_would_not_take_are_refused_by_field(rules: dict[str, Any], field: str) -> None:
    with pytest.raises(Invalid) as caught:
        spec(ingress=rules)
    assert caught.value.field == field


@pytest.mark.parametrize(
    ("route", "field"),
    [
        ({"headers": {"X-Beta": "1"}}, "routes[0].headers"),
        ({"headers": {"x-beta": "ü"}}, "routes[0].headers"),
        ({"headers": {f"x-{n}": "1" for n in range(17)}}, "routes[0].headers"),
        ({"timeout": 0}, "routes[0].timeout"),
        ({"request_headers": {"set": {"connection": "close"}}}, "routes[0].request_headers.set"),
    ],
)
def test_routes_that_envoy_would_not_take_are_refused_by_field(route: dict[str, Any], field: str) -> None:
    with pytest.raises(Invalid) as caught:
        spec(routes=[{"host": "a.example", **route}])
    assert caught.value.field == field


def test_one_place_may_be_there_for_several_headers_but_not_twice_for_the_same() -> None:
    host = {"host": "a.example", "path": "/api"}
    assert len(spec(routes=[host, {**host, "headers": {"x-a": "1"}}, {**host, "headers": {"x-a": "2"}}]).routes) == 3
    for again in ({"headers": {"x-a": "1"}}, {"headers": {"x-a": "1"}, "path": "/api/"}):
        with pytest.raises(Invalid, match="given twice"):
            spec(routes=[{**host, "headers": {"x-a": "1"}}, {**host, **again}])


def at(address: str, site: str = "local", *, release: int = 1, draining: bool = False) -> Endpoint:
    return Endpoint(instance=f"i-{address}", node="n", site=site, address=address, release=release, draining=draining)


NEAR = Nearness("local", {"ams": 10.0, "iad": 90.0})


def sites(levels: Any) -> list[set[str]]:
    return [{place.site for place in level} for level in levels]


def test_the_own_site_comes_first_then_the_nearest_and_those_that_nobody_knows_last_and_together() -> None:
    places = [at(f"10.0.0.{n}", site) for n, site in enumerate(("x", "iad", "y", "local", "ams"), 1)]
    assert sites(levels_of(places, {}, NEAR)) == [{"local"}, {"ams"}, {"iad"}, {"x", "y"}]
    assert sites(levels_of(places, {}, Nearness("ams"))) == [{"ams"}, {"iad", "local", "x", "y"}]
    assert sites(levels_of(places, {}, NEAR, levels_max=2)) == [{"local"}, {"ams", "iad", "x", "y"}]
    wide = ClusterLoadAssignment.FromString(endpoints(TARGET, places, near=NEAR, wide=2).body)
    assert [group.priority for group in wide.endpoints] == [0, 1, 2]
    assert [len(group.lb_endpoints) for group in wide.endpoints] == [2, 1, 2]


def test_a_site_where_all_drains_is_a_level_with_the_next() -> None:
    places = [at("10.0.0.1", draining=True), at("10.0.0.2", "ams"), at("10.0.0.3", "iad", draining=True)]
    assert sites(levels_of(places, {}, NEAR)) == [{"local", "ams", "iad"}]


def test_a_level_has_every_release_with_a_share() -> None:
    places = [at("10.0.0.1"), at("10.0.0.2", "ams", release=2), at("10.0.0.3", "iad"), at("10.0.0.4", "iad", release=2)]
    assert sites(levels_of(places, {1: 90, 2: 10}, NEAR)) == [{"local", "ams"}, {"iad"}]
    assert sites(levels_of(places, {1: 100, 2: 0}, NEAR)) == [{"local"}, {"ams", "iad"}]
    made = ClusterLoadAssignment.FromString(endpoints(TARGET, places, {1: 90, 2: 10}, near=NEAR).body)
    found = [(group.priority, group.locality.zone, group.load_balancing_weight.value) for group in made.endpoints]
    assert found == [(0, "r1", 90), (0, "r2", 10), (1, "r1", 90), (1, "r2", 10)]
    assert made.policy.overprovisioning_factor.value == WHOLE
    spilled = ClusterLoadAssignment.FromString(endpoints(TARGET, places, near=NEAR).body)
    assert spilled.policy.overprovisioning_factor.value == SPILL


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from("abcdef"), st.integers(1, 3), st.booleans()), max_size=20),
    st.dictionaries(st.integers(1, 3), st.integers(0, 100)),
)
def test_whatever_is_where_every_endpoint_is_in_one_level_and_each_level_serves_what_the_first_does(
    drawn: list[tuple[str, int, bool]], weights: dict[int, int]
) -> None:
    places = [at(f"10.0.0.{n}", site, release=number, draining=off) for n, (site, number, off) in enumerate(drawn, 1)]
    levels = levels_of(places, weights, Nearness("a", {"b": 1.0, "c": 2.0, "d": 3.0}))
    assert sorted(place.address for level in levels for place in level) == sorted(place.address for place in places)
    serving = [{place.release for place in level if not place.draining} for level in levels]
    shares = {number for number, share in weights.items() if share > 0}
    if len(levels) > 1:
        needed = shares & set.union(*serving) if weights else set()
        assert all(found and needed <= found for found in serving)
    made = ClusterLoadAssignment.FromString(endpoints(TARGET, places, weights).body)
    assert sum(len(group.lb_endpoints) for group in made.endpoints) == len(places)


def test_a_site_that_is_about_as_far_as_before_changes_no_order() -> None:
    assert NEAR.holds({"ams": 12.0, "iad": 80.0})
    assert NEAR.holds({"ams": 90.0, "iad": 89.0})
    assert not NEAR.holds({"ams": 90.0, "iad": 40.0})
    assert not NEAR.holds({"ams": 10.0})


def routing(*endpoints: Endpoint, rules: IngressRules | None = None, **more: Any) -> Routing:
    made = AppSpec(name="a", image="x", ports=(Port(port=80),), ingress=rules)
    return Routing(project="p", app="a", spec=made, hosts=(("a.example", "/", 80, False),), endpoints=endpoints, **more)


def told(table: RoutingTable, revision: int, *routings: Routing) -> None:
    table.apply(RoutingBatch(revision, False, routings))


def test_an_app_that_was_at_several_sites_once_keeps_the_cluster_that_it_got_then() -> None:
    table = RoutingTable(NEAR)
    told(table, 1, routing(at("10.0.0.1")))
    alone = table.resources[Kind.CLUSTER]["p/a/80"]
    assert not Cluster.FromString(alone.body).HasField("outlier_detection")
    told(table, 2, routing(at("10.0.0.1"), at("10.0.0.2", "ams")))
    several = table.resources[Kind.CLUSTER]["p/a/80"]
    assert Cluster.FromString(several.body).outlier_detection.consecutive_local_origin_failure.value == 2
    assert Cluster.FromString(several.body).connect_timeout.ToMilliseconds() < 1_000
    told(table, 3, routing(at("10.0.0.1")))
    assert table.resources[Kind.CLUSTER]["p/a/80"] == several


def test_a_cluster_does_not_change_while_something_drains_whose_requests_are_counted_in_it() -> None:
    table = RoutingTable()
    told(table, 1, routing(at("10.0.0.1")))
    before = table.resources[Kind.CLUSTER]["p/a/80"]
    rules = IngressRules(retries=1)
    told(table, 2, routing(at("10.0.0.1", draining=True), at("10.0.0.2"), rules=rules))
    assert table.resources[Kind.CLUSTER]["p/a/80"] == before
    told(table, 3, routing(at("10.0.0.2"), rules=rules))
    assert table.resources[Kind.CLUSTER]["p/a/80"] != before


def test_when_sites_change_places_only_endpoints_of_apps_at_several_are_written() -> None:
    table = RoutingTable(NEAR)
    told(table, 1, routing(at("10.0.0.1", "iad"), at("10.0.0.2", "ams")), replace(routing(at("10.0.0.3")), app="b", hosts=()))
    table.take_changes()
    table.move(Nearness("local", {"ams": 11.0, "iad": 91.0}))
    assert table.take_changes() == set()
    table.move(Nearness("local", {"ams": 90.0, "iad": 10.0}))
    assert table.take_changes() == {(Kind.ENDPOINTS, "p/a/80")}
    made = ClusterLoadAssignment.FromString(table.resources[Kind.ENDPOINTS]["p/a/80"].body)
    assert [group.lb_endpoints[0].metadata.filter_metadata["atoll"].fields["site"].string_value for group in made.endpoints] == [
        "iad",
        "ams",
    ]


def buckets(table: RoutingTable) -> dict[tuple[str, str], tuple[int, int]]:
    made = LocalRateLimit()
    TypedExtensionConfig.FromString(table.resources[Kind.FILTER]["rate"].body).typed_config.Unpack(made)
    return {
        (each.entries[0].key, each.entries[0].value): (each.token_bucket.tokens_per_fill.value, each.token_bucket.max_tokens)
        for each in made.descriptors
    }


def test_limits_come_and_go_with_their_apps_and_a_new_app_without_one_changes_no_bucket() -> None:
    table = RoutingTable()
    told(table, 1, routing(rules=IngressRules(rate=Rate(requests=10, burst=30)), project_rate=100))
    assert buckets(table) == {("app", "p/a"): (10, 30), ("project", "p"): (100, 100)}
    table.take_changes()
    told(table, 2, replace(routing(), app="b", hosts=(("b.example", "/", 80, False),)))
    assert Kind.FILTER not in {kind for kind, _ in table.take_changes()}
    told(table, 3, routing(rules=IngressRules(rate=Rate(requests=20))))
    assert buckets(table) == {("app", "p/a"): (20, 20)}
    table.apply(RoutingBatch(4, False, removed=("p/a",)))
    assert buckets(table) == {}


def test_an_app_s_limits_and_outliers_are_its_cluster_s() -> None:
    table = RoutingTable()
    rules = IngressRules(limits=Limits(connections=7, requests=8, pending=0), outliers=Outliers(failures=3, share=20), retries=1)
    told(table, 1, routing(rules=rules))
    made = Cluster.FromString(table.resources[Kind.CLUSTER]["p/a/80"].body)
    breaker = made.circuit_breakers.thresholds[0]
    assert (breaker.max_connections.value, breaker.max_requests.value, breaker.max_pending_requests.value) == (7, 8, 0)
    assert made.outlier_detection.consecutive_5xx.value == 3
    assert made.outlier_detection.max_ejection_percent.value == 20


@pytest.mark.parametrize(
    ("raw", "connections", "wanted"),
    [
        ("udp", None, UDP_SESSIONS_MAX),
        ("udp", UDP_SESSIONS_MAX + 1, UDP_SESSIONS_MAX),
        ("udp", 7, 7),
        ("tcp", None, BREAKER_MAX),
        ("tcp", UDP_SESSIONS_MAX + 1, UDP_SESSIONS_MAX + 1),
    ],
)
def test_clients_of_a_udp_port_are_bounded_whatever_the_app_allows(raw: str, connections: int | None, wanted: int) -> None:
    rules = IngressRules(limits=Limits(connections=connections)) if connections else None
    made = Cluster.FromString(cluster(replace(TARGET, raw=raw), rules).body)
    assert made.circuit_breakers.thresholds[0].max_connections.value == wanted


def test_a_route_without_rules_says_no_more_than_where_it_leads() -> None:
    made = VirtualHost.FromString(virtual_host("a.example", [("/", (Leg(TARGET),))]).body)
    (route,) = made.routes
    assert not route.route.HasField("retry_policy")
    assert not route.typed_per_filter_config
    assert len(made.SerializeToString()) < 100


def test_of_one_place_the_route_with_the_most_headers_comes_first() -> None:
    table = RoutingTable()
    rules = tuple(Rule(host="a.example", path="/", port=81 + n, headers={f"x-{k}": "1" for k in range(n + 1)}) for n in range(2))
    told(table, 1, replace(routing(), rules=rules))
    made = VirtualHost.FromString(table.resources[Kind.HOST]["http/a.example"].body)
    assert [(route.route.cluster, len(route.match.headers)) for route in made.routes] == [
        ("p/a/82", 2),
        ("p/a/81", 1),
        ("p/a/80", 0),
    ]
    assert set(table.resources[Kind.CLUSTER]) == {"p/a/80", "p/a/81", "p/a/82"}


def test_what_envoy_refused_is_told_of_its_app_until_it_changes() -> None:
    table = RoutingTable()
    told(table, 1, routing(at("10.0.0.1")))
    refused = Refused(table)
    refused.note(table.resources[Kind.HOST]["http/a.example"], "no such thing")
    assert "no such thing" in refused.problems()["p/a"]
    told(table, 2, replace(routing(at("10.0.0.1")), hosts=(("a.example", "/x", 80, False), ("bad host", "/", 80, False))))
    assert refused.problems() == {"p/a": "'bad host' is not a hostname"}
    told(table, 3, routing(at("10.0.0.1")))
    assert refused.problems() == {}


def test_what_envoy_takes_after_all_is_told_no_longer_and_what_it_took_of_another_version_changes_nothing() -> None:
    table = RoutingTable()
    told(table, 1, routing(at("10.0.0.1")))
    refused, newest = Refused(table), table.resources[Kind.HOST]["http/a.example"]
    refused.note(newest, "the port is busy")
    refused.taken(newest._replace(version="older"))
    assert "the port is busy" in refused.problems()["p/a"]
    refused.taken(newest)
    assert refused.problems() == {}


class Active:
    """What Envoy says is under way."""

    def __init__(self) -> None:
        self.active = 0

    async def get(self, path: str) -> bytes:
        return f"cluster.p/a/80.upstream_rq_active: {self.active}\ncluster.p/a/80.upstream_rq_pending_active: 0\n".encode()


class StepClock:
    def __init__(self) -> None:
        self.at = 1_000.0

    def now(self) -> float:
        return self.at

    def monotonic(self) -> float:
        return self.at


async def test_too_much_at_the_nearest_site_goes_on_to_the_next_at_once_and_comes_back_after_a_while() -> None:
    table, admin, clock = RoutingTable(NEAR), Active(), StepClock()
    places = (at("10.0.0.1"), at("10.0.0.2", "ams"), at("10.0.0.3", "iad"))
    told(table, 1, routing(*places, rules=IngressRules(spill=10)))
    spill = Spill(table, admin, clock=clock, changed=lambda: None)

    def priorities() -> list[int]:
        made = ClusterLoadAssignment.FromString(table.resources[Kind.ENDPOINTS]["p/a/80"].body)
        return [group.priority for group in made.endpoints for _ in group.lb_endpoints]

    async def look(active: int, after_s: float = 0.5) -> list[int]:
        clock.at += after_s
        admin.active = active
        await spill.look()
        return priorities()

    assert await look(10) == [0, 1, 2]
    assert await look(11) == [0, 0, 1]
    assert await look(20) == [0, 0, 1]
    assert await look(21) == [0, 0, 0]
    assert await look(500) == [0, 0, 0]
    assert await look(14) == [0, 0, 0]
    assert await look(15, BACK_S) == [0, 0, 0]
    assert await look(14) == [0, 0, 0]
    assert await look(14, BACK_S) == [0, 0, 1]
    assert await look(0) == [0, 0, 1]
    assert await look(0, BACK_S) == [0, 1, 2]
    told(table, 2, routing(places[0]))
    assert await look(500) == [0]


async def test_an_app_that_does_not_say_how_much_is_too_much_stays_at_its_nearest_site() -> None:
    table, admin = RoutingTable(NEAR), Active()
    told(table, 1, routing(at("10.0.0.1"), at("10.0.0.2", "ams")))
    table.take_changes()
    admin.active = 10_000
    await Spill(table, admin, clock=StepClock(), changed=lambda: None).look()
    assert table.take_changes() == set()
