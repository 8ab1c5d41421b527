"""The leader's certificates on a virtual clock: signing, ordering, renewing, and going on where the last leader was killed."""

from __future__ import annotations

import asyncio
import datetime
import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from control_cell import START, LoopClock, run_virtual
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.x509.oid import ExtendedKeyUsageOID
from msgspec.structs import replace

from atoll.control import certificates as controller
from atoll.control.certificates import CertificateLoop
from atoll.control.fake_authority import FakeAuthority
from atoll.control.leader import Term, lead
from atoll.control.orders import AcmeFailed, Pace
from atoll.control.signers import Signers
from atoll.control.world import KINDS as WORLD
from atoll.model import codec, keys
from atoll.model.chains import describe
from atoll.model.errors import Unavailable
from atoll.model.ports.store import LINEARIZABLE, Compare, Consistency, KeyValue, Op, TxnResult
from atoll.model.records import App, Event, RouteClaim
from atoll.model.records.certificate import (
    AcmeSettings,
    Certificate,
    CertificatePhase,
    CertificateRoot,
    CertificateSource,
    CertificateStatus,
)
from atoll.model.spec import AppSpec, IngressRules, Issuer, Port
from atoll.store.cache import State
from atoll.store.memory import MemoryStore
from made_certificates import DAY_S, Maker

MAKER = Maker(now=START)
LIFE_S = 9_000.0


class PlainSeal:
    """Seals nothing, but holds to the place."""

    def seal(self, plain: bytes, context: str) -> bytes:
        return context.encode() + b"|" + plain

    def open(self, sealed: bytes, context: str) -> bytes:
        place, _, plain = sealed.partition(b"|")
        assert place == context.encode()
        return plain


class FlakyStore(MemoryStore):
    """What another store holds, whose transactions fail while `failing` is set."""

    def __init__(self, behind: MemoryStore, clock: LoopClock) -> None:
        super().__init__(clock)
        self._behind = behind
        self.failing = False

    async def get(self, key: str, *, consistency: Consistency = LINEARIZABLE) -> KeyValue | None:
        return await self._behind.get(key, consistency=consistency)

    async def txn(self, compare: Sequence[Compare], then: Sequence[Op], otherwise: Sequence[Op] = ()) -> TxnResult:
        if self.failing:
            raise Unavailable("the disk is full")
        return await self._behind.txn(compare, then, otherwise)


class SetClock(LoopClock):
    ahead_s = 0.0

    def now(self) -> float:
        return super().now() + self.ahead_s


class Cell:
    def __init__(self) -> None:
        self.clock = SetClock()
        self.store = MemoryStore(self.clock)
        self.written = FlakyStore(self.store, self.clock)
        self.state = State(self.store, {**WORLD, **controller.KINDS, keys.CERTIFICATE_ROOTS: CertificateRoot})
        self.authority = FakeAuthority(self.signed, self.answered)
        self.authorities = {"https://ca.test/dir": self.authority}
        self.connected: list[AcmeSettings] = []
        self.signed_by_own = 0
        self.names: Callable[[str], str] = lambda host: host
        """What the authority puts into the certificate."""
        self._leaders: list[asyncio.Task[Any]] = []

    async def __aenter__(self) -> Cell:
        await self.state.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.kill()
        await self.state.close()
        await self.written.close()
        await self.store.close()

    def lead(self, identity: str = "a") -> None:
        signers = Signers(PlainSeal(), self.own, self.connect, Pace())

        async def work(term: Term) -> None:
            await CertificateLoop(self.written, self.state, self.clock, random.Random(7), term, signers).run()

        self._leaders.append(asyncio.ensure_future(lead(self.store, self.clock, identity, work)))

    async def kill(self) -> None:
        for task in self._leaders:
            task.cancel()
        await asyncio.gather(*self._leaders, return_exceptions=True)
        self._leaders.clear()

    async def own(self, host: str) -> tuple[str, bytes]:
        self.signed_by_own += 1
        now = self.clock.now() - START
        chain, key = MAKER.sign(host, begins_s=now, ends_s=now + LIFE_S)
        return chain, key.encode()

    def connect(self, settings: AcmeSettings) -> FakeAuthority:
        self.connected.append(settings)
        return self.authorities[settings.directory]

    def signed(self, host: str, request: bytes) -> str:
        csr = x509.load_der_x509_csr(request)
        assert csr.is_signature_valid
        names = csr.extensions.get_extension_for_class(x509.SubjectAlternativeName).value.get_values_for_type(x509.DNSName)
        assert names == [host]
        begin = datetime.datetime.fromtimestamp(self.clock.now(), datetime.UTC)
        certificate = (
            x509.CertificateBuilder()
            .subject_name(x509.Name([]))
            .issuer_name(MAKER.certificate.subject)
            .public_key(csr.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(begin)
            .not_valid_after(begin + datetime.timedelta(seconds=LIFE_S))
            .add_extension(x509.SubjectAlternativeName([x509.DNSName(self.names(host))]), critical=False)
            .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
            .sign(MAKER.key, hashes.SHA256())
        )
        return certificate.public_bytes(serialization.Encoding.PEM).decode()

    def answered(self, host: str, token: str) -> bool:
        """Whether the record has ingresses answer."""
        status = self.status(host)
        return status is not None and status.challenges.get(token) == f"{token}.thumb"

    async def put(self, key: str, record: object) -> None:
        await self.state.reach(await self.store.put(key, codec.encode(record)))

    async def delete(self, key: str) -> None:
        await self.state.reach(await self.store.delete(key))

    async def wish(self, host: str, source: CertificateSource, **more: Any) -> None:
        await self.put(keys.certificate(host), Certificate(host=host, project="p", source=source, updated_at=0.0, **more))

    async def choose(self, directory: str = "https://ca.test/dir") -> None:
        settings = AcmeSettings(directory=directory, sealed=b"", updated_at=self.clock.now())
        await self.put(keys.acme_settings(), settings)

    async def app(self, name: str, issuer: Issuer | None, *hosts: str) -> None:
        rules = IngressRules(certificate=issuer) if issuer is not None else None
        spec = AppSpec(name=name, project="p", image="x", ports=(Port(port=80),), ingress=rules)
        for host in hosts:
            await self.put(keys.route(host, "/"), RouteClaim(project="p", app=name))
        record = App(project="p", name=name, spec=spec, generation=1, release=1, replicas=1, created_at=0.0, updated_at=0.0)
        await self.put(keys.app("p", name), record)

    def status(self, host: str) -> CertificateStatus | None:
        held = self.state.get(CertificateStatus, host)
        return held.record if held is not None else None

    def events(self, host: str) -> list[str]:
        found = [held.record for held in self.state.records(Event).values() if held.record.subject == f"certificate/{host}"]
        return [event.code for event in sorted(found, key=lambda event: event.at)]

    async def until(self, host: str, phase: CertificatePhase, attempts: int = 0) -> CertificateStatus:
        def there() -> bool:
            status = self.status(host)
            return status is not None and status.phase is phase and status.attempts >= attempts

        await self.when(there)
        status = self.status(host)
        assert status is not None
        return status

    async def when(self, condition: Callable[[], bool]) -> None:
        while not condition():  # noqa: ASYNC110 (it costs virtual time only)
            await asyncio.sleep(0.1)


def virtual(test: Callable[[Cell], Any]) -> Callable[[], None]:
    """Have a test run with a cell, on its own virtual time."""

    async def body() -> None:
        async with Cell() as cell:
            await test(cell)

    def run() -> None:
        run_virtual(body())

    run.__name__, run.__doc__ = test.__name__, test.__doc__
    return run


@virtual
async def test_the_cells_own_root_signs_at_once_and_again_at_two_thirds_of_the_life(cell: Cell) -> None:
    cell.lead()
    await cell.wish("a.test", CertificateSource.OWN)
    first = await cell.until("a.test", CertificatePhase.VALID)
    assert describe(first.chain).names == ("a.test",)
    assert abs(first.renew_at - (START + LIFE_S * 2 / 3)) <= LIFE_S * controller.JITTER + 10
    await asyncio.sleep(first.renew_at - cell.clock.now() - 60)
    assert cell.status("a.test") == first
    await asyncio.sleep(400)
    second = cell.status("a.test")
    assert second is not None
    assert second.chain != first.chain
    assert cell.events("a.test") == ["certificate-issued", "certificate-issued"]


@virtual
async def test_renewals_of_certificates_made_together_are_spread(cell: Cell) -> None:
    cell.lead()
    for number in range(20):
        await cell.wish(f"h{number}.test", CertificateSource.OWN)
    times = [(await cell.until(f"h{number}.test", CertificatePhase.VALID)).renew_at for number in range(20)]
    assert max(times) - min(times) > LIFE_S * controller.JITTER


@virtual
async def test_an_order_goes_from_challenge_to_certificate(cell: Cell) -> None:
    cell.lead()
    await cell.choose()
    await cell.wish("a.test", CertificateSource.ACME)
    status = await cell.until("a.test", CertificatePhase.VALID)
    assert [call for call in cell.authority.calls if call != "look"] == ["begin", "answered", "finalize", "fetch"]
    key = PlainSeal().open(status.sealed, keys.certificate_status("a.test"))
    private = serialization.load_pem_private_key(key, None)
    public = x509.load_pem_x509_certificate(status.chain.encode()).public_key()
    assert private.public_key() == public
    assert (status.challenges, status.order, status.next_sealed, status.error) == ({}, "", b"", "")


@pytest.mark.parametrize("call", ["begin", "answered", "finalize", "fetch"])
@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_the_next_leader_goes_on_with_the_same_order_wherever_the_last_was_killed(call: str, after: bool) -> None:
    async def body() -> None:
        async with Cell() as cell:
            killed = asyncio.Event()

            async def before(name: str) -> None:
                if name == call and not killed.is_set():
                    killed.set()
                    if not after:
                        await asyncio.sleep(1e6)

            cell.authority.before = before
            cell.lead("a")
            await cell.choose()
            await cell.wish("a.test", CertificateSource.ACME)
            await killed.wait()
            await asyncio.sleep(0.11 if after else 0)
            await cell.kill()
            cell.lead("b")
            await cell.until("a.test", CertificatePhase.VALID)
            # What was ordered before its record could be written is ordered again, and nothing else.
            assert cell.authority.calls.count("begin") == (2 if call == "begin" and not after else 1)
            assert cell.authority.calls.count("finalize") <= 2

    run_virtual(body())


@virtual
async def test_a_failure_is_said_and_tried_again_later_and_later(cell: Cell) -> None:
    cell.authority.validate = lambda host: "connection refused"
    cell.lead()
    await cell.choose()
    await cell.wish("a.test", CertificateSource.ACME)
    waits = []
    for attempt in range(1, 5):
        status = await cell.until("a.test", CertificatePhase.FAILED, attempt)
        assert "connection refused" in status.error
        assert status.challenges == {}
        waits.append(status.retry_at - status.updated_at)
    assert all(0.8 * 60 * 2**n <= wait <= 1.2 * 60 * 2**n for n, wait in enumerate(waits))
    assert cell.authority.calls.count("begin") == 4, "an order that was refused is over"
    assert cell.events("a.test") == ["certificate-failed"] * 4
    cell.authority.validate = lambda host: ""
    status = await cell.until("a.test", CertificatePhase.VALID)
    assert (status.attempts, status.error) == (0, "")


@virtual
async def test_the_authority_says_when_it_wants_to_be_asked_again_and_others_wait_for_minutes_at_most(cell: Cell) -> None:
    cell.authority.failing = AcmeFailed("too many", kind="rateLimited", retry_after_s=3_000.0)
    cell.lead()
    await cell.choose()
    await cell.wish("a.test", CertificateSource.ACME)
    status = await cell.until("a.test", CertificatePhase.FAILED)
    assert status.retry_at - status.updated_at >= 3_000.0
    calls = len(cell.authority.calls)
    # A limit may be that of the account: nobody else asks for a while, either; what needs no authority goes on.
    await cell.wish("b.test", CertificateSource.ACME)
    await cell.wish("c.test", CertificateSource.OWN)
    await cell.until("c.test", CertificatePhase.VALID)
    await asyncio.sleep(controller.PAUSE_MAX_S - 100)
    assert len(cell.authority.calls) == calls
    cell.authority.failing = None
    await cell.until("b.test", CertificatePhase.VALID)
    assert status.updated_at + controller.PAUSE_MAX_S <= cell.clock.now() < status.updated_at + 1_000.0
    # The one that was limited waits as long as it was told to.
    await cell.until("a.test", CertificatePhase.VALID)
    assert cell.clock.now() >= status.updated_at + 3_000.0


@virtual
async def test_what_is_shown_stays_while_the_authority_is_away_and_its_order_goes_on(cell: Cell) -> None:
    cell.lead()
    await cell.choose()
    await cell.wish("a.test", CertificateSource.ACME)
    first = await cell.until("a.test", CertificatePhase.VALID)

    async def cut(name: str) -> None:
        if name == "answered":
            cell.authority.failing = AcmeFailed("the authority cannot be reached")

    cell.authority.before = cut
    await asyncio.sleep(first.renew_at - cell.clock.now())
    failed = await cell.until("a.test", CertificatePhase.FAILED)
    assert (failed.chain, failed.sealed) == (first.chain, first.sealed)
    assert failed.order
    begun = cell.authority.calls.count("begin")
    cell.authority.before = cell.authority.failing = None
    second = await cell.until("a.test", CertificatePhase.VALID)
    assert second.chain != first.chain
    assert cell.authority.calls.count("begin") == begun


@virtual
async def test_an_order_that_is_never_decided_is_looked_at_again_later(cell: Cell) -> None:
    cell.lead()
    await cell.choose()

    async def stuck(name: str) -> None:
        if name == "finalize":
            await asyncio.sleep(1e4)

    cell.authority.before = stuck
    await cell.wish("a.test", CertificateSource.ACME)
    failed = await cell.until("a.test", CertificatePhase.FAILED)
    assert "has not decided within 180 s" in failed.error
    assert failed.order
    cell.authority.before = None
    await cell.until("a.test", CertificatePhase.VALID)
    assert cell.authority.calls.count("begin") == 1


@virtual
async def test_an_order_of_another_authority_is_left_to_it(cell: Cell) -> None:
    other = FakeAuthority(cell.signed, cell.answered, base="https://other.test/")
    cell.authorities["https://other.test/dir"] = other
    cell.authority.validate, cell.authority.patient = lambda host: "connection refused", True
    cell.lead()
    await cell.choose()
    await cell.wish("a.test", CertificateSource.ACME)
    failed = await cell.until("a.test", CertificatePhase.FAILED)
    assert (failed.order, failed.order_at) == ("https://ca.test/order/1", "https://ca.test/dir")
    await cell.choose("https://other.test/dir")
    await cell.until("a.test", CertificatePhase.VALID)
    assert [call for call in other.calls if call != "look"] == ["begin", "answered", "finalize", "fetch"]


@virtual
async def test_what_the_authority_looks_for_is_answered_as_long_as_its_order_lasts(cell: Cell) -> None:
    cell.authority.validate, cell.authority.patient = lambda host: "connection refused", True
    cell.lead()
    await cell.choose()
    await cell.wish("a.test", CertificateSource.ACME)
    failed = await cell.until("a.test", CertificatePhase.FAILED)
    assert failed.error == "the authority has not decided within 180 s: connection refused"
    assert failed.challenges == {"token-1": "token-1.thumb"}
    # And shown again where it was withdrawn, though the authority has been told already.
    await cell.put(keys.certificate_status("a.test"), replace(failed, challenges={}))
    cell.authority.validate = lambda host: ""
    valid = await cell.until("a.test", CertificatePhase.VALID)
    assert valid.challenges == {}
    assert [cell.authority.calls.count(call) for call in ("begin", "answered")] == [1, 1]


@virtual
async def test_what_was_signed_before_the_date_was_set_back_is_signed_again_at_once(cell: Cell) -> None:
    cell.clock.ahead_s = DAY_S
    cell.lead()
    await cell.choose()
    for host, source in (("own.test", CertificateSource.OWN), ("acme.test", CertificateSource.ACME)):
        await cell.wish(host, source)
        first = await cell.until(host, CertificatePhase.VALID)
        assert describe(first.chain).not_before > START + DAY_S / 2
    cell.clock.ahead_s = 0.0
    await asyncio.sleep(2 * Pace().look_s)
    for host in ("own.test", "acme.test"):
        second = await cell.until(host, CertificatePhase.VALID)
        assert describe(second.chain).not_before <= cell.clock.now()
    assert cell.signed_by_own == 2, "once is enough"
    assert cell.authority.calls.count("begin") == 2


@virtual
async def test_what_failed_or_was_said_before_the_date_was_set_back_is_tried_and_said_again(cell: Cell) -> None:
    cell.clock.ahead_s = 20 * DAY_S
    cell.authority.validate = lambda host: "connection refused"
    cell.lead()
    await cell.choose()
    await cell.wish("file.test", CertificateSource.FILE, chain="x", sealed=b"x", not_after=START + DAY_S)
    await cell.wish("acme.test", CertificateSource.ACME)
    await cell.wish("switched.test", CertificateSource.ACME)
    await cell.until("file.test", CertificatePhase.VALID)
    for host in ("acme.test", "switched.test"):
        await cell.until(host, CertificatePhase.FAILED)
    cell.clock.ahead_s = 0.0
    cell.authority.validate = lambda host: ""
    # Another source in between does not carry a wait of days over.
    await cell.wish("switched.test", CertificateSource.OWN)
    await cell.until("switched.test", CertificatePhase.VALID)
    await cell.wish("switched.test", CertificateSource.ACME)
    await asyncio.sleep(2 * Pace().look_s)
    for host in ("acme.test", "switched.test"):
        status = cell.status(host)
        assert status is not None
        assert (status.phase, status.source) == (CertificatePhase.VALID, CertificateSource.ACME)
    assert len(cell.events("file.test")) == 2


@virtual
async def test_an_authority_that_was_chosen_by_a_clock_that_is_ahead_is_not_asked_without_a_pause(cell: Cell) -> None:
    cell.authority.validate = lambda host: "connection refused"
    cell.lead()
    await cell.put(keys.acme_settings(), AcmeSettings(directory="https://ca.test/dir", sealed=b"", updated_at=START + DAY_S))
    await cell.wish("a.test", CertificateSource.ACME)
    await asyncio.sleep(600)
    assert cell.authority.calls.count("begin") <= 4


@virtual
async def test_a_chain_that_is_not_for_the_hostname_is_not_taken_from_the_authority_either(cell: Cell) -> None:
    cell.names = lambda host: "other.test"
    cell.lead()
    await cell.choose()
    await cell.wish("a.test", CertificateSource.ACME)
    failed = await cell.until("a.test", CertificatePhase.FAILED)
    assert "is for other.test, not for a.test" in failed.error
    assert (failed.chain, failed.order) == ("", "")


@virtual
async def test_without_an_authority_it_is_said_and_tried_as_soon_as_one_is_chosen(cell: Cell) -> None:
    cell.lead()
    await cell.wish("a.test", CertificateSource.ACME)
    failed = await cell.until("a.test", CertificatePhase.FAILED)
    assert "atoll certificates acme --directory URL" in failed.error
    await asyncio.sleep(1)
    await cell.choose()
    await cell.until("a.test", CertificatePhase.VALID)
    assert cell.clock.now() < failed.retry_at


@virtual
async def test_a_wildcard_cannot_be_proved_over_http(cell: Cell) -> None:
    cell.lead()
    await cell.choose()
    await cell.wish("*.a.test", CertificateSource.ACME)
    assert "no wildcard" in (await cell.until("*.a.test", CertificatePhase.FAILED)).error
    assert cell.authority.calls == []


@virtual
async def test_an_app_that_asks_has_its_hostnames_signed_and_they_go_with_it(cell: Cell) -> None:
    cell.lead()
    await cell.choose()
    await cell.app("web", Issuer.OWN, "web.localhost", "www.test")
    await cell.app("plain", None, "plain.test")
    await cell.app("public", Issuer.ACME, "public.test", "public.localhost", "*.public.test")
    for host in ("web.localhost", "www.test", "public.test"):
        status = await cell.until(host, CertificatePhase.VALID)
        assert status.app in ("web", "public")
    await asyncio.sleep(10)
    # Nobody can prove these to a public authority, and nobody has asked for those of `plain`.
    assert {cell.status(host) for host in ("plain.test", "public.localhost", "*.public.test")} == {None}
    await cell.app("web", None, "web.localhost")
    await cell.when(lambda: cell.status("www.test") is None)
    assert cell.status("web.localhost") is None


@virtual
async def test_an_app_that_asks_while_no_authority_is_chosen_is_told_so_and_signed_once_one_is(cell: Cell) -> None:
    cell.lead()
    await cell.app("web", Issuer.ACME, "early.test")
    failed = await cell.until("early.test", CertificatePhase.FAILED)
    assert failed.app == "web"
    assert "no ACME authority is chosen" in failed.error
    assert cell.events("early.test") == ["certificate-failed"]
    await cell.choose()
    await cell.until("early.test", CertificatePhase.VALID)


@virtual
async def test_what_was_added_goes_before_what_an_app_asks_for(cell: Cell) -> None:
    cell.lead()
    await cell.wish("*.wild.test", CertificateSource.FILE, chain="x", sealed=b"x", not_after=START + 60 * DAY_S)
    await cell.wish("own.test", CertificateSource.FILE, chain="x", sealed=b"x", not_after=START + 60 * DAY_S)
    await cell.app("web", Issuer.OWN, "a.wild.test", "own.test", "free.test")
    await cell.until("free.test", CertificatePhase.VALID)
    await asyncio.sleep(5)
    assert cell.status("a.wild.test") is None
    assert cell.status("own.test") is None
    assert cell.signed_by_own == 1


@virtual
async def test_what_an_app_asked_for_and_has_is_kept_beside_a_wildcard_that_is_added_later(cell: Cell) -> None:
    cell.lead()
    await cell.app("web", Issuer.OWN, "a.wild.test", "shop.localhost")
    before = await cell.until("a.wild.test", CertificatePhase.VALID)
    await cell.until("shop.localhost", CertificatePhase.VALID)
    for wildcard in ("*.wild.test", "*.localhost"):
        await cell.wish(wildcard, CertificateSource.OWN)
        await cell.until(wildcard, CertificatePhase.VALID)
    await cell.app("web", Issuer.OWN, "a.wild.test", "b.wild.test", "shop.localhost", "late.localhost")
    await cell.until("late.localhost", CertificatePhase.VALID)  # clients take no certificate for *.localhost
    await asyncio.sleep(5)
    assert cell.status("a.wild.test") == before
    assert cell.status("shop.localhost") is not None
    assert cell.status("b.wild.test") is None, "the wildcard's is shown"


@virtual
async def test_the_end_of_a_certificate_from_files_is_said_in_time_and_not_of_one_that_was_renewed(cell: Cell) -> None:
    cell.lead()
    for host, days in (("a.test", 14), ("b.test", 3), ("c.test", 0), ("d.test", 14), ("e.test", 30)):
        not_after = START + days * DAY_S + 500
        await cell.wish(host, CertificateSource.FILE, chain="x", sealed=b"x", not_after=not_after)
    await asyncio.sleep(100)
    # Those whose end is near are told of at once.
    assert [len(cell.events(host)) for host in ("a.test", "b.test", "c.test", "d.test", "e.test")] == [0, 1, 1, 0, 0]
    await cell.wish("d.test", CertificateSource.FILE, chain="y", sealed=b"y", not_after=START + 60 * DAY_S)
    await asyncio.sleep(900)
    assert [len(cell.events(host)) for host in ("a.test", "b.test", "c.test", "d.test", "e.test")] == [1, 2, 2, 0, 0]
    await asyncio.sleep(2_000)
    assert cell.events("a.test") == ["certificate-ends"]


@virtual
async def test_one_who_does_not_lead_any_more_writes_nothing(cell: Cell) -> None:
    async def taken_over(name: str) -> None:
        if name == "answered":
            await cell.store.delete(keys.LEADER)
            await cell.store.put(keys.LEADER, b"other")

    cell.authority.before = taken_over
    cell.lead("a")
    await cell.choose()
    await cell.wish("a.test", CertificateSource.ACME)
    await asyncio.sleep(600)
    status = cell.status("a.test")
    assert status is not None
    assert status.phase is CertificatePhase.ORDERING
    assert status.chain == ""


@virtual
async def test_hundreds_are_signed_side_by_side_and_each_once(cell: Cell) -> None:
    cell.lead()
    for number in range(200):
        await cell.wish(f"h{number}.test", CertificateSource.OWN)
    for number in range(200):
        await cell.until(f"h{number}.test", CertificatePhase.VALID)
    await asyncio.sleep(60)
    assert cell.signed_by_own == 200


@virtual
async def test_a_store_that_cannot_be_written_for_a_while_ends_nobodys_term(cell: Cell) -> None:
    cell.lead()
    await cell.choose()
    await cell.wish("a.test", CertificateSource.ACME)
    first = await cell.until("a.test", CertificatePhase.VALID)
    cell.written.failing = True
    await cell.wish("b.test", CertificateSource.ACME)
    await asyncio.sleep(100)
    assert cell.status("b.test") is None
    cell.written.failing = False
    await cell.until("b.test", CertificatePhase.VALID)
    assert cell.status("a.test") == first


@virtual
async def test_a_certificate_of_another_project_is_no_wish_for_a_hostname_that_an_app_has(cell: Cell) -> None:
    cell.lead()
    for host in ("later.test", "x.wild.test", "free.test", "plain.test"):
        await cell.put(keys.certificate(host), Certificate(host=host, project="q", source=CertificateSource.OWN, updated_at=0.0))
    await cell.until("later.test", CertificatePhase.VALID)
    await cell.app("web", Issuer.OWN, "later.test")
    await cell.app("plain", None, "plain.test", "*.wild.test")
    await cell.when(lambda: (status := cell.status("later.test")) is not None and status.project == "p")
    status = await cell.until("later.test", CertificatePhase.VALID)
    assert status.app == "web"
    # And nothing is renewed for who does not answer there.
    await cell.when(lambda: cell.status("plain.test") is None and cell.status("x.wild.test") is None)
    assert cell.status("free.test") is not None


@virtual
async def test_who_removes_a_hostname_and_adds_it_again_waits_as_long_as_who_leaves_it(cell: Cell) -> None:
    cell.authority.validate = lambda host: "connection refused"
    cell.lead()
    await cell.choose()
    await cell.wish("a.test", CertificateSource.ACME)
    await cell.app("web", Issuer.ACME, "b.test")
    first = {host: await cell.until(host, CertificatePhase.FAILED, 1) for host in ("a.test", "b.test")}
    for _ in range(10):
        await cell.delete(keys.certificate("a.test"))
        await cell.app("web", None, "b.test")
        await asyncio.sleep(2)
        await cell.wish("a.test", CertificateSource.ACME)
        await cell.app("web", Issuer.ACME, "b.test")
        await asyncio.sleep(2)
    assert cell.authority.calls.count("begin") == 2
    status = cell.status("b.test")
    assert status is not None
    assert status.app == "web", "it is the app's again, and shown as such while it waits"
    for host, before in first.items():
        second = await cell.until(host, CertificatePhase.FAILED, 2)
        assert second.updated_at >= before.retry_at
        assert second.retry_at - second.updated_at >= 0.8 * 120


@virtual
async def test_another_source_in_between_is_no_way_around_the_wait(cell: Cell) -> None:
    cell.authority.validate = lambda host: "connection refused"
    cell.lead()
    await cell.choose()
    await cell.wish("a.test", CertificateSource.ACME)
    first = await cell.until("a.test", CertificatePhase.FAILED, 1)
    for number in range(4):
        # The cell's own root makes nobody wait.
        await cell.wish("a.test", CertificateSource.OWN)
        await cell.until("a.test", CertificatePhase.VALID)
        if number % 2:
            await cell.delete(keys.certificate("a.test"))
            await asyncio.sleep(2)
        await cell.wish("a.test", CertificateSource.FILE, chain="x", sealed=b"x", not_after=START + DAY_S)
        await asyncio.sleep(2)
        await cell.wish("a.test", CertificateSource.ACME)
        await asyncio.sleep(2)
        assert cell.clock.now() < first.retry_at
    assert cell.authority.calls.count("begin") == 1
    second = await cell.until("a.test", CertificatePhase.FAILED, 2)
    assert second.updated_at >= first.retry_at
    cell.authority.validate = lambda host: ""
    status = await cell.until("a.test", CertificatePhase.VALID)
    assert (status.source, status.attempts, status.retry_at) == (CertificateSource.ACME, 0, 0.0)


@virtual
async def test_of_a_failure_that_nobody_waits_for_the_wait_alone_is_kept_and_only_until_it_is_over(cell: Cell) -> None:
    cell.lead()
    await cell.choose()
    await cell.wish("a.test", CertificateSource.ACME)
    first = await cell.until("a.test", CertificatePhase.VALID)
    cell.authority.validate = lambda host: "connection refused"
    await asyncio.sleep(first.renew_at - cell.clock.now())
    failed = await cell.until("a.test", CertificatePhase.FAILED, 1)
    assert failed.chain == first.chain
    await cell.delete(keys.certificate("a.test"))
    await cell.when(lambda: (status := cell.status("a.test")) is None or not status.chain)
    rest = cell.status("a.test")
    assert rest is not None
    assert (rest.sealed, rest.attempts, rest.retry_at) == (b"", 1, failed.retry_at)
    # Another project's hostname by now: what failed before is not its own.
    await cell.put(
        keys.certificate("a.test"), Certificate(host="a.test", project="q", source=CertificateSource.ACME, updated_at=0.0)
    )
    await cell.when(lambda: (status := cell.status("a.test")) is not None and status.project == "q")
    assert cell.clock.now() < failed.retry_at
    await cell.until("a.test", CertificatePhase.FAILED, 1)
    await cell.delete(keys.certificate("a.test"))
    await cell.when(lambda: cell.status("a.test") is None)
