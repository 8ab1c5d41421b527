"""What an ingress says of requests under way: sampled at Envoy, added up, told with what came before where a report is lost."""

from __future__ import annotations

import pytest

from atoll.ingress.fake import FakeRouting
from atoll.ingress.loads import GAP_MAX_S, Loads, Sums, counted
from atoll.ingress.table import RoutingTable
from atoll.model.errors import Unavailable
from atoll.model.ports.control_plane import RoutingBatch
from atoll.model.records import Routing
from atoll.model.spec import AppSpec, Port, Scale
from atoll.model.traffic import AppLoad


class FakeAdmin:
    """Answers as Envoy would of `gauges`: cluster → under way, waiting, ever sent."""

    def __init__(self) -> None:
        self.gauges: dict[str, tuple[int, int, int]] = {}
        self.asked: list[str] = []
        self.away = False

    async def get(self, path: str) -> bytes:
        self.asked.append(path)
        if self.away:
            raise Unavailable("restarting")
        lines = []
        for cluster, (active, pending, total) in self.gauges.items():
            base = f"cluster.{cluster}.upstream_rq"
            lines += [f"{base}_active: {active}", f"{base}_pending_active: {pending}", f"{base}_total: {total}"]
        return "\n".join(lines).encode()


class FakeClock:
    def __init__(self) -> None:
        self.at = 100.0

    def now(self) -> float:
        return 1_000.0 + self.at

    def monotonic(self) -> float:
        return self.at


def routing(app: str, scale: Scale | None) -> Routing:
    more = {} if scale is None else {"scale": scale}
    spec = AppSpec(name=app, image="x", ports=(Port(port=80),), **more)  # type: ignore[arg-type]
    return Routing(project="p", app=app, spec=spec, hosts=((f"{app}.localhost", "/", 80, False),))


class World:
    def __init__(self, *routings: Routing) -> None:
        self.table = RoutingTable()
        self.table.apply(RoutingBatch(1, True, routings))
        self.admin, self.clock, self.control = FakeAdmin(), FakeClock(), FakeRouting()
        self.loads = Loads(self.table, self.admin, self.control, ingress="g", clock=self.clock)

    async def look(self, after_s: float = 1.0, **gauges: tuple[int, int, int]) -> None:
        self.admin.gauges = {self.table.clusters_of(f"p/{app}")[0]: each for app, each in gauges.items()}
        self.clock.at += after_s
        await self.loads.look()


async def test_only_apps_that_scale_by_their_requests_are_asked_about_and_told_of() -> None:
    world = World(
        routing("web", Scale(max=3, concurrency=5)),
        routing("api", Scale(max=3, rps=5)),
        routing("plain", None),
        routing("other", Scale(max=3, cpu=0.5)),
    )
    assert world.table.counted() == {"p/web", "p/api"}
    await world.look(web=(3, 1, 10), api=(0, 0, 7), plain=(9, 9, 9))
    await world.look(web=(5, 1, 16), api=(0, 0, 9), plain=(9, 9, 9))
    await world.loads.tell()
    (report,) = world.control.demands
    assert report.loads == (AppLoad("p/api", 2, 0.0), AppLoad("p/web", 6, 5.0))
    assert (report.uptime_s, report.started, report.apps, report.complete) == (2.0, 1_100.0, (), False)


async def test_without_such_an_app_envoy_is_asked_nothing_and_nothing_is_told() -> None:
    world = World(routing("web", Scale(max=3, concurrency=5)))
    world.table.apply(RoutingBatch(2, False, (routing("web", Scale(max=3, cpu=0.5)),)))
    await world.look()
    await world.loads.tell()
    assert (world.admin.asked, world.control.demands) == ([], [])
    world.table.apply(RoutingBatch(3, False, (routing("web", Scale(max=3, rps=1)),)))
    assert world.table.counted() == {"p/web"}
    world.table.apply(RoutingBatch(4, False, (), ("p/web",)))
    assert world.table.counted() == set()


async def test_a_report_that_is_lost_and_an_envoy_that_is_away_lose_nothing_but_their_own_time() -> None:
    world = World(routing("web", Scale(max=3, concurrency=5)))
    await world.look(web=(2, 0, 0))
    world.control.available = False
    await world.look(web=(2, 0, 5))
    await world.loads.tell()
    world.control.available = True
    world.admin.away = True
    await world.look()
    world.admin.away = False
    await world.look(web=(2, 0, 3))  # it was started anew, and has sent 3 since
    await world.loads.tell()
    (report,) = world.control.demands
    assert report.loads == (AppLoad("p/web", 8, 6.0),)


def test_what_was_under_way_before_a_long_gap_counts_only_for_a_while() -> None:
    sums = Sums()
    sums.add({"a"}, {"a": 4}, {"a": 1}, 0.0)
    sums.add({"a"}, {"a": 4}, {"a": 2}, 1_000.0)
    assert sums.loads() == (AppLoad("a", 1, 4 * GAP_MAX_S),)
    sums.add(set(), {}, {}, 1_001.0)
    assert sums.loads() == ()


@pytest.mark.parametrize("line", [b"", b"nonsense", b"cluster.c.upstream_rq_active: no", b"cluster.other.upstream_rq_active: 5"])
def test_lines_of_others_and_no_numbers_count_as_nothing(line: bytes) -> None:
    assert counted(line + b"\ncluster.c.upstream_rq_total: 2\n", {"c": "p/a"}) == ({}, {"p/a": 2})
