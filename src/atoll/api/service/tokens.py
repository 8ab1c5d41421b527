"""Tokens: made once, shown once, kept as a SHA-256. They carry 256 random bits, so that a plain digest is enough."""

from __future__ import annotations

import base64
import hashlib

from atoll.api.service.access import EVERY_PROJECT, Caller, check_id, check_name
from atoll.api.service.context import Context, Draft, RequestKey
from atoll.api.service.pages import page
from atoll.model import codec, keys
from atoll.model.errors import Forbidden, Invalid, NotFound, Unauthenticated
from atoll.model.ports.store import Delete, Put, absent, unchanged
from atoll.model.records import Role, Token, new_suffix
from atoll.model.views import Page, TokenRequest, TokenView

TOKEN_PREFIX = "atoll_"  # noqa: S105 (what marks a token, not one)
_TOKEN_BYTES = 32
_TOKEN_CHARS_MAX = 256
_MISSING = "send 'Authorization: Bearer TOKEN'; 'atoll token create' makes one"


class Tokens:
    def __init__(self, context: Context) -> None:
        self._context = context
        self._state = context.state

    def authenticate(self, token: str) -> Caller:
        """Return who holds `token`. Raises Unauthenticated: not known, withdrawn, or expired.

        Every token is in the cache of records, so this neither waits nor reads the store, and a withdrawn one ends at once.
        """
        if not token or len(token) > _TOKEN_CHARS_MAX:
            raise Unauthenticated("no token, or not one of ours", mend=_MISSING)
        digest = hashlib.sha256(token.encode("utf-8", "surrogatepass")).hexdigest()
        held = self._state.get(Token, digest)
        if held is None:
            raise Unauthenticated("this token is not known; it may have been withdrawn", mend=_MISSING)
        record = held.record
        if record.expires_at is not None and record.expires_at <= self._context.clock.now():
            raise Unauthenticated("this token has expired", mend="'atoll token create' makes a new one")
        return Caller(
            id=record.id,
            role=record.role,
            project=record.project,
            subject=record.subject,
            name=record.name,
            digest=digest,
            expires_at=record.expires_at,
        )

    def all(self, caller: Caller, *, limit: int, after: str = "") -> Page[TokenView]:
        """Return the tokens that `caller` may manage, in no telling order."""
        return page(
            self._state,
            Token,
            "",
            lambda held: view_of(held.record),
            limit=limit,
            after=after,
            keep=lambda t: _manages(caller, t.project),
        )

    async def create(self, caller: Caller, wanted: TokenRequest, *, request: RequestKey | None = None) -> TokenView:
        """Make a token and return it with its secret. Raises Invalid, Forbidden (more than the caller may give)."""
        check_request(caller, wanted)
        now = self._context.clock.now()
        secret = TOKEN_PREFIX + base64.urlsafe_b64encode(self._context.entropy(_TOKEN_BYTES)).rstrip(b"=").decode()
        token = Token(
            id=new_suffix(self._context.random.choice, 10),
            name=wanted.name,
            role=wanted.role,
            project=wanted.project,
            subject=wanted.subject,
            digest=hashlib.sha256(secret.encode()).hexdigest(),
            created_at=now,
            expires_at=now + wanted.expires_in_s if wanted.expires_in_s is not None else None,
        )
        key = keys.token(token.digest)

        def build() -> Draft[TokenView]:
            return Draft(compare=[absent(key)], ops=[Put(key, codec.encode(token))], answer=lambda _: view_of(token, secret))

        return await self._context.write(TokenView, build, request)

    async def delete(self, caller: Caller, id: str, *, request: RequestKey | None = None) -> TokenView:
        """Withdraw a token; it is refused from now on. Raises NotFound."""

        def build() -> Draft[TokenView]:
            held = next((held for held in self._state.records(Token).values() if held.record.id == id), None)
            if held is None or not _manages(caller, held.record.project):
                raise NotFound(f"no token '{id[:60]}'", mend="'atoll token list' lists them")
            key = keys.token(held.record.digest)
            view = view_of(held.record)
            return Draft(compare=[unchanged(key, held.revision)], ops=[Delete(key)], answer=lambda _: view)

        return await self._context.write(TokenView, build, request)

    def of(self, caller: Caller) -> TokenView | None:
        """Return the caller's own token."""
        found = (held.record for held in self._state.records(Token).values() if held.record.id == caller.id)
        token = next(found, None)
        return view_of(token) if token is not None else None


def check_request(caller: Caller, wanted: TokenRequest) -> None:
    """Raise Invalid for a token that makes no sense, Forbidden for one beyond what `caller` has."""
    if wanted.project != EVERY_PROJECT:
        check_name(wanted.project, "project")
    if not _manages(caller, wanted.project):
        raise Forbidden(f"a token for project '{caller.project}' cannot make one for '{wanted.project}'", field="project")
    if wanted.role in (Role.AGENT, Role.INGRESS):
        if not wanted.subject:
            what = "node" if wanted.role is Role.AGENT else "ingress"
            raise Invalid(f"subject: missing; a token with role '{wanted.role}' is for one {what}", field="subject")
        check_id(wanted.subject, "subject")
        if wanted.project != EVERY_PROJECT:
            raise Invalid(f"project: a token with role '{wanted.role}' is for all projects", field="project", mend="leave it away")
    elif wanted.subject:
        raise Invalid(f"subject: a token with role '{wanted.role}' has none", field="subject", mend="leave it away")


def view_of(token: Token, secret: str | None = None) -> TokenView:
    return TokenView(
        id=token.id,
        name=token.name,
        role=token.role,
        project=token.project,
        created_at=token.created_at,
        expires_at=token.expires_at,
        token=secret,
    )


def _manages(caller: Caller, project: str) -> bool:
    return caller.project in (EVERY_PROJECT, project)
