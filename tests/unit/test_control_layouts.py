"""Apps near their users: laid out at once, moved one by one as requests shift, never for less than it costs."""

from __future__ import annotations

import asyncio
from collections import Counter

from control_cell import Cell, run_virtual

from atoll.control.optimiser import QuickOptimiser
from atoll.model import keys
from atoll.model.errors import Unavailable
from atoll.model.records import Event, Ingress, IngressHeartbeat, Instance, RoundTrips, Site
from atoll.model.spec import AppSpec, Placement, Port, Resources, Rollout
from atoll.model.states import Desired
from atoll.model.units import Bytes, Cores, Seconds
from atoll.scheduling.layout import Question
from atoll.scheduling.whereabouts import Layout

GIB = 1 << 30
PLACES = {"ams": (52.31, 4.76), "iad": (38.94, -77.46), "sin": (1.36, 103.99)}


def web(**placement: object) -> AppSpec:
    where = Placement(**{"near": "users", **placement})  # type: ignore[arg-type]
    rollout = Rollout(deadline=Seconds(600), drain=Seconds(5))
    resources = Resources(cpu=Cores(0.1), memory=Bytes(GIB))
    return AppSpec(name="web", image="x", ports=(Port(port=80),), resources=resources, rollout=rollout, placement=where)


def run(cell: Cell) -> list[Instance]:
    return [i for i in cell.instances() if i.desired is Desired.RUN and i.node is not None]


def by_site(cell: Cell) -> dict[str, int]:
    return dict(Counter(str(instance.node).partition("-")[0] for instance in run(cell)))


def ask(cell: Cell, **rates: float) -> None:
    """Let so many requests per second come in at each site."""
    for site in PLACES:
        at = cell.clock.now()
        cell.ingresses[site] = IngressHeartbeat(ingress=site, site=site, at=at, requests={"default/web": rates.get(site, 0.0)})


async def world(cell: Cell, per_site: int = 2) -> None:
    for site, (latitude, longitude) in PLACES.items():
        await cell.put(keys.site(site), Site(name=site, latitude=latitude, longitude=longitude))
        await cell.put(keys.ingress(site), Ingress(name=site, site=site, http_port=1))
        for number in range(per_site):
            await cell.add_node(f"{site}-{number}", site=site)
    cell.agents()
    cell.lead()
    await asyncio.sleep(1)


def test_instances_start_where_requests_come_from_and_the_status_says_so() -> None:
    async def main() -> None:
        async with Cell() as cell:
            ask(cell, ams=300.0, iad=100.0)
            await world(cell)
            await cell.deploy(web(), replicas=4)
            await cell.until(lambda: cell.ready() == 4)
            assert by_site(cell) == {"ams": 3, "iad": 1}
            await cell.until(lambda: (status := cell.app_status()) is not None and status.sites == {"ams": 3, "iad": 1})
            nodes = Counter(instance.node for instance in run(cell))
            assert max(nodes.values()) == 2, "within a site they are even over nodes"

    run_virtual(main())


def test_before_anyone_has_asked_every_site_with_an_ingress_counts_alike() -> None:
    async def main() -> None:
        async with Cell() as cell:
            await world(cell)
            await cell.deploy(web(), replicas=3)
            await cell.until(lambda: cell.ready() == 3)
            assert by_site(cell) == {"ams": 1, "iad": 1, "sin": 1}

    run_virtual(main())


def test_as_requests_shift_instances_follow_one_by_one_and_none_is_missed() -> None:
    async def main() -> None:
        async with Cell() as cell:
            ask(cell, ams=400.0)
            await world(cell, per_site=4)
            await cell.deploy(web(), replicas=4)
            await cell.until(lambda: cell.ready() == 4)
            assert by_site(cell) == {"ams": 4}
            await asyncio.sleep(100)
            least, most = [4], [4]
            cell.watchers.append(lambda: least.append(cell.ready()))
            cell.watchers.append(lambda: most.append(len([i for i in cell.instances() if i.desired is Desired.RUN])))
            ask(cell, ams=100.0, sin=300.0)
            await cell.until(lambda: by_site(cell) == {"ams": 1, "sin": 3} and cell.ready() == 4, 600)
            assert min(least) == 4, "each is replaced before it leaves"
            assert max(most) == 5, "one at a time"
            moved = [held.record for held in cell.state.records(Event).values() if held.record.code == "evacuated"]
            assert len(moved) == 3
            assert all("site sin is nearer to its users" in event.message for event in moved)
            assert await cell.quiet(600) < 30, "and then it stays"
            assert by_site(cell) == {"ams": 1, "sin": 3}

    run_virtual(main())


def test_nothing_moves_for_requests_that_go_up_and_down_a_little() -> None:
    async def main() -> None:
        async with Cell() as cell:
            ask(cell, ams=200.0, iad=200.0)
            await world(cell)
            await cell.deploy(web(), replicas=2)
            await cell.until(lambda: cell.ready() == 2)
            await asyncio.sleep(70)
            ids = {instance.id for instance in run(cell)}
            for turn in range(20):
                wave = 30.0 if turn % 2 else -30.0
                ask(cell, ams=200.0 + wave, iad=200.0 - wave)
                await asyncio.sleep(70)
            assert {instance.id for instance in run(cell)} == ids

    run_virtual(main())


def test_one_more_goes_where_the_layout_has_it_and_a_lost_one_comes_back_at_its_site() -> None:
    async def main() -> None:
        async with Cell() as cell:
            ask(cell, ams=200.0, sin=200.0)
            await world(cell)
            made = await cell.deploy(web(), replicas=2)
            await cell.until(lambda: cell.ready() == 2)
            await cell.change(made, replicas=4)
            await cell.until(lambda: cell.ready() == 4)
            assert by_site(cell) == {"ams": 2, "sin": 2}
            victim = next(str(instance.node) for instance in run(cell) if str(instance.node).startswith("sin"))
            cell.silent.add(victim)
            await cell.until(lambda: all(i.node != victim for i in run(cell)) and cell.ready() == 4, 300)
            assert by_site(cell) == {"ams": 2, "sin": 2}

    run_virtual(main())


def test_where_a_site_is_full_the_rest_goes_to_the_next_nearest_and_stays_there() -> None:
    async def main() -> None:
        async with Cell() as cell:
            ask(cell, iad=500.0)
            await world(cell, per_site=1)
            await cell.deploy(web(), replicas=10)
            await cell.until(lambda: cell.ready() == 10)
            assert by_site(cell) == {"iad": 8, "ams": 2}  # 8 GiB each
            ids = {instance.id for instance in run(cell)}
            await asyncio.sleep(600)
            assert {instance.id for instance in run(cell)} == ids

    run_virtual(main())


def test_a_new_leader_goes_on_from_the_layout_in_the_status() -> None:
    async def main() -> None:
        async with Cell() as cell:
            ask(cell, ams=300.0, iad=100.0)
            await world(cell)
            await cell.deploy(web(), replicas=4)
            await cell.until(lambda: (status := cell.app_status()) is not None and status.sites == {"ams": 3, "iad": 1})
            ids = {instance.id for instance in run(cell)}
            cell.stop_leading()
            await asyncio.sleep(20)
            cell.lead("another")
            await asyncio.sleep(300)
            assert {instance.id for instance in run(cell)} == ids

    run_virtual(main())


class Broken(QuickOptimiser):
    def __init__(self) -> None:
        self.asked = 0

    async def solve(self, question: Question) -> Layout:
        self.asked += 1
        raise Unavailable("no")


def test_without_an_optimiser_the_quick_layout_stands_and_it_is_asked_again_by_and_by() -> None:
    async def main() -> None:
        async with Cell() as cell:
            broken = cell.optimiser = Broken()
            ask(cell, ams=300.0, iad=100.0)
            await world(cell)
            await cell.deploy(web(), replicas=4)
            await cell.until(lambda: cell.ready() == 4)
            await asyncio.sleep(300)
            assert by_site(cell) == {"ams": 3, "iad": 1}
            assert 3 <= broken.asked <= 8

    run_virtual(main())


def test_a_bound_that_no_site_keeps_is_explained_and_measured_round_trips_change_the_answer() -> None:
    async def main() -> None:
        async with Cell() as cell:
            ask(cell, sin=100.0)
            await world(cell)
            await cell.put(keys.site("sin"), Site(name="sin", latitude=1.36, longitude=103.99))
            for number in range(2):
                await cell.put(keys.node_policy(f"sin-{number}"), _cordoned(f"sin-{number}"))
            await cell.deploy(web(latency_max=Seconds(0.1)), replicas=1)
            await cell.until(lambda: any(i.rejection is not None for i in cell.instances()))
            rejection = cell.instances()[0].rejection
            assert rejection is not None
            assert rejection.code == "no-latency"
            assert "farther than 100ms from 1% of its users" in rejection.message
            assert "the nearest of these is" in rejection.mend
            await cell.put(keys.round_trips("sin"), RoundTrips(ingress="sin", site="sin", ms={"ams": 80.0}, at=0.0))
            await cell.until(lambda: cell.ready() == 1)
            assert by_site(cell) == {"ams": 1}

    run_virtual(main())


def _cordoned(name: str) -> object:
    from atoll.model.records import NodePolicy

    return NodePolicy(name=name, cordoned=True)
