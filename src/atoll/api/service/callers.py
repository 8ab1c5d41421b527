"""Who ingresses are to instances that ask: an authority of its own signs for that, and for nothing else.

It is no part of the authority of machines, so no server takes what it signs for an agent's or an ingress's; and instances that
trust it take no machine's certificate, whatever they look at in it.
"""

from __future__ import annotations

from collections.abc import Iterable

from atoll.api.service import signing
from atoll.api.service.certificate_roots import ensure_root
from atoll.api.service.context import Context
from atoll.model import keys
from atoll.model.certificates import CallerCertificate, CallerRequest
from atoll.model.membership import CALLER
from atoll.model.records.certificate import CertificateRoot
from atoll.model.spec import AppSpec
from atoll.store.cache import State

LIFE_S = 86_400.0
"""As long as machines': of it, ingresses can do two thirds without the control plane before instances turn them away."""
CALLERS = "callers"
"""The name of the authority, and of its record."""


class CallerAuthority:
    """`life_s` is how long the certificates live that it signs."""

    def __init__(self, context: Context, life_s: float = LIFE_S) -> None:
        self._context = context
        self._life_s = life_s

    async def ensure(self) -> CertificateRoot:
        """Have the authority made, if it is not there yet. Safe to repeat, also by several servers at once."""
        return await ensure_root(self._context, CALLERS, CALLERS)

    async def certify(self, ingress: str, request: CallerRequest) -> CallerCertificate:
        """Return a certificate for `ingress`: for clients only, named `spiffe://CELL/caller/NAME`. Safe to repeat.

        That the ingress is who it says, and not revoked, has been checked. Raises Invalid (the request), Corrupt (another key
        sealed the authority's).
        """
        key = signing.requested_key(request.csr)
        root = await self.ensure()
        signer = self._context.sealer.open(root.sealed, keys.certificate_root(CALLERS))
        subject = signing.Subject(kind=CALLER, name=ingress, enrolment=CALLER)
        signed = signing.sign(root.certificate, signer, subject, key, self._context.clock.now(), self._life_s)
        return CallerCertificate(certificate=signed.certificate, life_s=self._life_s)


async def ensure_for(context: Context, specs: Iterable[AppSpec]) -> None:
    """Have the authority made before the first instance that is to trust it."""
    if not caller_ca(context.state) and any(spec.ingress is not None and spec.ingress.mutual for spec in specs):
        await ensure_root(context, CALLERS, CALLERS)


def caller_ca(state: State) -> str:
    """Return the authority's certificate (PEM); empty while it has not been made."""
    held = state.get(CertificateRoot, CALLERS)
    return held.record.certificate if held is not None else ""
