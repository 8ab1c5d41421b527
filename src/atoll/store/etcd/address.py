"""Where an etcd is and how it is spoken to. Passwords come from the environment or from a file, never from an address."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from atoll.model.errors import Invalid

T = TypeVar("T")

SCHEME = "etcd://"
PORT_DEFAULT = 2379
MEMBERS_MAX = 16


@dataclass(frozen=True)
class EtcdAddress:
    """Members as HOST:PORT, the nearest first: calls go to the first that answers.

    With `ca` (PEM) all connections use TLS and members must show a certificate of it; with `cert` and `key` we show one too.
    """

    members: tuple[str, ...]
    ca: bytes | None = None
    cert: bytes | None = field(default=None, repr=False)
    key: bytes | None = field(default=None, repr=False)
    user: str = ""
    password: str = field(default="", repr=False)

    def __str__(self) -> str:
        return SCHEME + ",".join(self.members)


def members_of(text: str) -> tuple[str, ...]:
    """Return the members that `etcd://HOST[:PORT],…` names. Raises Invalid, also for a user or a password in it."""
    if not text.startswith(SCHEME):
        raise Invalid("the address of an etcd begins with etcd://", field="store", mend="write etcd://HOST:PORT,HOST:PORT,…")
    rest = text.removeprefix(SCHEME).rstrip("/")
    if "@" in rest:
        raise Invalid(
            "the address of an etcd holds no user and no password: everyone on the machine could read them",
            field="store",
            mend="set ATOLL_STORE_USER, and ATOLL_STORE_PASSWORD_FILE or ATOLL_STORE_PASSWORD",
        )
    members = tuple(_member(part) for part in rest.split(","))
    if len(members) > MEMBERS_MAX:
        raise Invalid(f"an etcd has at most {MEMBERS_MAX} members here, not {len(members)}", field="store")
    if len(set(members)) != len(members):
        raise Invalid(f"a member stands twice in {text}", field="store")
    return members


def _member(text: str) -> str:
    host, colon, port = text.strip().rpartition(":")
    if not colon or (text.startswith("[") and text.endswith("]")):
        host, port = text.strip(), str(PORT_DEFAULT)
    sound = host and not set(host) & set("/?# ") and port.isascii() and port.isdigit() and 0 < int(port) < 65_536
    if not sound or (":" in host) != (host.startswith("[") and host.endswith("]")):
        raise Invalid(f"{text!r} is not HOST:PORT", field="store", mend="write etcd://HOST:PORT,HOST:PORT,…")
    return f"{host}:{port}"


def load(
    text: str,
    *,
    ca: Path | None = None,
    cert: Path | None = None,
    key: Path | None = None,
    user: str = "",
    password: str = "",
    password_file: Path | None = None,
) -> EtcdAddress:
    """Return the address with what its files hold. Raises Invalid, naming the setting."""
    if (cert is None) != (key is None):
        raise Invalid("a client's certificate and its key are given together, or neither", field="store-cert")
    if cert is not None and ca is None:
        raise Invalid("a client's certificate is for TLS, which needs the CA of the members", field="store-ca")
    if password_file is not None:
        password = _read(password_file, "store-password-file", Path.read_text).strip()
    if bool(user) != bool(password):
        raise Invalid(
            "a user of etcd needs a password, and a password a user",
            field="store-user",
            mend="set ATOLL_STORE_USER, and ATOLL_STORE_PASSWORD_FILE or ATOLL_STORE_PASSWORD",
        )
    return EtcdAddress(
        members_of(text),
        ca=None if ca is None else _read(ca, "store-ca", Path.read_bytes),
        cert=None if cert is None else _read(cert, "store-cert", Path.read_bytes),
        key=None if key is None else _read(key, "store-key", Path.read_bytes),
        user=user,
        password=password,
    )


def _read(path: Path, field: str, how: Callable[[Path], T]) -> T:
    try:
        return how(path)
    except (OSError, UnicodeDecodeError) as error:
        raise Invalid(f"cannot read {path}: {getattr(error, 'strerror', None) or 'it is not text'}", field=field) from None
