"""The aggregated discovery server that Envoy connects to, over a unix socket that only this user can open."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Collection
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import structlog
from envoy.service.discovery.v3 import discovery_pb2

from atoll.ingress.delta import DeltaSession, Resources, Verdicts
from atoll.ingress.hostnames import AHEAD_MAX, Hostnames
from atoll.ingress.resources import Kind, Name, Resource
from atoll.model.errors import DeadlineExceeded, Unavailable
from atoll.model.ports.clock import Clock

SERVICE = "envoy.service.discovery.v3.AggregatedDiscoveryService"
STOP_GRACE_S = 0.2
OPTIONS = (
    ("grpc.so_reuseport", 0),
    ("grpc.max_receive_message_length", 64 << 20),
    # Envoy asks every 10 s whether we live. By default gRPC takes that for abuse, and ends the stream after some 40 s.
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
    ("grpc.http2.max_ping_strikes", 0),
)

log = structlog.get_logger()


class AdsServer:
    """Tells every Envoy that connects what `resources` holds. Says nothing before the first `publish`.

    So an Envoy that served before this process was started keeps what it has until there is something better.
    """

    def __init__(
        self,
        resources: Resources,
        clock: Clock,
        *,
        refused: Callable[[Resource, str], None],
        taken: Callable[[Resource], None] = lambda resource: None,
        hostnames_ahead: int = AHEAD_MAX,
        http3_hosts: Collection[str] = (),
    ) -> None:
        """With more hostnames than `hostnames_ahead` Envoy is told of each when it asks; `refused` and `taken`: see `Verdicts`,
        `http3_hosts`: see `DeltaSession`."""
        self._resources = resources
        self._clock = clock
        self._verdicts = Verdicts(refused, taken)
        self._hostnames = Hostnames(resources.get(Kind.HOST, {}), ahead_max=hostnames_ahead)
        self._http3_hosts = http3_hosts
        self._sessions: dict[DeltaSession, asyncio.Event] = {}
        self._newest: DeltaSession | None = None
        self._published = asyncio.Event()
        self._withheld = {Kind.SECRET}
        self._progress = asyncio.Condition()
        self._server: grpc.aio.Server | None = None

    async def start(self, socket: Path) -> None:
        """Listen at `socket`, replacing what is there. Raises Unavailable."""
        socket.unlink(missing_ok=True)
        server = grpc.aio.server(options=OPTIONS)
        handler = grpc.stream_stream_rpc_method_handler(
            self._converse,
            request_deserializer=discovery_pb2.DeltaDiscoveryRequest.FromString,
            response_serializer=discovery_pb2.DeltaDiscoveryResponse.SerializeToString,
        )
        server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler(SERVICE, {"DeltaAggregatedResources": handler})])
        try:
            server.add_insecure_port(f"unix:{socket}")
        except RuntimeError as error:
            raise Unavailable(f"cannot listen at {socket}: {error}") from None
        await server.start()
        self._server = server

    async def stop(self) -> None:
        if self._server is not None:
            await self._server.stop(STOP_GRACE_S)
            self._server = None

    @property
    def connected(self) -> bool:
        return self._newest is not None

    def publish(self, names: set[Name]) -> None:
        """Send what changed in `resources`. The first call says that they are complete, but for secrets."""
        self._published.set()
        self._tell(names)

    def publish_secrets(self, names: set[Name]) -> None:
        """Likewise for secrets, of which nothing is said before, and for what changed with them."""
        self._withheld.discard(Kind.SECRET)
        self._tell(names)

    def _tell(self, names: set[Name]) -> None:
        for session, wake in self._sessions.items():
            session.changed(names)
            wake.set()

    async def applied(self, name: Name, version: str, *, timeout_s: float) -> None:
        """Return when Envoy has confirmed this version or a later one, or would hear it when it asks. Raises DeadlineExceeded."""

        def done() -> bool:
            if self._newest is None:
                return False
            if name[0] is Kind.HOST and not self._hostnames.shows(name[1]):
                return True
            newest = self._resources[name[0]].get(name[1])
            return self._newest.applied(name) in (version, newest.version if newest else None)

        try:
            async with self._progress:
                await asyncio.wait_for(self._progress.wait_for(done), timeout_s)
        except TimeoutError:
            raise DeadlineExceeded(f"Envoy has not confirmed {name[1]} within {timeout_s:.0f} s") from None

    async def _converse(
        self, requests: AsyncIterator[discovery_pb2.DeltaDiscoveryRequest], context: Any
    ) -> AsyncIterator[discovery_pb2.DeltaDiscoveryResponse]:
        # No deadline: until the control plane has spoken there is nothing to say.
        await self._published.wait()
        session = DeltaSession(
            self._resources, self._verdicts, self._withheld, hostnames=self._hostnames, http3_hosts=self._http3_hosts
        )
        wake = asyncio.Event()
        reader = asyncio.create_task(self._read(requests, session, wake), name="ads-read")
        reader.add_done_callback(lambda task: wake.set())
        try:
            self._sessions[session], self._newest = wake, session
            log.info("ingress.envoy-connected")
            while not reader.done():
                wake.clear()
                while (response := session.respond(self._clock.monotonic())) is not None:
                    yield response
                await self._pause(session, wake)
        finally:
            self._sessions.pop(session, None)
            if self._newest is session:
                self._newest = None
            reader.cancel()

    async def _pause(self, session: DeltaSession, wake: asyncio.Event) -> None:
        timeout_s = None if session.held_until is None else max(0.0, session.held_until - self._clock.monotonic())
        try:
            # Without a deadline: an idle Envoy says nothing for days, and one that dies ends the stream.
            await asyncio.wait_for(wake.wait(), timeout_s)
        except TimeoutError:
            return

    async def _read(
        self, requests: AsyncIterator[discovery_pb2.DeltaDiscoveryRequest], session: DeltaSession, wake: asyncio.Event
    ) -> None:
        async for request in requests:
            session.receive(request)
            wake.set()
            async with self._progress:
                self._progress.notify_all()
