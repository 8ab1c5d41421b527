"""Who belongs to the cell: machines join with a token that counts once, renew their certificates, are revoked and removed."""

from __future__ import annotations

import hmac

import structlog
from msgspec.structs import replace

from atoll.api.service.access import Caller, check_id
from atoll.api.service.authorities import RENEW_LATE_S, Authorities
from atoll.api.service.context import Context, Draft
from atoll.api.service.expulsions import ROLES, Expulsions
from atoll.api.service.signing import Shown, Signed, Subject, key_digest, proved, requested_key
from atoll.model import codec, keys
from atoll.model.errors import AtollError, Conflict, Forbidden, Invalid, Revoked, Unauthenticated
from atoll.model.membership import (
    Certified,
    Identity,
    JoinRequest,
    JoinToken,
    MemberKind,
    RenewRequest,
    read_join_token,
    renewal_message,
    uri_of,
)
from atoll.model.ports.store import Delete, Put, absent, unchanged
from atoll.model.records import (
    CELL_PROJECT,
    Event,
    Ingress,
    Node,
    Role,
    Severity,
    Token,
    event_id,
    new_suffix,
)

REFUSALS_S = 10.0
"""Of one kind of refusal there is one event in so long, so that a stranger who tries for ever fills no store."""
_JOIN_MEND = "make another with 'atoll join-token create' on a machine that may"
_RECORDS: dict[MemberKind, type[Node] | type[Ingress]] = {MemberKind.NODE: Node, MemberKind.INGRESS: Ingress}
"""What a member is registered with, also one that shows a token and so has no Identity."""
_KINDS = {role: kind for kind, role in ROLES.items()}

log = structlog.get_logger()


class Membership(Expulsions):
    def __init__(self, context: Context, authorities: Authorities) -> None:
        super().__init__(context)
        self._authorities = authorities

    def caller(self, shown: Shown) -> Caller:
        """Return who holds a verified certificate. Raises Unauthenticated, Revoked. Neither waits nor reads the store."""
        kind, name = _named(shown.uri)
        identity = self._standing(kind, name, shown.enrolment)
        if shown.expires_at <= self._context.clock.now():
            raise Unauthenticated(f"the certificate of {kind} '{name}' has expired", mend="renew it; the agent does by itself")
        if not self._authorities.trusts(shown.authority):
            raise Unauthenticated("the certificate's authority has been retired", mend="renew it, or join anew")
        return Caller(
            id=f"{kind}/{name}/{identity.enrolment}",
            role=ROLES[kind],
            subject=name,
            name=name,
            authority=shown.authority,
            expires_at=shown.expires_at,
        )

    def check(self, caller: Caller) -> None:
        """Raise Revoked for a token of a machine that was revoked."""
        kind = _kind_of(caller.role)
        if kind is not None:
            self._not_revoked(kind, caller.subject)

    async def join(self, request: JoinRequest) -> Certified:
        """Let a machine in. The same token and key again get another certificate; the token with another key is refused.

        Raises Unauthenticated (the token), Conflict (the name), Invalid (the request). OutcomeUnknown: repeat with the same key.
        """
        try:
            token = self._token(request.token)
            key = requested_key(request.csr)
            digest = key_digest(key)
            name = check_id(request.name or token.subject or request.hostname, "name")
            self._may_join(token, name, digest)
            again = self._state.get(Identity, f"{token.kind}/{name}") if token.used_key == digest else None
            enrolment = again.record.enrolment if again is not None else new_suffix(self._context.random.choice, 12)
            signed = await self._authorities.sign(Subject(kind=token.kind, name=name, enrolment=enrolment), key)
        except (Unauthenticated, Conflict, Forbidden, Invalid) as error:
            await self._refused("join-refused", request.name or request.hostname, error)
            raise

        def build() -> Draft[Certified]:
            token = self._token(request.token)
            self._may_join(token, name, digest)
            now = self._context.clock.now()
            identity = Identity(
                kind=token.kind, name=name, enrolment=enrolment, joined_at=now, serial=signed.serial, expires_at=signed.expires_at
            )
            used = replace(token, used_at=token.used_at or now, used_by=name, used_key=digest, used_enrolment=enrolment)
            compare, ops = self._put_identity(identity)
            held = self._state.get(JoinToken, token.id)
            compare.append(unchanged(keys.join_token(token.id), held.revision if held is not None else 0))
            ops.append(Put(keys.join_token(token.id), codec.encode(used)))
            if again is None:  # who had the name before has it no more, whatever he showed
                ops += [Delete(keys.token(bearer.digest)) for bearer in self._tokens_of(token.kind, name)]
            ops.append(self._event(token.kind, name, f"{token.kind}-joined", f"{token.kind} {name} joined the cell"))
            return Draft(compare=compare, ops=ops, answer=lambda _: self._certified(name, signed))

        try:
            return await self._context.write(Certified, build)
        except (Unauthenticated, Conflict, Forbidden) as error:  # someone else was faster
            await self._refused("join-refused", request.name or request.hostname, error)
            raise

    async def renew(self, request: RenewRequest) -> Certified:
        """Return a new certificate for who proves to hold the key of one that is good, or has expired not long ago.

        Raises Unauthenticated, Revoked, Invalid. Safe to repeat.
        """
        trusted = [held.record.certificate for held in self._authorities.trusted()]
        shown = proved(request.certificate, trusted, renewal_message(request.csr), request.proof)
        kind, name = _named(shown.uri)
        try:
            self._standing(kind, name, shown.enrolment)
            if shown.expires_at + RENEW_LATE_S <= self._context.clock.now():
                raise Unauthenticated(f"the certificate of {kind} '{name}' has expired too long ago", mend=_JOIN_MEND)
        except AtollError as error:
            await self._refused("renewal-refused", name, error)
            raise
        signed = await self._authorities.sign(Subject(kind=kind, name=name, enrolment=shown.enrolment), requested_key(request.csr))

        def build() -> Draft[Certified]:
            identity = self._standing(kind, name, shown.enrolment)
            compare, ops = self._put_identity(replace(identity, serial=signed.serial, expires_at=signed.expires_at))
            ops.append(self._event(kind, name, "certificate-renewed", f"{kind} {name} has a new certificate"))
            return Draft(compare=compare, ops=ops, answer=lambda _: self._certified(name, signed))

        return await self._context.write(Certified, build)

    def still(self, caller: Caller) -> AtollError | None:
        """Return why who was admitted may not go on; None while he may. Who has renewed since goes on with what he showed."""
        until = caller.expires_at
        try:
            self.check(caller)
            kind, _, rest = caller.id.partition("/")
            if rest:
                name, _, enrolment = rest.partition("/")
                identity = self._standing(MemberKind(kind), name, enrolment)
                if not self._authorities.trusts(caller.authority):
                    return Unauthenticated("the certificate's authority has been retired", mend="renew it, or join anew")
                until = max(until or 0.0, identity.expires_at)
            elif caller.digest and self._state.get(Token, caller.digest) is None:
                return Unauthenticated("this token has been withdrawn", mend="'atoll token create' makes a new one")
        except AtollError as error:
            return error
        if until is not None and until <= self._context.clock.now():
            return Unauthenticated("what was shown at the beginning has expired", mend="renew it, or make another token")
        return None

    def _standing(self, kind: MemberKind, name: str, enrolment: str) -> Identity:
        self._not_revoked(kind, name)
        held = self._state.get(Identity, f"{kind}/{name}")
        if held is None:
            raise Unauthenticated(f"{kind} '{name}' is not of this cell; it may have been removed", mend=_JOIN_MEND)
        if held.record.enrolment != enrolment:
            raise Unauthenticated(f"another machine has joined as {kind} '{name}' since", mend=_JOIN_MEND)
        return held.record

    def _not_revoked(self, kind: MemberKind, name: str) -> None:
        held = self._state.get(Identity, f"{kind}/{name}")
        if held is not None and held.record.revoked_at is not None:
            mend = f"an operator lets it in again with: atoll join-token create --{kind} {name}"
            raise Revoked(f"{kind} '{name}' was revoked", mend=mend)

    def _token(self, text: str) -> JoinToken:
        parts = read_join_token(text)
        held = self._state.get(JoinToken, parts.id)
        if held is None or not hmac.compare_digest(held.record.digest, parts.digest):
            raise Unauthenticated("this join token is not known here: it is another cell's, or was withdrawn", mend=_JOIN_MEND)
        if held.record.expires_at <= self._context.clock.now():
            raise Unauthenticated("this join token has expired", mend=_JOIN_MEND)
        return held.record

    def _may_join(self, token: JoinToken, name: str, key: str) -> None:
        if token.used_at is not None and token.used_key != key:
            raise Conflict(f"this join token was used already, by '{token.used_by}'", mend=_JOIN_MEND)
        if token.used_at is not None and token.used_by != name:
            raise Conflict(f"this join token was used already, by this machine as '{token.used_by}'", mend=_JOIN_MEND)
        if token.used_at is not None:
            # To ask again is for an answer that was lost, not a way back in; nor into what another machine has joined as since.
            self._not_revoked(token.kind, name)
            held = self._state.get(Identity, f"{token.kind}/{name}")
            # A server of before says only when it was used, which is when the machine joined unless it has asked again since.
            same = held is not None and (
                held.record.enrolment == token.used_enrolment if token.used_enrolment else held.record.joined_at == token.used_at
            )
            if not same:
                said = f"this join token was used already, by '{name}', which was removed or replaced since"
                raise Conflict(said, mend=_JOIN_MEND)
        if token.subject and token.subject != name:
            raise Forbidden(f"this join token is for '{token.subject}', not '{name}'", mend="leave --node away, or make another")
        if token.used_at is None and not token.subject:
            taken = self._state.get(Identity, f"{token.kind}/{name}") is not None
            if taken or self._state.get(_RECORDS[token.kind], name) is not None:
                raise Conflict(
                    f"there is a {token.kind} '{name}' already",
                    mend=f"choose another name with --node, or replace it: atoll join-token create --{token.kind} {name}",
                )

    def _certified(self, name: str, signed: Signed) -> Certified:
        return Certified(name=name, certificate=signed.certificate, bundle=self._authorities.bundle())

    async def _refused(self, code: str, name: str, error: AtollError) -> None:
        """Say in the log and in an event that someone was turned away; of many alike only the first is an event."""
        said = name[:60] if name.isprintable() else ""
        log.warning(code.replace("-", " "), name=said, cause=error.message)
        at = self._context.clock.now()
        id = event_id(int(at / REFUSALS_S) * REFUSALS_S, f"{code}-{error.code}")
        if self._state.get(Event, f"{CELL_PROJECT}/{id}") is not None:
            return
        event = Event(
            id=id,
            at=at,
            project=CELL_PROJECT,
            subject="cell/membership",
            code=code,
            message=f"'{said}': {error.message}",
            severity=Severity.WARNING,
        )
        try:
            key = keys.event(CELL_PROJECT, id)
            result = await self._context.store.txn([absent(key)], [Put(key, codec.encode(event))])
            await self._context.reach(result.revision)
        except AtollError as failed:
            log.warning("a refusal could not be written down", cause=failed.message)


def _named(uri: str) -> tuple[MemberKind, str]:
    """Return kind and name in a certificate's URI. Raises Unauthenticated: not a machine's of this cell."""
    for kind in MemberKind:
        prefix = uri_of(kind, "")
        if uri.startswith(prefix):
            return kind, uri.removeprefix(prefix)
    raise Unauthenticated(f"a certificate for {uri[:100]!r} is no machine's of this cell", mend="use the machine's own, or a token")


def _kind_of(role: Role) -> MemberKind | None:
    return _KINDS.get(role)
