"""Who belongs to a cell: its certificate authorities, join tokens, the identities of machines, its servers.

Each record has one writer, named in its docstring. Times are seconds since the epoch (UTC); certificates are PEM text.
"""

from __future__ import annotations

import base64
import binascii
import enum
import hashlib

from msgspec import Struct

from atoll.model.errors import Unauthenticated, VersionSkew
from atoll.model.records import CELL

API_VERSION = 1
"""Raised with every change of the API that an older peer would misunderstand."""
DATA_VERSION = 1
"""Raised with every change of the records that an older server would do harm to: one that it must not lose when it writes a record
that it reads without it, one whose meaning is another."""
SKEW_MAX = 1
"""How many versions apart two peers may be, or a server and the data: one side of a rolling upgrade is one ahead."""
API_HEADER = "atoll-api"
"""Says the speaker's `API_VERSION`, in requests and in answers. Who says nothing is taken as he is: curl, a browser."""

SERVER_NAME = "server.atoll.internal"
"""The DNS name that every server's certificate has, so that clients can tell servers of the cell at any address."""
CALLER = "caller"
"""The kind in the name of who calls an instance, an ingress: no `MemberKind`, so that it opens nothing else."""
JOIN_PREFIX = "atolljoin_"
_ID_BYTES = 6
_SECRET_BYTES = 24
_PIN_BYTES = 32
JOIN_TOKEN_CHARS_MAX = 256
PEM_CHARS_MAX = 65_536
"""Of a bundle of certificates; one alone has under 1 KiB."""
CSR_CHARS_MAX = 8_192
EARLY_S = 300.0
"""How much before its making a certificate begins to count, for clocks that are behind."""


class MemberKind(enum.StrEnum):
    NODE = "node"
    INGRESS = "ingress"


class _Record(Struct, frozen=True, kw_only=True, omit_defaults=True):
    pass


class Authority(_Record, frozen=True, kw_only=True):
    """A certificate authority of the cell; the newest whose `signs_from` is past signs. Writer: API.

    One that is not retired yet is trusted, so that a new one is known everywhere before it signs.
    """

    id: str
    certificate: str
    sealed: bytes
    """Its private key, sealed with the cell's key."""
    created_at: float
    signs_from: float
    retired_at: float | None = None


class JoinToken(_Record, frozen=True, kw_only=True):
    """Lets one machine in, once. Only the SHA-256 of its secret is kept. Writer: API."""

    id: str
    digest: str
    kind: MemberKind
    subject: str = ""
    """The only name that may join with it, also where that name is taken; empty: any name that is free."""
    created_at: float
    expires_at: float
    used_at: float | None = None
    used_by: str = ""
    used_key: str = ""
    """SHA-256 of the public key that joined: the same machine may ask again, when the answer did not reach it."""
    used_enrolment: str = ""
    """The enrolment that it got: who asks again must still have it. Empty in what an older server wrote."""


class Identity(_Record, frozen=True, kw_only=True):
    """A machine that has joined. Its certificates count while they name this enrolment. Writer: API."""

    kind: MemberKind
    name: str
    enrolment: str
    """Changes when the machine joins anew; empty where one was revoked that had never joined."""
    joined_at: float
    serial: str = ""
    """Of the newest certificate."""
    expires_at: float = 0.0
    """Of the newest certificate."""
    revoked_at: float | None = None


class Server(_Record, frozen=True, kw_only=True):
    """A server that runs, under a lease of its own. Writer: that server."""

    id: str
    """Also its name as leader."""
    urls: tuple[str, ...]
    version: str
    api: int = API_VERSION
    data: int = 1
    """The version of data that it writes."""
    started_at: float


class JoinTokenRequest(Struct, frozen=True, kw_only=True):
    kind: MemberKind = MemberKind.NODE
    subject: str = ""
    expires_in_s: float = 3_600.0


class JoinTokenView(Struct, frozen=True, kw_only=True):
    id: str
    kind: MemberKind
    subject: str = ""
    created_at: float
    expires_at: float
    used_at: float | None = None
    used_by: str = ""
    token: str | None = None
    """Only in the answer to its making."""
    servers: tuple[str, ...] = ()
    """Where to join, in the answer to its making."""


class JoinRequest(Struct, frozen=True, kw_only=True):
    token: str
    name: str = ""
    """Empty: the one that the token is for, and where it is for any, `hostname`."""
    hostname: str = ""
    csr: str
    """A certificate signing request (PEM) for the machine's own key; nothing but the key is taken from it."""


class RenewRequest(Struct, frozen=True, kw_only=True):
    certificate: str
    csr: str
    proof: bytes
    """What the key of `certificate` makes of `renewal_message(csr)`: ECDSA with SHA-256, DER."""


class Certified(Struct, frozen=True, kw_only=True):
    """What a machine gets: keep it, and renew before it ends."""

    name: str
    certificate: str
    bundle: str
    """Every authority that is trusted now."""


class Bundle(Struct, frozen=True, kw_only=True):
    cell: str
    bundle: str


class AuthorityView(Struct, frozen=True, kw_only=True):
    id: str
    fingerprint: str
    signs_from: float
    retired_at: float | None = None
    signs: bool = False


class RotateRequest(Struct, frozen=True, kw_only=True):
    at_once: bool = False
    """The new authority signs now, and no other is trusted any more: every machine must join anew."""


class IdentityView(Struct, frozen=True, kw_only=True):
    kind: MemberKind
    name: str
    joined_at: float
    expires_at: float
    revoked_at: float | None = None


class ServerView(Struct, frozen=True, kw_only=True):
    server: Server
    leads: bool = False


def uri_of(kind: str, name: str) -> str:
    """Return who a certificate is for: a SPIFFE ID (the SPIFFE project's "SPIFFE-ID", section 2) with the cell as trust domain."""
    return f"spiffe://{CELL}/{kind}/{name}"


def renewal_message(csr: str) -> bytes:
    return b"atoll renew\0" + csr.encode()


def join_token(id: bytes, secret: bytes, pin: bytes) -> str:
    """Return the text of a join token: its id, its secret, and the SHA-256 of the authority that the machine will meet."""
    return JOIN_PREFIX + base64.urlsafe_b64encode(id + secret + pin).decode()


class JoinParts(Struct, frozen=True):
    id: str
    digest: str
    pin: str
    """`sha256:` and 64 hexadecimal digits."""


def read_join_token(text: str) -> JoinParts:
    """Return the parts of a join token; of its secret only the digest. Raises Unauthenticated for anything else."""
    mend = "copy the whole command that 'atoll join-token create' prints"
    if not text.startswith(JOIN_PREFIX) or len(text) > JOIN_TOKEN_CHARS_MAX:
        raise Unauthenticated("this is no join token", mend=mend)
    try:
        raw = base64.b64decode(text.removeprefix(JOIN_PREFIX), altchars=b"-_", validate=True)
    except (binascii.Error, ValueError):
        raw = b""
    if len(raw) != _ID_BYTES + _SECRET_BYTES + _PIN_BYTES:
        raise Unauthenticated("this join token is not whole", mend=mend)
    id, secret, pin = raw[:_ID_BYTES], raw[_ID_BYTES : _ID_BYTES + _SECRET_BYTES], raw[-_PIN_BYTES:]
    return JoinParts(id.hex(), hashlib.sha256(secret).hexdigest(), f"sha256:{pin.hex()}")


def new_join_parts(entropy: bytes) -> tuple[bytes, bytes]:
    """Return id and secret out of at least 30 random bytes."""
    return entropy[:_ID_BYTES], entropy[_ID_BYTES : _ID_BYTES + _SECRET_BYTES]


JOIN_ENTROPY_BYTES = _ID_BYTES + _SECRET_BYTES


def check_skew(ours: int, theirs: str | None, *, they: str, we: str) -> None:
    """Raise VersionSkew where a peer's header says a version more than `SKEW_MAX` away; None, and what is no number, pass."""
    if theirs is None or not theirs.isascii() or not theirs.isdecimal() or len(theirs) > 6:
        return
    there = int(theirs)
    if abs(there - ours) > SKEW_MAX:
        older = they if there < ours else we
        raise VersionSkew(
            f"{they} speaks version {there} of the API, {we} version {ours}; they may be {SKEW_MAX} apart",
            mend=f"update {older} first, one version at a time",
        )
