"""The ingress of a site: what the control plane says of apps and their endpoints, Envoy does."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import structlog

from atoll.ingress.activator import Activator
from atoll.ingress.admin import EnvoyAdmin, Requests, short
from atoll.ingress.ads import AdsServer
from atoll.ingress.bootstrap import ACCESS_LOG, ADS_SOCKET
from atoll.ingress.callers import Shown
from atoll.ingress.certificates import CertificateTable
from atoll.ingress.clusters import Nearness
from atoll.ingress.demand import Demand
from atoll.ingress.drain import Drainer
from atoll.ingress.envoy import LOG, EnvoyProcess, also_at, free_port, udp_clients_max
from atoll.ingress.heartbeat import Heart
from atoll.ingress.hostnames import AHEAD_MAX
from atoll.ingress.loads import Loads
from atoll.ingress.logs import keep_bounded
from atoll.ingress.meter import Meter
from atoll.ingress.probe import Prober, own_address
from atoll.ingress.refused import PROBLEMS_MAX, Refused
from atoll.ingress.resources import STREAM_IDLE_S, Kind, Resource
from atoll.ingress.spill import Spill
from atoll.ingress.table import RoutingTable
from atoll.ingress.tracing import Tracing
from atoll.model import records
from atoll.model.certificates import Callers, CertificateFeed
from atoll.model.errors import AtollError, DeadlineExceeded, Unavailable
from atoll.model.ports.clock import Clock, SystemClock
from atoll.model.ports.control_plane import Peers, RoutingBatch
from atoll.model.records import INGRESS_PROBLEM
from atoll.model.traffic import DemandReport, TrafficReport
from atoll.model.worker import SERVICES

RETRY_S = 0.2
RETRY_MAX_S = 5.0
READY_POLL_S = 0.02
WORDS_MAX = 500
"""Characters of Envoy's reason in the log; it likes to quote what it refuses."""
STOP_GRACE_S = 5.0
"""What active requests get when the ingress is stopped."""

log = structlog.get_logger()


class ControlPlane(Protocol):
    """`model.ports.control_plane.ControlPlane`, as far as an ingress needs it."""

    async def register_ingress(self, ingress: records.Ingress) -> None: ...

    def routing(self, ingress: str) -> AsyncIterator[RoutingBatch]: ...

    async def drained(self, ingress: str, instances: Sequence[str]) -> None: ...

    async def ingress_heartbeat(self, heartbeat: records.IngressHeartbeat) -> Peers: ...

    async def traffic(self, report: TrafficReport) -> None: ...

    async def demand(self, report: DemandReport) -> None: ...


class Ingress:
    """Serves HTTP at `address:port` for every app that has a route; `directory` is its own. Port 0 takes a free one.

    Without the control plane it serves what it last knew. `workers` are Envoy's threads, one for each core by default.
    `reachable` is where other sites' ingresses measure the way to it; without it, what it finds out itself.
    """

    def __init__(
        self,
        control_plane: ControlPlane,
        directory: Path,
        *,
        name: str = "local",
        site: str = "local",
        address: str = "127.0.0.1",
        port: int = 8080,
        domain: str = "localhost",
        workers: int | None = None,
        stop_grace_s: float = STOP_GRACE_S,
        clock: Clock | None = None,
        binary: Path | None = None,
        reachable: str | None = None,
        certificates: CertificateFeed | None = None,
        callers: Callers | None = None,
        tls_port: int | None = None,
        tls_needed: bool = True,
        tracing: Tracing | None = None,
        hostnames_ahead: int = AHEAD_MAX,
        stream_idle_s: float = STREAM_IDLE_S,
        one_family: bool = False,
    ) -> None:
        """An `address` that means all of one version of IP means all of the other, too, where the machine has that, unless
        `one_family`. `certificates` is where those come from that are shown at `tls_port` (None for no TLS); see `EnvoyProcess`.
        `callers` certifies it for instances that ask who calls."""
        self.http_port = port or free_port(address)
        self.ready = asyncio.Event()
        """Set once Envoy runs and has the routes of the control plane."""
        self._control_plane = control_plane
        self._directory = directory
        self._name, self._site, self._domain = name, site, domain
        self._reachable = own_address(address) if reachable is None else reachable
        self._stop_grace_s = stop_grace_s
        self._clock = clock or SystemClock()
        self.table = RoutingTable(Nearness(site))
        self.table.address = address
        self.table.udp_room.clients_max = udp_clients_max()
        self._refusals = Refused(self.table)
        self.certificates = CertificateTable(self.table.project_of)
        self._certificates = certificates
        self._shown = None
        if callers is not None:
            self._shown = Shown(callers, ingress=name, clock=self._clock, changed=self._show, told=lambda: self._heart.tell_soon())
        shown = {**self.table.resources, Kind.SECRET: self.certificates}
        self.ads = AdsServer(
            shown,
            self._clock,
            refused=self._refused,
            taken=self._taken,
            hostnames_ahead=hostnames_ahead,
            http3_hosts=self.table.http3_hosts,
        )
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        (directory / SERVICES).mkdir(exist_ok=True)
        (directory / SERVICES).chmod(0o755)  # shown to workers, which are nobody; what lies above keeps others away
        self.envoy = EnvoyProcess(
            directory,
            name=name,
            address=address,
            also="" if one_family else also_at(address),
            port=self.http_port,
            clock=self._clock,
            workers=workers,
            binary=binary,
            tls_port=(tls_port or free_port(address)) if tls_port is not None else 0,
            tls_needed=tls_needed,
            tracing=tracing,
            stream_idle_s=stream_idle_s,
        )
        self._demand = Demand(self.table, self.envoy.admin, control_plane, ingress=name)
        self.activator = Activator(self.table, directory, wake=self._demand.wake)
        self.table.udp_waker = self.activator.datagrams.port_of
        self._drainer = Drainer(
            self.table, self.ads, _Counts(self.envoy.admin, self.activator), control_plane, ingress=name, clock=self._clock
        )
        self._meter = Meter(self.table, self.envoy.admin, control_plane, ingress=name, clock=self._clock)
        self._loads = Loads(self.table, self.envoy.admin, control_plane, ingress=name, clock=self._clock)
        self._spill = Spill(self.table, self.envoy.admin, clock=self._clock, changed=self._publish)
        prober = Prober(site, self._clock)
        self._heart = Heart(
            self.envoy.admin,
            control_plane,
            prober,
            ingress=name,
            site=site,
            clock=self._clock,
            problems=self._problems,
            moved=self._moved,
            register=self._register,
        )

    async def run(self) -> None:
        """Serve until cancelled; then Envoy ends too, with `stop_grace_s` for the requests that are active.

        Raises Conflict when the port is taken, Unsupported without Envoy; then nothing runs. Should anything else go wrong
        here, Envoy serves on, and the next ingress on this directory adopts it.
        """
        with short(self._directory / ADS_SOCKET) as socket:
            await self.ads.start(socket)
        self.activator.start()
        try:
            await self.envoy.start()
            await self._serve()
        except (asyncio.CancelledError, AtollError):
            await asyncio.shield(self.envoy.stop(self._stop_grace_s))
            raise
        finally:
            await asyncio.shield(self.ads.stop())
            self.activator.stop()

    async def _serve(self) -> None:
        logs = [self._directory / ACCESS_LOG, self._directory / LOG]
        self.table.https_port = self.envoy.tls_port
        self.table.also = self.envoy.also
        self.table.serves = self.certificates.serves
        self.table.shows = self.certificates.shows
        self.table.http3 = self.envoy.http3()
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self.envoy.supervise(), name="ingress-envoy")
            tasks.create_task(self._follow(), name="ingress-routing")
            tasks.create_task(self._become_ready(), name="ingress-ready")
            if self._certificates is not None:
                tasks.create_task(self._follow_certificates(self._certificates), name="ingress-certificates")
            if self._shown is not None:
                tasks.create_task(self._shown.run(), name="ingress-shown")
            tasks.create_task(self._drainer.run(), name="ingress-drain")
            tasks.create_task(self._meter.run(), name="ingress-meter")
            tasks.create_task(self._demand.run(self.activator), name="ingress-demand")
            tasks.create_task(self._heart.run(), name="ingress-heart")
            tasks.create_task(self._loads.run(), name="ingress-loads")
            tasks.create_task(self._spill.run(), name="ingress-spill")
            tasks.create_task(keep_bounded(logs, self.envoy.admin), name="ingress-logs")

    async def _follow(self) -> None:
        """Take over every change of the routing, for ever; a control plane that is away changes nothing."""
        retry_s = RETRY_S
        while True:
            try:
                await self._register()
                async for batch in self._control_plane.routing(self._name):
                    await self._apply(batch)
                    retry_s = RETRY_S
                log.warning("ingress.control-plane-away", message="the watch ended")
            except AtollError as error:
                log.warning("ingress.control-plane-away", message=str(error), code=error.code, retry_in_s=retry_s)
            await asyncio.sleep(retry_s)
            retry_s = min(retry_s * 2, RETRY_MAX_S)

    async def _follow_certificates(self, feed: CertificateFeed) -> None:
        """As `_follow`, for the certificates."""
        retry_s = RETRY_S
        while True:
            try:
                async for batch in feed.certificates(self._name):
                    secrets, challenged = self.certificates.apply(batch)
                    self.table.challenge(self.certificates.challenges, challenged)
                    self.table.certified(None if batch.complete else {host for _, host in secrets})
                    if self.certificates.whole:
                        self.ads.publish_secrets(secrets | self.table.take_changes())
                    retry_s = RETRY_S
            except AtollError as error:
                log.warning("ingress.certificates-away", message=str(error), code=error.code, retry_in_s=retry_s)
            await asyncio.sleep(retry_s)
            retry_s = min(retry_s * 2, RETRY_MAX_S)

    def _show(self, shown: Resource) -> None:
        self.certificates.shown = shown
        # Before all certificates are known nothing is said of any; this one is among them then.
        if self.certificates.whole:
            self.ads.publish_secrets({(shown.kind, shown.name)})

    async def _register(self) -> None:
        await self._control_plane.register_ingress(
            records.Ingress(
                name=self._name,
                site=self._site,
                http_port=self.http_port,
                https_port=self.envoy.tls_port,
                domain=self._domain,
                address=self._reachable,
                registered_at=self._clock.now(),
            )
        )

    async def _apply(self, batch: RoutingBatch) -> None:
        for problem in self.table.apply(batch):
            self._heart.tell_soon()
            log.warning("ingress.routing-refused", app=problem.app, message=problem.message)
        if self._shown is not None:
            self._shown.follow(batch)
        self.activator.changed()
        changed = self.table.take_changes()
        await asyncio.sleep(0)  # who waits for an instance goes to it before the rest of this is done
        # Whose a hostname is decides which certificate is shown for it.
        hosts = {(Kind.SECRET, name.partition("/")[2]) for kind, name in changed if kind is Kind.HOST}
        self.ads.publish(changed | hosts)
        self._drainer.changed()

    async def _become_ready(self) -> None:
        while not self.ready.is_set():
            try:
                for kind in (Kind.ROUTES, Kind.HOST):
                    for resource in list(self.table.resources[kind].values()):
                        await self.ads.applied((kind, resource.name), resource.version, timeout_s=1.0)
                await self.envoy.admin.get("/ready")
                log.info("ingress.ready", port=self.http_port, apps=self.table.apps)
                self.ready.set()
            except (DeadlineExceeded, Unavailable):
                await asyncio.sleep(READY_POLL_S)

    def _moved(self, round_trips_ms: Mapping[str, float]) -> None:
        self.table.move(Nearness(self._site, dict(round_trips_ms)))
        self._publish()

    def _publish(self) -> None:
        """Tell Envoy of what changed otherwise than by routing, which has been there before."""
        if changes := self.table.take_changes():
            self.ads.publish(changes)

    def _problems(self) -> dict[str, str]:
        own = {INGRESS_PROBLEM: self.envoy.without} if self.envoy.without else {}
        own |= dict(list(self._shown.problems().items())[: PROBLEMS_MAX // 2]) if self._shown is not None else {}
        return {**self._refusals.problems(PROBLEMS_MAX - len(own)), **own}

    def _taken(self, resource: Resource) -> None:
        self._refusals.taken(resource)
        self._heart.tell_soon()
        log.info("ingress.envoy-took", kind=resource.kind.rpartition(".")[2], name=resource.name)

    def _refused(self, resource: Resource, words: str) -> None:
        self._refusals.note(resource, words[:WORDS_MAX])
        self._heart.tell_soon()
        log.error("ingress.envoy-refused", kind=resource.kind.rpartition(".")[2], name=resource.name, message=words[:WORDS_MAX])


class _Counts:
    """What goes on at each instance: Envoy's counts, and what the activator has spliced to it past Envoy."""

    def __init__(self, admin: EnvoyAdmin, activator: Activator) -> None:
        self._admin = admin
        self._activator = activator

    async def requests(self, clusters: tuple[str, ...]) -> dict[str, Requests]:
        return await self._activator.requests(clusters, self._admin)
