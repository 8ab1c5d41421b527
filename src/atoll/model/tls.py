"""TLS to the cell's servers, for every kind of client: who has a certificate of the cell's authority for servers is one of them.

At whatever address it was dialled: names and addresses of machines say nothing that the authority does not say better.
"""

from __future__ import annotations

import ssl
from pathlib import Path
from typing import Any

from atoll.model.errors import Invalid
from atoll.model.membership import SERVER_NAME


class CellContext(ssl.SSLContext):
    """Made by `trusting`. What its files hold is read anew when they change, for connections that begin from then on."""

    _files: tuple[Path, ...] = ()
    _seen: tuple[int, ...] = ()

    def wrap_bio(
        self,
        incoming: ssl.MemoryBIO,
        outgoing: ssl.MemoryBIO,
        server_side: bool = False,
        server_hostname: Any = None,
        session: Any = None,
    ) -> ssl.SSLObject:
        self.refresh()
        return super().wrap_bio(incoming, outgoing, server_side, SERVER_NAME, session)

    def refresh(self) -> None:
        """Read `identity` (and `ca`, where it is a file) again if they have changed. Raises OSError, ssl.SSLError."""
        seen = tuple(path.stat().st_mtime_ns for path in self._files)
        if seen != self._seen:
            self.load_cert_chain(self._files[0])
            for bundle in self._files[1:]:
                self.load_verify_locations(bundle)
            self._seen = seen


def trusting(ca: str | Path, identity: Path | None = None) -> CellContext:
    """Return a context that trusts `ca`, PEM text or a file of it, alone, and shows `identity`, a file with key and certificate.

    Raises Invalid.
    """
    context = CellContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    try:
        if isinstance(ca, Path):
            context.load_verify_locations(ca)
        else:
            context.load_verify_locations(cadata=ca)
        if identity is not None:
            context._files = (identity, ca) if isinstance(ca, Path) else (identity,)
            context.refresh()
    except (ssl.SSLError, ValueError, OSError) as error:
        raise Invalid(f"ca: certificates cannot be used: {error}", field="ca", mend="give certificates in PEM") from None
    return context
