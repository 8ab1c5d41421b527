"""Certificates of hostnames: what users send and see of them, what ingresses are told. Keys go in, and out to ingresses alone."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from typing import Annotated, Protocol

from msgspec import Meta, Struct

from atoll.model.errors import Invalid
from atoll.model.membership import CSR_CHARS_MAX
from atoll.model.records.certificate import CertificatePhase, CertificateSource

CHAIN_CHARS_MAX = 65_536
KEY_CHARS_MAX = 16_384
CERTIFICATES_MAX = 50_000
"""Of a cell, beside those that apps ask for."""
HOST_PATTERN = r"(\*\.)?[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?(\.[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?)*"
_HOST = re.compile(HOST_PATTERN)
LOCAL = ("localhost", "internal", "local")
"""Ends of names that no public authority can reach (RFC 6761, RFC 6762, and `internal`, which is kept for private use)."""
CHALLENGE_PATH = "/.well-known/acme-challenge/"
"""Where an authority looks for an answer (RFC 8555, 8.3)."""


class CertificateRequest(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A certificate from files, with chain and key in PEM; or the wish for one that is signed here or by ACME."""

    source: CertificateSource = CertificateSource.FILE
    chain: Annotated[str, Meta(max_length=CHAIN_CHARS_MAX)] = ""
    key: Annotated[str, Meta(max_length=KEY_CHARS_MAX)] = ""
    shared: bool = False

    def __repr__(self) -> str:
        return f"CertificateRequest(source={self.source}, …)"


class CertificateView(Struct, frozen=True, kw_only=True):
    """What anyone of the project may see: all but the key."""

    host: str
    project: str
    source: CertificateSource
    state: CertificatePhase
    app: str = ""
    """The app whose spec asks for it; empty where it was added."""
    shared: bool = False
    names: tuple[str, ...] = ()
    issuer: str = ""
    fingerprint: str = ""
    """SHA-256 of the certificate that is shown."""
    not_before: float | None = None
    not_after: float | None = None
    renew_at: float | None = None
    retry_at: float | None = None
    error: str = ""
    """Of the last attempt to have it signed."""
    chain: str = ""
    """PEM; of one that is shown alone."""
    revision: int = 0


class AcmeRequest(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Which authority signs where `acme` is asked for. Whoever sends it agrees to that authority's terms."""

    directory: Annotated[str, Meta(max_length=1024)]
    contact: Annotated[tuple[Annotated[str, Meta(max_length=254)], ...], Meta(max_length=8)] = ()
    ca: Annotated[str, Meta(max_length=CHAIN_CHARS_MAX)] = ""
    eab_kid: Annotated[str, Meta(max_length=256)] = ""
    eab_key: Annotated[str, Meta(max_length=1024)] = ""

    def __repr__(self) -> str:
        return f"AcmeRequest(directory={self.directory!r}, …)"


class AcmeView(Struct, frozen=True, kw_only=True):
    directory: str = ""
    """Empty where none was chosen yet."""
    contact: tuple[str, ...] = ()
    eab_kid: str = ""
    updated_at: float | None = None
    revision: int = 0


class RootView(Struct, frozen=True, kw_only=True):
    """What a browser is told to trust for hostnames that the cell signs itself."""

    certificate: str
    fingerprint: str
    not_after: float


class Material(Struct, frozen=True, kw_only=True):
    """A certificate with its key, for an ingress to show."""

    host: str
    project: str
    chain: str
    key: str
    shared: bool = False

    def __repr__(self) -> str:
        return f"Material({self.host!r}, …)"


class ChallengeAnswer(Struct, frozen=True, kw_only=True):
    """What an ingress answers under `CHALLENGE_PATH` and `token` while an order is under way."""

    host: str
    token: str
    answer: str


class CertificateBatch(Struct, frozen=True):
    """With `complete`, `put` and `kept` are every certificate there is; what a batch before has told is among those kept."""

    revision: int
    complete: bool
    put: tuple[Material, ...] = ()
    removed: tuple[str, ...] = ()
    """Hosts."""
    kept: tuple[str, ...] = ()
    """Hosts whose record or key cannot be read now: what is known of them holds."""
    challenges: tuple[ChallengeAnswer, ...] | None = None
    """All that are to be answered; None where nothing new is said of them."""


class CallerRequest(Struct, frozen=True, kw_only=True):
    """An ingress asks for what it shows to instances that ask who calls."""

    csr: Annotated[str, Meta(max_length=CSR_CHARS_MAX)]
    """PKCS #10 in PEM, of a key that stays with the ingress; nothing but the key is taken from it."""


class CallerCertificate(Struct, frozen=True, kw_only=True):
    """Good for nothing but to be shown to instances: no server of the cell takes it, and no client."""

    certificate: str
    life_s: float
    """From its making, so that the clocks need not agree."""


class Callers(Protocol):
    """Who certifies an ingress for the instances that it calls."""

    async def certify_caller(self, ingress: str, request: CallerRequest) -> CallerCertificate:
        """Raises Unavailable (safe to repeat), Revoked, NotFound where the server is older than this."""
        ...


class CertificateFeed(Protocol):
    """What an ingress sees of the certificates."""

    def certificates(self, ingress: str) -> AsyncIterator[CertificateBatch]:
        """Yield all there is, the last batch of that being the complete one, then changes as they come.

        Ends with Unavailable when the connection breaks: call again. Raises NotFound where the server is older than this.
        """
        ...


def check_host(host: str, field: str = "host") -> str:
    """Return `host` if it can have a certificate: a name in lower case, or `*.` and a name. Raises Invalid."""
    if len(host) > 253 or _HOST.fullmatch(host) is None or host.removeprefix("*.").replace(".", "").isdigit():
        mend = "write it in lower case, e.g. www.example.com or *.example.com; other alphabets as xn--…"
        if "/" in host or ":" in host:
            mend = "give the name alone, without scheme, port and path, e.g. www.example.com"
        raise Invalid(f"{field}: {host[:80]!r} is not a hostname", field=field, mend=mend)
    return host


def provable(host: str) -> bool:
    """Whether a public ACME authority could have it proved over HTTP that `host` leads to this cell (RFC 8555, 8.3)."""
    return "." in host and not host.startswith("*.") and host.rpartition(".")[2] not in LOCAL


def too_wide(host: str) -> bool:
    """Whether `host` is a wildcard over a single label, which clients take for no name (as public suffixes: RFC 6125, 7.2)."""
    return host.startswith("*.") and "." not in host.removeprefix("*.")


def wildcard_of(host: str) -> str:
    """Return the wildcard that covers `host`: that with one label less (RFC 6125, 6.4.3)."""
    return f"*.{host.partition('.')[2]}"


def wildcards_over(host: str) -> list[str]:
    """Return every wildcard that a route to `host` may be written as, the nearest first: unlike a certificate's, of any depth."""
    parts = host.removeprefix("*.").split(".")
    return ["*." + ".".join(parts[start:]) for start in range(0 if host.startswith("*.") else 1, len(parts))]


def covers(name: str, host: str) -> bool:
    """Whether a certificate's `name` is good for `host`; a wildcard host only by the same wildcard."""
    return name == host or (name.startswith("*.") and not host.startswith("*.") and wildcard_of(host) == name)
