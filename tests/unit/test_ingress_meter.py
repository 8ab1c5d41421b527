"""What Envoy says of each release, as counts that only grow, and as what is reported."""

from __future__ import annotations

import pytest
from envoy.config.cluster.v3.cluster_pb2 import Cluster
from envoy.config.endpoint.v3.endpoint_pb2 import ClusterLoadAssignment
from msgspec import json

from atoll.ingress.fake import FakeRouting
from atoll.ingress.meter import POLL_ALL_S, Meter, counts_in
from atoll.ingress.resources import SLOTS, Kind, zone_of
from atoll.ingress.table import RoutingTable
from atoll.model.errors import Unavailable
from atoll.model.ports.control_plane import RoutingBatch
from atoll.model.records import Endpoint, Preview, Routing
from atoll.model.spec import AppSpec
from atoll.model.traffic import BOUNDS_MS, Counts


class FakeAdmin:
    """Answers as Envoy would of `counts`: (cluster, zone) → requests, errors; every request took 9 ms."""

    def __init__(self) -> None:
        self.counts: dict[tuple[str, str], tuple[int, int]] = {}
        self.asked: list[str] = []

    async def get(self, path: str) -> bytes:
        self.asked.append(path)
        stats: list[object] = []
        histograms = []
        for (cluster, zone), (requests, errors) in self.counts.items():
            base = f"cluster.{cluster}.zone.here.{zone}.upstream_rq_"
            stats += [{"name": base + "completed", "value": requests}, {"name": base + "5xx", "value": errors}]
            buckets = [{"upper_bound": bound, "interval": 0, "cumulative": requests if bound == 10 else 0} for bound in BOUNDS_MS]
            histograms.append({"name": base + "time", "buckets": buckets})
        return json.encode({"stats": [*stats, {"histograms": histograms}]})


class FakeClock:
    at = 100.0

    def now(self) -> float:
        return self.at

    def monotonic(self) -> float:
        return self.at


def at(address: str, release: int, *, draining: bool = False) -> Endpoint:
    return Endpoint(instance=f"i-{address}", node="n", address=address, release=release, draining=draining)


def routing(
    *endpoints: Endpoint, app: str = "web", weights: dict[int, int] | None = None, preview: Preview | None = None
) -> Routing:
    return Routing(
        project="p",
        app=app,
        spec=AppSpec(name=app, image="x"),
        hosts=((f"{app}.localhost", "/", 80, False),),
        endpoints=endpoints,
        weights=weights or {},
        preview=preview,
    )


def assignment(table: RoutingTable, cluster: str) -> dict[str, tuple[int, list[str]]]:
    body = table.resources[Kind.ENDPOINTS][cluster].body
    message = ClusterLoadAssignment.FromString(body)
    return {
        group.locality.zone: (
            group.load_balancing_weight.value,
            [each.endpoint.address.socket_address.address for each in group.lb_endpoints],
        )
        for group in message.endpoints
    }


def test_each_release_is_a_locality_with_its_weight_or_as_many_as_serve() -> None:
    table = RoutingTable()
    there = (at("10.0.0.1", 1), at("10.0.0.2", 1), at("10.0.0.3", 1, draining=True), at("10.0.0.4", 2))
    table.apply(RoutingBatch(1, True, (routing(*there),)))
    assert {zone: weight for zone, (weight, _) in assignment(table, "p/web/80").items()} == {"r1": 2, "r2": 1}
    table.apply(RoutingBatch(2, False, (routing(*there, weights={1: 95, 2: 5}),)))
    assert assignment(table, "p/web/80") == {"r1": (95, ["10.0.0.1", "10.0.0.2", "10.0.0.3"]), "r2": (5, ["10.0.0.4"])}
    table.apply(RoutingBatch(3, False, (routing(*there, weights={1: 100}),)))
    assert assignment(table, "p/web/80")["r2"] == (0, ["10.0.0.4"])
    cluster = Cluster.FromString(table.resources[Kind.CLUSTER]["p/web/80"].body)
    assert cluster.common_lb_config.HasField("locality_weighted_lb_config")
    assert table.take_changes() >= {(Kind.ENDPOINTS, "p/web/80")}


def test_weights_change_endpoints_only() -> None:
    table = RoutingTable()
    table.apply(RoutingBatch(1, True, (routing(at("10.0.0.1", 1), at("10.0.0.2", 2)),)))
    table.take_changes()
    table.apply(RoutingBatch(2, False, (routing(at("10.0.0.1", 1), at("10.0.0.2", 2), weights={1: 50, 2: 50}),)))
    assert table.take_changes() <= {(Kind.ENDPOINTS, "p/web/80")}


def test_a_preview_is_a_host_and_a_cluster_of_its_own_and_goes_again() -> None:
    table = RoutingTable()
    preview = Preview(host="preview--web.localhost", release=2, port=90, endpoints=(at("10.0.0.2", 2),))
    table.apply(RoutingBatch(1, True, (routing(at("10.0.0.1", 1), weights={1: 100, 2: 0}, preview=preview),)))
    assert assignment(table, "p/web/90/preview") == {"r2": (1, ["10.0.0.2"])}
    assert assignment(table, "p/web/80") == {"r1": (100, ["10.0.0.1"])}
    assert "http/preview--web.localhost" in table.resources[Kind.HOST]
    assert [endpoint.instance for _, endpoint in table.draining()] == []
    table.apply(RoutingBatch(2, False, (routing(at("10.0.0.1", 1)),)))
    assert "http/preview--web.localhost" not in table.resources[Kind.HOST]
    assert "p/web/90/preview" not in table.resources[Kind.CLUSTER]


def test_kept_releases_never_share_a_zone() -> None:
    assert len({zone_of(release) for release in range(1_000, 1_000 + SLOTS)}) == SLOTS


async def test_counts_grow_from_when_the_ingress_began_and_go_on_after_envoy_has_died() -> None:
    table, admin, control, clock = RoutingTable(), FakeAdmin(), FakeRouting(), FakeClock()
    meter = Meter(table, admin, control, ingress="g", clock=clock)
    web = ("p/web/80", "r1")
    admin.counts[web] = (500, 50)
    await meter.look()
    table.apply(RoutingBatch(1, True, (routing(at("10.0.0.1", 1), at("10.0.0.2", 2)),)))
    admin.counts |= {web: (510, 51), ("p/web/80", "r2"): (4, 4), ("p/gone/80", "r1"): (9, 9)}
    await meter.look()
    await meter.tell()
    (said,) = control.reports
    assert {each.release: (each.counts.requests, each.counts.errors) for each in said.releases} == {1: (10, 1), 2: (4, 4)}
    assert said.releases[0].counts.quantile_s(0.99) == pytest.approx(0.00997)
    admin.counts = {web: (3, 0)}
    await meter.look()
    await meter.tell()
    assert [each.counts.requests for each in control.reports[-1].releases] == [13]
    await meter.look()
    await meter.tell()
    assert len(control.reports) == 2, "nothing new, nothing told"


async def test_apps_of_one_release_are_looked_at_now_and_then_and_those_of_several_at_once() -> None:
    table, admin, clock = RoutingTable(), FakeAdmin(), FakeClock()
    meter = Meter(table, admin, FakeRouting(), ingress="g", clock=clock)
    table.apply(RoutingBatch(1, True, (routing(at("10.0.0.1", 1)),)))
    await meter.look()
    await meter.look()
    assert len(admin.asked) == 1
    table.apply(RoutingBatch(2, False, (routing(at("10.0.0.1", 1), at("10.0.0.2", 2)), routing(at("10.0.0.3", 1), app="shop"))))
    await meter.look()
    assert "web" in admin.asked[-1]
    assert "shop" not in admin.asked[-1]
    clock.at += POLL_ALL_S
    await meter.look()
    assert "web" not in admin.asked[-1], "all are asked for"


async def test_what_was_not_told_is_told_again_and_a_zone_that_has_a_new_release_counts_for_that() -> None:
    table, admin, control = RoutingTable(), FakeAdmin(), FakeRouting()
    meter = Meter(table, admin, control, ingress="g", clock=FakeClock())
    await meter.look()
    table.apply(RoutingBatch(1, True, (routing(at("10.0.0.1", 1), at("10.0.0.2", 2)),)))
    admin.counts[("p/web/80", "r1")] = (5, 0)
    control.available = False
    await meter.look()
    with pytest.raises(Unavailable):
        await meter.tell()
    control.available = True
    await meter.tell()
    assert [each.counts.requests for each in control.reports[-1].releases] == [5]
    later = 1 + SLOTS
    table.apply(RoutingBatch(2, False, (routing(at("10.0.0.9", later), at("10.0.0.2", 2)),)))
    admin.counts[("p/web/80", "r1")] = (7, 0)
    await meter.look()
    await meter.tell()
    assert [(each.release, each.counts.requests) for each in control.reports[-1].releases] == [(later, 2)]


def test_an_answer_that_is_no_statistics_is_an_error() -> None:
    assert counts_in(b'{"stats": []}') == {}
    with pytest.raises(Unavailable):
        counts_in(b"<html>")
    assert Counts(3, 1).since(Counts(5, 1)) == Counts(3, 1)
