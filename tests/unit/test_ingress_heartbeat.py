"""What an ingress says of its site: rates of requests, round trips, and what the API makes of both."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from typing import Any

import pytest
from control_cell import LoopClock, run_virtual

from atoll.api.service.context import KINDS, Context
from atoll.api.service.ingress_heartbeats import IngressHeartbeats
from atoll.api.service.sealing import Sealer
from atoll.api.service.sites import Sites, check_site
from atoll.ingress.fake import FakeRouting
from atoll.ingress.heartbeat import SOON_S, Heart, app_requests
from atoll.ingress.probe import Prober, own_address
from atoll.ingress.rates import HALF_LIFE_S, Rates
from atoll.model import codec, keys
from atoll.model.errors import Forbidden, Invalid, NotFound, TooLarge, Unavailable
from atoll.model.ports.control_plane import Peer, Peers
from atoll.model.records import Capacity, Ingress, IngressHeartbeat, Node, RoundTrips, Site
from atoll.store.cache import State
from atoll.store.memory import MemoryStore


class StepClock:
    """Stands still until it is moved."""

    def __init__(self) -> None:
        self.at = 1_000_000.0

    def now(self) -> float:
        return self.at

    def monotonic(self) -> float:
        return self.at


def test_rates_settle_at_what_comes_in_and_forget_by_halves() -> None:
    rates = Rates()
    for step in range(61):
        rates.add({"p/a": 50 * step, "p/b": 5 * step}, 10.0 * step)
    assert rates.per_s() == {"p/a": pytest.approx(5.0), "p/b": pytest.approx(0.5)}
    at, last = 600.0, {"p/a": 3000, "p/b": 300}
    rates.add(last, at + HALF_LIFE_S)
    assert rates.per_s()["p/a"] == pytest.approx(5.0 * 0.75 / 1.75, rel=0.01)  # what was before the first look stays unknown


def test_a_counter_that_begins_anew_and_an_app_that_goes_do_no_harm() -> None:
    rates = Rates()
    rates.add({"p/a": 1_000_000}, 0.0)
    rates.add({"p/a": 100}, 10.0)
    assert rates.per_s() == {"p/a": 10.0}
    rates.add({"p/a": 7}, 10.0)  # no time has passed
    for step in range(2, 700):
        rates.add({}, 10.0 * step)
    assert rates.per_s() == {}


def test_all_ports_of_an_app_count_and_those_that_found_no_instance_too() -> None:
    stats = (
        "cluster.shop/web/8080.upstream_rq_total: 12\n"
        "cluster.shop/web/9090/h2.upstream_rq_total: 3\n"
        "cluster.shop/web/8080.upstream_cx_none_healthy: 5\n"
        "cluster.shop/web/8080.zone.here.r1.upstream_rq_completed: 99\n"
        "cluster.shop/api/1.upstream_rq_total: 1\n"
        "cluster.admin.upstream_rq_total: 77\n"
    )
    assert app_requests(stats) == {"shop/web": 20, "shop/api": 1}


class Far:
    """Connections take what they are told to, on a clock that stands still otherwise."""

    def __init__(self, clock: StepClock, ms: dict[str, list[float]]) -> None:
        self.clock = clock
        self.ms = ms
        self.asked: list[str] = []

    async def connect(self, address: str, port: int) -> None:
        self.asked.append(address)
        left = self.ms.get(address)
        if not left:
            raise ConnectionRefusedError
        self.clock.at += left.pop(0) / 1000


async def test_the_shortest_of_three_tries_is_smoothed_and_who_does_not_answer_stays_as_it_was() -> None:
    clock = StepClock()
    far = Far(clock, {"b": [30.0, 20.0, 25.0, 40.0, 41.0, 50.0], "c": [9.0]})
    prober = Prober("here", clock, far)
    peers = [Peer("bee", "b", 80), Peer("cee", "c", 80), Peer("here", "h", 80), Peer("dead", "d", 80)]
    await prober.measure(peers)
    assert prober.round_trips_ms == {"bee": 20.0, "cee": 9.0}
    assert "h" not in far.asked
    await prober.measure(peers)
    assert prober.round_trips_ms == {"bee": pytest.approx(26.0), "cee": 9.0}
    await prober.measure([peers[0]])
    assert set(prober.round_trips_ms) == {"bee"}


async def test_a_round_has_a_bound_and_those_that_waited_longest_come_first() -> None:
    clock = StepClock()
    peers = [Peer(f"s{number:03d}", f"a{number:03d}", 80) for number in range(100)]
    far = Far(clock, {peer.address: [1.0] * 30 for peer in peers})
    prober = Prober("here", clock, far)
    for _ in range(4):
        await prober.measure(peers)
    assert len(prober.round_trips_ms) == 100
    assert len(far.asked) == 4 * 32 * 3


def test_an_address_that_only_this_machine_reaches_is_not_given_out() -> None:
    assert own_address("127.0.0.1") == ""
    assert own_address("::1") == ""
    assert own_address("192.0.2.7") == "192.0.2.7"
    assert own_address("not an address") == ""


class Stats:
    def __init__(self) -> None:
        self.total = 0

    async def get(self, path: str) -> bytes:
        if self.total < 0:
            raise Unavailable("Envoy is away")
        return f"cluster.p/a/80.upstream_rq_total: {self.total}\n".encode()


async def test_a_heartbeat_tells_rates_and_round_trips_and_a_control_plane_that_is_away_loses_nothing() -> None:
    clock, admin, routing = StepClock(), Stats(), FakeRouting()
    prober = Prober("here", clock, Far(clock, {"b": [30.0] * 9}))
    heart = Heart(admin, routing, prober, ingress="i", site="here", clock=clock)
    routing.peers = Peers((Peer("bee", "b", 80),))
    for _ in range(3):
        await heart.beat()
        clock.at += 10.0
        admin.total += 20
    first, *_, last = routing.heartbeats
    assert (first.ingress, first.site, first.requests, first.round_trips_ms) == ("i", "here", {}, {})
    assert last.requests == {"p/a": pytest.approx(2.0, rel=0.02)}
    assert last.round_trips_ms == {"bee": 30.0}
    routing.available = False
    await heart.beat()
    admin.total = -1
    await heart.beat()
    routing.available, admin.total = True, 60
    clock.at += 10.0
    await heart.beat()
    assert len(routing.heartbeats) == 4
    assert routing.heartbeats[-1].round_trips_ms == {"bee": 30.0}


def test_what_an_ingress_cannot_route_is_told_soon_and_a_flood_of_it_no_oftener_than_twice_a_second() -> None:
    async def main() -> tuple[list[float], list[float]]:
        clock, routing = LoopClock(), FakeRouting()
        heart = Heart(Stats(), routing, Prober("here", clock), ingress="i", site="here", clock=clock)
        running = asyncio.create_task(heart.run())
        began = clock.now()
        await asyncio.sleep(3.0)
        heart.tell_soon()
        await asyncio.sleep(4.0)
        quiet = [beat.at - began for beat in routing.heartbeats]
        routing.heartbeats.clear()
        for _ in range(400):
            heart.tell_soon()
            await asyncio.sleep(0.01)
        running.cancel()
        return quiet, [beat.at - began for beat in routing.heartbeats]

    quiet, flooded = run_virtual(main())
    assert quiet == pytest.approx([0.0, 3.0 + SOON_S])
    assert len(flooded) == pytest.approx(4.0 / SOON_S, abs=1)


class Api:
    def __init__(self) -> None:
        self.clock = StepClock()
        self.store = MemoryStore(self.clock)
        self.state = State(self.store, KINDS)

    async def __aenter__(self) -> Api:
        await self.state.start()
        context = Context(self.store, self.state, self.clock, random.Random(1), Sealer(bytes(32)), "localhost")
        self.heartbeats = IngressHeartbeats(context)
        self.sites = Sites(context, self.heartbeats)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.state.close()
        await self.store.close()

    async def put(self, key: str, record: object) -> None:
        await self.state.reach(await self.store.put(key, codec.encode(record)))

    async def ingress(self, name: str, address: str = "") -> None:
        await self.put(keys.ingress(name), Ingress(name=name, site=name, http_port=80, address=address))

    def trips(self, name: str) -> dict[str, float] | None:
        held = self.state.get(RoundTrips, name)
        return held.record.ms if held is not None else None


def told(name: str, **more: Any) -> IngressHeartbeat:
    return IngressHeartbeat(ingress=name, site=name, at=0.0, **more)


async def test_ingresses_are_told_of_those_at_other_sites_that_can_be_reached() -> None:
    async with Api() as api:
        await api.ingress("a", "192.0.2.1")
        await api.ingress("b", "192.0.2.2")
        await api.ingress("c")
        assert (await api.heartbeats.note(told("a"))).peers == (Peer("b", "192.0.2.2", 80),)


async def test_round_trips_are_written_when_they_change_and_not_more_often_than_each_minute() -> None:
    async with Api() as api:
        await api.ingress("a")
        await api.ingress("b")
        await api.ingress("c")
        await api.heartbeats.note(told("a", round_trips_ms={"b": 20.0, "c": 5.0}))
        assert api.trips("a") == {"b": 20.0, "c": 5.0}
        await api.heartbeats.note(told("a", round_trips_ms={"b": 40.0}))
        assert api.trips("a") == {"b": 20.0, "c": 5.0}, "too soon"
        api.clock.at += 61
        revision = await api.store.revision()
        await api.heartbeats.note(told("a", round_trips_ms={"b": 21.0}))
        assert await api.store.revision() == revision, "nearly the same"
        await api.heartbeats.note(told("a", round_trips_ms={"b": 40.0}))
        assert api.trips("a") == {"b": 40.0, "c": 5.0}, "who does not answer is where it was"


async def test_a_silent_ingress_counts_for_an_hour_and_is_forgotten_then() -> None:
    async with Api() as api:
        await api.ingress("a")
        await api.ingress("b")
        await api.heartbeats.note(told("a", requests={"p/x": 3.0}))
        api.clock.at += 3_500
        await api.heartbeats.note(told("b"))
        assert set(api.heartbeats.all()) == {"a", "b"}
        api.clock.at += 200
        await api.heartbeats.note(told("b"))
        assert set(api.heartbeats.all()) == {"b"}


@pytest.mark.parametrize(
    ("beat", "error"),
    [
        (told("nobody"), NotFound),
        (IngressHeartbeat(ingress="a", site="elsewhere", at=0.0), Forbidden),
        (told("a", requests={"p/x": -1.0}), Invalid),
        (told("a", requests={"p/x": float("nan")}), Invalid),
        (told("a", requests={"p/x": 1e12}), Invalid),
        (told("a", requests={f"p/x{n}": 1.0 for n in range(10_001)}), TooLarge),
        (told("a", round_trips_ms={"b": 0.0}), Invalid),
        (told("a", round_trips_ms={"b": float("inf")}), Invalid),
        (told("a", round_trips_ms={f"s{n}": 1.0 for n in range(2_001)}), TooLarge),
    ],
)
async def test_a_heartbeat_that_cannot_be_true_is_refused(beat: IngressHeartbeat, error: type[Exception]) -> None:
    async with Api() as api:
        await api.ingress("a")
        with pytest.raises(error):
            await api.heartbeats.note(beat)
        assert not api.heartbeats.all()


async def test_sites_are_listed_whether_described_or_only_named_and_removed_again() -> None:
    async with Api() as api:
        await api.ingress("ams")
        capacity = Capacity(cpu_milli=1, memory_bytes=1, disk_bytes=1)
        await api.put(keys.node("n"), Node(name="n", site="bare", capacity=capacity))
        made = await api.sites.put(Site(name="fra", country="DE", latitude=50.03, longitude=8.57))
        await api.sites.put(Site(name="ams", country="NL", latitude=52.31, longitude=4.76, round_trips_ms={"bare": 12.0}))
        await api.heartbeats.note(told("ams", requests={"p/a": 2.0, "p/b": 1.5}, round_trips_ms={"fra": 7.25}))
        views = api.sites.all(limit=2)
        assert [view.site.name for view in views.items] == ["ams", "bare"]
        assert views.next == "bare"
        assert [view.site.name for view in api.sites.all(limit=2, after="bare").items] == ["fra"]
        ams = api.sites.get("ams")
        assert ams.round_trips_ms == {"fra": 7.25}
        assert (ams.measured_ms, ams.requests_per_s, ams.ingresses, ams.described) == ({"fra": 7.25}, 3.5, ("ams",), True)
        assert (api.sites.get("bare").nodes, api.sites.get("bare").described) == (1, False)
        assert (await api.sites.put(made.site)).revision == made.revision, "the same again writes nothing"
        assert (await api.sites.remove("fra")).country == "DE"
        with pytest.raises(NotFound):
            api.sites.get("fra")
        with pytest.raises(NotFound):
            await api.sites.remove("fra")


BAD: list[tuple[Callable[[], Site], str]] = [
    (lambda: Site(name="a b"), "name"),
    (lambda: Site(name=""), "name"),
    (lambda: Site(name="a", country="de"), "country"),
    (lambda: Site(name="a", country="ZZ"), "country"),
    (lambda: Site(name="a", region="eu"), "region"),
    (lambda: Site(name="a", region="any"), "region"),
    (lambda: Site(name="a", region="DE"), "region"),
    (lambda: Site(name="a", latitude=1.0), "latitude"),
    (lambda: Site(name="a", latitude=91.0, longitude=0.0), "latitude"),
    (lambda: Site(name="a", latitude=0.0, longitude=float("nan")), "longitude"),
    (lambda: Site(name="a", round_trips_ms={"b": -1.0}), "round_trips_ms"),
    (lambda: Site(name="a", round_trips_ms={"b": float("nan")}), "round_trips_ms"),
    (lambda: Site(name="a", round_trips_ms={"b/c": 1.0}), "round_trips_ms"),
    (lambda: Site(name="a", note="x" * 2_000), "note"),
]


@pytest.mark.parametrize(("make", "field"), BAD)
def test_a_site_that_is_nowhere_is_refused_with_its_field(make: Callable[[], Site], field: str) -> None:
    with pytest.raises(Invalid) as refused:
        check_site(make())
    assert refused.value.field == field
