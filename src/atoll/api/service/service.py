"""The service as a whole."""

from __future__ import annotations

import asyncio
import os
import random
from collections.abc import Callable
from typing import Any, Self

from atoll import __version__
from atoll.api.service.access import Caller
from atoll.api.service.app_views import AppViews
from atoll.api.service.apps import Apps
from atoll.api.service.authorities import LIFE_S, Authorities
from atoll.api.service.brakes import Brakes
from atoll.api.service.callers import CallerAuthority
from atoll.api.service.certificate_feed import CertificateFeeds
from atoll.api.service.certificate_roots import CertificateRoots
from atoll.api.service.certificates import Certificates
from atoll.api.service.context import Context, ImageResolver
from atoll.api.service.control_plane import LocalControlPlane
from atoll.api.service.drains import Drains
from atoll.api.service.events import Events
from atoll.api.service.exposition import Exposition
from atoll.api.service.fabric import Fabrics
from atoll.api.service.feeds import Feeds
from atoll.api.service.groups import Groups
from atoll.api.service.heartbeats import Heartbeats
from atoll.api.service.holds import Holds
from atoll.api.service.housekeeping import Housekeeping
from atoll.api.service.ingress_heartbeats import IngressHeartbeats
from atoll.api.service.ingresses import Ingresses
from atoll.api.service.instances import Instances
from atoll.api.service.jobs import Jobs
from atoll.api.service.join_tokens import JoinTokens
from atoll.api.service.lookups import by_node, by_owner
from atoll.api.service.maintenances import Maintenances
from atoll.api.service.membership import Membership
from atoll.api.service.nodes import Nodes
from atoll.api.service.planning import Planning
from atoll.api.service.pools import Pools
from atoll.api.service.projects import Projects
from atoll.api.service.quotas import Quotas
from atoll.api.service.reservations import Reservations
from atoll.api.service.rollouts import Rollouts
from atoll.api.service.sealing import Sealer
from atoll.api.service.secrets import Secrets
from atoll.api.service.servers import Dial, Servers
from atoll.api.service.sites import Sites
from atoll.api.service.snapshots import ProjectSnapshots
from atoll.api.service.standing import Standing
from atoll.api.service.tokens import Tokens
from atoll.api.service.traffic import Traffic
from atoll.api.service.tunnels import Tunnels
from atoll.api.service.watching import Watching
from atoll.model.membership import API_VERSION, Server
from atoll.model.ports.clock import Clock
from atoll.model.ports.store import Store
from atoll.model.records import CELL, App, Event, Ingress, Instance, Release, Status
from atoll.model.views import Info
from atoll.store.cache import State
from atoll.store.index import By, by_project

_FOUND: tuple[tuple[type[Any], By], ...] = (
    (Instance, by_project),
    (Instance, by_node),
    (Instance, by_owner),
    (Status, by_project),
    (App, by_project),
    (Release, by_project),
    (Event, by_project),
)
"""By what records are found all the time, of kinds of which there may be very many."""


class Service:
    """Everything the API does, over `store` and the cache `state` of its records (which must hold `context.KINDS`).

    `secret_key` has 32 bytes and seals secrets; `domain` is what default hostnames end in. `entropy` gives bytes for tokens,
    nonces and stream ids; a simulator passes its seeded generator's. `server` is what this one writes of itself (`servers.run`),
    and `dial` how it reaches the others. Use it as `async with`, or call `start` and `close`.
    """

    def __init__(
        self,
        store: Store,
        state: State,
        clock: Clock,
        random: random.Random,
        secret_key: bytes,
        domain: str = "localhost",
        *,
        store_name: str = "memory",
        entropy: Callable[[int], bytes] = os.urandom,
        server: Server | None = None,
        dial: Dial | None = None,
        certificate_life_s: float = LIFE_S,
        api_version: int = API_VERSION,
    ) -> None:
        self.context = Context(store, state, clock, random, Sealer(secret_key, entropy), domain, entropy)
        self.clock = clock
        self._store_name = store_name
        self.heartbeats = Heartbeats(clock)
        self.traffic = Traffic(clock)
        self.ingresses = IngressHeartbeats(self.context)
        self.sites = Sites(self.context, self.ingresses)
        self.tunnels = Tunnels(lambda: entropy(16).hex())
        self.projects = Projects(self.context)
        self.quotas = Quotas(self.context)
        self.apps = Apps(self.context, AppViews(self.context, self.ingresses))
        self.groups = Groups(self.context, self.apps)
        self.jobs = Jobs(self.context)
        self.pools = Pools(self.context)
        self.instances = Instances(self.context)
        self.planning = Planning(self.context, self.heartbeats, self.ingresses)
        self.holds = Holds(self.context, self.instances, self.tunnels)
        self.snapshots = ProjectSnapshots(self.context, self.tunnels)
        self.secrets = Secrets(self.context)
        self.tokens = Tokens(self.context)
        self.nodes = Nodes(self.context, self.heartbeats, self.tunnels)
        self.drains = Drains(self.context, self.nodes)
        self.maintenances = Maintenances(self.context)
        self.brakes = Brakes(self.context)
        self.reservations = Reservations(self.context)
        self.events = Events(self.context)
        self.exposition = Exposition(self.context, self.heartbeats, self.traffic)
        self.rollouts = Rollouts(self.context, self.apps, self.traffic)
        self.feeds = Feeds(self.context)
        self.fabrics = Fabrics(self.context)
        self.certificates = Certificates(self.context)
        self.certificate_roots = CertificateRoots(self.context)
        self.certificate_feeds = CertificateFeeds(self.context)
        self.callers = CallerAuthority(self.context)
        self.watching = Watching(self.context)
        self.control_plane = LocalControlPlane(
            self.context, self.feeds, self.nodes, self.secrets, self.heartbeats, self.tunnels, self.ingresses
        )
        self.control_plane.counted = self.traffic
        self.demand = self.control_plane.wanted
        self.exposition.loads = self.demand.loads
        self.authorities = Authorities(self.context, certificate_life_s)
        self.join_tokens = JoinTokens(self.context, self.authorities, server)
        self.membership = Membership(self.context, self.authorities)
        self.ingress_records = Ingresses(self.context, self.ingresses)
        self.standing = Standing(state, self.membership)
        self.servers = Servers(self.context, server, dial)
        if server is not None and dial is not None:
            self.tunnels.elsewhere = self.servers.elsewhere
        self.api_version = api_version
        self.housekeeping = Housekeeping(self.context, self.join_tokens, self.heartbeats)
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        """Begin to follow the cache and to tidy up."""
        for kind, by in _FOUND:
            # Made by whoever asks first, which may be in the moment after another server's death.
            self.context.state.found(kind, by, "")
        self.feeds.start()
        self.fabrics.start()
        self.certificate_feeds.start()
        self._tasks.append(asyncio.create_task(self.housekeeping.run(), name="api housekeeping"))
        self._tasks.append(asyncio.create_task(self.standing.run(), name="api standing"))

    async def close(self) -> None:
        """End every stream and task. Safe to repeat; the store and the cache stay open, they are the caller's."""
        self.watching.close()
        await self.feeds.close()
        await self.fabrics.close()
        await self.certificate_feeds.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._tasks.clear()

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    def use_images(self, images: ImageResolver) -> None:
        """Name the cell's own registry, in which tags are pinned when a release is made."""
        self.context.images = images

    async def healthy(self) -> int:
        """Return the store's revision, as a sign that it answers. Raises Unavailable."""
        return await self.context.store.revision()

    def info(self, caller: Caller) -> Info:
        state = self.context.state
        return Info(
            version=__version__,
            cell=CELL,
            revision=state.revision,
            store=self._store_name,
            ingresses=tuple(held.record for _, held in sorted(state.records(Ingress).items())),
            token=self.tokens.of(caller),
        )
