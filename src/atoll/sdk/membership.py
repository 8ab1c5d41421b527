"""A machine's identity: its key and certificate on disk, how it joins a cell, and how it renews without a restart."""

from __future__ import annotations

import asyncio
import math
import random
from collections.abc import Awaitable, Callable
from pathlib import Path

import structlog
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from msgspec import Struct

from atoll.model import codec
from atoll.model.errors import AtollError, Corrupt, OutcomeUnknown, Retry, Unauthenticated, Unavailable
from atoll.model.membership import EARLY_S, Certified, JoinRequest, RenewRequest, read_join_token, renewal_message
from atoll.model.ports.clock import Clock
from atoll.sdk import answers
from atoll.sdk.failover import transport_to
from atoll.sdk.private_file import write_private
from atoll.sdk.transport import Transport
from atoll.sdk.trust import Tls
from atoll.store.lock import unavailable

RENEW_AT = 2 / 3
"""Of a certificate's life: a third is left for servers that do not answer."""
LOOK_S = 60.0
"""The longest wait between two looks at the clock, which may jump."""
RETRY_FIRST_S = 1.0
RETRY_MAX_S = 300.0
JOIN_TRIES = 8
JOIN_RETRY_MAX_S = 10.0

Say = Callable[[str, str, bool], Awaitable[None]]
"""`(code, message, bad)`: what is to be known of the certificate, as an event of the machine."""

log = structlog.get_logger()


class Held(Struct, frozen=True, kw_only=True):
    """What a machine holds."""

    name: str
    begins_at: float
    """When it was made; it counts `EARLY_S` earlier, which is none of its life."""
    ends_at: float

    @property
    def renew_at(self) -> float:
        return self.begins_at + RENEW_AT * (self.ends_at - self.begins_at)

    def valid_at(self, now: float) -> bool:
        """Whether it counts already."""
        return now >= self.begins_at - EARLY_S


class Credentials:
    """The files `identity.pem` (key and certificate, 0600) and `ca.pem` in a directory of mode 0700."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self.file = directory / "identity.pem"
        self.bundle = directory / "ca.pem"
        self._joining = directory / "joining.pem"

    def load(self) -> Held | None:
        """Return what is held; None where nothing is. Raises Corrupt, Unavailable (it cannot be read now)."""
        try:
            certificate = self._certificate()
            self.bundle.read_text()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise unavailable(self.file, error) from None
        return _read(certificate, self.file)

    def tls(self) -> Tls:
        """Return what connections to the cell are made with. Raises Invalid."""
        return Tls(self.bundle, self.file)

    async def join(self, servers: str, token: str, name: str, choose: random.Random, *, hostname: str = "") -> Held:
        """Make a key, have it certified at one of `servers` (URLs with commas), and keep both.

        `name` may be empty: then it is the one that the token is for, and where that is for any, `hostname`. The servers are
        known by the authority that is pinned in the token. Raises Unauthenticated, Conflict, Forbidden: the token is refused;
        Unavailable after `JOIN_TRIES`. Safe to repeat: the same key is used until it is certified.
        """
        pin = read_join_token(token).pin
        key = self._joining_key()
        request = JoinRequest(token=token, name=name, hostname=hostname, csr=_csr(key))
        transport = transport_to(servers, None, agent="atoll-join", ca=pin)
        try:
            for tried in range(JOIN_TRIES):
                try:
                    certified = await _post(transport, "/v1/identity/join", request)
                    break
                except (Unavailable, OutcomeUnknown) as error:
                    if tried == JOIN_TRIES - 1:
                        raise Unavailable(f"could not join: {error}", mend=error.mend) from None
                    log.warning("could not join; trying again", cause=error.message)
                    await asyncio.sleep(min(JOIN_RETRY_MAX_S, 0.5 * 2**tried) * choose.uniform(0.5, 1.0))
        finally:
            await transport.close()
        self._keep(key, certified)
        self._joining.unlink()
        held = self.load()
        assert held is not None  # noqa: S101 (it was just written)
        return held

    async def renew(self, transport: Transport, *, before: float = math.inf) -> Certified | None:
        """Get another certificate for a new key, and keep both; None, and neither is kept, where it begins at `before` or later.

        Raises as the server answers, and Unavailable where they cannot be kept; then what was held stays.
        """
        try:
            old = serialization.load_pem_private_key(self.file.read_bytes(), None)
            certificate = self._certificate()
        except OSError as error:
            raise unavailable(self.file, error) from None
        if not isinstance(old, ec.EllipticCurvePrivateKey):
            raise Corrupt(f"{self.file} holds another kind of key", mend="remove it, and join anew with --join")
        key = ec.generate_private_key(ec.SECP256R1())
        csr = _csr(key)
        proof = old.sign(renewal_message(csr), ec.ECDSA(hashes.SHA256()))
        request = RenewRequest(certificate=certificate, csr=csr, proof=proof)
        certified = await _post(transport, "/v1/identity/renew", request)
        if _read(certified.certificate, "the server's answer").begins_at >= before:
            return None
        self._keep(key, certified)
        return certified

    def _certificate(self) -> str:
        """Return the certificate alone: the key stays here."""
        text = self.file.read_text()
        begin = text.find("-----BEGIN CERTIFICATE-----")
        return text[begin:] if begin >= 0 else ""

    def _joining_key(self) -> ec.EllipticCurvePrivateKey:
        if self._joining.exists():
            key = serialization.load_pem_private_key(self._joining.read_bytes(), None)
            if isinstance(key, ec.EllipticCurvePrivateKey):
                return key
        key = ec.generate_private_key(ec.SECP256R1())
        write_private(self._joining, _pem(key))
        return key

    def _keep(self, key: ec.EllipticCurvePrivateKey, certified: Certified) -> None:
        # Key and certificate in one file, so that no crash leaves one without the other.
        write_private(self.bundle, certified.bundle.encode())
        write_private(self.file, _pem(key) + certified.certificate.encode())


async def keep_renewed(
    credentials: Credentials, anonymous: Callable[[], Transport], tls: Tls, clock: Clock, choose: random.Random, say: Say
) -> None:
    """Renew the certificate when two thirds of its life are over, for ever; `tls` shows the new one from then on.

    One that does not count yet is of a server whose clock was ahead, or this machine's is behind: nobody here knows which. So
    another is asked for at every look, and kept where it begins earlier.
    `anonymous` gives a way to the servers that shows no certificate: one that has expired would end the handshake, and the
    server takes it in a renewal all the same. What fails is said once, and tried again with growing waits.
    """
    failures = 0
    while True:
        try:
            held = credentials.load()
        except Unavailable as error:  # too many open files, say: what is held is there all the same
            log.warning("the machine's certificate cannot be read; trying again", cause=error.message)
            await asyncio.sleep(LOOK_S)
            continue
        if held is None:
            raise Corrupt("the machine's certificate is gone", mend="join anew with --join")
        await asyncio.sleep(wait_s(held, clock.now(), failures, choose))
        valid = held.valid_at(clock.now())
        if valid and clock.now() < held.renew_at:
            failures = 0
            continue
        try:
            certified = await _renewed(credentials, anonymous(), math.inf if valid else held.begins_at)
        except AtollError as error:
            failures += 1
            log.warning("the certificate could not be renewed", cause=error.message, mend=error.mend, failures=failures)
            if failures == 1 or error.retry is Retry.NEVER:
                await _said(say, "certificate-not-renewed", f"the certificate could not be renewed: {error.message}", True)
        else:
            failures = 0
            if certified is not None:
                tls.renewed()
                log.info("the certificate was renewed", name=certified.name)


async def _renewed(credentials: Credentials, transport: Transport, before: float) -> Certified | None:
    try:
        return await credentials.renew(transport, before=before)
    finally:
        await transport.close()


def wait_s(held: Held, now: float, failures: int, choose: random.Random) -> float:
    """Return how long to wait before the next look: a little at random, so that machines which joined together spread out."""
    if failures:
        return min(RETRY_MAX_S, RETRY_FIRST_S * 2.0 ** min(failures - 1, 32)) * choose.uniform(0.5, 1.0)
    due: float = held.renew_at - now + choose.uniform(0, 0.05) * (held.ends_at - held.begins_at)
    return max(0.0, min(due, LOOK_S))


async def _said(say: Say, code: str, message: str, bad: bool) -> None:
    try:
        await say(code, message, bad)
    except AtollError as error:
        log.info("an event could not be sent", code=code, cause=error.message)


async def _post(transport: Transport, path: str, record: object) -> Certified:
    answer = await transport.request("POST", path, body=codec.encode(record))
    try:
        return answers.read(answer, Certified)
    except Unauthenticated as error:
        mend = "make another join token with 'atoll join-token create' on a machine that may"
        raise Unauthenticated(error.message, mend=mend) from None


def _read(certificate: str, where: object) -> Held:
    """Raises Corrupt."""
    try:
        found = x509.load_pem_x509_certificate(certificate.encode())
    except ValueError as error:
        raise Corrupt(f"{where} holds no certificate: {error}", mend="remove it, and join anew with --join") from None
    name = str(found.subject.get_attributes_for_oid(NameOID.COMMON_NAME)[0].value)
    begins, ends = found.not_valid_before_utc.timestamp() + EARLY_S, found.not_valid_after_utc.timestamp()
    return Held(name=name, begins_at=min(begins, ends), ends_at=ends)


def _csr(key: ec.EllipticCurvePrivateKey) -> str:
    """Return a signing request for `key`; the server alone says what the certificate names."""
    request = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([])).sign(key, hashes.SHA256())
    return request.public_bytes(serialization.Encoding.PEM).decode()


def _pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
