"""Certificates of the hostnames that ingresses serve, and what is needed to have them signed."""

from __future__ import annotations

import enum

from atoll.model.records.basis import Record


class CertificateSource(enum.StrEnum):
    """Who signs."""

    FILE = "file"
    """Somebody else: the project hands chain and key in."""
    OWN = "own"
    """The cell's own root for hostnames, which browsers trust once they are told to."""
    ACME = "acme"
    """The authority of `AcmeSettings`, which sees that the hostname leads to this cell (RFC 8555)."""


class CertificatePhase(enum.StrEnum):
    WAITING = "waiting"
    """Nothing was tried yet."""
    ORDERING = "ordering"
    FAILED = "failed"
    """It is tried again at `retry_at`."""
    VALID = "valid"


class Certificate(Record, frozen=True, kw_only=True):
    """What a project wants for a hostname. Writer: API, for the user. Chain and key are there where the source is `file`."""

    host: str
    """`*.` in front means every name with one more label."""
    project: str
    source: CertificateSource
    chain: str = ""
    """PEM, the hostname's own certificate first."""
    sealed: bytes = b""
    """The private key (PEM), sealed with the cell's key."""
    not_after: float = 0.0
    """When `chain` ends."""
    shared: bool = False
    """It may be shown for hostnames of other projects, too."""
    version: int = 1
    updated_at: float


class CertificateStatus(Record, frozen=True, kw_only=True):
    """How it stands with a certificate that is not handed in, and with the end of one that is. Writer: leader."""

    host: str
    project: str
    source: CertificateSource
    app: str = ""
    """Whose spec asks for it; empty where a `Certificate` does."""
    phase: CertificatePhase = CertificatePhase.WAITING
    chain: str = ""
    sealed: bytes = b""
    """The key of `chain`, which serves until a newer one is there."""
    not_after: float = 0.0
    renew_at: float = 0.0
    order: str = ""
    """The URL of the order that is under way."""
    order_at: str = ""
    """The directory of the authority that has it."""
    next_sealed: bytes = b""
    """The key that the order is for."""
    challenges: dict[str, str] = {}
    """Token → what every ingress answers under it (RFC 8555, 8.3)."""
    attempts: int = 0
    """Failures one after the other."""
    retry_at: float = 0.0
    error: str = ""
    """Of the last attempt."""
    warned_at: float = 0.0
    """When it was last said that it ends soon."""
    updated_at: float


class AcmeSettings(Record, frozen=True, kw_only=True):
    """The authority that signs where `acme` is asked for. Writer: API, for an admin."""

    directory: str
    contact: tuple[str, ...] = ()
    """Mail addresses."""
    ca: str = ""
    """What the directory's own certificate is known by (PEM); empty for the system's authorities."""
    eab_kid: str = ""
    """External account binding: the key's id (RFC 8555, 7.3.4)."""
    sealed: bytes
    """`AcmeKeys` as JSON, sealed with the cell's key."""
    updated_at: float


class AcmeKeys(Record, frozen=True, kw_only=True):
    """Never stored but sealed."""

    account: str
    """PEM."""
    eab: str = ""
    """Base64url, as authorities hand it out."""

    def __repr__(self) -> str:
        return "AcmeKeys(…)"


class CertificateRoot(Record, frozen=True, kw_only=True):
    """What the cell signs hostnames with, or what ingresses show to instances: each apart from the other and from the authority of
    machines, so that who trusts one trusts not the others. Writer: API.
    """

    certificate: str
    sealed: bytes
    created_at: float
