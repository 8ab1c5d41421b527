"""Which requests choose a canary: what a spec may say of it, and when there is one to choose."""

from __future__ import annotations

import random
from typing import Any

import pytest
from envoy.config.core.v3.health_check_pb2 import DRAINING, HEALTHY
from envoy.config.endpoint.v3.endpoint_pb2 import ClusterLoadAssignment
from envoy.config.route.v3.route_components_pb2 import VirtualHost
from msgspec import structs

from atoll.api.service import KINDS, SYSTEM, Service
from atoll.api.service.routing import routing_of
from atoll.ingress.resources import Kind
from atoll.ingress.table import RoutingTable
from atoll.model import codec, keys
from atoll.model.errors import Invalid
from atoll.model.ports.clock import SystemClock
from atoll.model.ports.control_plane import RoutingBatch
from atoll.model.records import App, AppPhase, AppStatus, Endpoint, Preview, Routing, Rule
from atoll.model.rollouts import RolloutPhase, RolloutStatus
from atoll.model.spec import AppSpec, CanaryChoice, CanaryStep, IngressRules, Port, Rollout, Strategy, check_app
from atoll.store.cache import State
from atoll.store.memory import MemoryStore


@pytest.mark.parametrize(
    ("canary", "field"),
    [
        ({}, "ingress.canary"),
        ({"header": "x-canary", "cookie": "canary"}, "ingress.canary"),
        ({"header": "X Canary"}, "ingress.canary.header"),
        ({"cookie": "a b"}, "ingress.canary.cookie"),
        ({"cookie": "canary", "value": "a;b"}, "ingress.canary.value"),
        ({"cookie": "canary", "value": ""}, "ingress.canary.value"),
        ({"header": "x-canary", "value": "a\nb"}, "ingress.canary.value"),
    ],
)
def test_what_chooses_nobody_or_cannot_be_sent_is_refused_by_field(canary: dict[str, Any], field: str) -> None:
    value = {"name": "a", "image": "x.test/a:1", "ports": [{"port": 80}], "ingress": {"canary": canary}}
    with pytest.raises(Invalid) as refused:
        check_app(codec.convert(value, AppSpec))
    assert refused.value.field == field


def routing(canary: int, *, draining: bool = False) -> Routing:
    rules = IngressRules(canary=CanaryChoice(header="x-canary"))
    return Routing(
        project="a",
        app="web",
        spec=AppSpec(name="web", image="x", ports=(Port(port=80),), ingress=rules),
        hosts=(("web.test", "/", 80, False),),
        rules=(Rule(host="web.test", path="/", port=80, headers={"x-part": "api"}),),
        endpoints=(
            Endpoint(instance="old", node="n", address="10.0.0.1", release=1),
            Endpoint(instance="new", node="n", address="10.0.0.2", release=2, draining=draining),
        ),
        canary=canary,
    )


def led(table: RoutingTable) -> list[tuple[list[str], str]]:
    """Return for each route the headers that it asks for, and where it leads."""
    host = VirtualHost.FromString(table.resources[Kind.HOST]["http/web.test"].body)
    return [([each.name for each in route.match.headers], route.route.cluster) for route in host.routes]


def test_each_place_leads_to_the_new_release_first_for_who_chooses_it_and_only_while_it_serves() -> None:
    table = RoutingTable()
    table.apply(RoutingBatch(1, True, (routing(2),)))
    plain, new = "a/web/80", "a/web/80/preview"
    assert led(table) == [(["x-part", "x-canary"], new), (["x-part"], plain), (["x-canary"], new), ([], plain)]
    ends = table.resources[Kind.ENDPOINTS]
    assert b"10.0.0.2" in ends[new].body
    assert b"10.0.0.1" not in ends[new].body
    for later in (routing(0), routing(2, draining=True)):
        table.apply(RoutingBatch(2, False, (later,)))
        assert led(table) == [(["x-part"], plain), ([], plain)]


def health(table: RoutingTable, cluster: str) -> dict[str, int]:
    message = ClusterLoadAssignment.FromString(table.resources[Kind.ENDPOINTS][cluster].body)
    ends = [end for group in message.endpoints for end in group.lb_endpoints]
    return {end.endpoint.address.socket_address.address: end.health_status for end in ends}


def test_what_nobody_is_led_to_any_more_is_counted_until_the_last_instance_that_may_be_at_work_by_it_is_gone() -> None:
    table = RoutingTable()
    plain, new = "a/web/80", "a/web/80/preview"
    table.apply(RoutingBatch(1, True, (routing(2),)))
    for revision, later in enumerate((routing(0), routing(0, draining=True), routing(2, draining=True)), 2):
        table.apply(RoutingBatch(revision, False, (later,)))
        assert table.clusters_of("a/web") == (plain, new)
        assert new in table.resources[Kind.CLUSTER]
        # Who comes by a route that Envoy still has goes where all go.
        assert health(table, new) == health(table, plain)
    assert health(table, new) == {"10.0.0.1": HEALTHY, "10.0.0.2": DRAINING}
    gone = structs.replace(routing(0), endpoints=routing(0).endpoints[:1])
    table.apply(RoutingBatch(9, False, (gone,)))
    assert table.clusters_of("a/web") == (plain,)
    assert set(table.resources[Kind.CLUSTER]) == set(table.resources[Kind.ENDPOINTS]) == {plain}


def test_an_instance_that_left_the_preview_hostname_drains_there() -> None:
    table = RoutingTable()
    old, new = routing(0).endpoints
    preview = Preview(host="preview.test", release=2, port=81, endpoints=(new,))
    table.apply(RoutingBatch(1, True, (structs.replace(routing(0), preview=preview),)))
    back = Preview(host="preview.test", release=1, port=81, endpoints=(old,))
    table.apply(RoutingBatch(2, False, (structs.replace(routing(0), preview=back),)))
    assert health(table, "a/web/81/preview") == {"10.0.0.1": HEALTHY, "10.0.0.2": DRAINING}
    moved = structs.replace(back, port=82)
    table.apply(RoutingBatch(3, False, (structs.replace(routing(0, draining=True), preview=moved),)))
    assert table.clusters_of("a/web") == ("a/web/80", "a/web/81/preview", "a/web/82/preview")
    assert health(table, "a/web/81/preview")["10.0.0.2"] == DRAINING
    table.apply(RoutingBatch(4, False, removed=("a/web",)))
    assert table.resources[Kind.CLUSTER] == {}


async def test_there_is_a_release_to_choose_only_while_its_canary_rollout_is_under_way() -> None:
    clock = SystemClock()
    store = MemoryStore(clock)
    async with State(store, KINDS) as state, Service(store, state, clock, random.Random(1), bytes(32), "apps.test") as service:
        await service.projects.put("a")
        rollout = Rollout(strategy=Strategy.CANARY, steps=(CanaryStep(weight=5),))
        rules = IngressRules(canary=CanaryChoice(header="x-canary"))
        spec = AppSpec(name="web", project="a", image="x.test/web:1", ports=(Port(port=80),), rollout=rollout, ingress=rules)
        app = (await service.apps.put(SYSTEM, spec)).app

        async def chosen(status: RolloutStatus, of: App = app) -> int:
            record = AppStatus(project="a", name="web", phase=AppPhase.DEPLOYING, release=2, rollout=status)
            await service.context.reach(await store.put(keys.app_status("a", "web"), codec.encode(record)))
            routing = routing_of(state, of, (), "apps.test")
            assert routing is not None
            return routing.canary

        for phase in RolloutPhase:
            going = RolloutStatus(release=2, stable=1, strategy=Strategy.CANARY, phase=phase, weight=5)
            assert await chosen(going) == (2 if phase.under_way else 0), phase
        assert await chosen(RolloutStatus(release=2, stable=1, strategy=Strategy.BLUE_GREEN)) == 0
        assert await chosen(RolloutStatus(release=1, stable=1, strategy=Strategy.CANARY)) == 0
        unasked = structs.replace(app, spec=structs.replace(app.spec, ingress=None))
        assert await chosen(RolloutStatus(release=2, stable=1, strategy=Strategy.CANARY), unasked) == 0
    await store.close()
