"""Keys for signs of life by datagram: made from the cell's key, so that every server has them and none keeps them.

Whoever may speak for a node (its token, its certificate) gets its key, for a day at a time; one that is revoked gets no other, and
the key of one whose name another machine has joined under fits no more.
"""

from __future__ import annotations

from urllib.parse import urlsplit

from atoll.api.service.context import Context
from atoll.model import beats
from atoll.model.beats import BeatGrant
from atoll.model.membership import Identity, MemberKind, Server
from atoll.model.records import Node

PURPOSE = "beats"
HEARTBEATS_PER_S = 100
"""Heartbeats over HTTP that are wanted of all nodes together; each costs a server about as much as thirty beats."""
HEARTBEAT_MIN_S, HEARTBEAT_MAX_S = 5.0, 15.0
"""But no node is asked for them more or less often. They say what is in use; that a node lives, its beats say."""
REJOINS_PER_S = 200
"""Agents that come back in a second, of those whose server has died; each costs another some 3 ms. All at once they would hold
up the server that begins to lead just then. Beats go on meanwhile, and what runs does."""
SPREAD_MAX_S = 30.0


def beat_key(context: Context, node: str, epoch: int) -> bytes:
    """Return the key of a node for an epoch, as it is enrolled now; for whoever takes beats on this server."""
    identity = context.state.get(Identity, f"{MemberKind.NODE}/{node}")
    return beats.key_of(context.sealer.derive(PURPOSE), node, epoch, identity.record.enrolment if identity is not None else "")


def grant_of(context: Context, node: str) -> BeatGrant:
    now = context.clock.now()
    epoch = beats.epoch_at(now)
    # The servers of now and before take an epoch's key for as long again, so it lasts into the next by half.
    lasts_s = (epoch + 1.5) * beats.EPOCH_S - now
    servers = [held.record for _, held in sorted(context.state.records(Server).items())]
    addresses = tuple(dict.fromkeys(_address(server.urls[0]) for server in servers if server.urls))
    nodes = len(context.state.records(Node))
    return BeatGrant(
        key=beat_key(context, node, epoch),
        epoch=epoch,
        lasts_s=lasts_s,
        servers=addresses,
        heartbeat_s=min(HEARTBEAT_MAX_S, max(HEARTBEAT_MIN_S, nodes / HEARTBEATS_PER_S)),
        spread_s=min(SPREAD_MAX_S, nodes / REJOINS_PER_S),
    )


def _address(url: str) -> str:
    """Return where a server takes beats: at the port of its API, but datagrams."""
    parts = urlsplit(url)
    host = parts.hostname or ""
    port = parts.port or (443 if parts.scheme == "https" else 80)
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
