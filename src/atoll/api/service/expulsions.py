"""Who is put out of the cell: machines are revoked, and forgotten. Part of `membership`, with what both write."""

from __future__ import annotations

from msgspec.structs import replace

from atoll.api.service.access import Caller, check_id
from atoll.api.service.context import Context, Draft, RequestKey
from atoll.api.service.lookups import by_node
from atoll.model import codec, keys
from atoll.model.errors import Conflict, NotFound
from atoll.model.membership import (
    Identity,
    IdentityView,
    JoinToken,
    MemberKind,
)
from atoll.model.ports.store import Compare, Delete, Op, Put, absent, unchanged
from atoll.model.records import (
    CELL_PROJECT,
    Event,
    Instance,
    Node,
    NodeHealth,
    NodeLiveness,
    Role,
    Severity,
    Status,
    Token,
    event_id,
)
from atoll.store.cache import State

NAMED_MAX = 5
"""Instances that an error names."""
ROLES = {MemberKind.NODE: Role.AGENT, MemberKind.INGRESS: Role.INGRESS}


class Expulsions:
    def __init__(self, context: Context) -> None:
        self._context = context
        self._state = context.state

    async def revoke(self, kind: MemberKind, name: str, caller: Caller, *, request: RequestKey | None = None) -> IdentityView:
        """Let a machine's certificate and tokens count no more, at every server within moments, also on streams that are open.

        What runs there goes on until the machine counts as lost. Only a join token that names it lets it in again.
        Raises NotFound. Safe to repeat.
        """
        check_id(name, "name")

        def build() -> Draft[IdentityView]:
            held = self._state.get(Identity, f"{kind}/{name}")
            tokens = self._tokens_of(kind, name)
            known = kind is MemberKind.NODE and self._state.get(Node, name) is not None
            if held is None and not tokens and not known:
                raise NotFound(f"no {kind} '{name[:60]}'", mend="'atoll nodes' lists them")
            now = self._context.clock.now()
            old = held.record if held is not None else Identity(kind=kind, name=name, enrolment="", joined_at=now)
            if old.revoked_at is not None and not tokens and not invitations(self._state, kind, name):
                return Draft(answer=lambda _: _view(old))
            identity = replace(old, revoked_at=old.revoked_at or now)
            compare, ops = self._put_identity(identity)
            ops += [Delete(keys.token(token.digest)) for token in tokens]
            ops += [Delete(keys.join_token(id)) for id in invitations(self._state, kind, name)]
            who = caller.name or caller.id
            ops.append(self._event(kind, name, f"{kind}-revoked", f"{kind} {name} was revoked, by {who}", Severity.WARNING))
            return Draft(compare=compare, ops=ops, answer=lambda _: _view(identity))

        return await self._context.write(IdentityView, build, request)

    async def remove_node(self, name: str, caller: Caller, *, request: RequestKey | None = None) -> IdentityView:
        """Forget a node for good: its records, its certificate, its tokens. Safe to repeat until it is gone.

        Raises NotFound, Conflict: it answers and is not revoked, or instances are still placed there.
        """
        check_id(name, "name")

        def build() -> Draft[IdentityView]:
            node = self._state.get(Node, name)
            held = self._state.get(Identity, f"{MemberKind.NODE}/{name}")
            if node is None and held is None:
                raise NotFound(f"no node '{name[:60]}'", mend="'atoll nodes' lists them")
            liveness = self._state.get(NodeLiveness, name)
            health = liveness.record.health if liveness is not None else NodeHealth.READY
            revoked = held is not None and held.record.revoked_at is not None
            if node is not None and health is NodeHealth.READY and not revoked:
                raise Conflict(
                    f"node '{name}' answers", mend=f"end its agent and wait until it is lost, or: atoll nodes revoke {name}"
                )
            placed = self._held_by(name)
            if placed:
                what = "1 instance is" if len(placed) == 1 else f"{len(placed)} instances are"
                mend = "wait until they are replaced, then try again"
                raise Conflict(f"{what} placed on node '{name}': {', '.join(placed[:NAMED_MAX])}", mend=mend)
            now = self._context.clock.now()
            gone = held.record if held is not None else Identity(kind=MemberKind.NODE, name=name, enrolment="", joined_at=now)
            compare: list[Compare] = []
            ops: list[Op] = [Delete(keys.token(token.digest)) for token in self._tokens_of(MemberKind.NODE, name)]
            for key, record in ((keys.node(name), node), (keys.identity(MemberKind.NODE, name), held)):
                if record is not None:
                    compare.append(unchanged(key, record.revision))
                    ops.append(Delete(key))
            ops += [Delete(keys.node_policy(name)), Delete(keys.node_liveness(name)), Delete(keys.prefetch(name))]
            ops += [Delete(keys.fabric_node(name)), Delete(keys.fabric_paths(name))]
            ops += [Delete(keys.join_token(id)) for id in invitations(self._state, MemberKind.NODE, name)]
            who = caller.name or caller.id
            ops.append(self._event(MemberKind.NODE, name, "node-removed", f"node {name} was removed, by {who}"))
            return Draft(compare=compare, ops=ops, answer=lambda _: _view(replace(gone, revoked_at=gone.revoked_at or now)))

        return await self._context.write(IdentityView, build, request)

    def identities(self) -> tuple[IdentityView, ...]:
        return tuple(_view(held.record) for _, held in sorted(self._state.records(Identity).items()))

    def _held_by(self, node: str) -> list[str]:
        """Return the instances that a node holds: what has ended for good holds nothing, though it is kept to be read."""
        there = [held.record for held in self._state.found(Instance, by_node, node).values()]
        statuses = {one.id: self._state.get(Status, f"{one.project}/{one.id}") for one in there}
        return sorted(one.id for one in there if (held := statuses[one.id]) is None or not held.record.phase.final)

    def _put_identity(self, identity: Identity) -> tuple[list[Compare], list[Op]]:
        key = keys.identity(identity.kind, identity.name)
        held = self._state.get(Identity, f"{identity.kind}/{identity.name}")
        return [absent(key) if held is None else unchanged(key, held.revision)], [Put(key, codec.encode(identity))]

    def _tokens_of(self, kind: MemberKind, name: str) -> list[Token]:
        tokens = (held.record for held in self._state.records(Token).values())
        return [token for token in tokens if token.role is ROLES[kind] and token.subject == name]

    def _event(self, kind: MemberKind, name: str, code: str, message: str, severity: Severity = Severity.INFO) -> Put:
        at = self._context.clock.now()
        id = event_id(at, f"{name}-{code}")
        subject = f"{kind}/{name}"
        node = name if kind is MemberKind.NODE else None
        event = Event(id=id, at=at, project=CELL_PROJECT, subject=subject, code=code, message=message, severity=severity, node=node)
        return Put(keys.event(CELL_PROJECT, id), codec.encode(event))


def invitations(state: State, kind: MemberKind, name: str) -> list[str]:
    """Return the join tokens for exactly this machine, and those that let it in: none of before lets it in again."""
    found = ((id, held.record) for id, held in state.records(JoinToken).items())
    return [id for id, token in found if token.kind is kind and name in (token.subject, token.used_by)]


def _view(identity: Identity) -> IdentityView:
    return IdentityView(
        kind=identity.kind,
        name=identity.name,
        joined_at=identity.joined_at,
        expires_at=identity.expires_at,
        revoked_at=identity.revoked_at,
    )
