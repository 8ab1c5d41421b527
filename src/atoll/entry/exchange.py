"""A server's side of the beats put together: over its records and its key."""

from __future__ import annotations

from atoll.api.service import Service
from atoll.api.service.beat_keys import beat_key
from atoll.control.detection.exchange import Exchange
from atoll.model.membership import Identity, MemberKind
from atoll.model.ports.clock import Clock, system_random
from atoll.model.records import Node
from atoll.store.cache import State


def exchange_of(service: Service, state: State, clock: Clock) -> Exchange:
    """Return a server's side of the beats. A node that is not in the store, or that is revoked, is not listened to."""

    nodes, identities, prefix = state.records(Node), state.records(Identity), f"{MemberKind.NODE}/"

    def basis_of(node: str) -> object | None:
        held, identity = nodes.get(node), identities.get(prefix + node)
        if held is None or identity is None:
            return held
        return identity if identity.record.revoked_at is None else None

    def site_of(node: str) -> str | None:
        return nodes[node].record.site if basis_of(node) is not None else None

    return Exchange(
        key_of=lambda node, epoch: beat_key(service.context, node, epoch),
        site_of=site_of,
        last_seen=service.heartbeats.last_seen(),
        clock=clock,
        chance=system_random(),
        basis_of=basis_of,
    )
