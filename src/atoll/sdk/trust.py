"""Whom a client trusts over TLS, and what it shows: the cell's own authorities, pinned, or those of the system."""

from __future__ import annotations

import asyncio
import hashlib
import re
import ssl
from collections.abc import Awaitable, Callable
from pathlib import Path

from atoll.model.errors import Invalid, Unauthenticated
from atoll.model.membership import PEM_CHARS_MAX
from atoll.model.tls import trusting

PIN = re.compile(r"sha256:[0-9a-f]{64}")
_CERTIFICATE = re.compile(r"-----BEGIN CERTIFICATE-----\s.+?\s-----END CERTIFICATE-----\n?", re.DOTALL)
_MEND = "give the cell's authority with --ca or ATOLL_CA: a PEM file, or its sha256 fingerprint"

Fetch = Callable[[ssl.SSLContext], Awaitable[str]]
"""Asks a server for its bundle of authorities over a connection with the given context."""


class Tls:
    """What every connection of one client is made with. `generation` rises when it changes: older connections are let go.

    `ca` is PEM text, a file of it, or pins (`sha256:` and 64 hexadecimal digits, with commas); without it the system's
    authorities and the server's own name count. `identity` is a file (PEM, key and certificate) that is shown to servers.
    """

    def __init__(self, ca: str | Path | None = None, identity: Path | None = None) -> None:
        self._pins = pins_of(ca) if isinstance(ca, str) else frozenset()
        self._context: ssl.SSLContext | None = None
        self._learning = asyncio.Lock()
        self.generation = 0
        if ca is None:
            self._context = ssl.create_default_context()
        elif not self._pins:
            self._context = trusting(ca, identity)

    async def context(self, fetch: Fetch) -> ssl.SSLContext:
        """Return the context; with pins, the authorities are fetched first, and those that a pin names are trusted.

        Raises Unauthenticated: none of what the server has is pinned; and what `fetch` raises.
        """
        if self._context is None:
            async with self._learning:
                if self._context is None:
                    found = await fetch(unverified())
                    self._context = trusting("".join(chosen(found, self._pins)))
        return self._context

    def renewed(self) -> None:
        """The files hold something new: let older connections go."""
        self.generation += 1


def pins_of(text: str) -> frozenset[str]:
    """Return the pins in `text`; none where it is PEM. Raises Invalid."""
    if "-----BEGIN" in text:
        return frozenset()
    pins = frozenset(part.strip().lower() for part in text.split(","))
    if not all(PIN.fullmatch(pin) for pin in pins):
        raise Invalid(f"ca: {text[:80]!r} is no fingerprint and no PEM", field="ca", mend=_MEND)
    return pins


def read_ca(text: str) -> str:
    """Return what `--ca` or ATOLL_CA means: pins and PEM as they are, else the content of the file of that name. Raises Invalid."""
    if text.startswith("sha256:") or "-----BEGIN" in text:
        return text
    try:
        return Path(text).read_text()[:PEM_CHARS_MAX]
    except (OSError, UnicodeDecodeError) as error:
        raise Invalid(f"ca: cannot read {text[:200]}: {error}", field="ca", mend=_MEND) from None


def chosen(bundle: str, pins: frozenset[str]) -> list[str]:
    """Return the certificates of `bundle` that a pin names. Raises Unauthenticated where there is none."""
    found = [pem for pem in _CERTIFICATE.findall(bundle[:PEM_CHARS_MAX]) if fingerprint(pem) in pins]
    if not found:
        raise Unauthenticated(
            "this is not the cell that was meant: none of its authorities has the pinned fingerprint",
            mend="check the address; after a rotation of the authority, pin the new one or make a new join token",
        )
    return found


def fingerprint(pem: str) -> str:
    """Return the SHA-256 of a certificate, as tools show it, with `sha256:` before it."""
    return f"sha256:{hashlib.sha256(ssl.PEM_cert_to_DER_cert(pem.strip())).hexdigest()}"


def unverified() -> ssl.SSLContext:
    """For the one question whose answer is checked against a pin."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context
