"""What a server runs to take part in control: wait to lead, then lead."""

from __future__ import annotations

import asyncio
import random

from atoll.control.certificates import CertificateLoop
from atoll.control.detection.exchange import Exchange
from atoll.control.heir import Heir
from atoll.control.judging import Traffic
from atoll.control.layouts import IngressHeartbeats
from atoll.control.leader import Ended, Keep, Term, lead
from atoll.control.loop import Loop
from atoll.control.nodes import LastSeen
from atoll.control.optimiser import Optimiser
from atoll.control.queries import Ask
from atoll.control.readings import Heartbeats
from atoll.control.signers import Signers
from atoll.control.sleeping import Demand
from atoll.model.ports.clock import Clock
from atoll.model.ports.store import Revision, Store
from atoll.store.cache import State


async def run_control(
    store: Store,
    state: State,
    clock: Clock,
    chance: random.Random,
    last_seen: LastSeen,
    *,
    heartbeats: Heartbeats | None = None,
    identity: str = "server",
    detection: Exchange | None = None,
    ingresses: IngressHeartbeats | None = None,
    optimiser: Optimiser | None = None,
    traffic: Traffic | None = None,
    demand: Demand | None = None,
    ask: Ask | None = None,
    ended: Ended | None = None,
    keep: Keep | None = None,
    certificates: Signers | None = None,
    heir: Heir | None = None,
) -> None:
    """Lead whenever this server holds the lease, until cancelled.

    `state` must hold all of `world.KINDS`. `last_seen` is read live: node → any number that changes with each sign of life;
    so are `heartbeats`: node → the latest, by whose readings apps are scaled.
    `detection` says which nodes are silent; without one their heartbeats over HTTP do, slowly.
    `ingresses` is read live too: ingress → its latest word, by which apps come near their users; `optimiser` says where they should
    be; without one the quick way does.
    `demand` is what ingresses have requests for, by which apps wake, sleep and scale; `ask` is how Prometheus servers are asked.
    So is `traffic`: app → release → what ingresses counted, by which rollouts are judged.
    `identity` names this server across its restarts; no two servers may share one. `ended` tells of the death of another, `keep`
    keeps the lease alive: see `lead`.
    `heir`, of the same `state`, keeps ready what a leader needs; pass one to use what it keeps for something else as well.
    `certificates` signs hostnames; without it nobody looks after those here, and `state` needs none of `certificates.KINDS`.
    """

    heir = heir or Heir(state, clock)

    async def work(term: Term) -> None:
        try:
            joins = await heir.take(Revision(int(term.fence.expected)))
            loop = Loop(
                store,
                state,
                clock,
                chance,
                last_seen,
                term,
                heartbeats,
                detection,
                ingresses,
                optimiser,
                traffic,
                demand,
                ask,
                joins,
            )
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(loop.run(), name="control: loop")
                if certificates is not None:
                    own = CertificateLoop(store, state, clock, chance, term, certificates)
                    tasks.create_task(own.run(), name="control: certificates")
        finally:
            heir.begin()

    async with heir:
        await lead(store, clock, identity, work, detection.affirm if detection is not None else lambda until: None, ended, keep)
