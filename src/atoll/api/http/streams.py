"""Live streams over WebSocket: exec, logs and files, spliced to the agent's own connection."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, TypeVar

import structlog
from litestar import WebSocket
from litestar.handlers import WebsocketRouteHandler
from msgspec.structs import replace

from atoll.api.http.answers import JSON, error_body
from atoll.api.http.calls import QUERY_BYTES_MAX, admit, internal, parse_query, pattern
from atoll.api.service import Caller, Need, Service
from atoll.api.service.access import check_id
from atoll.model import codec
from atoll.model.errors import AtollError, DeadlineExceeded, Exhausted, Invalid, NotFound, TooLarge
from atoll.model.ports.control_plane import TAKEN, Channel, StreamKind
from atoll.model.records import Instance, NodeHealth, NodeLiveness
from atoll.model.streams import ExecOptions, FilesOptions, Kind, LogOptions, NextCommand, pack

T = TypeVar("T")
Socket = WebSocket[Any, Any, Any]
Open = Callable[[Service, Caller, dict[str, str], dict[str, str]], Awaitable[Channel]]

COMMANDS_AHEAD = "/v1/projects/{project}/commands/next"
AHEAD_S = 120.0
"""How long a stream may wait for a command; clients close theirs sooner."""
AHEAD_MAX, AHEAD_ALL_MAX = 8, 1_024
"""Streams that wait so, of one caller and of all."""
CLOSE_S = 5.0
"""How long either end has to take the last messages once the other has closed."""
GOING_AWAY = 1001
POLICY = 1008
"""RFC 6455, section 7.4.1: who has the stream may have it no more."""
REASON_CHARS_MAX = 100

log = structlog.get_logger()


async def open_exec(service: Service, caller: Caller, path: dict[str, str], query: dict[str, str]) -> Channel:
    return await _command(service, path["project"], path["instance"], _options(query, ExecOptions))


async def _command(service: Service, project: str, id: str, options: ExecOptions) -> Channel:
    if not options.argv or not options.argv[0]:
        raise Invalid("argv: empty; say what to run", field="argv")
    instance = service.instances.running(project, id)
    variables = service.pools.variables(instance)
    if variables:
        options = replace(options, env={**variables, **options.env})
    return await _tunnel(service, instance, StreamKind.EXEC, options)


async def open_logs(service: Service, caller: Caller, path: dict[str, str], query: dict[str, str]) -> Channel:
    instance = service.instances.placed(path["project"], path["instance"])
    return await _tunnel(service, instance, StreamKind.LOGS, _options(query, LogOptions))


async def open_files(service: Service, caller: Caller, path: dict[str, str], query: dict[str, str]) -> Channel:
    kinds = {"get": StreamKind.FILES_GET, "put": StreamKind.FILES_PUT}
    mode = query.get("mode", "")
    if mode not in kinds:
        raise Invalid(f"mode: {mode[:20]!r} is neither 'get' nor 'put'", field="mode")
    instance = service.instances.running(path["project"], path["instance"])
    return await _tunnel(service, instance, kinds[mode], _options(query, FilesOptions))


async def open_agent_end(service: Service, caller: Caller, path: dict[str, str], query: dict[str, str]) -> Channel:
    return await service.control_plane.open_stream(path["node"], path["stream"])


async def open_tunnel(service: Service, caller: Caller, path: dict[str, str], query: dict[str, str]) -> Channel:
    return _Requests(service.tunnels.requests(path["node"]))


async def open_for_peer(service: Service, caller: Caller, path: dict[str, str], query: dict[str, str]) -> Channel:
    """Another server has a stream for a node whose tunnel is here, or is not. Its caller has been judged there."""
    node, kind, instance = (query.get(name, "") for name in ("node", "kind", "instance"))
    check_id(node, "node")
    if not service.tunnels.connected(node):
        raise NotFound(f"node '{node}' has no tunnel here")
    return await service.tunnels.open(node, kind, instance, _options(query, dict[str, Any]), here_only=True)


STREAMS: tuple[tuple[str, Need, Open], ...] = (
    ("/v1/projects/{project}/instances/{instance}/exec", Need.DEPLOY, open_exec),
    ("/v1/projects/{project}/instances/{instance}/logs", Need.READ, open_logs),
    ("/v1/projects/{project}/instances/{instance}/files", Need.DEPLOY, open_files),
    ("/v1/nodes/{node}/tunnel", Need.AGENT, open_tunnel),
    ("/v1/nodes/{node}/streams/{stream}", Need.AGENT, open_agent_end),
    ("/v1/servers/streams", Need.PEER, open_for_peer),
)


def stream_handlers(service: Service) -> list[WebsocketRouteHandler]:
    return [*(_handler(service, path, need, opener) for path, need, opener in STREAMS), _commands_ahead(service)]


def _handler(service: Service, path: str, need: Need, opener: Open) -> WebsocketRouteHandler:
    async def handle(socket: Socket) -> None:
        try:
            caller, parts = admit(service, socket, need)
            channel = await opener(service, caller, parts, parse_query(socket.scope["query_string"]))
        except AtollError as error:
            await _refuse(socket, error)
            return
        except Exception as error:
            log.exception("a stream could not be opened", path=socket.scope["path"])
            await _refuse(socket, internal(error))
            return
        try:
            await socket.accept()
            with service.standing.watched(caller) as ended:
                await splice(socket, channel, ended)
        finally:
            await channel.close()

    return WebsocketRouteHandler(pattern(path))(handle)


def _commands_ahead(service: Service) -> WebsocketRouteHandler:
    """Streams that clients open before they want a command: its handshake is then over, and the command is their first message."""
    waiting: Counter[str] = Counter()

    async def handle(socket: Socket) -> None:
        try:
            caller, parts = admit(service, socket, Need.DEPLOY)
            if waiting[caller.id] >= AHEAD_MAX or waiting.total() >= AHEAD_ALL_MAX:
                raise Exhausted("enough streams wait for a command already", mend="ask for the command itself")
        except AtollError as error:
            await _refuse(socket, error)
            return
        await socket.accept()
        with service.standing.watched(caller) as ended:
            waiting[caller.id] += 1
            try:
                wanted = await _first_message(socket, ended)
            finally:
                waiting[caller.id] -= 1
                if not waiting[caller.id]:
                    del waiting[caller.id]
            if wanted is None:
                return
            if (reason := service.membership.still(caller)) is not None:  # what ends by its time alone is looked at seldom
                await _end(socket, reason)
            else:
                await _serve(service, socket, parts["project"], wanted, ended)

    return WebsocketRouteHandler(pattern(COMMANDS_AHEAD))(handle)


async def _first_message(socket: Socket, ended: asyncio.Future[AtollError]) -> bytes | None:
    """Return what a client says first; None when it has left, or has waited long enough, or may not have it any more."""
    receiving = asyncio.ensure_future(socket.receive())
    done, _ = await asyncio.wait((receiving, ended), timeout=AHEAD_S, return_when=asyncio.FIRST_COMPLETED)
    if receiving not in done:
        receiving.cancel()
        await _end(socket, ended.result() if ended.done() else DeadlineExceeded("nobody wanted a command"))
        return None
    return _said(receiving.result())


async def _end(socket: Socket, why: AtollError) -> None:
    reason = f"{why.code}: {why.message}"
    await socket.send({"type": "websocket.close", "code": POLICY, "reason": reason[:REASON_CHARS_MAX]})


async def _serve(service: Service, socket: Socket, project: str, wanted: bytes, ended: asyncio.Future[AtollError]) -> None:
    try:
        if len(wanted) > QUERY_BYTES_MAX:
            raise TooLarge(f"the command has {len(wanted)} bytes; at most {QUERY_BYTES_MAX} are taken")
        command = codec.decode(wanted, NextCommand)
        channel = await _command(service, project, check_id(command.instance, "instance"), command.options)
    except AtollError as error:
        told = error
    except Exception as error:
        log.exception("a command's stream could not be opened", project=project)
        told = internal(error)
    else:
        try:
            await socket.send({"type": "websocket.send", "bytes": TAKEN, "text": None})
            await splice(socket, channel, ended)
        finally:
            await channel.close()
        return
    await socket.send({"type": "websocket.send", "bytes": pack(Kind.ERROR, codec.encode(error_body(told).error)), "text": None})
    await socket.send({"type": "websocket.close", "code": 1000, "reason": ""})


async def splice(socket: Socket, channel: Channel, ended: asyncio.Future[AtollError] | None = None) -> None:
    """Carry messages both ways until one side ends; what was sent before is still delivered. `ended` breaks it off."""
    inward = asyncio.create_task(_inward(socket, channel))
    outward = asyncio.create_task(_outward(socket, channel))
    try:
        waits: set[asyncio.Future[Any]] = {inward, outward} if ended is None else {inward, outward, ended}
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        if ended is not None and ended.done() and not inward.done() and not outward.done():
            outward.cancel()
            await _end(socket, ended.result())
            return
        if outward.done() and not inward.done():
            await asyncio.wait((inward,), timeout=CLOSE_S)
    finally:
        await channel.close()
        for task in (inward, outward):
            task.cancel()
        for result in await asyncio.gather(inward, outward, return_exceptions=True):
            if isinstance(result, Exception) and not isinstance(result, AtollError):
                log.info("a stream broke", cause=repr(result))


async def _inward(socket: Socket, channel: Channel) -> None:
    while (said := _said(await socket.receive())) is not None:
        await channel.send(said)


def _said(message: Any) -> bytes | None:
    """Return what came; None for the client's end."""
    if message["type"] == "websocket.disconnect":
        return None
    data = message.get("bytes")
    return bytes(data) if data is not None else (message.get("text") or "").encode()


async def _outward(socket: Socket, channel: Channel) -> None:
    while (message := await channel.receive()) is not None:
        await socket.send({"type": "websocket.send", "bytes": message, "text": None})
    await socket.send({"type": "websocket.close", "code": 1000, "reason": ""})


class _Requests:
    """What is wanted of an agent, as a channel that only sends."""

    def __init__(self, requests: AsyncIterator[Any]) -> None:
        self._requests = requests

    async def send(self, message: bytes) -> None:
        """An agent has nothing to say here."""

    async def receive(self) -> bytes | None:
        async for request in self._requests:
            return codec.encode(request)
        return None

    async def gone(self) -> None:
        """There is no other end."""
        await asyncio.Event().wait()

    async def close(self) -> None:
        close = getattr(self._requests, "aclose", None)
        if close is not None:
            try:
                await close()
            except RuntimeError:
                # The reader is inside; its task's end closes the iterator.
                return


async def _tunnel(service: Service, instance: Instance, kind: str, options: object) -> Channel:
    assert instance.node is not None  # noqa: S101 (what `placed` promises)
    liveness = service.context.state.get(NodeLiveness, instance.node)
    lost = liveness is not None and liveness.record.health is NodeHealth.LOST
    return await service.tunnels.open(instance.node, kind, instance.id, codec.to_plain(options), lost=lost)


def _options(query: dict[str, str], kind: type[T]) -> T:
    text = query.get("options") or "{}"
    return codec.decode(text.encode(), kind)


async def _refuse(socket: Socket, error: AtollError) -> None:
    """Answer the handshake with the error, as an HTTP call would."""
    headers = [JSON]
    body = codec.encode(error_body(error))
    start: Any = {"type": "websocket.http.response.start", "status": error.status, "headers": headers}
    end: Any = {"type": "websocket.http.response.body", "body": body, "more_body": False}
    await socket.receive()  # the handshake itself
    await socket.send(start)
    await socket.send(end)
