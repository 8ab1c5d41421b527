"""What this ingress shows to instances that ask who calls: a certificate of its own, renewed long before it ends.

The key is made here and stays here, in memory. Each certificate has a new one. Envoy is told of it as of every secret: connections
that are open go on, and those that begin from then on show the newer one. Without the control plane the last one serves to its end.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import structlog
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from atoll.ingress.certificates import secret
from atoll.ingress.resources import SHOWN, Resource
from atoll.model.certificates import CallerRequest, Callers
from atoll.model.errors import AtollError
from atoll.model.ports.clock import Clock
from atoll.model.ports.control_plane import RoutingBatch

RENEW_AT = 1 / 3
"""Of a certificate's life: two thirds are left for a control plane that is away."""
LOOK_S = 60.0
"""The longest wait between two looks at the clock, which may jump."""
RETRY_S, RETRY_MAX_S = 0.5, 15.0
WORDS_MAX = 300
"""Characters of why there is none."""

log = structlog.get_logger()


class Shown:
    """`changed` is called with each certificate that is to be shown from then on, `told` when `problems` may say other things.

    `run` asks `callers` once an app needs it.
    """

    def __init__(
        self,
        callers: Callers,
        *,
        ingress: str,
        clock: Clock,
        changed: Callable[[Resource], None],
        told: Callable[[], None] = lambda: None,
    ) -> None:
        self._callers = callers
        self._ingress = ingress
        self._clock = clock
        self._changed = changed
        self._told = told
        self._apps: set[str] = set()
        self._needed = asyncio.Event()
        self._life: tuple[float, float] | None = None
        """When what is shown began to live, and when it ends."""
        self._retry_s = 0.0
        self._cause = ""

    def follow(self, batch: RoutingBatch) -> None:
        """Take over which apps' instances ask who calls."""
        put = {f"{routing.project}/{routing.app}": routing.spec.ingress for routing in batch.put}
        kept = self._apps & set(batch.kept) if batch.complete else self._apps - set(batch.removed)
        mutual = {key for key, rules in put.items() if rules is not None and rules.mutual}
        self._apps = (kept - put.keys()) | mutual
        (self._needed.set if self._apps else self._needed.clear)()

    def problems(self) -> dict[str, str]:
        """Return app (`PROJECT/NAME`) → why its instances turn the ingress away; nothing while there is a good certificate."""
        if not self._cause or (self._life is not None and self._clock.now() < self._life[1]):
            return {}
        what = "has ended" if self._life is not None else "is not there"
        words = f"the certificate that this ingress shows to instances {what}, and they turn it away: {self._cause}"
        return dict.fromkeys(sorted(self._apps), words[:WORDS_MAX])

    async def run(self) -> None:
        """Keep it renewed while an app needs it. Returns never."""
        while True:
            await self._needed.wait()
            await asyncio.sleep(await self.step())

    async def step(self) -> float:
        """Get another certificate if it is time; return the seconds until the next look."""
        now = self._clock.now()
        if self._life is not None:
            begins_at, ends_at = self._life
            renew_at = begins_at + RENEW_AT * (ends_at - begins_at)
            # Before its beginning: the clock went back, and how long it lives is not known any more.
            if begins_at <= now < renew_at:
                return min(LOOK_S, renew_at - now)
        key = ec.generate_private_key(ec.SECP256R1())
        try:
            answer = await self._callers.certify_caller(self._ingress, CallerRequest(csr=_csr(key)))
            chain = answer.certificate
        except AtollError as error:
            before, self._cause = self.problems(), error.message
            if self.problems() != before:
                self._told()
            self._retry_s = min(max(RETRY_S, self._retry_s * 2), RETRY_MAX_S)
            log.warning("ingress.not-certified", message=str(error), code=error.code, retry_in_s=self._retry_s)
            return self._retry_s
        # It began to live after we asked, so by this it ends a little early.
        before = self.problems()
        self._life, self._retry_s, self._cause = (now, now + answer.life_s), 0.0, ""
        if before:
            self._told()
        self._changed(secret(SHOWN, chain, _pem(key)))
        return min(LOOK_S, RENEW_AT * answer.life_s)


def _csr(key: ec.EllipticCurvePrivateKey) -> str:
    request = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([])).sign(key, hashes.SHA256())
    return request.public_bytes(serialization.Encoding.PEM).decode()


def _pem(key: ec.EllipticCurvePrivateKey) -> str:
    encoded = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    return encoded.decode()
