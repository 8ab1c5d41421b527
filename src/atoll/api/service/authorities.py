"""The cell's certificate authorities: made when first needed, kept sealed in the store, rotated without a gap."""

from __future__ import annotations

from cryptography.hazmat.primitives.asymmetric import ec
from msgspec.structs import replace

from atoll.api.service import signing
from atoll.api.service.context import Context, Draft, RequestKey
from atoll.api.service.signing import Signed, Subject
from atoll.model import codec, keys
from atoll.model.errors import Corrupt
from atoll.model.membership import Authority, AuthorityView
from atoll.model.ports.store import Compare, Op, Put, absent, unchanged
from atoll.model.records import CELL, new_suffix
from atoll.store.cache import Held

LIFE_S = 86_400.0
"""Of a machine's or server's certificate."""
FIRST = "first"
"""The id of a cell's first authority, so that of two servers which begin together only one makes it."""
RENEW_LATE_S = 7 * 86_400.0
"""How long an expired certificate still proves who asks for a new one: a site may be cut off for days."""


class Authorities:
    """`life_s` is how long the certificates live that it signs."""

    def __init__(self, context: Context, life_s: float = LIFE_S) -> None:
        self._context = context
        self._state = context.state
        self.life_s = life_s

    def trusted(self) -> list[Held[Authority]]:
        """Return the authorities that are not retired, the oldest first."""
        now = self._context.clock.now()
        held = [one for one in self._state.records(Authority).values() if not _retired(one.record, now)]
        return sorted(held, key=lambda one: (one.record.signs_from, one.record.created_at, one.record.id))

    def trusts(self, id: str) -> bool:
        held = self._state.get(Authority, id)
        return held is not None and not _retired(held.record, self._context.clock.now())

    def bundle(self) -> str:
        """Return the certificates (PEM) of all that are trusted."""
        return "".join(held.record.certificate for held in self.trusted())

    def signer(self) -> Authority | None:
        """Return the authority that signs now; None where there is none yet."""
        now = self._context.clock.now()
        trusted = [held.record for held in self.trusted()]
        # A clock that went back would leave none that signs yet; the oldest has signed before.
        return next((one for one in reversed(trusted) if one.signs_from <= now), trusted[0] if trusted else None)

    async def ensure(self) -> Authority:
        """Return the authority that signs now; the cell's first is made here. Safe to repeat, also by several servers at once."""
        if (found := self.signer()) is not None:
            return found
        first = self._new(FIRST, self._context.clock.now())
        key = keys.authority(FIRST)

        def build() -> Draft[Authority]:
            if (found := self.signer()) is not None:
                return Draft(answer=lambda _: found)
            return Draft(compare=[absent(key)], ops=[Put(key, codec.encode(first))], answer=lambda _: first)

        return await self._context.write(Authority, build)

    def key_of(self, authority: Authority) -> bytes:
        """Raises Corrupt: this server's key is not the cell's."""
        try:
            return self._context.sealer.open(authority.sealed, keys.authority(authority.id))
        except Corrupt:
            raise Corrupt(
                "the authority's key cannot be opened with this server's key",
                mend="give every server the same key: 'atoll server --key FILE'",
            ) from None

    async def sign(self, subject: Subject, key: ec.EllipticCurvePublicKey) -> Signed:
        """Return a certificate for `subject`, who holds `key`."""
        authority = await self.ensure()
        return signing.sign(authority.certificate, self.key_of(authority), subject, key, self._context.clock.now(), self.life_s)

    async def rotate(self, *, at_once: bool = False, request: RequestKey | None = None) -> tuple[AuthorityView, ...]:
        """Make a new authority. It is trusted now, and signs when every certificate has been renewed once and so everyone knows
        it; the old ones are retired when what they signed has ended. `at_once`: it signs now, and the old ones count no more."""
        await self.ensure()
        now = self._context.clock.now()
        signs_from = now if at_once else now + self.life_s
        retired_at = now if at_once else signs_from + self.life_s + RENEW_LATE_S
        new = self._new(new_suffix(self._context.random.choice, 8), signs_from)

        def build() -> Draft[tuple[AuthorityView, ...]]:
            compare: list[Compare] = [absent(keys.authority(new.id))]
            ops: list[Op] = [Put(keys.authority(new.id), codec.encode(new))]
            for key, held in self._state.records(Authority).items():
                if held.record.retired_at is None or held.record.retired_at > retired_at:
                    compare.append(unchanged(keys.authority(key), held.revision))
                    ops.append(Put(keys.authority(key), codec.encode(replace(held.record, retired_at=retired_at))))
            return Draft(compare=compare, ops=ops, answer=lambda _: self.views())

        return await self._context.write(tuple[AuthorityView, ...], build, request)

    def views(self) -> tuple[AuthorityView, ...]:
        signer = self.signer()
        return tuple(
            AuthorityView(
                id=held.record.id,
                fingerprint=f"sha256:{signing.fingerprint(held.record.certificate).hex()}",
                signs_from=held.record.signs_from,
                retired_at=held.record.retired_at,
                signs=signer is not None and signer.id == held.record.id,
            )
            for held in self.trusted()
        )

    def _new(self, id: str, signs_from: float) -> Authority:
        now = self._context.clock.now()
        certificate, key = signing.new_authority(id, CELL, now)
        sealed = self._context.sealer.seal(key, keys.authority(id))
        return Authority(id=id, certificate=certificate, sealed=sealed, created_at=now, signs_from=signs_from)


def _retired(authority: Authority, now: float) -> bool:
    return authority.retired_at is not None and authority.retired_at <= now
