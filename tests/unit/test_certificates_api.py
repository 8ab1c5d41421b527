"""Certificates over the API: who may add which, what comes out and what never does, and what ingresses are told."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

import httpx
import pytest
from cryptography import x509

from atoll.api.http.app import create_app
from atoll.api.service import KINDS, SYSTEM, Service
from atoll.model import codec, keys
from atoll.model.certificates import AcmeRequest, CertificateBatch, CertificateRequest, ChallengeAnswer
from atoll.model.chains import check_chain
from atoll.model.errors import Invalid
from atoll.model.ports.clock import SystemClock
from atoll.model.records import Ingress, Role, RouteClaim
from atoll.model.records.certificate import AcmeSettings, Certificate, CertificatePhase, CertificateSource, CertificateStatus
from atoll.model.spec import AppSpec, IngressRules, Issuer, Port, Route
from atoll.model.views import TokenRequest
from atoll.store.cache import State
from atoll.store.memory import MemoryStore
from made_certificates import Maker

MAKER = Maker()
ALL = "/v1/projects/default/certificates"


class Api:
    def __init__(self, service: Service, client: httpx.AsyncClient) -> None:
        self.service = service
        self.client = client
        self.tokens: dict[str, str] = {}

    async def mint(self, name: str, role: Role, project: str = "*", subject: str = "") -> None:
        view = await self.service.tokens.create(SYSTEM, TokenRequest(name=name, role=role, project=project, subject=subject))
        assert view.token is not None
        self.tokens[name] = view.token

    async def call(self, method: str, path: str, body: Any = None, *, who: str = "admin") -> httpx.Response:
        content = json.dumps(body).encode() if body is not None else None
        return await self.client.request(
            method, path.replace("*", "%2A"), content=content, headers={"authorization": f"Bearer {self.tokens[who]}"}
        )

    async def add(self, host: str, *, who: str = "admin", project: str = "default", **more: Any) -> httpx.Response:
        chain, key = MAKER.sign(host)
        path = f"/v1/projects/{project}/certificates/{host}"
        return await self.call("PUT", path, {"chain": chain, "key": key, **more}, who=who)

    async def refused(self, response: httpx.Response) -> tuple[int, str, str]:
        error = response.json()["error"]
        return response.status_code, error.get("field") or "", error["message"]

    async def put(self, key: str, record: object) -> None:
        await self.service.context.reach(await self.service.context.store.put(key, codec.encode(record)))


@pytest.fixture
async def api() -> AsyncIterator[Api]:
    clock = SystemClock()
    store = MemoryStore(clock)
    async with (
        State(store, KINDS) as state,
        Service(store, state, clock, random.Random(1), bytes(32), "apps.test") as service,
    ):
        transport = httpx.ASGITransport(create_app(service))  # type: ignore[arg-type]
        async with httpx.AsyncClient(transport=transport, base_url="http://api") as client:
            made = Api(service, client)
            await service.projects.put("team")
            await made.mint("admin", Role.ADMIN)
            await made.mint("deployer", Role.DEPLOY, "default")
            await made.mint("reader", Role.READ, "default")
            await made.mint("stranger", Role.DEPLOY, "team")
            await made.mint("agent", Role.AGENT, subject="n1")
            await made.mint("edge", Role.INGRESS, subject="edge")
            yield made
    await store.close()


async def test_a_certificate_goes_in_is_listed_and_shown_without_its_key(api: Api) -> None:
    chain, key = MAKER.sign("www.test")
    put = await api.call("PUT", f"{ALL}/www.test", {"chain": chain, "key": key}, who="deployer")
    assert put.status_code == 200
    shown = (await api.call("GET", f"{ALL}/www.test", who="reader")).json()
    assert shown["chain"] == chain
    assert shown["names"] == ["www.test"]
    assert shown["state"] == "valid"
    listed = await api.call("GET", ALL, who="reader")
    assert [one["host"] for one in listed.json()["items"]] == ["www.test"]
    body = key.split("\n")[1]
    stored = await api.service.context.store.get(keys.certificate("www.test"))
    assert stored is not None
    for text in (put.text, json.dumps(shown), listed.text, stored.value.decode()):
        assert body not in text
        assert "PRIVATE" not in text


async def test_what_no_ingress_could_show_is_refused_and_changes_nothing(api: Api) -> None:
    chain, key = MAKER.sign("a.test")
    other = MAKER.sign("a.test")[1]
    assert (await api.call("PUT", f"{ALL}/a.test", {"chain": chain, "key": key})).status_code == 200
    before = (await api.call("GET", f"{ALL}/a.test")).json()
    for body, field in (
        ({"chain": chain, "key": other}, "key"),
        ({"chain": MAKER.sign("b.test")[0], "key": key}, "key"),
        ({"chain": "x", "key": key}, "chain"),
        ({}, "chain"),
        ({"source": "own", "chain": chain, "key": key}, "chain"),
        ({"source": "acme"}, "source"),
    ):
        status, named, message = await api.refused(await api.call("PUT", f"{ALL}/a.test", body))
        assert (status, named) == (400, field), message
    assert (await api.call("GET", f"{ALL}/a.test")).json() == before
    assert (await api.refused(await api.call("PUT", f"{ALL}/a_b", {"chain": chain, "key": key})))[:2] == (400, "host")
    assert (await api.refused(await api.call("PUT", f"{ALL}/*.a.test", {"source": "acme"})))[:2] == (400, "host")


async def test_a_hostname_of_another_project_is_refused_and_its_owner_named_to_who_may_see_it(api: Api) -> None:
    assert (await api.add("ours.test")).status_code == 200
    status, field, message = await api.refused(await api.add("ours.test", who="stranger", project="team"))
    assert (status, field) == (409, "host")
    assert "another project" in message
    assert "default" not in message
    assert "project 'default'" in (await api.refused(await api.add("ours.test", project="team")))[2]
    await api.put(keys.route("claimed.a.test", "/"), RouteClaim(project="default", app="web"))
    assert (await api.refused(await api.add("claimed.a.test", who="stranger", project="team")))[0] == 409
    # A wildcard would be shown for what others own below it.
    assert (await api.refused(await api.add("*.a.test", who="stranger", project="team")))[0] == 409
    assert (await api.add("*.elsewhere.test", who="stranger", project="team")).status_code == 200
    # And a hostname that a wildcard of another's app leads.
    await api.put(keys.route("*.wild.test", "/"), RouteClaim(project="default", app="web"))
    assert (await api.refused(await api.add("a.b.wild.test", who="stranger", project="team")))[0] == 409
    # A part of a path or of a name is not the hostname itself.
    assert (await api.add("unclaimed.a.test", who="stranger", project="team")).status_code == 200


async def test_under_the_cells_domain_each_project_has_its_part(api: Api) -> None:
    assert (await api.add("web.apps.test")).status_code == 200
    assert (await api.add("*.apps.test")).status_code == 200
    assert (await api.add("web.team.apps.test", who="stranger", project="team")).status_code == 200
    assert (await api.add("*.team.apps.test", who="stranger", project="team")).status_code == 200
    for host, project in (("web.apps.test", "team"), ("*.apps.test", "team"), ("x.team.apps.test", "default")):
        assert (await api.add(host, project=project)).status_code in (403, 409)


async def test_only_a_token_for_all_projects_may_share_a_certificate(api: Api) -> None:
    assert (await api.refused(await api.add("*.shared.test", who="deployer", shared=True)))[:2] == (403, "shared")
    await api.put(keys.route("app.shared.test", "/"), RouteClaim(project="team", app="web"))
    assert (await api.add("*.shared.test", shared=True)).status_code == 200


async def test_only_ingresses_are_told_of_keys(api: Api) -> None:
    await api.add("a.test")
    for who in ("admin", "deployer", "reader", "agent"):
        response = await api.call("GET", "/v1/ingresses/edge/certificates", who=who)
        assert response.status_code == 403
        assert "PRIVATE" not in response.text
    assert (await api.call("GET", "/v1/ingresses/other/certificates", who="edge")).status_code == 403


async def test_readers_add_nothing_and_strangers_see_nothing(api: Api) -> None:
    assert (await api.add("a.test", who="reader")).status_code == 403
    assert (await api.add("a.test")).status_code == 200
    assert (await api.call("GET", f"{ALL}/a.test", who="stranger")).status_code == 403
    assert (await api.call("GET", "/v1/projects/team/certificates/a.test", who="stranger")).status_code == 404
    assert (await api.call("DELETE", "/v1/projects/team/certificates/a.test", who="stranger")).status_code == 404
    assert (await api.call("DELETE", f"{ALL}/a.test", who="deployer")).status_code == 200
    assert (await api.call("GET", f"{ALL}/a.test")).status_code == 404


async def test_a_list_goes_by_pages(api: Api) -> None:
    for number in range(5):
        await api.add(f"h{number}.test")
    first = (await api.call("GET", f"{ALL}?limit=3")).json()
    second = (await api.call("GET", f"{ALL}?limit=3&after={first['next']}")).json()
    assert [one["host"] for one in (*first["items"], *second["items"])] == [f"h{number}.test" for number in range(5)]
    assert "next" not in second or second["next"] is None


async def following(api: Api, batches: int, changes: Any) -> list[CertificateBatch]:
    """Return so many batches, having made `changes` after the first complete one."""
    found: list[CertificateBatch] = []
    async with asyncio.timeout(30), aclosing(api.service.certificate_feeds.certificates("edge")) as feed:  # type: ignore[type-var]
        async for batch in feed:
            found.append(batch)
            if batch.complete:
                await changes()
            if len(found) == batches:
                break
    return found


async def test_an_ingress_is_told_of_everything_then_of_each_change(api: Api) -> None:
    await api.add("a.test")

    async def changes() -> None:
        await api.add("b.test")

    first, second = await following(api, 2, changes)
    assert first.complete
    (material,) = first.put
    assert check_chain("a.test", material.chain, material.key, SystemClock().now())
    assert [one.host for one in second.put] == ["b.test"]

    async def removal() -> None:
        await api.call("DELETE", f"{ALL}/a.test")

    first, second = await following(api, 2, removal)
    assert second.removed == ("a.test",)


async def test_many_certificates_are_told_in_parts_and_the_last_part_is_complete(api: Api) -> None:
    chain, key = MAKER.sign("*.many.test")
    sealer = api.service.context.sealer
    for number in range(1_200):
        host = f"h{number:04d}.many.test"
        record = Certificate(
            host=host,
            project="default",
            source=CertificateSource.FILE,
            chain=chain,
            sealed=sealer.seal(key.encode(), keys.certificate(host)),
            updated_at=0.0,
        )
        await api.service.context.store.put(keys.certificate(host), codec.encode(record))
    await api.service.context.reach(await api.service.context.store.revision())

    async def nothing() -> None: ...

    found = await following(api, 3, nothing)
    assert [batch.complete for batch in found] == [False, False, True]
    hosts = {material.host for batch in found for material in batch.put}
    assert len(hosts) == 1_200
    assert set(found[-1].kept) | {material.host for material in found[-1].put} == hosts


async def test_a_key_that_was_sealed_for_another_place_is_never_told(api: Api) -> None:
    chain, key = MAKER.sign("a.test")
    moved = api.service.context.sealer.seal(key.encode(), keys.certificate("b.test"))
    record = Certificate(host="a.test", project="default", source=CertificateSource.FILE, chain=chain, sealed=moved, updated_at=0.0)
    await api.put(keys.certificate("a.test"), record)

    async def nothing() -> None: ...

    (only,) = await following(api, 1, nothing)
    assert only.put == ()


async def test_what_the_leader_had_signed_is_told_with_the_answers_to_challenges(api: Api) -> None:
    chain, key = MAKER.sign("acme.test")
    await api.service.certificate_roots.set_acme(AcmeRequest(directory="https://ca.test/dir"))
    await api.service.certificates.put(SYSTEM, "default", "acme.test", CertificateRequest(source=CertificateSource.ACME))
    status = CertificateStatus(
        host="acme.test",
        project="default",
        source=CertificateSource.ACME,
        phase=CertificatePhase.ORDERING,
        challenges={"token": "token.thumb"},
        updated_at=0.0,
    )

    async def begin() -> None:
        await api.put(keys.certificate_status("acme.test"), status)

    first, second = await following(api, 2, begin)
    assert (first.put, first.challenges) == ((), ())
    assert second.challenges == (ChallengeAnswer(host="acme.test", token="token", answer="token.thumb"),)
    place = keys.certificate_status("acme.test")
    sealed = api.service.context.sealer.seal(key.encode(), place)
    done = CertificateStatus(
        host="acme.test",
        project="default",
        source=CertificateSource.ACME,
        phase=CertificatePhase.VALID,
        chain=chain,
        sealed=sealed,
        updated_at=0.0,
    )

    async def finish() -> None:
        await api.put(place, done)

    _, second = await following(api, 2, finish)
    assert [material.host for material in second.put] == ["acme.test"]
    assert second.challenges == ()
    view = api.service.certificates.get("default", "acme.test")
    assert (view.state, view.source) == (CertificatePhase.VALID, CertificateSource.ACME)


async def test_the_cells_own_root_signs_hostnames_and_is_not_that_of_machines(api: Api) -> None:
    root = (await api.call("GET", "/v1/certificates/root", who="reader")).json()
    assert (await api.call("GET", "/v1/certificates/root")).json() == root
    chain, key = await api.service.certificate_roots.sign("hello.localhost")
    checked = check_chain("hello.localhost", chain, key.decode(), SystemClock().now())
    issuer = x509.load_pem_x509_certificate(root["certificate"].encode())
    x509.load_pem_x509_certificate(checked.chain.encode()).verify_directly_issued_by(issuer)
    await api.service.authorities.ensure()
    assert root["certificate"] not in api.service.authorities.bundle()


async def test_the_acme_authority_is_an_admins_choice_and_its_keys_never_come_out(api: Api) -> None:
    path = "/v1/certificates/acme"
    wish = {
        "directory": "https://ca.test/dir",
        "contact": ["ops@a.test"],
        "eab_kid": "kid",
        "eab_key": "c2VjcmV0LXNlY3JldC1zZWNyZXQ",
    }
    assert (await api.call("PUT", path, wish, who="deployer")).status_code == 403
    put = await api.call("PUT", path, wish)
    assert put.status_code == 200
    got = await api.call("GET", path, who="reader")
    assert got.json()["directory"] == "https://ca.test/dir"
    stored = await api.service.context.store.get(keys.acme_settings())
    assert stored is not None
    for text in (put.text, got.text, stored.value.decode()):
        assert wish["eab_key"] not in text
        assert "PRIVATE" not in text
    for bad, field in (
        ({"directory": "http://ca.test/dir"}, "directory"),
        ({"directory": "https://[x"}, "directory"),
        ({"directory": "https://ca.test:99999/dir"}, "directory"),
        ({"directory": "https://:pw@ca.test/dir"}, "directory"),
        ({"directory": "https://ca.test/dir", "contact": ["nobody"]}, "contact"),
        ({"directory": "https://ca.test/dir", "eab_kid": "k"}, "eab_kid"),
        ({"directory": "https://ca.test/dir", "eab_kid": "k", "eab_key": "?"}, "eab_key"),
        ({"directory": "https://ca.test/dir", "ca": "none"}, "chain"),
    ):
        assert (await api.refused(await api.call("PUT", path, bad)))[:2] == (400, field)
    assert (await api.call("DELETE", path)).status_code == 200
    assert (await api.call("GET", path)).json().get("directory", "") == ""


async def test_an_account_key_lasts_as_long_as_its_directory(api: Api) -> None:
    roots = api.service.certificate_roots

    async def account(directory: str, *contact: str) -> str:
        await roots.set_acme(AcmeRequest(directory=directory, contact=contact))
        stored = await api.service.context.store.get(keys.acme_settings())
        assert stored is not None
        return roots.keys_of(codec.decode(stored.value, AcmeSettings)).account

    first = await account("https://ca.test/dir")
    assert await account("https://ca.test/dir", "new@a.test") == first
    assert await account("https://other.test/dir") != first


async def test_an_app_may_claim_a_hostname_that_another_projects_certificate_names(api: Api) -> None:
    """Hostnames belong to who serves them; the certificate of the other is then shown no more (see the ingress's table)."""
    await api.add("taken.test", who="stranger", project="team")
    spec = AppSpec(name="web", image="x.test/web:1", ports=(Port(port=80),), routes=(Route(host="taken.test"),))
    await api.service.apps.put(SYSTEM, spec)
    held = api.service.context.state.get(RouteClaim, "taken.test/")
    assert held is not None
    assert held.record.project == "default"


async def test_an_app_that_wants_tls_is_named_by_its_https_url_where_the_ingress_speaks_it(api: Api) -> None:
    spec = AppSpec(name="web", image="x.test/web:1", ports=(Port(port=80),), ingress=IngressRules(https_only=True))
    await api.service.control_plane.register_ingress(Ingress(name="edge", http_port=8080))
    assert (await api.service.apps.put(SYSTEM, spec)).urls == ("http://web.apps.test:8080/",)
    await api.service.control_plane.register_ingress(Ingress(name="edge", http_port=8080, https_port=8443))
    assert api.service.apps.get("default", "web").urls == ("https://web.apps.test:8443/",)
    await api.service.control_plane.register_ingress(Ingress(name="edge", http_port=80, https_port=443))
    assert api.service.apps.get("default", "web").urls == ("https://web.apps.test/",)


async def test_an_app_that_asks_for_a_certificate_is_named_by_its_https_url_too_and_first_once_it_is_signed(api: Api) -> None:
    await api.service.control_plane.register_ingress(Ingress(name="edge", http_port=8080, https_port=8443))

    async def urls(issuer: Issuer, *hosts: str) -> tuple[str, ...]:
        routes = tuple(Route(host=host) for host in hosts)
        rules = IngressRules(certificate=issuer)
        spec = AppSpec(name="web", image="x.test/web:1", ports=(Port(port=80),), routes=routes, ingress=rules)
        return (await api.service.apps.put(SYSTEM, spec)).urls

    secure, plain = "https://web.apps.test:8443/", "http://web.apps.test:8080/"
    assert await urls(Issuer.OWN) == (plain, secure)
    signed = CertificateStatus(
        host="web.apps.test", project="default", source=CertificateSource.OWN, chain="x", updated_at=0.0, app="web"
    )
    await api.put(keys.certificate_status("web.apps.test"), signed)
    assert await urls(Issuer.OWN) == (secure, plain)
    assert (await urls(Issuer.ACME, "web.internal"))[-1:] == ("http://web.internal:8080/",), "no authority signs it"


@pytest.mark.parametrize(
    ("domain", "hosts", "refused"),
    [
        ("localhost", (), True),
        ("localhost", ("web.internal", "*.a.test"), True),
        ("localhost", ("web.test",), False),
        ("apps.test", (), False),
    ],
)
async def test_acme_is_refused_to_an_app_none_of_whose_hostnames_a_public_authority_can_sign(
    domain: str, hosts: tuple[str, ...], refused: bool
) -> None:
    store = MemoryStore()
    async with (
        State(store, KINDS) as state,
        Service(store, state, SystemClock(), random.Random(1), bytes(32), domain=domain) as made,
    ):
        routes = tuple(Route(host=host) for host in hosts)
        rules = IngressRules(certificate=Issuer.ACME, https_only=True)
        spec = AppSpec(name="web", image="x.test/web:1", ports=(Port(port=80),), routes=routes, ingress=rules)
        if not refused:
            await made.apps.put(SYSTEM, spec)
            return
        with pytest.raises(Invalid, match=r"web\.localhost") as caught:
            await made.apps.put(SYSTEM, spec)
        assert caught.value.field == "ingress.certificate"
        assert "own" in (caught.value.mend or "")


@pytest.mark.parametrize("source", ["own", "file"])
async def test_a_wildcard_over_a_single_label_is_refused_and_one_over_two_is_not(api: Api, source: str) -> None:
    async def put(host: str) -> httpx.Response:
        return await (api.add(host) if source == "file" else api.call("PUT", f"{ALL}/{host}", {"source": source}))

    status, field, words = await api.refused(await put("*.localhost"))
    assert (status, field) == (400, "host")
    assert "single label" in words
    assert (await put("*.team.localhost")).status_code == 200
