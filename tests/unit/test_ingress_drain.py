"""Draining, against an Envoy and a control plane that say what they are told to, in virtual time."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterable

from control_cell import LoopClock, run_virtual

from atoll.ingress.admin import Requests
from atoll.ingress.drain import INSTANCES_PER_REPORT, Drainer
from atoll.ingress.resources import Name
from atoll.ingress.table import RoutingTable
from atoll.model.errors import DeadlineExceeded, TooLarge
from atoll.model.ports.control_plane import RoutingBatch
from atoll.model.records import Endpoint, Routing
from atoll.model.spec import AppSpec

ENOUGH_S = 5.0


def app(name: str, instances: Iterable[int], *, draining: bool = True) -> Routing:
    """Return an app whose instance `n` is `NAME-n`, at an address of its own."""
    ends = (
        Endpoint(instance=f"{name}-{n}", node="n", address=f"10.{ord(name)}.{n >> 8}.{n & 255}", draining=draining)
        for n in instances
    )
    spec = AppSpec(name=name, image="x")
    return Routing(project="p", app=name, spec=spec, hosts=((f"{name}.test", "/", 80, False),), endpoints=tuple(ends))


class Site:
    """A drainer, and all that it asks."""

    def __init__(self) -> None:
        self.table = RoutingTable()
        self.drainer = Drainer(self.table, self, self, self, ingress="i", clock=LoopClock())
        self.refused: set[str] = set()
        """Clusters that Envoy does not have."""
        self.active: dict[str, int] = {}
        self.reports: list[list[str]] = []
        self.refuse_reports_after = 1_000

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        task = asyncio.create_task(self.drainer.run())
        try:
            yield
        finally:
            task.cancel()
            await asyncio.wait({task})

    def tell(self, *routings: Routing) -> None:
        self.table.apply(RoutingBatch(1, False, routings))
        self.drainer.changed()

    async def applied(self, name: Name, version: str, *, timeout_s: float) -> None:
        if name[1] in self.refused:
            await asyncio.sleep(timeout_s)
            raise DeadlineExceeded("Envoy has not confirmed it")

    async def requests(self, clusters: tuple[str, ...]) -> dict[str, Requests]:
        return {f"{address}:80": Requests(active=count, total=count) for address, count in self.active.items()}

    async def drained(self, ingress: str, instances: list[str]) -> None:
        if len(instances) > INSTANCES_PER_REPORT or len(self.reports) >= self.refuse_reports_after:
            raise TooLarge("that is too much")
        self.reports.append(list(instances))

    @property
    def drained_instances(self) -> list[str]:
        return [id for report in self.reports for id in report]


def test_more_instances_than_fit_into_a_report_are_told_in_several_and_each_once() -> None:
    async def main() -> None:
        site = Site()
        count = 2 * INSTANCES_PER_REPORT + 5
        site.tell(app("a", range(count)))
        site.refuse_reports_after = 1
        async with site.running():
            await asyncio.sleep(ENOUGH_S)
            assert len(site.drained_instances) == INSTANCES_PER_REPORT
            site.refuse_reports_after = 1_000
            await asyncio.sleep(ENOUGH_S)
            assert sorted(site.drained_instances) == sorted(f"a-{n}" for n in range(count))
            site.tell(app("a", range(count + 1)))
            await asyncio.sleep(ENOUGH_S)
            assert site.reports[-1] == [f"a-{count}"]

    run_virtual(main())


def test_an_app_that_envoy_refused_holds_up_no_other_and_is_not_said_to_have_drained() -> None:
    async def main() -> None:
        site = Site()
        site.refused = {"p/a/80"}
        site.active = {"10.99.0.0": 1}
        site.tell(app("a", range(20)), app("b", range(3)), app("c", range(2)))
        async with site.running():
            await asyncio.sleep(ENOUGH_S)
            assert sorted(site.drained_instances) == ["b-0", "b-1", "b-2", "c-1"]
            site.active = {}
            await asyncio.sleep(ENOUGH_S)
            assert sorted(site.drained_instances) == ["b-0", "b-1", "b-2", "c-0", "c-1"]
            site.refused = set()
            await asyncio.sleep(ENOUGH_S)
            assert len(site.drained_instances) == 25

    run_virtual(main())
