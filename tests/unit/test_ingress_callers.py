"""What ingresses show to instances that ask who calls: who signs it, what it is good for, its renewal, what Envoy is told."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import AsyncIterator
from contextlib import aclosing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import msgspec
import pytest
from cryptography import x509
from cryptography.x509.oid import ExtendedKeyUsageOID
from envoy.config.cluster.v3.cluster_pb2 import Cluster
from envoy.extensions.transport_sockets.tls.v3.secret_pb2 import Secret
from envoy.extensions.transport_sockets.tls.v3.tls_pb2 import UpstreamTlsContext
from envoy.service.discovery.v3.discovery_pb2 import DeltaDiscoveryRequest

from atoll.api.http.app import create_app
from atoll.api.service import KINDS, SYSTEM, Service, signing
from atoll.api.service.callers import LIFE_S, CallerAuthority
from atoll.ingress import clusters
from atoll.ingress.callers import RENEW_AT, Shown
from atoll.ingress.certificates import CertificateTable, secret
from atoll.ingress.delta import DeltaSession, Verdicts
from atoll.ingress.resources import SHOWN, Kind, Resource, Target
from atoll.model import codec, keys
from atoll.model.certificates import CallerCertificate, CallerRequest, CertificateBatch, Material
from atoll.model.errors import Invalid, Unauthenticated, Unavailable
from atoll.model.membership import MemberKind, uri_of
from atoll.model.ports.control_plane import RoutingBatch
from atoll.model.records import Assignment, Instance, OwnerKind, Role, Routing
from atoll.model.spec import (
    CALLER_CA,
    CALLER_CA_DIRECTORY,
    AppSpec,
    Health,
    HealthKind,
    IngressRules,
    InstanceTls,
    Port,
    PortProtocol,
    Volume,
    check_app,
)
from atoll.model.views import TokenRequest
from atoll.node.compose import env_of
from atoll.node.directories import Directories
from atoll.store.cache import State
from atoll.store.memory import MemoryStore
from made_certificates import Maker

MAKER = Maker()
MUTUAL = IngressRules(instance_tls=InstanceTls(ca=MAKER.pem, mutual=True))


class Time:
    """A clock that is set."""

    def __init__(self) -> None:
        self.at = 1_800_000_000.0

    def now(self) -> float:
        return self.at

    def monotonic(self) -> float:
        return self.at


def app(name: str = "web", rules: IngressRules | None = MUTUAL, **more: Any) -> AppSpec:
    return AppSpec(name=name, image="host.example/a:1", ports=(Port(port=443),), ingress=rules, **more)


def routing(name: str = "web", rules: IngressRules | None = MUTUAL) -> Routing:
    return Routing(project="default", app=name, spec=app(name, rules), hosts=())


class Cell:
    """A cell's authority for callers, and one ingress that asks it."""

    def __init__(self, service: Service, clock: Time) -> None:
        self.service, self.clock = service, clock
        self.shown: list[Resource] = []
        self.away = False
        self.asked: list[str] = []
        self.ingress = Shown(self, ingress="edge", clock=clock, changed=self.shown.append)

    async def certify_caller(self, ingress: str, request: CallerRequest) -> CallerCertificate:
        if self.away:
            raise Unavailable("no server answers")
        self.asked.append(request.csr)
        return await self.service.callers.certify(ingress, request)

    def certificate(self) -> x509.Certificate:
        """Return what is shown now."""
        message = Secret.FromString(self.shown[-1].body)
        return x509.load_pem_x509_certificate(message.tls_certificate.certificate_chain.inline_string.encode())


@pytest.fixture
async def cell() -> AsyncIterator[Cell]:
    clock = Time()
    store = MemoryStore(clock)
    async with State(store, KINDS) as state, Service(store, state, clock, random.Random(1), bytes(32), "apps.test") as service:
        yield Cell(service, clock)
    await store.close()


async def test_it_is_for_clients_only_names_the_ingress_and_is_by_an_authority_that_no_machine_is_known_by(cell: Cell) -> None:
    await cell.service.authorities.ensure()
    await cell.ingress.step()
    found = cell.certificate()
    root = await cell.service.callers.ensure()
    found.verify_directly_issued_by(x509.load_pem_x509_certificate(root.certificate.encode()))
    uses = found.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert list(uses) == [ExtendedKeyUsageOID.CLIENT_AUTH]
    names = found.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert [str(name.value) for name in names] == ["spiffe://main/caller/edge"]
    assert not any(str(name.value).startswith(uri_of(kind, "")) for name in names for kind in MemberKind)
    assert found.not_valid_after_utc.timestamp() == cell.clock.at + LIFE_S
    # The authorities that servers take machines' certificates by do not have it, and the other way round.
    pem = cell.shown[-1].body
    text = Secret.FromString(pem).tls_certificate.certificate_chain.inline_string
    trusted = [held.record.certificate for held in cell.service.authorities.trusted()]
    assert trusted
    assert root.certificate not in trusted
    with pytest.raises(Unauthenticated, match="no authority that this cell trusts"):
        signing.proved(text, trusted, b"", b"")
    assert (await cell.service.certificate_roots.ensure()).certificate != root.certificate


async def test_the_authority_is_one_and_its_key_is_sealed(cell: Cell) -> None:
    first, second = await asyncio.gather(cell.service.callers.ensure(), cell.service.callers.ensure())
    assert first == second
    stored = await cell.service.context.store.get(keys.certificate_root("callers"))
    assert stored is not None
    assert b"PRIVATE" not in stored.value
    assert cell.service.context.sealer.open(first.sealed, keys.certificate_root("callers")).startswith(b"-----BEGIN PRIVATE")


async def test_only_the_ingress_itself_is_certified(cell: Cell) -> None:
    transport = httpx.ASGITransport(create_app(cell.service))  # type: ignore[arg-type]
    tokens = {}
    for name, role, subject in (("admin", Role.ADMIN, ""), ("agent", Role.AGENT, "n1"), ("edge", Role.INGRESS, "edge")):
        view = await cell.service.tokens.create(SYSTEM, TokenRequest(name=name, role=role, project="*", subject=subject))
        tokens[name] = view.token
    await cell.ingress.step()
    body = json.dumps({"csr": cell.asked[0]})
    async with httpx.AsyncClient(transport=transport, base_url="http://api") as client:

        async def ask(ingress: str, who: str, content: str = body) -> httpx.Response:
            headers = {"authorization": f"Bearer {tokens[who]}"}
            return await client.post(f"/v1/ingresses/{ingress}/caller", content=content, headers=headers)

        assert (await ask("edge", "edge")).status_code == 200
        for ingress, who in (("edge", "agent"), ("edge", "admin"), ("other", "edge")):
            assert (await ask(ingress, who)).status_code == 403
        refused = await ask("edge", "edge", json.dumps({"csr": "x"}))
        assert (refused.status_code, refused.json()["error"]["field"]) == (400, "csr")
        await cell.service.membership.revoke(MemberKind.INGRESS, "edge", SYSTEM)
        assert (await ask("edge", "edge")).status_code in (401, 403)


async def test_it_is_renewed_with_a_new_key_at_a_third_of_its_life_and_the_last_one_serves_while_nobody_answers(cell: Cell) -> None:
    cell.ingress.follow(RoutingBatch(1, True, (routing(),)))
    await cell.ingress.step()
    first = cell.certificate()
    cell.clock.at += LIFE_S * RENEW_AT - 1
    assert await cell.ingress.step() == pytest.approx(1)
    assert len(cell.shown) == 1
    cell.away = True
    cell.clock.at += 2
    waits = [await cell.ingress.step() for _ in range(8)]
    assert waits == sorted(waits)
    assert waits[0] < waits[-1] == 15.0
    assert len(cell.shown) == 1
    assert cell.ingress.problems() == {}, "it is good still"
    cell.clock.at += LIFE_S * (1 - RENEW_AT)
    (words,) = cell.ingress.problems().values()
    assert "has ended" in words
    assert "no server answers" in words
    assert set(cell.ingress.problems()) == {"default/web"}
    cell.away = False
    await cell.ingress.step()
    assert cell.ingress.problems() == {}
    assert cell.certificate().public_key() != first.public_key()


async def test_a_clock_that_goes_back_has_another_made(cell: Cell) -> None:
    await cell.ingress.step()
    cell.clock.at -= 3_600
    await cell.ingress.step()
    assert len(cell.shown) == 2


async def test_only_apps_that_ask_for_it_have_one_asked_for_and_are_told_when_there_is_none(cell: Cell) -> None:
    cell.away = True
    plain = routing("plain", None)
    cell.ingress.follow(RoutingBatch(1, True, (plain,)))
    running = asyncio.create_task(cell.ingress.run())
    await asyncio.sleep(0)
    assert cell.ingress.problems() == {}
    running.cancel()
    await cell.ingress.step()
    assert cell.ingress.problems() == {}, "nobody misses it"
    cell.ingress.follow(RoutingBatch(2, False, (routing("a"), routing("b"))))
    assert {key: "is not there" in words for key, words in cell.ingress.problems().items()} == {
        "default/a": True,
        "default/b": True,
    }
    cell.ingress.follow(RoutingBatch(3, False, (routing("a", None),)))
    assert set(cell.ingress.problems()) == {"default/b"}
    cell.ingress.follow(RoutingBatch(4, True, (), kept=("default/b",)))
    assert set(cell.ingress.problems()) == {"default/b"}, "its record cannot be read now, and what is known holds"
    cell.ingress.follow(RoutingBatch(5, False, removed=("default/b",)))
    assert cell.ingress.problems() == {}


def _context(rules: IngressRules, *, app: str = "web", project: str = "shop") -> tuple[Cluster, UpstreamTlsContext]:
    made = Cluster.FromString(clusters.cluster(Target(project, app, 443), rules).body)
    context = UpstreamTlsContext()
    assert made.transport_socket.typed_config.Unpack(context)
    return made, context


def test_envoy_asks_for_what_it_shows_by_name_and_knows_the_instance_by_the_apps_own_name() -> None:
    _, context = _context(MUTUAL)
    common = context.common_tls_context
    assert [each.name for each in common.tls_certificate_sds_secret_configs] == [SHOWN]
    assert not common.tls_certificates, "no key is in the cluster"
    assert [each.matcher.exact for each in common.validation_context.match_typed_subject_alt_names] == ["web.shop.internal"]
    assert context.sni == "web.shop.internal"
    assert common.validation_context.trusted_ca.inline_string == MAKER.pem
    _, named = _context(IngressRules(instance_tls=InstanceTls(ca=MAKER.pem, name="own.test", mutual=True)))
    assert [each.matcher.exact for each in named.common_tls_context.validation_context.match_typed_subject_alt_names] == [
        "own.test"
    ]
    _, before = _context(IngressRules(instance_tls=InstanceTls(ca=MAKER.pem)))
    assert not before.common_tls_context.tls_certificate_sds_secret_configs
    assert not before.common_tls_context.validation_context.match_typed_subject_alt_names


def test_no_client_can_say_its_name() -> None:
    assert len(SHOWN.encode()) > 255


class Stream:
    """One stream of an Envoy that asks for secrets, of an ingress that has told of `table`."""

    def __init__(self, table: CertificateTable) -> None:
        resources: Any = {**{kind: {} for kind in Kind}, Kind.SECRET: table}
        self.session = DeltaSession(resources, Verdicts(lambda resource, words: None))

    def ask(self, *names: str, known: dict[str, str] | None = None) -> None:
        request = DeltaDiscoveryRequest(type_url=Kind.SECRET, resource_names_subscribe=names, initial_resource_versions=known or {})
        self.session.receive(request)

    def answer(self) -> tuple[dict[str, str], set[str]]:
        """Return what is sent as name → version, and of which names it is said that there is none."""
        sent: dict[str, str] = {}
        none: set[str] = set()
        while (response := self.session.respond(0.0)) is not None:
            sent |= {part.name: part.version for part in response.resources}
            none |= set(response.removed_resources)
            self.session.receive(DeltaDiscoveryRequest(type_url=Kind.SECRET, response_nonce=response.nonce))
        return sent, none


def test_until_there_is_one_envoy_is_told_nothing_of_it_and_keeps_what_it_has_of_an_earlier_process() -> None:
    table = CertificateTable(lambda host: None)
    table.apply(CertificateBatch(1, True, (Material(host="a.test", project="default", chain="c", key="k"),)))
    stream = Stream(table)
    stream.ask(SHOWN, "a.test", known={SHOWN: "of before"})
    sent, none = stream.answer()
    assert (set(sent), none) == ({"a.test"}, set())
    table.shown = secret(SHOWN, "chain", "key")
    stream.session.changed({(Kind.SECRET, SHOWN)})
    assert stream.answer() == ({SHOWN: table.shown.version}, set())
    table.shown = secret(SHOWN, "newer", "key")
    stream.session.changed({(Kind.SECRET, SHOWN)})
    assert stream.answer() == ({SHOWN: table.shown.version}, set())
    assert stream.session.applied((Kind.SECRET, SHOWN)) == table.shown.version
    assert SHOWN not in list(table), "it is no hostname's"


def test_who_makes_up_names_does_not_have_it_let_go_of() -> None:
    from atoll.ingress.held_secrets import SECRETS_MAX, HeldSecrets

    held = HeldSecrets()
    assert not held.ask(SHOWN)
    for number in range(SECRETS_MAX + 5):
        assert held.ask(f"n{number}.test")
    dropped = held.bound(())
    assert dropped == [f"n{number}.test" for number in range(5)]
    assert not held.withholds(SHOWN)


async def test_instances_of_such_an_app_are_handed_the_authority_and_no_others(cell: Cell) -> None:
    state = cell.service.context
    await cell.service.apps.put(SYSTEM, app("web"))
    await cell.service.apps.put(SYSTEM, app("plain", None))
    assert await state.store.get(keys.certificate_root("callers")) is not None, "it is there before the first instance"
    for name in ("web", "plain"):
        instance = Instance(
            id=f"{name}-1", project="default", owner_kind=OwnerKind.APP, owner=name, release=1, node="n1", created_at=0.0
        )
        await state.reach(await state.store.put(keys.instance("default", instance.id), codec.encode(instance)))
    async with asyncio.timeout(30), aclosing(cell.service.feeds.assignments("n1")) as feed:  # type: ignore[type-var]
        batch = await anext(feed)
    told = {assignment.instance.owner: assignment.caller_ca for assignment in batch.put}
    assert told == {"web": (await cell.service.callers.ensure()).certificate, "plain": ""}
    assert codec.decode(codec.encode(batch.put[0]), Assignment) == batch.put[0]


def _assignment(ca: str, rules: IngressRules | None = MUTUAL) -> Assignment:
    instance = Instance(id="web-1", project="default", owner_kind=OwnerKind.APP, owner="web", release=1, node="n1", created_at=0.0)
    return Assignment(instance=instance, workload=app(rules=rules), revision=1, caller_ca=ca)


def test_the_node_shows_it_as_a_file_that_cannot_be_written_and_takes_it_away_with_the_instance(tmp_path: Path) -> None:
    directories = Directories(tmp_path / "data")
    directories.make()
    for ca in ("first", "second"):  # a restart has the newest
        (mount,) = directories.make_trust(_assignment(ca))
        assert (mount.target, mount.read_only) == (CALLER_CA_DIRECTORY, True)
        file = mount.source / "ca.pem"
        assert file.read_text() == ca
        assert file.stat().st_mode & 0o777 == 0o644, "any user inside may read it"
    image: Any = SimpleNamespace(config=SimpleNamespace(env=()))
    assert dict(env_of(_assignment("x"), image, {}, "n1"))["ATOLL_INGRESS_CA"] == CALLER_CA
    directories.remove_instance("web-1")
    assert not mount.source.exists()
    assert directories.make_trust(_assignment("", None)) == []
    assert "ATOLL_INGRESS_CA" not in dict(env_of(_assignment("", None), image, {}, "n1"))
    with pytest.raises(Unavailable):
        directories.make_trust(_assignment(""))


@pytest.mark.parametrize(
    ("more", "field"),
    [
        ({"health": Health(kind=HealthKind.HTTP)}, "health.kind"),
        ({"volumes": (Volume(name="v", path="/etc/atoll/ingress"),)}, "volumes[0].path"),
        ({"volumes": (Volume(name="v", path="/etc"),)}, "volumes[0].path"),
    ],
)
def test_what_would_stand_in_its_way_is_refused(more: dict[str, Any], field: str) -> None:
    with pytest.raises(Invalid) as caught:
        check_app(app(**more))
    assert caught.value.field == field
    check_app(app(rules=None, **more))


def test_checks_that_need_no_certificate_are_taken() -> None:
    check_app(app(health=Health(kind=HealthKind.TCP)))
    ports = (Port(port=443), Port(name="live", port=8081, protocol=PortProtocol.TCP))
    check_app(msgspec.structs.replace(app(health=Health(kind=HealthKind.HTTP, port="live")), ports=ports))


async def test_another_life_is_told_to_the_ingress(cell: Cell) -> None:
    cell.service.callers = CallerAuthority(cell.service.context, life_s=30.0)
    assert await cell.ingress.step() == pytest.approx(10.0)
