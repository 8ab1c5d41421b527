"""A hostname is one project's: its paths, whatever is claimed at once, and with them its certificate."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import aclosing

import pytest

from atoll.api.service import KINDS, SYSTEM, Service
from atoll.model import codec, keys
from atoll.model.certificates import AcmeRequest, CertificateRequest, Material
from atoll.model.errors import Conflict, NotFound
from atoll.model.ports.clock import SystemClock
from atoll.model.ports.store import Delete
from atoll.model.records import RouteClaim, RouteHost
from atoll.model.records.certificate import CertificatePhase, CertificateSource, CertificateStatus
from atoll.model.spec import AppSpec, Port, Route
from atoll.store.cache import State
from atoll.store.memory import MemoryStore
from made_certificates import Maker

MAKER = Maker()


def spec(project: str, *places: str, name: str = "web", image: str = "x.test/web:1") -> AppSpec:
    hosts = (place.partition("/") for place in places)
    routes = tuple(Route(host=host, path=slash + path) for host, slash, path in hosts)
    return AppSpec(name=name, project=project, image=image, ports=(Port(port=80),), routes=routes)


def added(host: str, **more: bool) -> CertificateRequest:
    chain, key = MAKER.sign(host)
    return CertificateRequest(chain=chain, key=key, **more)


async def put(service: Service, key: str, record: object) -> None:
    await service.context.reach(await service.context.store.put(key, codec.encode(record)))


@pytest.fixture
async def service() -> AsyncIterator[Service]:
    clock = SystemClock()
    store = MemoryStore(clock)
    async with (
        State(store, KINDS) as state,
        Service(store, state, clock, random.Random(1), bytes(32), "apps.test") as made,
    ):
        for project in ("a", "b"):
            await made.projects.put(project)
        yield made
    await store.close()


async def test_a_path_of_another_projects_hostname_is_refused_and_of_ones_own_taken(service: Service) -> None:
    await service.apps.put(SYSTEM, spec("a", "shop.example/"))
    with pytest.raises(Conflict, match="belongs to app 'web' in project 'a'"):
        await service.apps.put(SYSTEM, spec("b", "shop.example/zz"))
    assert service.context.state.get(RouteClaim, "shop.example/zz") is None
    await service.apps.put(SYSTEM, spec("a", "shop.example/zz", name="other"))
    await service.certificates.put(SYSTEM, "a", "shop.example", added("shop.example"))


async def test_of_two_projects_that_claim_paths_of_one_hostname_at_once_one_wins(service: Service) -> None:
    wishes = [service.apps.put(SYSTEM, spec(project, f"shop.example/{project}")) for project in ("a", "b")]
    ends = await asyncio.gather(*wishes, return_exceptions=True)
    assert sorted(isinstance(end, Conflict) for end in ends) == [False, True]
    assert len([place for place in service.context.state.records(RouteClaim) if place.startswith("shop.example/")]) == 1


async def test_a_hostname_that_is_given_up_is_free_for_others_and_its_record_is_swept(service: Service) -> None:
    await service.apps.put(SYSTEM, spec("a", "shop.example/", "gone.example/"))
    await service.apps.put(SYSTEM, spec("a"))
    await service.apps.put(SYSTEM, spec("b", "shop.example/zz"))
    await service.housekeeping.sweep()
    await service.context.reach(await service.context.store.revision())
    entered = {host: held.record.project for host, held in service.context.state.records(RouteHost).items()}
    assert entered == {"shop.example": "b", "web.a.apps.test": "a", "web.b.apps.test": "b"}


async def test_a_claim_that_nobody_needs_holds_no_hostname_and_does_not_come_back(service: Service) -> None:
    await put(service, keys.route("shop.example", "/old"), RouteClaim(project="a", app="web"))
    await service.apps.put(SYSTEM, spec("b", "shop.example/"))
    assert service.context.state.get(RouteClaim, "shop.example/old") is None
    with pytest.raises(Conflict, match="project 'b'"):
        await service.apps.put(SYSTEM, spec("a", "shop.example/old"))


async def test_claims_of_an_older_store_count_and_what_shares_a_hostname_there_goes_on(service: Service) -> None:
    store = service.context.store
    await service.apps.put(SYSTEM, spec("a", "shop.example/"))
    await service.apps.put(SYSTEM, spec("b", "tmp.example/"))
    # As a store was written before hostnames had one project.
    await store.txn((), [Delete(keys.ROUTE_HOSTS, prefix=True)])
    held = service.context.state.get(RouteClaim, "shop.example/")
    assert held is not None
    with pytest.raises(Conflict, match="project 'a'"):
        await service.apps.put(SYSTEM, spec("b", "shop.example/zz"))
    await service.apps.put(SYSTEM, spec("a", "shop.example/", image="x.test/web:2"))
    # Two projects on one hostname, from then: both may deploy again, and the shortest path says whose certificate it is.
    await put(service, keys.route("shop.example", "/zz"), RouteClaim(project="b", app="web"))
    await service.certificates.put(SYSTEM, "a", "shop.example", added("shop.example"))
    with pytest.raises(Conflict, match="belongs to project 'a'"):
        await service.certificates.put(SYSTEM, "b", "shop.example", added("shop.example"))
    await service.apps.put(SYSTEM, spec("a", "shop.example/", image="x.test/web:3"))


async def shown(service: Service, host: str) -> Material | None:
    """Return what an ingress that begins now is told of a hostname."""
    found: dict[str, Material] = {}
    async with asyncio.timeout(30), aclosing(service.certificate_feeds.certificates("edge")) as feed:  # type: ignore[type-var]
        async for batch in feed:
            found |= {material.host: material for material in batch.put}
            if batch.complete:
                break
    return found.get(host)


async def test_who_has_the_hostname_replaces_a_certificate_that_another_added_before(service: Service) -> None:
    for host in ("later.example", "*.later.example", "x.later.example"):
        await service.certificates.put(SYSTEM, "b", host, added(host))
    with pytest.raises(Conflict, match="project 'b'"):
        await service.certificates.put(SYSTEM, "a", "later.example", added("later.example"))
    await service.apps.put(SYSTEM, spec("a", "later.example/", "x.later.example/"))
    for host in ("later.example", "*.later.example", "x.later.example"):
        view = await service.certificates.put(SYSTEM, "a", host, added(host), if_match=0 if host == "later.example" else None)
        assert view.project == "a"
        with pytest.raises(NotFound):
            service.certificates.get("b", host)
        with pytest.raises(Conflict, match="project 'a'"):
            await service.certificates.put(SYSTEM, "b", host, added(host))


async def test_what_another_handed_in_is_not_taken_over_with_its_hostname(service: Service) -> None:
    await service.certificates.put(SYSTEM, "b", "later.example", added("later.example"))
    await service.apps.put(SYSTEM, spec("a", "later.example/"))
    await service.certificates.put(SYSTEM, "a", "later.example", CertificateRequest(source=CertificateSource.OWN))
    assert service.certificates.get("a", "later.example").chain == ""
    assert await shown(service, "later.example") is None


async def test_a_shared_certificate_and_one_whose_project_answers_too_are_nobody_elses_to_replace(service: Service) -> None:
    await service.certificates.put(SYSTEM, "default", "*.wide.example", added("*.wide.example", shared=True))
    await service.certificates.put(SYSTEM, "b", "*.both.example", added("*.both.example"))
    await service.apps.put(SYSTEM, spec("b", "b.both.example/"))
    await service.apps.put(SYSTEM, spec("a", "a.wide.example/", "a.both.example/"))
    for host in ("*.wide.example", "*.both.example"):
        with pytest.raises(Conflict):
            await service.certificates.put(SYSTEM, "a", host, added(host))


async def test_what_an_app_had_signed_is_shown_beside_what_another_project_added_before(service: Service) -> None:
    await service.certificates.put(SYSTEM, "b", "later.example", added("later.example"))
    await service.apps.put(SYSTEM, spec("a", "later.example/"))
    chain, key = MAKER.sign("later.example")
    place = keys.certificate_status("later.example")
    sealed = service.context.sealer.seal(key.encode(), place)
    status = CertificateStatus(
        host="later.example",
        project="a",
        source=CertificateSource.OWN,
        app="web",
        phase=CertificatePhase.VALID,
        chain=chain,
        sealed=sealed,
        updated_at=0.0,
    )
    await put(service, place, status)
    material = await shown(service, "later.example")
    assert material is not None
    assert (material.project, material.chain) == ("a", chain)


async def test_the_wait_that_is_left_of_a_removed_certificate_is_seen_only_by_who_adds_it_again(service: Service) -> None:
    status = CertificateStatus(
        host="slow.example",
        project="a",
        source=CertificateSource.ACME,
        phase=CertificatePhase.FAILED,
        attempts=3,
        retry_at=9e9,
        updated_at=0.0,
    )
    await put(service, keys.certificate_status("slow.example"), status)
    assert service.certificates.all("a", limit=10).items == ()
    with pytest.raises(NotFound):
        await service.certificates.remove("a", "slow.example")
    await service.certificate_roots.set_acme(AcmeRequest(directory="https://ca.test/dir"))
    view = await service.certificates.put(SYSTEM, "a", "slow.example", CertificateRequest(source=CertificateSource.ACME))
    assert (view.state, view.retry_at) == (CertificatePhase.FAILED, 9e9)
