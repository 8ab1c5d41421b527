"""TLS at the listener: our certificate, renewed without a restart; clients may show theirs, and what they show must be ours.

A bad client certificate ends the handshake, and is logged; who shows none needs a token.
"""

from __future__ import annotations

import datetime
import os
import ssl
from typing import Any

import structlog

from atoll.api.service.signing import Shown
from atoll.model.errors import Corrupt

log = structlog.get_logger()


class _Side(ssl.SSLObject):
    """A handshake that says in the log why it failed, and lets a client whose certificate is refused know."""

    _refused: ssl.SSLError | None = None

    def do_handshake(self) -> None:
        if self._refused is not None:
            raise self._refused
        try:
            super().do_handshake()
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
            raise
        except ssl.SSLCertVerificationError as error:
            log.warning("a client's certificate was refused", cause=error.verify_message)
            # OpenSSL has written an alert that says why. asyncio sends what is written only where more is waited for; the client
            # hangs up when it has it, and the time limit of the handshake ends one that does not.
            self._refused = error
            raise ssl.SSLWantReadError from None
        except ssl.SSLError as error:
            log.info("a TLS handshake failed", cause=error.reason or str(error))
            raise


class ListenerTls:
    """The context of the listener. Connections that are open keep what they began with."""

    def __init__(self) -> None:
        self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.context.minimum_version = ssl.TLSVersion.TLSv1_3
        self.context.verify_mode = ssl.CERT_OPTIONAL
        # A resumed session would show a certificate that nobody has looked at again.
        self.context.num_tickets = 0
        self.context.sslobject_class = _Side

    def use(self, certificate: str, key: bytes, bundle: str) -> None:
        """Show `certificate` (PEM) from the next handshake on, and take clients of `bundle`'s authorities. Raises Corrupt.

        An authority that is no longer in the bundle is refused behind the handshake (`Authorities.trusts`).
        """
        # OpenSSL reads it from a file only; this one is in memory, and nobody else's.
        descriptor = os.memfd_create("atoll certificate", os.MFD_CLOEXEC)
        try:
            with os.fdopen(os.dup(descriptor), "wb") as file:
                file.write(key + certificate.encode())
            self.context.load_cert_chain(f"/proc/self/fd/{descriptor}")
            self.context.load_verify_locations(cadata=bundle)
        except ssl.SSLError as error:
            raise Corrupt(f"the server's certificate cannot be used: {error}") from None
        finally:
            os.close(descriptor)


def shown_by(transport: Any) -> Shown | None:
    """Return what the client of a TLS connection has shown; None for one that showed nothing, or speaks plainly."""
    side = transport.get_extra_info("ssl_object")
    certificate = side.getpeercert() if side is not None else None
    if not certificate:
        return None
    subject = {name: value for part in certificate.get("subject", ()) for name, value in part}
    issuer = {name: value for part in certificate.get("issuer", ()) for name, value in part}
    uri = next((value for kind, value in certificate.get("subjectAltName", ()) if kind == "URI"), "")
    ends = datetime.datetime.strptime(certificate["notAfter"], "%b %d %H:%M:%S %Y GMT").replace(tzinfo=datetime.UTC)
    return Shown(
        uri=uri,
        enrolment=subject.get("serialNumber", ""),
        authority=issuer.get("commonName", ""),
        expires_at=ends.timestamp(),
    )
