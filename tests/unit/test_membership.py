"""Who belongs to a cell: join tokens that count once, certificates that are renewed, revoked and outlived by their authority."""

from __future__ import annotations

import asyncio
import errno
import os
import random
import ssl
import struct
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from control_cell import run_virtual
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from msgspec import structs

from atoll.api.service import KINDS, SYSTEM, Service
from atoll.api.service.authorities import LIFE_S, RENEW_LATE_S
from atoll.api.service.heartbeats import REMOVED_S
from atoll.api.service.ingress_heartbeats import ALIVE_S
from atoll.api.service.join_tokens import YOUNG_S, JoinTokens
from atoll.api.service.servers import TOKEN_LIFE_S, check_key
from atoll.api.service.signing import Shown, Subject
from atoll.api.service.standing import Standing
from atoll.entry.config import Config
from atoll.entry.joining import reach
from atoll.entry.process import Stop
from atoll.entry.serving import ServerCertificate, server_id
from atoll.model import codec, keys
from atoll.model.errors import (
    AtollError,
    Conflict,
    Corrupt,
    Forbidden,
    Invalid,
    NotFound,
    Revoked,
    Unauthenticated,
    Unavailable,
    Unsupported,
    VersionSkew,
)
from atoll.model.membership import (
    EARLY_S,
    Authority,
    Certified,
    JoinRequest,
    JoinToken,
    JoinTokenRequest,
    MemberKind,
    RenewRequest,
    Server,
    check_skew,
    join_token,
    renewal_message,
    uri_of,
)
from atoll.model.records import (
    Capacity,
    Event,
    Heartbeat,
    Ingress,
    Instance,
    Node,
    NodeHealth,
    NodeLiveness,
    OwnerKind,
    Role,
    Status,
    Usage,
)
from atoll.model.states import Phase
from atoll.model.views import TokenRequest
from atoll.sdk.http import HttpTransport
from atoll.sdk.membership import LOOK_S, RETRY_MAX_S, Credentials, Held, keep_renewed, wait_s
from atoll.sdk.private_file import write_private
from atoll.sdk.transport import Answer
from atoll.sdk.trust import chosen, fingerprint, pins_of
from atoll.store.cache import State
from atoll.store.lock import unavailable
from atoll.store.memory import MemoryStore


class FakeClock:
    def __init__(self) -> None:
        self.time = 1_700_000_000.0

    def now(self) -> float:
        return self.time

    def monotonic(self) -> float:
        return self.time


class Machine:
    """A new machine with a key of its own."""

    def __init__(self) -> None:
        self.key = ec.generate_private_key(ec.SECP256R1())
        self.certified: Certified | None = None

    def csr(self, key: Any = None) -> str:
        request = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([])).sign(key or self.key, hashes.SHA256())
        return request.public_bytes(serialization.Encoding.PEM).decode()

    def renewal(self, csr: str | None = None, signer: ec.EllipticCurvePrivateKey | None = None) -> RenewRequest:
        assert self.certified is not None
        csr = csr or self.csr(ec.generate_private_key(ec.SECP256R1()))
        proof = (signer or self.key).sign(renewal_message(csr), ec.ECDSA(hashes.SHA256()))
        return RenewRequest(certificate=self.certified.certificate, csr=csr, proof=proof)

    @property
    def shown(self) -> Shown:
        """What TLS would have verified."""
        assert self.certified is not None
        certificate = x509.load_pem_x509_certificate(self.certified.certificate.encode())
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        subject = {one.oid._name: str(one.value) for one in (*certificate.subject, *certificate.issuer) if one.oid._name}
        return Shown(
            uri=names.get_values_for_type(x509.UniformResourceIdentifier)[0],
            enrolment=subject["serialNumber"],
            authority=str(next(iter(certificate.issuer.get_attributes_for_oid(x509.NameOID.COMMON_NAME))).value),
            expires_at=certificate.not_valid_after_utc.timestamp(),
        )


class Cell:
    def __init__(self, service: Service, clock: FakeClock) -> None:
        self.service = service
        self.clock = clock
        self.store = service.context.store
        self.ways = 0
        """Dialled for renewals."""

    async def put(self, key: str, record: object) -> None:
        await self.service.context.reach(await self.store.put(key, codec.encode(record)))

    async def token(self, subject: str = "", kind: MemberKind = MemberKind.NODE, expires_in_s: float = 3600.0) -> str:
        view = await self.service.join_tokens.create(JoinTokenRequest(kind=kind, subject=subject, expires_in_s=expires_in_s))
        assert view.token is not None
        return view.token

    async def join(self, name: str, token: str | None = None, machine: Machine | None = None) -> Machine:
        machine = machine or Machine()
        request = JoinRequest(token=token or await self.token(), name=name, csr=machine.csr())
        machine.certified = await self.service.membership.join(request)
        return machine

    def events(self, code: str) -> list[Event]:
        return [held.record for held in self.service.context.state.records(Event).values() if held.record.code == code]

    @property
    def members(self):  # type: ignore[no-untyped-def]
        return self.service.membership


@asynccontextmanager
async def new_cell() -> AsyncIterator[Cell]:
    clock = FakeClock()
    store = MemoryStore(clock)
    async with State(store, KINDS) as state, Service(store, state, clock, random.Random(1), bytes(32)) as service:
        made = Cell(service, clock)
        await made.put(keys.server("s1"), Server(id="s1", urls=("https://10.0.0.1:7600",), version="0", started_at=0))
        yield made
    await store.close()


@pytest.fixture
async def cell() -> AsyncIterator[Cell]:
    async with new_cell() as made:
        yield made


async def test_a_machine_joins_with_a_token_and_is_known_by_its_certificate(cell: Cell) -> None:
    machine = await cell.join("n7")
    caller = cell.members.caller(machine.shown)
    assert (caller.role, caller.subject) == (Role.AGENT, "n7")
    assert machine.shown.uri == uri_of("node", "n7") == "spiffe://main/node/n7"
    assert machine.certified is not None
    leaf = x509.load_pem_x509_certificate(machine.certified.certificate.encode())
    leaf.verify_directly_issued_by(x509.load_pem_x509_certificate(machine.certified.bundle.encode()))
    uses = leaf.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert list(uses) == [x509.ExtendedKeyUsageOID.CLIENT_AUTH], "a node's certificate serves nobody"
    assert [event.subject for event in cell.events("node-joined")] == ["node/n7"]
    edge = await cell.join("edge", await cell.token("edge", MemberKind.INGRESS))
    assert cell.members.caller(edge.shown).role is Role.INGRESS


async def test_a_token_counts_once_and_the_replay_is_refused_with_an_event_and_harms_nobody(cell: Cell) -> None:
    token = await cell.token()
    first = await cell.join("n1", token)
    for name in ("n1", "n2"):
        with pytest.raises(Conflict, match="used already, by 'n1'"):
            await cell.join(name, token)
    assert [event.severity for event in cell.events("join-refused")] == ["warning"], "of many alike one is an event"
    assert cell.members.caller(first.shown).subject == "n1"
    assert [view.name for view in cell.members.identities()] == ["n1"]


async def test_the_same_machine_may_ask_again_when_the_answer_was_lost(cell: Cell) -> None:
    token, machine = await cell.token(), Machine()
    await cell.join("n1", token, machine)
    lost = machine.shown
    await cell.join("n1", token, machine)
    assert cell.members.caller(machine.shown).subject == "n1"
    assert machine.shown.enrolment == lost.enrolment
    with pytest.raises(Conflict, match="as 'n1'"):
        await cell.join("n2", token, machine)


@pytest.mark.parametrize(
    ("token", "says"),
    [
        ("", "no join token"),
        ("atoll_abc", "no join token"),
        ("atolljoin_AAAA", "not whole"),
        ("atolljoin_" + "!" * 84, "not whole"),
        ("atolljoin_" + "A" * 5000, "no join token"),
        (join_token(b"123456", b"s" * 24, b"p" * 32), "not known here: it is another cell's"),
    ],
)
async def test_a_foreign_or_damaged_join_token_is_refused_with_its_reason(cell: Cell, token: str, says: str) -> None:
    await cell.token()
    with pytest.raises(Unauthenticated, match=says):
        await cell.members.join(JoinRequest(token=token, name="n1", csr=Machine().csr()))
    assert len(cell.events("join-refused")) == 1
    assert not cell.members.identities()


async def test_an_expired_or_withdrawn_join_token_lets_nobody_in(cell: Cell) -> None:
    token = await cell.token(expires_in_s=60)
    cell.clock.time += 61
    with pytest.raises(Unauthenticated, match="has expired"):
        await cell.join("n1", token)
    other = await cell.token()
    id = next(view.id for view in cell.service.join_tokens.all() if view.expires_at > cell.clock.now())
    await cell.service.join_tokens.delete(id)
    with pytest.raises(Unauthenticated, match="withdrawn"):
        await cell.join("n1", other)
    assert not cell.members.identities()


async def test_a_name_that_is_taken_needs_a_token_that_names_it(cell: Cell) -> None:
    old = await cell.join("n1")
    await cell.put(keys.node("n2"), Node(name="n2", capacity=Capacity(cpu_milli=1, memory_bytes=1, disk_bytes=1)))
    for name in ("n1", "n2"):
        with pytest.raises(Conflict, match=f"there is a node '{name}' already"):
            await cell.join(name)
    with pytest.raises(Forbidden, match="for 'n1', not 'n9'"):
        await cell.join("n9", await cell.token("n1"))
    new = await cell.join("n1", await cell.token("n1"))
    assert cell.members.caller(new.shown).subject == "n1"
    with pytest.raises(Unauthenticated, match="another machine has joined as node 'n1' since"):
        cell.members.caller(old.shown)


@pytest.mark.parametrize(("kind", "role"), [(MemberKind.NODE, Role.AGENT), (MemberKind.INGRESS, Role.INGRESS)])
async def test_who_takes_over_a_name_ends_its_bearer_tokens_and_asking_again_ends_none(
    cell: Cell, kind: MemberKind, role: Role
) -> None:
    async def bearer(name: str) -> str:
        made = await cell.service.tokens.create(SYSTEM, TokenRequest(name="a", role=role, subject=name))
        assert made.token is not None
        return made.token

    old, other = await bearer("n1"), await bearer("n2")
    token, machine = await cell.token("n1", kind), Machine()
    await cell.join("n1", token, machine)
    with pytest.raises(Unauthenticated):
        cell.service.tokens.authenticate(old)
    assert cell.service.tokens.authenticate(other).subject == "n2"
    later = await bearer("n1")
    await cell.join("n1", token, machine)
    assert cell.service.tokens.authenticate(later).subject == "n1"


async def test_the_name_of_an_ingress_that_shows_a_token_is_taken_for_ingresses(cell: Cell) -> None:
    await cell.put(keys.ingress("edge"), Ingress(name="edge", http_port=80))
    with pytest.raises(Conflict, match="there is a ingress 'edge' already"):
        await cell.join("edge", await cell.token(kind=MemberKind.INGRESS))
    await cell.join("edge")  # a node of that name is another thing
    edge = await cell.join("edge", await cell.token("edge", MemberKind.INGRESS))
    assert cell.members.caller(edge.shown).role is Role.INGRESS


async def test_a_machine_without_a_name_gets_that_of_its_token_or_of_its_host(cell: Cell) -> None:
    bound, free = await cell.token("n7"), await cell.token()
    for token, name in ((bound, "n7"), (free, "host")):
        certified = await cell.members.join(JoinRequest(token=token, hostname="host", csr=Machine().csr()))
        assert certified.name == name


@pytest.mark.parametrize("name", ["", "N1", "a/b", "../x", "n" * 200, "n1\n"])
async def test_a_name_that_is_no_name_is_refused(cell: Cell, name: str) -> None:
    with pytest.raises(Invalid):
        await cell.join(name)


def requests() -> Iterator[tuple[str, str]]:
    good = Machine()
    yield "empty", ""
    yield "text", "hello"
    yield "oversized", "-----BEGIN CERTIFICATE REQUEST-----\n" + "A" * 9000
    yield "damaged", good.csr().replace("M", "N", 3)
    yield "rsa", good.csr(rsa.generate_private_key(public_exponent=65537, key_size=2048))
    yield "another curve", good.csr(ec.generate_private_key(ec.SECP384R1()))


@pytest.mark.parametrize(("what", "csr"), list(requests()))
async def test_a_request_that_is_malformed_or_of_another_kind_of_key_is_refused(cell: Cell, what: str, csr: str) -> None:
    token = await cell.token()
    with pytest.raises(Invalid, match="csr:"):
        await cell.members.join(JoinRequest(token=token, name="n1", csr=csr))
    await cell.join("n1", token)  # the token is not used up by it


async def test_names_that_a_request_asks_for_are_not_read(cell: Cell) -> None:
    machine = Machine()
    wish = x509.SubjectAlternativeName(
        [x509.UniformResourceIdentifier(uri_of("node", "other")), x509.DNSName("server.atoll.internal")]
    )
    request = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([])).add_extension(wish, critical=False)
    csr = request.sign(machine.key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM).decode()
    machine.certified = await cell.members.join(JoinRequest(token=await cell.token(), name="n1", csr=csr))
    assert machine.shown.uri == uri_of("node", "n1")
    assert "server.atoll.internal" not in str(x509.load_pem_x509_certificate(machine.certified.certificate.encode()).extensions)


async def test_a_certificate_is_renewed_by_who_holds_its_key_also_some_days_after_its_end(cell: Cell) -> None:
    machine = await cell.join("n1")
    for later_s in (LIFE_S * 2 / 3, LIFE_S + RENEW_LATE_S - 60):
        cell.clock.time += later_s
        key = ec.generate_private_key(ec.SECP256R1())
        certified = await cell.members.renew(machine.renewal(machine.csr(key)))
        machine.key, machine.certified = key, certified
        assert cell.members.caller(machine.shown).subject == "n1"
    cell.clock.time += LIFE_S + RENEW_LATE_S + 1
    with pytest.raises(Unauthenticated, match="expired too long ago"):
        await cell.members.renew(machine.renewal())
    with pytest.raises(Unauthenticated, match="has expired"):
        cell.members.caller(machine.shown)
    assert len(cell.events("certificate-renewed")) == 2
    assert len(cell.events("renewal-refused")) == 1


async def test_nobody_renews_a_certificate_that_is_not_his(cell: Cell) -> None:
    machine, thief = await cell.join("n1"), Machine()
    thief.certified = machine.certified
    with pytest.raises(Unauthenticated, match="own key did not sign"):
        await cell.members.renew(thief.renewal())
    honest = machine.renewal()
    with pytest.raises(Unauthenticated, match="own key did not sign"):
        await cell.members.renew(RenewRequest(certificate=honest.certificate, csr=thief.csr(), proof=honest.proof))
    foreign = MemoryStore(cell.clock)
    async with State(foreign, KINDS) as state, Service(foreign, state, cell.clock, random.Random(2), bytes(32)) as other:
        key = thief.key.public_key()
        signed = await other.authorities.sign(Subject(kind="node", name="n1", enrolment=machine.shown.enrolment), key)
    await foreign.close()
    thief.certified = Certified(name="n1", certificate=signed.certificate, bundle="")
    with pytest.raises(Unauthenticated, match="no authority that this cell trusts"):
        await cell.members.renew(thief.renewal())
    for junk in ("", "junk", "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n", "A" * 10_000):
        with pytest.raises(Unauthenticated):
            await cell.members.renew(RenewRequest(certificate=junk, csr=thief.csr(), proof=b"x"))


async def test_a_revoked_node_is_refused_by_certificate_token_and_renewal_until_an_operator_lets_it_in(cell: Cell) -> None:
    machine = await cell.join("n1")
    token = await cell.service.tokens.create(SYSTEM, TokenRequest(name="a", role=Role.AGENT, subject="n1"))
    assert token.token is not None
    before = await cell.token("n1")
    await cell.members.revoke(MemberKind.NODE, "n1", SYSTEM)
    with pytest.raises(Revoked):
        cell.members.caller(machine.shown)
    with pytest.raises(Revoked):
        await cell.members.renew(machine.renewal())
    with pytest.raises(Unauthenticated):
        cell.service.tokens.authenticate(token.token)
    with pytest.raises(Unauthenticated, match="withdrawn"):
        await cell.join("n1", before)
    with pytest.raises(Conflict):
        await cell.join("n1")
    again = await cell.service.tokens.create(SYSTEM, TokenRequest(name="a", role=Role.AGENT, subject="n1"))
    assert again.token is not None
    with pytest.raises(Revoked):
        cell.members.check(cell.service.tokens.authenticate(again.token))
    assert [event.severity for event in cell.events("node-revoked")] == ["warning"]
    back = await cell.join("n1", await cell.token("n1"))
    assert cell.members.caller(back.shown).subject == "n1"
    with pytest.raises(Unauthenticated):
        cell.members.caller(machine.shown)


async def test_a_revoked_machine_cannot_ask_again_with_the_token_that_let_it_in(cell: Cell) -> None:
    token, machine = await cell.token(), Machine()
    await cell.join("n1", token, machine)
    await cell.members.revoke(MemberKind.NODE, "n1", SYSTEM)
    with pytest.raises(Unauthenticated, match="withdrawn"):
        await cell.join("n1", token, machine)
    await cell.members.remove_node("n1", SYSTEM)
    with pytest.raises(Unauthenticated, match="withdrawn"):
        await cell.join("n1", token, machine)


@pytest.mark.parametrize("kind", list(MemberKind))
@pytest.mark.parametrize("how", ["revoked", "revoked by an older server", "removed", "replaced", "replaced by an older server"])
async def test_a_machine_that_was_put_out_is_not_let_in_as_its_successor_by_asking_again(
    cell: Cell, kind: MemberKind, how: str
) -> None:
    token, machine = await cell.token(kind=kind), Machine()
    await cell.join("n1", token, machine)
    (used,) = (held.record for held in cell.service.context.state.records(JoinToken).values())
    cell.clock.time += 1
    if how.startswith("revoked"):
        await cell.members.revoke(kind, "n1", SYSTEM)
    elif how == "removed" and kind is MemberKind.NODE:
        await cell.members.remove_node("n1", SYSTEM)
    elif how == "removed":
        await cell.put(keys.ingress("n1"), Ingress(name="n1", http_port=80))
        cell.clock.time += ALIVE_S
        await cell.service.ingress_records.forget("n1", SYSTEM)
    if how == "revoked by an older server":  # which leaves the token
        await cell.put(keys.join_token(used.id), used)
    if how == "replaced by an older server":  # which knows of no enrolment in a token
        await cell.put(keys.join_token(used.id), structs.replace(used, used_enrolment=""))
    successor = await cell.join("n1", await cell.token("n1", kind))
    with pytest.raises((Unauthenticated, Conflict), match=r"withdrawn|removed or replaced since"):
        await cell.join("n1", token, machine)
    with pytest.raises(Unauthenticated):
        cell.members.caller(machine.shown)
    assert cell.members.caller(successor.shown).subject == "n1"


async def test_a_machine_whose_answer_was_lost_by_a_server_of_before_is_let_in_by_asking_a_new_one(cell: Cell) -> None:
    token, machine = await cell.token(), Machine()
    await cell.join("n1", token, machine)
    (used,) = (held.record for held in cell.service.context.state.records(JoinToken).values())
    await cell.put(keys.join_token(used.id), structs.replace(used, used_enrolment=""))
    cell.clock.time += 1
    for _ in range(2):  # the second by what the first has noted
        again = await cell.join("n1", token, machine)
        assert cell.members.caller(again.shown).subject == "n1"


async def test_a_node_is_removed_only_when_it_is_gone_and_holds_nothing(cell: Cell) -> None:
    machine = await cell.join("n1")
    await cell.put(keys.node("n1"), Node(name="n1", capacity=Capacity(cpu_milli=1, memory_bytes=1, disk_bytes=1)))
    with pytest.raises(Conflict, match="answers"):
        await cell.members.remove_node("n1", SYSTEM)
    await cell.put(keys.node_liveness("n1"), NodeLiveness(name="n1", health=NodeHealth.LOST, since=1))
    instance = Instance(id="i1", project="default", owner_kind=OwnerKind.APP, owner="web", node="n1", created_at=1)
    await cell.put(keys.instance("default", "i1"), instance)
    done = structs.replace(instance, id="done", owner="work", owner_kind=OwnerKind.JOB)
    await cell.put(keys.instance("default", "done"), done)
    await cell.put(keys.status("default", "done"), Status(instance="done", project="default", node="n1", phase=Phase.SUCCEEDED))
    with pytest.raises(Conflict, match=r"^1 instance is placed on node 'n1': i1$"):
        await cell.members.remove_node("n1", SYSTEM)
    await cell.service.context.reach(await cell.store.delete(keys.instance("default", "i1")))
    await cell.members.remove_node("n1", SYSTEM)
    for key in (keys.node("n1"), keys.node_liveness("n1"), keys.identity("node", "n1")):
        assert await cell.store.get(key) is None
    with pytest.raises(Unauthenticated, match="may have been removed"):
        cell.members.caller(machine.shown)
    with pytest.raises(NotFound):
        await cell.members.remove_node("n1", SYSTEM)
    assert (await cell.join("n1")).shown.uri == uri_of("node", "n1"), "its name is free again"


async def test_what_a_removed_node_said_is_forgotten_and_what_a_silent_one_said_is_not(cell: Cell) -> None:
    beats = cell.service.heartbeats
    for name in ("n1", "n2"):
        await cell.put(keys.node(name), Node(name=name, capacity=Capacity(cpu_milli=1, memory_bytes=1, disk_bytes=1)))
        beats.note(Heartbeat(node=name, at=1.0, usage=(Usage(instance="i1", disk_bytes=-1),)))
    await cell.put(keys.node_liveness("n1"), NodeLiveness(name="n1", health=NodeHealth.LOST, since=1))
    await cell.members.remove_node("n1", SYSTEM)
    await cell.service.context.reach(await cell.store.put(keys.node("n3"), b"of a later version"))
    beats.touch("n3")
    cell.clock.time += REMOVED_S + 1
    beats.touch("n4")  # it registers just now, and this server does not have its record yet
    await cell.service.housekeeping.sweep()
    assert sorted(beats.last_seen()) == ["n2", "n3", "n4"]
    assert [sorted(table) for table in (beats.all(), beats.last_said())] == [["n2"], ["n2"]]


async def test_a_new_authority_is_trusted_before_it_signs_and_the_old_ends_when_what_it_signed_has_ended(cell: Cell) -> None:
    old = await cell.join("n1")
    await cell.service.authorities.rotate()
    certified = await cell.members.renew(old.renewal())
    assert certified.bundle.count("BEGIN CERTIFICATE") == 2
    first = old.shown.authority
    assert (await cell.join("n2")).shown.authority == first, "the new one does not sign before everyone knows it"
    cell.clock.time += LIFE_S + 1
    young = await cell.join("n3")
    assert young.shown.authority != first
    assert cell.service.authorities.trusts(first)
    cell.clock.time += LIFE_S + RENEW_LATE_S
    assert not cell.service.authorities.trusts(first)
    with pytest.raises(Unauthenticated, match="no authority"):
        await cell.members.renew(old.renewal())


async def test_a_rotation_at_once_trusts_nothing_of_before(cell: Cell) -> None:
    old = await cell.join("n1")
    await cell.service.authorities.rotate(at_once=True)
    with pytest.raises(Unauthenticated, match="retired"):
        cell.members.caller(old.shown)
    with pytest.raises(Unauthenticated, match="no authority"):
        await cell.members.renew(old.renewal())
    new = await cell.join("n1", await cell.token("n1"))
    assert cell.members.caller(new.shown).subject == "n1"


async def test_a_rotation_at_once_cuts_streams_of_before_that_are_open(cell: Cell) -> None:
    caller = cell.members.caller((await cell.join("n1")).shown)
    with cell.service.standing.watched(caller) as ended, cell.service.standing.watched(SYSTEM) as unharmed:
        await cell.service.authorities.rotate()
        assert cell.members.still(caller) is None
        assert not ended.done()
        await cell.service.authorities.rotate(at_once=True)
        async with asyncio.timeout(5):
            assert "retired" in str(await ended)
        assert not unharmed.done()


async def test_a_stream_is_cut_when_what_was_shown_has_expired_and_goes_on_where_it_was_renewed(cell: Cell) -> None:
    lazy, diligent = await cell.join("n1"), await cell.join("n2")
    made = await cell.service.tokens.create(SYSTEM, TokenRequest(name="a", role=Role.READ, expires_in_s=LIFE_S))
    callers = [cell.members.caller(machine.shown) for machine in (lazy, diligent)]
    callers.append(cell.service.tokens.authenticate(made.token or ""))
    cell.clock.time += LIFE_S / 2
    await cell.members.renew(diligent.renewal())
    standing = Standing(cell.service.context.state, cell.members, look_s=0.01)
    running = asyncio.create_task(standing.run())
    with standing.watched(callers[0]) as one, standing.watched(callers[1]) as two, standing.watched(callers[2]) as three:
        assert not one.done()
        assert not three.done()
        cell.clock.time += LIFE_S / 2 + 1
        async with asyncio.timeout(5):
            assert "has expired" in str(await one)
            assert "has expired" in str(await three)
        assert not two.done()
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)


async def test_the_authority_s_key_lies_sealed_and_a_server_with_another_key_says_so(cell: Cell) -> None:
    await cell.service.authorities.ensure()
    item = await cell.store.get(keys.authority("first"))
    assert item is not None
    assert b"PRIVATE" not in item.value
    assert b"PRIVATE" not in codec.decode(item.value, Authority).sealed
    await check_key(cell.service.context)
    async with State(cell.store, KINDS) as state, Service(cell.store, state, cell.clock, random.Random(3), b"x" * 32) as other:
        with pytest.raises(Corrupt, match="not the cell's"):
            await check_key(other.context)
        with pytest.raises(Corrupt, match="cannot be opened"):
            await other.authorities.sign(Subject(kind="node", name="n", enrolment="e"), Machine().key.public_key())


async def test_two_servers_that_begin_together_make_one_authority(cell: Cell) -> None:
    async with State(cell.store, KINDS) as state, Service(cell.store, state, cell.clock, random.Random(3), bytes(32)) as other:
        one, two = await cell.service.authorities.ensure(), await other.authorities.ensure()
    assert one == two


async def test_a_certificate_s_holder_is_no_server_and_a_server_s_is_no_machine(cell: Cell) -> None:
    machine = await cell.join("n1")
    signed = await cell.service.authorities.sign(
        Subject(kind="server", name="s1", enrolment="s1", hosts=("localhost",)), machine.key.public_key()
    )
    machine.certified = Certified(name="s1", certificate=signed.certificate, bundle="")
    with pytest.raises(Unauthenticated, match="no machine's of this cell"):
        cell.members.caller(machine.shown)


async def test_what_servers_show_each_other_needs_the_cell_s_key_and_ends(cell: Cell) -> None:
    token = cell.service.servers.token()
    assert cell.service.servers.authenticate(token).name == "server alone"
    async with State(cell.store, KINDS) as state, Service(cell.store, state, cell.clock, random.Random(3), b"x" * 32) as other:
        with pytest.raises(Unauthenticated):
            cell.service.servers.authenticate(other.servers.token())
    who, until = token.split(".")[1:3]
    for bad in (
        "",
        "a.b.c.d",
        token[:-1] + "0",
        token + "0",
        token.replace(who, "else"),
        token.replace(until, str(int(until) + 1)),
    ):
        with pytest.raises(Unauthenticated):
            cell.service.servers.authenticate(bad)
    cell.clock.time += TOKEN_LIFE_S + 1
    with pytest.raises(Unauthenticated, match="clock"):
        cell.service.servers.authenticate(token)


async def test_a_join_token_needs_a_server_that_speaks_tls(cell: Cell) -> None:
    await cell.put(keys.server("s1"), Server(id="s1", urls=("http://127.0.0.1:7600",), version="0", started_at=0))
    with pytest.raises(Unsupported, match="speaks TLS"):
        await cell.token()


async def test_a_server_that_speaks_tls_makes_join_tokens_before_it_is_listed(cell: Cell) -> None:
    await cell.put(keys.server("s1"), Server(id="s1", urls=("http://127.0.0.1:7600",), version="0", started_at=0))
    own = Server(id="s1", urls=("https://10.0.0.1:7600",), version="0", started_at=cell.clock.time)
    tokens = JoinTokens(cell.service.context, cell.service.authorities, own)
    assert (await tokens.create(JoinTokenRequest())).servers == ("https://10.0.0.1:7600",)


async def test_a_server_that_was_just_started_waits_for_one_that_speaks_tls(cell: Cell) -> None:
    await cell.put(keys.server("s1"), Server(id="s1", urls=("http://127.0.0.1:7600",), version="0", started_at=0))
    own = Server(id="s2", urls=("http://10.0.0.2:7600",), version="0", started_at=cell.clock.time)
    asked = asyncio.ensure_future(JoinTokens(cell.service.context, cell.service.authorities, own).create(JoinTokenRequest()))
    await asyncio.sleep(0)
    await cell.put(keys.server("s3"), Server(id="s3", urls=("https://10.0.0.3:7600",), version="0", started_at=0))
    assert (await asyncio.wait_for(asked, 30)).servers == ("https://10.0.0.3:7600",)
    await cell.put(keys.server("s3"), Server(id="s3", urls=("http://10.0.0.3:7600",), version="0", started_at=0))
    cell.clock.time += YOUNG_S
    with pytest.raises(Unsupported, match="speaks TLS"):
        await JoinTokens(cell.service.context, cell.service.authorities, own).create(JoinTokenRequest())


async def test_old_join_tokens_are_swept_away(cell: Cell) -> None:
    await cell.token(expires_in_s=10)
    cell.clock.time += 100_000
    await cell.token()
    await cell.service.housekeeping.sweep()
    assert len((await cell.store.range(keys.JOIN_TOKENS)).items) == 1


async def test_no_secret_of_a_join_token_is_kept(cell: Cell) -> None:
    token = await cell.token()
    for item in (await cell.store.range("")).items:
        assert token.encode() not in item.value


def test_a_server_s_id_is_its_own_and_stays(tmp_path: Path) -> None:
    one, two = Config(data=tmp_path / "a", node="box"), Config(data=tmp_path / "b", node="box")
    assert server_id(one) == server_id(one)
    assert server_id(one) != server_id(two)
    (tmp_path / "a/server/id").write_text("../x")
    with pytest.raises(Corrupt, match="no server id"):
        server_id(one)


@pytest.mark.parametrize(
    ("listen", "flags", "secure"),
    [
        ("127.0.0.1:1", {}, False),
        ("[::1]:1", {}, False),
        ("localhost:1", {}, False),
        ("127.0.0.1:1", {"tls": True}, True),
        ("0.0.0.0:1", {}, True),
        ("10.0.0.1:1", {}, True),
        ("0.0.0.0:1", {"insecure_plain": True}, False),
    ],
)
def test_where_others_may_come_tls_is_spoken_unless_plain_was_asked_for(listen: str, flags: dict[str, bool], secure: bool) -> None:
    assert Config(listen=listen, **flags).secure is secure  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("ours", "theirs", "fine"), [(2, "1", True), (2, "2", True), (2, "3", True), (2, "4", False), (3, "1", False)]
)
def test_versions_of_the_api_may_be_one_apart(ours: int, theirs: str, fine: bool) -> None:
    if fine:
        check_skew(ours, theirs, they="the caller", we="this server")
    else:
        older = "the caller" if int(theirs) < ours else "this server"
        with pytest.raises(VersionSkew) as refused:
            check_skew(ours, theirs, they="the caller", we="this server")
        assert older in (refused.value.mend or "")


@pytest.mark.parametrize("said", [None, "", "one", "-1", "9" * 30])
def test_who_says_no_version_is_taken_as_he_is(said: str | None) -> None:
    check_skew(1, said, they="the caller", we="this server")


def test_a_certificate_is_renewed_at_two_thirds_of_its_life_whatever_the_clock_does() -> None:
    held, choose = Held(name="n", begins_at=0, ends_at=900), random.Random(1)
    assert held.renew_at == 600
    assert wait_s(held, 0, 0, choose) == LOOK_S
    assert wait_s(held, -1e9, 0, choose) == LOOK_S, "a clock that was set back is looked at again soon"
    assert wait_s(held, 1e9, 0, choose) == 0
    waits = [wait_s(held, 700, failures, choose) for failures in range(1, 2000, 50)]
    assert 0.5 <= waits[0] <= 1
    assert all(wait <= RETRY_MAX_S for wait in waits)


@pytest.mark.parametrize("life_s", [3.0, 20.0, LIFE_S])
async def test_two_thirds_are_counted_from_when_a_certificate_was_made_however_short_its_life(
    cell: Cell, life_s: float, tmp_path: Path
) -> None:
    cell.service.authorities.life_s = life_s
    certified = (await cell.join("n1")).certified
    assert certified is not None
    (tmp_path / "identity.pem").write_text(certified.certificate)
    (tmp_path / "ca.pem").write_text(certified.bundle)
    held = Credentials(tmp_path).load()
    assert held is not None
    assert held.renew_at - cell.clock.now() == pytest.approx(life_s * 2 / 3, abs=1.0)
    assert wait_s(held, cell.clock.now(), 0, random.Random(1)) >= min(LOOK_S, life_s * 2 / 3 - 1.0), "or else it is a hot loop"


def held_by(machine: Machine, directory: Path) -> Credentials:
    """Return the credentials of a machine that has joined, on disk."""
    assert machine.certified is not None
    key = machine.key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    credentials = Credentials(directory)
    write_private(credentials.bundle, machine.certified.bundle.encode())
    write_private(credentials.file, key + machine.certified.certificate.encode())
    return credentials


class Way(HttpTransport):
    """The way to the cell for a renewal."""

    def __init__(self, cell: Cell) -> None:
        super().__init__("http://server")
        self._cell = cell
        cell.ways += 1

    async def request(
        self, method: str, path: str, *, headers: Mapping[str, str] | None = None, body: bytes = b"", timeout_s: float = 30.0
    ) -> Answer:
        assert (method, path) == ("POST", "/v1/identity/renew")
        return Answer(200, {}, codec.encode(await self._cell.members.renew(codec.decode(body, RenewRequest))))


class AtOnce(random.Random):
    """Waits for nothing after a failure."""

    def uniform(self, a: float, b: float) -> float:
        return 0.0


async def test_a_certificate_that_cannot_be_kept_is_asked_for_again_once_the_disk_takes_it(cell: Cell, tmp_path: Path) -> None:
    credentials = held_by(await cell.join("n1"), tmp_path)
    before = credentials.file.read_bytes()
    (tmp_path / "identity.pem.new").mkdir()  # in its way, as a full disk would be
    cell.clock.time += LIFE_S * 2 / 3 + 1
    tls = credentials.tls()
    told = asyncio.Event()

    async def say(code: str, message: str, bad: bool) -> None:
        assert code == "certificate-not-renewed"
        assert str(credentials.file) in message
        told.set()

    keeping = asyncio.create_task(keep_renewed(credentials, lambda: Way(cell), tls, cell.clock, AtOnce(), say))
    async with asyncio.timeout(10):
        await told.wait()
        assert credentials.file.read_bytes() == before
        (tmp_path / "identity.pem.new").rmdir()
        while not tls.generation:
            assert not keeping.done()
            await asyncio.sleep(0)
    keeping.cancel()
    held = credentials.load()
    assert held is not None
    assert held.ends_at > cell.clock.now() + LIFE_S / 2


async def test_a_certificate_that_cannot_be_read_now_is_looked_at_again(cell: Cell, tmp_path: Path) -> None:
    credentials = held_by(await cell.join("n1"), tmp_path)
    tls = credentials.tls()
    credentials.bundle.unlink()
    credentials.bundle.mkdir()  # as unreadable as when too many files are open

    async def say(code: str, message: str, bad: bool) -> None:
        raise AssertionError(code)

    with pytest.raises(Unavailable, match="cannot use"):
        credentials.load()
    keeping = asyncio.create_task(keep_renewed(credentials, lambda: Way(cell), tls, cell.clock, AtOnce(), say))
    await asyncio.sleep(0.01)
    assert not keeping.done()
    keeping.cancel()


def test_a_certificate_that_does_not_count_yet_is_replaced_by_one_that_begins_earlier(tmp_path: Path) -> None:
    async def nothing_bad(code: str, message: str, bad: bool) -> None:
        raise AssertionError(code)

    async def story() -> None:
        async with new_cell() as cell:
            ours = FakeClock()
            cell.clock.time = ours.time + EARLY_S + 10
            credentials = held_by(await cell.join("n1"), tmp_path)
            before, tls = credentials.file.read_bytes(), credentials.tls()
            keeping = asyncio.create_task(keep_renewed(credentials, lambda: Way(cell), tls, ours, AtOnce(), nothing_bad))
            await asyncio.sleep(2.5 * LOOK_S)
            assert credentials.file.read_bytes() == before, "what begins no earlier helps nobody"
            assert cell.ways == 2, "one is asked for at each look"
            cell.clock.time = ours.time
            await asyncio.sleep(5 * LOOK_S)
            held = credentials.load()
            assert held is not None
            assert (held.begins_at, tls.generation) == (ours.time, 1)
            assert cell.ways == 3
            keeping.cancel()

    run_virtual(story())


def shown_by(server: ssl.SSLContext) -> x509.Certificate:
    """Return what a server shows to who comes now."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    to, back = ssl.MemoryBIO(), ssl.MemoryBIO()
    client, other = context.wrap_bio(back, to), server.wrap_bio(to, back, server_side=True)
    for side in (client, other):
        with pytest.raises(ssl.SSLWantReadError):
            side.do_handshake()
    client.do_handshake()
    shown = client.getpeercert(True)
    assert shown is not None
    return x509.load_der_x509_certificate(shown)


async def test_a_server_whose_date_was_set_back_shows_a_certificate_that_counts(cell: Cell, tmp_path: Path) -> None:
    certificate = ServerCertificate(Config(data=tmp_path), cell.service, "s1", cell.clock)
    await certificate.begin()
    first = shown_by(certificate.tls.context)
    await certificate.begin()
    assert shown_by(certificate.tls.context) == first
    cell.clock.time -= 3600.0
    await certificate.begin()
    second = shown_by(certificate.tls.context)
    assert second.not_valid_before_utc.timestamp() == cell.clock.now() - EARLY_S
    await certificate.begin()
    assert shown_by(certificate.tls.context) == second


async def test_a_server_that_cannot_write_down_the_authorities_says_so_and_goes_on_once_it_can(cell: Cell, tmp_path: Path) -> None:
    config = Config(data=tmp_path)
    certificate = ServerCertificate(config, cell.service, "s1", cell.clock)
    blocked = config.ca_file.with_name("ca.pem.new")
    blocked.mkdir(parents=True)
    with pytest.raises(Unavailable, match=r"cannot use .*ca\.pem"):  # which ends no server that runs
        await certificate.begin()
    blocked.rmdir()
    await certificate.begin()
    assert config.ca_file.read_text() == cell.service.authorities.bundle()


@pytest.mark.parametrize(
    ("number", "mend"), [(errno.ENOSPC, "make room on"), (errno.EDQUOT, "make room on"), (errno.EACCES, "run as"), (errno.EIO, "")]
)
def test_what_a_disk_refuses_names_what_helps(number: int, mend: str) -> None:
    error = unavailable(Path("/data/ca.pem"), OSError(number, os.strerror(number)))
    assert os.strerror(number) in error.message
    assert (error.mend or "").startswith(mend)
    assert bool(error.mend) is bool(mend)


async def test_the_servers_of_a_machine_that_joined_are_written_only_where_they_are_others(cell: Cell, tmp_path: Path) -> None:
    held_by(await cell.join("n1"), tmp_path / "identity")
    file = tmp_path / "identity/servers"

    async def servers(given: str = "") -> str:
        found = await reach(Config(server=given), MemberKind.NODE, tmp_path, Stop())
        assert found is not None
        return found.servers

    with pytest.raises(Invalid, match="which servers"):
        await servers()
    assert await servers("https://a:1") == "https://a:1"
    (tmp_path / "identity/servers.new").mkdir()  # in the way of every write
    assert [await servers(), await servers("https://a:1")] == ["https://a:1"] * 2
    with pytest.raises(Unavailable):
        await servers("https://b:1")
    assert file.read_text() == "https://a:1\n", "whole or not at all"
    file.write_text("")
    with pytest.raises(Invalid, match="which servers"):
        await servers()


async def test_a_pin_chooses_its_authority_and_nothing_else(cell: Cell) -> None:
    authority = await cell.service.authorities.ensure()
    bundle = authority.certificate
    pin = fingerprint(bundle)
    assert chosen("junk" + bundle + "junk", frozenset({pin})) == [bundle]
    with pytest.raises(Unauthenticated, match="not the cell that was meant"):
        chosen(bundle, frozenset({"sha256:" + "0" * 64}))
    assert pins_of(pin.upper().replace("SHA256", "sha256")) == {pin}
    for bad in ("sha256:xyz", "md5:00", pin + "0"):
        with pytest.raises(Invalid, match="no fingerprint"):
            pins_of(bad)


async def test_a_stranger_s_flood_of_bad_tokens_writes_one_event(cell: Cell) -> None:
    revision = await cell.store.revision()
    for number in range(50):
        with pytest.raises(AtollError):
            await cell.join("n1", join_token(struct.pack("6s", b"%d" % number), b"s" * 24, b"p" * 32))
    assert await cell.store.revision() == revision + 1
