"""The ingresses that have registered, and how one that is gone for good is forgotten."""

from __future__ import annotations

from atoll.api.service.access import Caller, check_id
from atoll.api.service.context import Context, Draft, RequestKey
from atoll.api.service.expulsions import invitations
from atoll.api.service.ingress_heartbeats import ALIVE_S, IngressHeartbeats
from atoll.model import codec, keys
from atoll.model.errors import Conflict, NotFound
from atoll.model.membership import Identity, MemberKind
from atoll.model.ports.store import Compare, Delete, Op, Put, unchanged
from atoll.model.records import CELL_PROJECT, INGRESS_PROBLEM, Event, Ingress, Role, Token, event_id
from atoll.model.views import IngressView


class Ingresses:
    """What this server hears: an ingress tells every server that it is there. One that began lately has heard nothing yet."""

    def __init__(self, context: Context, heartbeats: IngressHeartbeats) -> None:
        self._context = context
        self._state = context.state
        self._heartbeats = heartbeats
        self._began = context.clock.monotonic()

    def all(self) -> tuple[IngressView, ...]:
        """Return every ingress that has registered, by name."""
        found = []
        for name, held in sorted(self._state.records(Ingress).items()):
            beat = self._heartbeats.all().get(name)
            silent_s = self._heartbeats.silent_s(name)
            requests = round(sum(beat.requests.values()), 3) if beat is not None else 0.0
            problems = len(beat.problems) if beat is not None else 0
            problem = beat.problems.get(INGRESS_PROBLEM, "") if beat is not None else ""
            view = IngressView(ingress=held.record, silent_s=silent_s, requests_per_s=requests, problems=problems, problem=problem)
            found.append(view)
        return tuple(found)

    async def forget(self, name: str, caller: Caller, *, request: RequestKey | None = None) -> IngressView:
        """Forget an ingress that is gone for good: no drain waits for it any more, and it keeps no app awake.

        What it showed to be let in counts no longer, so that it must join anew. Raises NotFound, Conflict: it is there,
        or this server has not listened for long enough to know.
        """
        check_id(name, "name")

        def build() -> Draft[IngressView]:
            held = self._state.get(Ingress, name)
            if held is None:
                raise NotFound(f"no ingress '{name[:60]}'", mend="'atoll ingresses' lists them")
            identity = self._state.get(Identity, f"{MemberKind.INGRESS}/{name}")
            revoked = identity is not None and identity.record.revoked_at is not None
            silent_s = self._heartbeats.silent_s(name)
            listened_s = self._context.clock.monotonic() - self._began
            if silent_s is None and listened_s < ALIVE_S and not revoked:
                mend = f"again in {ALIVE_S - listened_s:.0f} s; or revoke it first"
                raise Conflict(f"this server has started only now, and cannot know whether ingress '{name}' is there", mend=mend)
            if silent_s is not None and silent_s < ALIVE_S and not revoked:
                mend = f"end it, and wait for {ALIVE_S:.0f} s; or revoke it first"
                raise Conflict(f"ingress '{name}' was heard of {silent_s:.0f} s ago", mend=mend)
            compare: list[Compare] = [unchanged(keys.ingress(name), held.revision)]
            ops: list[Op] = [Delete(keys.ingress(name)), Delete(keys.round_trips(name))]
            if identity is not None:
                key = keys.identity(MemberKind.INGRESS, name)
                compare.append(unchanged(key, identity.revision))
                ops.append(Delete(key))
            tokens = (one.record for one in self._state.records(Token).values())
            ops += [Delete(keys.token(one.digest)) for one in tokens if one.role is Role.INGRESS and one.subject == name]
            ops += [Delete(keys.join_token(id)) for id in invitations(self._state, MemberKind.INGRESS, name)]
            ops.append(self._event(name, caller))
            view = IngressView(ingress=held.record, silent_s=silent_s)
            return Draft(compare=compare, ops=ops, answer=lambda _: view)

        return await self._context.write(IngressView, build, request)

    def _event(self, name: str, caller: Caller) -> Put:
        at = self._context.clock.now()
        id = event_id(at, f"{name}-ingress-forgotten")
        message = f"ingress {name} was forgotten, by {caller.name or caller.id}"
        event = Event(id=id, at=at, project=CELL_PROJECT, subject=f"ingress/{name}", code="ingress-forgotten", message=message)
        return Put(keys.event(CELL_PROJECT, id), codec.encode(event))
