"""Apps that depend on others: written together, started and rolled in order, stopped in reverse."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator

import pytest
from control_cell import Cell, fails, healthy, run_virtual
from msgspec.structs import replace

from atoll.api.service import KINDS, SYSTEM, Service
from atoll.model.errors import Conflict, Invalid
from atoll.model.records import AppPhase
from atoll.model.spec import AppSpec, Disruption, Health, Port, Rollout, Route, Scale
from atoll.model.units import Seconds
from atoll.store.cache import State
from atoll.store.memory import MemoryStore


def app(name: str, *on: str, version: int = 1) -> AppSpec:
    rollout = Rollout(drain=Seconds(1), deadline=Seconds(60))
    return AppSpec(name=name, image=f"x/y:{version}", ports=(Port(port=80),), health=Health(), depends_on=on, rollout=rollout)


class StillClock:
    def now(self) -> float:
        return 1_000_000.0

    def monotonic(self) -> float:
        return 1_000_000.0


@pytest.fixture
async def service() -> AsyncIterator[Service]:
    store, seeded = MemoryStore(StillClock()), random.Random(1)
    async with (
        State(store, KINDS) as state,
        Service(store, state, StillClock(), seeded, bytes(32), entropy=seeded.randbytes) as made,
    ):
        yield made
    await store.close()


async def test_a_group_is_written_in_one_revision(service: Service) -> None:
    view = await service.groups.put(SYSTEM, "default", (app("web", "api"), app("api", "db"), app("db")))
    assert [each.app.name for each in view.apps] == ["web", "api", "db"]
    assert {each.revision for each in view.apps} == {view.revision}
    again = await service.groups.put(SYSTEM, "default", (app("web", "api"), app("api", "db"), app("db")))
    assert {each.revision for each in again.apps} == {view.revision}, "the same again changes nothing"


@pytest.mark.parametrize(
    ("specs", "field", "said"),
    [
        ((app("web", "api"), app("api", "db"), app("db", "web")), "depends_on", "web → api → db → web"),
        ((app("web", "cache"), app("api")), "depends_on[0]", "no app 'cache'"),
        ((app("web"), app("web")), "apps[1].name", "twice"),
        ((app("web"), replace(app("api"), project="other")), "apps[1].project", "other"),
        ((app("web"), replace(app("api"), image=None)), "apps[1].image", "app 'api'"),
        ((app("web"), replace(app("api"), disruption=Disruption())), "apps[1].disruption.max_unavailable", "app 'api'"),
        ((), "apps", "1 to 64"),
    ],
)
async def test_of_a_group_with_a_mistake_nothing_is_written_and_the_mistake_is_named(
    service: Service, specs: tuple[AppSpec, ...], field: str, said: str
) -> None:
    before = await service.context.store.revision()
    with pytest.raises(Invalid) as refused:
        await service.groups.put(SYSTEM, "default", specs)
    assert refused.value.field == field
    assert said in refused.value.message
    assert await service.context.store.revision() == before


async def test_two_apps_of_a_group_cannot_have_one_route(service: Service) -> None:
    routed = [replace(app(name), ports=(Port(port=80),), routes=(Route(host="shop.example"),)) for name in ("a", "b")]
    with pytest.raises(Conflict) as refused:
        await service.groups.put(SYSTEM, "default", tuple(routed))
    assert "shop.example" in refused.value.message
    assert service.apps.all("default", limit=10).items == ()


async def test_what_others_depend_on_is_not_deleted_before_them(service: Service) -> None:
    await service.groups.put(SYSTEM, "default", (app("web", "db"), app("db")))
    with pytest.raises(Conflict) as refused:
        await service.apps.delete("default", "db")
    assert "web depends on" in refused.value.message
    await service.apps.delete("default", "web")
    assert (await service.apps.delete("default", "db")).app.deleting is True
    with pytest.raises(Invalid) as gone:
        await service.apps.put(SYSTEM, app("late", "db"))
    assert "is being deleted" in gone.value.message


async def test_a_dependency_and_a_budget_make_no_release_and_a_rollback_keeps_them(service: Service) -> None:
    await service.apps.put(SYSTEM, app("db"))
    await service.apps.put(SYSTEM, app("web"))
    changed = await service.apps.put(SYSTEM, replace(app("web", "db"), disruption=Disruption(max_unavailable=2)))
    assert (changed.app.release, changed.app.spec.depends_on) == (1, ("db",))
    await service.apps.put(SYSTEM, replace(app("web", "db", version=2), disruption=Disruption(max_unavailable=2)))
    back = await service.apps.rollback(SYSTEM, "default", "web", 1)
    assert (back.app.release, back.app.spec.depends_on, back.app.spec.disruption) == (1, ("db",), Disruption(max_unavailable=2))
    with pytest.raises(Invalid) as refused:
        await service.apps.put(SYSTEM, app("db", "web"))
    assert "db → web → db" in refused.value.message


def running(cell: Cell, *names: str) -> bool:
    statuses = [cell.app_status(name) for name in names]
    return all(status is not None and status.phase is AppPhase.RUNNING for status in statuses)


async def begin(cell: Cell) -> None:
    await cell.add_node("n1")
    cell.lead()
    cell.agents()


def test_apps_start_in_the_order_of_what_they_depend_on() -> None:
    async def main() -> None:
        async with Cell() as cell:
            await begin(cell)
            began: list[str] = []
            cell.watchers.append(lambda: began.extend(i.owner for i in cell.instances() if i.owner not in began))
            for spec in (app("web", "api"), app("api", "db"), app("db")):
                await cell.deploy(spec)
            await cell.until(lambda: (s := cell.app_status("web")) is not None and s.waits_for == ("api",))
            status = cell.app_status("web")
            assert status is not None
            assert (status.phase, status.message) == (AppPhase.DEPLOYING, "release 1 waits for api to be ready")
            await cell.until(lambda: running(cell, "web", "api", "db"))
            assert began == ["db", "api", "web"]
            assert status != cell.app_status("web")

    run_virtual(main())


def test_a_group_rolls_in_order_and_one_that_fails_holds_the_others_at_what_serves() -> None:
    async def main() -> None:
        async with Cell() as cell:
            await begin(cell)
            db, web = await cell.deploy(app("db")), await cell.deploy(app("web", "db"))
            await cell.until(lambda: running(cell, "web", "db"))
            cell.script = lambda instance: (
                fails(instance) if instance.owner == "db" and instance.release == 2 else healthy(instance)
            )
            await cell.deploy(app("db", version=2), release=2)
            await cell.deploy(app("web", "db", version=2), release=2)
            await cell.quiet(200)
            status = cell.app_status("web")
            assert status is not None
            assert (status.phase, status.waits_for, status.ready) == (AppPhase.DEPLOYING, ("db",), 1), "no deadline runs"
            assert {i.release for i in cell.instances() if i.owner == "web"} == {1}
            await cell.deploy(app("db", version=3), release=3)
            await cell.until(lambda: running(cell, "web", "db") and {i.release for i in cell.instances()} == {2, 3})
            assert (db.name, web.name) == ("db", "web")

    run_virtual(main())


def test_an_app_that_serves_is_healed_whatever_becomes_of_what_it_depends_on() -> None:
    async def main() -> None:
        async with Cell() as cell:
            await begin(cell)
            await cell.deploy(app("db"))
            await cell.deploy(app("web", "db"))
            await cell.until(lambda: running(cell, "web", "db"))
            cell.script = lambda instance: fails(instance) if instance.owner == "db" else healthy(instance)
            for instance in cell.instances():
                await cell.report(instance, **dict(fails(instance)[-1][1]), ready=False)
            await cell.until(lambda: not running(cell, "web") and not running(cell, "db"))
            await cell.until(lambda: running(cell, "web"))
            assert [i.owner for i in cell.instances() if (s := cell.status(i)) and s.ready] == ["web"]
            assert not running(cell, "db")

    run_virtual(main())


def test_apps_stop_in_the_reverse_order() -> None:
    async def main() -> None:
        async with Cell() as cell:
            await begin(cell)
            apps = [await cell.deploy(spec) for spec in (app("db"), app("api", "db"), app("web", "api"))]
            await cell.until(lambda: running(cell, "web", "api", "db"))
            gone: list[str] = []

            def look() -> None:
                there = {i.owner for i in cell.instances()}
                gone.extend(name for name in ("db", "api", "web") if name not in there and name not in gone)

            cell.watchers.append(look)
            for each in reversed(apps):
                await cell.change(each, replicas=0)
            await cell.until(lambda: len(gone) == 3)
            assert gone == ["web", "api", "db"]
            for each in apps:
                await cell.change(each, replicas=1)
            await cell.until(lambda: running(cell, "web", "api", "db"))

    run_virtual(main())


def test_an_app_of_replicas_0_is_no_app_to_wait_for_for_ever_without_a_word() -> None:
    async def main() -> None:
        async with Cell() as cell:
            await begin(cell)
            await cell.deploy(replace(app("db"), scale=Scale(replicas=0)), replicas=0)
            await cell.deploy(app("web", "db"))
            await cell.until(lambda: (s := cell.app_status("web")) is not None and s.waits_for == ("db",))
            await cell.quiet(100)
            assert cell.instances() == []

    run_virtual(main())
