"""Join tokens: made, listed, withdrawn. What they let in is in `membership`."""

from __future__ import annotations

import asyncio

from atoll.api.service.access import check_id
from atoll.api.service.authorities import Authorities
from atoll.api.service.context import Context, Draft, RequestKey
from atoll.api.service.signing import fingerprint
from atoll.model import codec, keys
from atoll.model.errors import Exhausted, Invalid, NotFound, Unsupported
from atoll.model.membership import (
    JOIN_ENTROPY_BYTES,
    JoinToken,
    JoinTokenRequest,
    JoinTokenView,
    Server,
    join_token,
    new_join_parts,
    read_join_token,
)
from atoll.model.ports.store import Delete, Put, absent, unchanged

EXPIRES_S_MAX = 30 * 86_400.0
TOKENS_MAX = 10_000
YOUNG_S = 12.0
"""For so long after a server's start others may not be listed yet: above the lease under which they are."""
LOOK_S = 0.25
KEEP_S = 86_400.0
"""How long an expired join token is still told apart from an unknown one."""


class JoinTokens:
    """`own` is what this server writes of itself; None where it runs alone."""

    def __init__(self, context: Context, authorities: Authorities, own: Server | None = None) -> None:
        self._context = context
        self._state = context.state
        self._authorities = authorities
        self._own = own

    async def create(self, wanted: JoinTokenRequest, *, request: RequestKey | None = None) -> JoinTokenView:
        """Make a token and return it with its secret.

        Raises Invalid; Exhausted; Unsupported where no server speaks TLS. While this one is young it waits for others for a while.
        """
        if wanted.subject:
            check_id(wanted.subject, "subject")
        if not 1.0 <= wanted.expires_in_s <= EXPIRES_S_MAX:
            raise Invalid(f"expires_in_s: from 1 s to {EXPIRES_S_MAX / 86_400:.0f} days", field="expires_in_s")
        servers = self._servers() or await self._soon()
        if not servers:
            raise Unsupported(
                "no server of this cell speaks TLS, without which no certificate proves anything",
                mend="start the server with --listen HOST:PORT --tls; if one was started just now, try again in a moment",
            )
        if len(self._state.records(JoinToken)) >= TOKENS_MAX:
            raise Exhausted(f"there are {TOKENS_MAX} join tokens already", mend="withdraw some: atoll join-token delete ID")
        authority = await self._authorities.ensure()
        now = self._context.clock.now()
        id, secret = new_join_parts(self._context.entropy(JOIN_ENTROPY_BYTES))
        text = join_token(id, secret, fingerprint(authority.certificate))
        parts = read_join_token(text)
        token = JoinToken(
            id=parts.id,
            digest=parts.digest,
            kind=wanted.kind,
            subject=wanted.subject,
            created_at=now,
            expires_at=now + wanted.expires_in_s,
        )
        key = keys.join_token(token.id)

        def build() -> Draft[JoinTokenView]:
            return Draft(compare=[absent(key)], ops=[Put(key, codec.encode(token))], answer=lambda _: _view(token, text, servers))

        return await self._context.write(JoinTokenView, build, request)

    def all(self) -> tuple[JoinTokenView, ...]:
        """Return the tokens, without their secrets, the newest first."""
        tokens = sorted((held.record for held in self._state.records(JoinToken).values()), key=lambda one: -one.created_at)
        return tuple(_view(token) for token in tokens)

    async def delete(self, id: str, *, request: RequestKey | None = None) -> JoinTokenView:
        """Withdraw a token. Who has joined with it stays. Raises NotFound."""

        def build() -> Draft[JoinTokenView]:
            held = self._state.get(JoinToken, id)
            if held is None:
                raise NotFound(f"no join token '{id[:60]}'", mend="'atoll join-token list' lists them")
            key, view = keys.join_token(id), _view(held.record)
            return Draft(compare=[unchanged(key, held.revision)], ops=[Delete(key)], answer=lambda _: view)

        return await self._context.write(JoinTokenView, build, request)

    def stale(self) -> list[str]:
        """Return the keys of those that expired long ago, for housekeeping."""
        horizon = self._context.clock.now() - KEEP_S
        return [keys.join_token(id) for id, held in self._state.records(JoinToken).items() if held.record.expires_at < horizon]

    def _servers(self) -> tuple[str, ...]:
        """Return where TLS is spoken. This server is among them before it is listed: that waits for who had its place before."""
        listed = (url for held in self._state.records(Server).values() for url in held.record.urls)
        own = self._own.urls if self._own is not None else ()
        return tuple(sorted({url for url in (*listed, *own) if url.startswith("https://")}))

    async def _soon(self) -> tuple[str, ...]:
        """Return where TLS is spoken once that is known, while this server is young: all may have been started at once."""
        clock = self._context.clock
        while self._own is not None and 0.0 <= clock.now() - self._own.started_at < YOUNG_S:
            if servers := self._servers():
                return servers
            await asyncio.sleep(LOOK_S)
        return self._servers()


def _view(token: JoinToken, text: str | None = None, servers: tuple[str, ...] = ()) -> JoinTokenView:
    return JoinTokenView(
        id=token.id,
        kind=token.kind,
        subject=token.subject,
        created_at=token.created_at,
        expires_at=token.expires_at,
        used_at=token.used_at,
        used_by=token.used_by,
        token=text,
        servers=servers,
    )
