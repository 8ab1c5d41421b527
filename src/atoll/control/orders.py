"""What control sees of an ACME authority (RFC 8555): orders, their challenges, and what goes wrong with them."""

from __future__ import annotations

import asyncio
import enum
from collections.abc import Callable
from typing import Protocol

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from msgspec import Struct

from atoll.model.errors import AtollError, DeadlineExceeded, Retry
from atoll.model.records.certificate import AcmeSettings


class AcmeFailed(AtollError):
    """The authority refused, or could not be reached. `retry_after_s` is what it said of the next try."""

    code = "acme"
    status = 502
    retry = Retry.SAFE

    def __init__(self, message: str, *, kind: str = "", retry_after_s: float = 0.0) -> None:
        super().__init__(message)
        self.kind = kind
        """The last part of the problem's type, such as `rateLimited`; empty where the authority was not reached."""
        self.retry_after_s = retry_after_s


class OrderState(enum.StrEnum):
    PENDING = "pending"
    READY = "ready"
    PROCESSING = "processing"
    VALID = "valid"
    INVALID = "invalid"


class Challenge(Struct, frozen=True, kw_only=True):
    """What the authority looks for at a hostname over HTTP; `answer` is what it must find."""

    url: str
    token: str
    answer: str
    pending: bool = True
    error: str = ""


class Order(Struct, frozen=True, kw_only=True):
    url: str
    state: OrderState
    finalize: str = ""
    certificate: str = ""
    challenges: tuple[Challenge, ...] = ()
    error: str = ""
    retry_after_s: float = 0.0
    """When the authority wants to be asked again."""


class Authority(Protocol):
    """One account at one authority. Every call may raise AcmeFailed; each but `begin` is safe to repeat."""

    async def begin(self, host: str) -> Order:
        """Make an order for one hostname, with its HTTP challenge."""
        ...

    async def look(self, url: str) -> Order: ...

    async def answered(self, challenge: Challenge) -> None:
        """Say that every ingress answers it now."""
        ...

    async def finalize(self, order: Order, request: bytes) -> None:
        """Hand in the signing request (DER) of an order that is ready."""
        ...

    async def fetch(self, order: Order) -> str:
        """Return the chain (PEM) of an order that is valid."""
        ...


Connect = Callable[[AcmeSettings], Authority]
"""Raises Corrupt where the account's key cannot be opened."""


class Pace(Struct, frozen=True, kw_only=True):
    """How long things take, in seconds."""

    settle_s: float = 1.0
    """After the ingresses that are known answer, for those that are not: their streams hear of it within milliseconds."""
    poll_s: float = 2.0
    order_s: float = 180.0
    """An order that is not decided by then is looked at again later; it is not given up."""
    retry_min_s: float = 60.0
    retry_max_s: float = 43_200.0
    look_s: float = 300.0
    """All certificates are looked at so often, whatever has happened."""
    gather_s: float = 0.2
    """Changes that come within so long are looked at together."""


async def fulfil(authority: Authority, order: Order, request: bytes, pace: Pace, show: Show) -> str:
    """Lead an order, whatever its state, to its chain (PEM); `show` has all ingresses answer its challenges.

    Raises AcmeFailed: the order is `INVALID`, or the authority failed; DeadlineExceeded: it is not decided within `pace.order_s`,
    and may be led on.
    """
    shown: dict[str, str] = {}
    told: set[str] = set()
    try:
        async with asyncio.timeout(pace.order_s):
            while True:
                match order.state:
                    case OrderState.PENDING:
                        # Those that it looks at already, too: it may look again for as long as the order lasts (RFC 8555, 8.2).
                        answers = {one.token: one.answer for one in order.challenges}
                        if answers != shown:
                            await show(answers)
                            shown = answers
                            await asyncio.sleep(pace.settle_s)
                        for one in order.challenges:
                            if one.pending and one.url not in told:
                                await authority.answered(one)
                                told.add(one.url)
                    case OrderState.READY:
                        await authority.finalize(order, request)
                    case OrderState.VALID:
                        return await authority.fetch(order)
                    case OrderState.INVALID:
                        why = words_of(order) or "the authority gave no reason"
                        raise AcmeFailed(why, kind="invalid", retry_after_s=order.retry_after_s)
                    case OrderState.PROCESSING:
                        pass
                await asyncio.sleep(max(pace.poll_s, order.retry_after_s))
                order = await authority.look(order.url)
    except TimeoutError:
        words = words_of(order)
        late = f"the authority has not decided within {pace.order_s:.0f} s" + (f": {words}" if words else "")
        raise DeadlineExceeded(late) from None


class Show(Protocol):
    async def __call__(self, answers: dict[str, str]) -> None: ...


def words_of(order: Order) -> str:
    """Return what is wrong with an order: what the authority found at the hostname says more than the order itself."""
    found = [one.error for one in order.challenges if one.error]
    return found[0] if found else order.error


def new_key() -> bytes:
    """Return a private key (PEM) for a hostname: ECDSA P-256."""
    key = ec.generate_private_key(ec.SECP256R1())
    return key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())


def request_for(host: str, key: bytes) -> bytes:
    """Return a signing request (PKCS #10, DER) for one hostname."""
    private = serialization.load_pem_private_key(key, None)
    assert isinstance(private, ec.EllipticCurvePrivateKey)  # noqa: S101 (it is one of `new_key`)
    names = x509.SubjectAlternativeName([x509.DNSName(host)])
    builder = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([])).add_extension(names, critical=False)
    return builder.sign(private, hashes.SHA256()).public_bytes(serialization.Encoding.DER)
