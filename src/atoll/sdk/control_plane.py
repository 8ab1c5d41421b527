"""`model.ports.control_plane` over HTTP: what agents and ingresses call. Every call here is safe to repeat.

Calls go over a few persistent connections; each watch has its own, which counts as broken after `SILENCE_S` without a line.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Sequence
from typing import TypeVar

import msgspec

from atoll.model import codec
from atoll.model.beats import BeatGrant
from atoll.model.certificates import CallerCertificate, CallerRequest, CertificateBatch
from atoll.model.errors import AtollError, DeadlineExceeded, Invalid, OutcomeUnknown, Unavailable
from atoll.model.fabric import FabricBatch, FabricGrant, FabricOffer, FabricPaths
from atoll.model.ports.control_plane import AssignmentBatch, Channel, Peers, RoutingBatch, StreamRequest
from atoll.model.records import Event, Heartbeat, Ingress, IngressHeartbeat, Node, Status
from atoll.model.traffic import DemandReport, TrafficReport
from atoll.model.views import ErrorAnswer
from atoll.sdk import answers
from atoll.sdk.assignments import read_assignments
from atoll.sdk.failover import Failover, transport_to
from atoll.sdk.onward import Batch, Onward
from atoll.sdk.transport import Transport, path

CALL_S = 10.0
"""The longest wait for the answer to one call; the agent's loops try again."""

TAKEN_S = 600.0
"""How long who reads a stream may be about taking the last of it (`PAUSED_S` of the server)."""

SLOW_S = 2.0
"""So long a server may keep the others waiting for the next heartbeat."""

B = TypeVar("B", bound=Batch)


class _Report(msgspec.Struct, frozen=True):
    statuses: Sequence[Status]
    events: Sequence[Event]


class _Drained(msgspec.Struct, frozen=True):
    instances: Sequence[str]


class HttpControlPlane:
    """See `ports.control_plane.ControlPlane`. `token` is the node's or the ingress's own.

    `node` is whose secrets `instance_secrets` asks for; without it, the node that was registered last through this object.
    """

    def __init__(self, address: str, token: str | None, *, node: str | None = None, transport: Transport | None = None) -> None:
        self._transport: Transport = transport or transport_to(address, token, agent="atoll-agent")
        self._node = node
        self._onward: defaultdict[str, Onward] = defaultdict(Onward)
        """Path of a stream → how far it was told."""

    async def register_node(self, node: Node) -> None:
        await self._call("PUT", path("nodes", node.name), node)
        self._node = node.name

    async def heartbeat(self, heartbeat: Heartbeat) -> None:
        """Tell every server, for only the one that leads judges by it.

        Raises when none has taken it: what the first that answered did.
        """
        await self._tell_all(path("nodes", heartbeat.node, "heartbeat"), heartbeat, slow_s=SLOW_S)

    async def beat_grant(self, node: str) -> BeatGrant:
        answer = await self._call("GET", path("nodes", node, "beats"))
        return codec.decode(answer, BeatGrant)

    def assignments(self, node: str) -> AsyncIterator[AssignmentBatch]:
        """Yield batches, the first complete; empty ones say that the server is there. Ends with Unavailable.

        An assignment that this version does not understand is in `kept` and `unread`.
        """
        return self._batches(path("nodes", node, "assignments"), AssignmentBatch, read_assignments)

    async def report(self, node: str, statuses: Sequence[Status], events: Sequence[Event] = ()) -> None:
        await self._call("POST", path("nodes", node, "statuses"), _Report(statuses, events))

    async def instance_secrets(self, instance: str) -> dict[str, str]:
        """Return environment variable → value. Raises NotFound naming a missing secret."""
        if self._node is None:
            raise Invalid("instance_secrets: no node is registered yet")
        answer = await self._call("GET", path("nodes", self._node, "instances", instance, "secrets"))
        return codec.decode(answer, dict[str, str])

    async def stream_requests(self, node: str) -> AsyncIterator[StreamRequest]:
        """Yield what the server asks for. Ends with Unavailable when the tunnel breaks; dial again."""
        tunnel = await self._transport.channel(path("nodes", node, "tunnel"))
        try:
            while (message := await tunnel.receive()) is not None:
                yield codec.decode(message, StreamRequest)
        finally:
            await tunnel.close()
        raise Unavailable("the server closed the tunnel")

    async def open_stream(self, node: str, id: str) -> Channel:
        return await self._transport.channel(path("nodes", node, "streams", id), close_s=TAKEN_S)

    async def register_ingress(self, ingress: Ingress) -> None:
        await self._call("PUT", path("ingresses", ingress.name), ingress)

    def routing(self, ingress: str) -> AsyncIterator[RoutingBatch]:
        """As `assignments`, for all apps that have routes."""
        return self._batches(path("ingresses", ingress, "routing"), RoutingBatch)

    def certificates(self, ingress: str) -> AsyncIterator[CertificateBatch]:
        """See `model.certificates.CertificateFeed`."""
        return self._batches(path("ingresses", ingress, "certificates"), CertificateBatch)

    async def certify_caller(self, ingress: str, request: CallerRequest) -> CallerCertificate:
        """See `model.certificates.Callers`."""
        return codec.decode(await self._call("POST", path("ingresses", ingress, "caller"), request), CallerCertificate)

    async def ingress_heartbeat(self, heartbeat: IngressHeartbeat) -> Peers:
        """Tell every server: each may be asked to forget an ingress that is silent. Raises as `heartbeat`."""
        where = path("ingresses", heartbeat.ingress, "heartbeat")
        return codec.decode(await self._tell_all(where, heartbeat, slow_s=SLOW_S), Peers)

    async def drained(self, ingress: str, instances: Sequence[str]) -> None:
        await self._call("POST", path("ingresses", ingress, "drained"), _Drained(instances))

    async def traffic(self, report: TrafficReport) -> None:
        """Tell every server, for only the one that leads decides by it. Raises as `heartbeat`."""
        await self._tell_all(path("ingresses", report.ingress, "traffic"), report)

    async def demand(self, report: DemandReport) -> None:
        """As `traffic`."""
        await self._tell_all(path("ingresses", report.ingress, "demand"), report)

    async def _tell_all(self, where: str, report: object, *, slow_s: float = CALL_S) -> bytes:
        """Return the answer of the first server that has taken it; the others are waited for until `slow_s`, and given up."""
        each: Sequence[Transport] = self._transport.each if isinstance(self._transport, Failover) else (self._transport,)
        calls = [asyncio.ensure_future(self._call("POST", where, report, one)) for one in each]
        try:
            _, slow = await asyncio.wait(calls, timeout=slow_s)
            while slow and not any(call.done() and not call.cancelled() and call.exception() is None for call in calls):
                # Each ends by itself, after CALL_S at most.
                _, slow = await asyncio.wait(slow, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for call in calls:
                call.cancel()
            told = await asyncio.gather(*calls, return_exceptions=True)
        taken = [one for one in told if not isinstance(one, BaseException)]
        if taken:
            return taken[0]
        failed = [one for one in told if isinstance(one, BaseException)]
        # A server that refuses says more than one that is away.
        raise next((one for one in failed if not isinstance(one, Unavailable)), failed[0])

    async def join_fabric(self, node: str, offer: FabricOffer) -> FabricGrant:
        return codec.decode(await self._call("PUT", path("nodes", node, "fabric"), offer), FabricGrant)

    async def report_paths(self, paths: FabricPaths) -> None:
        await self._call("PUT", path("nodes", paths.node, "fabric", "paths"), paths)

    def fabric(self, node: str) -> AsyncIterator[FabricBatch]:
        """See `ports.fabric.FabricControl`."""
        return self._batches(path("nodes", node, "fabric"), FabricBatch)

    async def close(self) -> None:
        """Close the idle connections; streams that are open end with their iterators."""
        await self._transport.close()

    async def _call(self, method: str, where: str, record: object | None = None, transport: Transport | None = None) -> bytes:
        body = b"" if record is None else codec.encode(record)
        try:
            answer = await (transport or self._transport).request(method, where, body=body, timeout_s=CALL_S)
        except (OutcomeUnknown, DeadlineExceeded) as error:
            raise Unavailable(str(error)) from None  # every call of this port may be repeated
        if answer.status >= 400:
            refused = answers.from_answer(answer.status, answer.body)
            if answer.status >= 500 and not isinstance(refused, Unavailable):
                raise Unavailable(f"{method} {where}: {refused}")
            raise refused
        return answer.body

    async def _batches(self, where: str, kind: type[B], read: Callable[[bytes], B] | None = None) -> AsyncIterator[B]:
        async with self._transport.lines(where) as lines:
            async for line in lines:
                try:
                    batch = read(line) if read is not None else codec.decode_known(line, kind)
                except Invalid as error:
                    raise _broken(line, error) from None
                self._onward[where].take(batch)
                yield batch


def _broken(line: bytes, error: Invalid) -> AtollError:
    """A stream that fails after its status was sent can only say so in a line of its own."""
    try:
        told = codec.decode(line, ErrorAnswer).error
    except Invalid:
        return Unavailable(f"the server sent a batch that this version does not understand: {error}")
    return answers.from_body(told)
