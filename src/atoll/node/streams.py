"""Serves live streams: a command in an instance, its log, files in and out (messages as in `model.streams`)."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Awaitable, Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

import structlog
from msgspec.structs import replace

from atoll.model import codec
from atoll.model.copying import Copier
from atoll.model.errors import AtollError, Conflict, DeadlineExceeded, Exhausted, Invalid, NotFound, Unavailable
from atoll.model.ports.control_plane import Channel, ControlPlane, StreamKind, StreamRequest
from atoll.model.ports.runtime import Execution, Runtime
from atoll.model.states import Phase
from atoll.model.streams import (
    ErrorBody,
    ExecOptions,
    FilesOptions,
    Kind,
    LogOptions,
    ReinstateOptions,
    Resize,
    SnapshotsOptions,
    pack,
    unpack,
)
from atoll.node.files import Ids, error_in_words, pack_files, unpack_files
from atoll.node.gpus import Gpus
from atoll.node.holding import hold
from atoll.node.in_root import IdMap
from atoll.node.runner import Runner
from atoll.node.snapshots import Snapshots
from atoll.node.stdin import Stdin
from atoll.node.tools import Logs
from atoll.node.transitions import Rest
from atoll.node.turns import Turns

OPEN_S = 10.0
"""Deadline of dialling the server for one stream."""
EXEC_START_S = 30.0
FILES_IDLE_S = 60.0
"""A copy whose other end does not move for so long is given up."""
REINSTATED_S = 5.0
FILES_THREADS = 4
"""Copies that run at a time; others wait, FILES_WAIT_S at most."""
FILES_PER_PROJECT = 2
FILES_WAIT_S = 50.0
"""Less than an end waits for the other to move."""

T = TypeVar("T")
log = structlog.get_logger()
_copiers = ThreadPoolExecutor(FILES_THREADS, thread_name_prefix="atoll-copy")
_copies = Turns(FILES_THREADS, FILES_PER_PROJECT)


async def serve_stream(
    request: StreamRequest,
    control: ControlPlane,
    node: str,
    runner: Runner | None,
    logs: Logs,
    *,
    gpus: Gpus | None = None,
    snapshots: Snapshots | None = None,
    full: bool = False,
    channel: Channel | None = None,
) -> None:
    """Serve one stream to its end, on `channel` where it is open already. What goes wrong is told to the other end; never raises
    AtollError."""
    try:
        if channel is None:
            async with asyncio.timeout(OPEN_S):
                channel = await control.open_stream(node, request.id)
    except (AtollError, TimeoutError) as error:
        log.warning("stream not opened", kind=request.kind, instance=request.instance, error=str(error) or "timed out")
        return
    try:
        try:
            if full:
                raise Exhausted("this node serves as many streams as it may; try again later")
            if request.kind == StreamKind.GPU_REINSTATE:
                await _reinstate(channel, gpus, codec.convert(request.options, ReinstateOptions))
            elif request.kind in (StreamKind.SNAPSHOTS, StreamKind.SNAPSHOT_REMOVE) and snapshots is not None:
                await _snapshots(request, channel, snapshots, node)
            elif runner is None:
                raise NotFound(f"instance {request.instance} is not on this node")
            else:
                await _serve(request, channel, runner, logs, node)
        except AtollError as error:
            body = ErrorBody.of(error)
            await channel.send(pack(Kind.ERROR, codec.encode(body)))
    except Unavailable:
        log.debug("stream left", kind=request.kind, instance=request.instance)
    finally:
        await channel.close()


async def _serve(request: StreamRequest, channel: Channel, runner: Runner, logs: Logs, node: str) -> None:
    if request.kind == StreamKind.LOGS:
        await _send_logs(channel, runner, logs, codec.convert(request.options, LogOptions))
        return
    with runner.in_use():
        await _work(request, channel, runner, node)


async def _work(request: StreamRequest, channel: Channel, runner: Runner, node: str) -> None:
    match request.kind:
        case StreamKind.EXEC:
            await _exec(channel, runner, codec.convert(request.options, ExecOptions))
        case StreamKind.FILES_GET:
            await _get_files(channel, runner, codec.convert(request.options, FilesOptions).path)
        case StreamKind.FILES_PUT:
            await _put_files(channel, runner, codec.convert(request.options, FilesOptions).path)
        case StreamKind.PAUSE | StreamKind.RESUME | StreamKind.SNAPSHOT:
            runtime, _ = _running(runner)
            held = await hold(runner, runtime, request.kind, node)
            await channel.send(pack(Kind.DATA, codec.encode(held)))
            await _taken(channel)
        case _:
            raise Invalid(f"unknown kind of stream {request.kind!r}")


async def _snapshots(request: StreamRequest, channel: Channel, snapshots: Snapshots, node: str) -> None:
    options = codec.convert(request.options, SnapshotsOptions)
    if request.kind == StreamKind.SNAPSHOTS:
        views = await asyncio.to_thread(snapshots.all, options.project, node)
        await channel.send(pack(Kind.DATA, codec.encode(views)))
    else:
        await asyncio.to_thread(snapshots.remove, options.project, options.digest)
        await channel.send(pack(Kind.END))
    await _taken(channel)


async def _taken(channel: Channel) -> None:
    """Wait for the asker's end: closing before it could cut what is under way."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(REINSTATED_S):
            await channel.receive()


async def _reinstate(channel: Channel, gpus: Gpus | None, options: ReinstateOptions) -> None:
    if gpus is None:
        raise NotFound("this node has no GPUs", field="gpu")
    device = await gpus.reinstate(options.device, reset=options.reset, by=options.by)
    await channel.send(pack(Kind.DATA, codec.encode(replace(device, links=(), profiles=(), foreign=()))))
    await _taken(channel)


def _running(runner: Runner) -> tuple[Runtime, int]:
    runtime, pid = runner.runtime, runner.state.pid
    if runtime is None or pid is None or runner.state.phase not in (Phase.RUNNING, Phase.STOPPING):
        raise Conflict(f"instance {runner.id} is {runner.state.phase.value}, not running", mend="wait until it runs")
    return runtime, pid


async def _exec(channel: Channel, runner: Runner, options: ExecOptions) -> None:
    runtime, _ = _running(runner)
    if runner.state.rest is not Rest.AWAKE:
        raise Conflict(f"instance {runner.id} is parked, and would not answer", mend="choose one that serves: atoll ps")
    if runner.paused:
        raise Conflict(f"instance {runner.id} is paused", mend="atoll sandbox resume lets it go on")
    if not options.argv or not options.argv[0]:
        raise Invalid("argv: missing", field="argv")
    try:
        async with asyncio.timeout(EXEC_START_S):
            execution = await runtime.exec(
                runner.id,
                options.argv,
                env=tuple(options.env.items()),
                workdir=options.workdir,
                user=options.user,
                tty=options.tty,
                rows=options.rows,
                columns=options.columns,
            )
    except TimeoutError:
        raise DeadlineExceeded(f"the command did not start within {EXEC_START_S:.0f} s") from None
    control = asyncio.create_task(_feed(channel, execution))
    try:
        while (chunk := await execution.read()) is not None:
            await channel.send(pack(Kind.STDOUT if chunk[0] == 1 else Kind.STDERR, chunk[1]))
        await channel.send(pack(Kind.EXIT, str(await execution.wait()).encode()))
    finally:
        control.cancel()
        await asyncio.gather(control, return_exceptions=True)
        await execution.close()


async def _feed(channel: Channel, execution: Execution) -> None:
    """Carry what the client sends; when it has gone, end the command, whose output nobody reads any more."""
    stdin = Stdin(execution)
    try:
        while (message := await channel.receive()) is not None:
            kind, payload = unpack(message)
            match kind:
                case Kind.STDIN | Kind.STDIN_END:
                    stdin.put(payload if kind is Kind.STDIN else None)
                    if not await stdin.has_room(channel.gone()):
                        break
                case Kind.RESIZE:
                    size = codec.decode(payload, Resize)
                    await execution.resize(size.rows, size.columns)
                case Kind.SIGNAL:
                    await execution.signal(payload.decode("ascii", "replace"))
                case _:
                    raise Invalid(f"an exec stream takes no {kind.name} from the client")
    except AtollError as error:
        log.info("exec input ended", error=str(error))
    finally:
        stdin.end()
    await execution.close()


async def _send_logs(channel: Channel, runner: Runner, logs: Logs, options: LogOptions) -> None:
    async def send() -> None:
        async for line in logs.read(runner.project, runner.id, options):
            await channel.send(pack(Kind.LOG, codec.encode(line)))
        await channel.send(pack(Kind.END))

    await _until_left(channel, send())


async def _until_left(channel: Channel, work: Any) -> None:
    """Run `work`, and end it when the other end goes away, which a quiet log would never notice."""
    task = asyncio.ensure_future(work)

    async def left() -> None:
        while await channel.receive() is not None:
            pass

    watcher = asyncio.ensure_future(left())
    try:
        await asyncio.wait({task, watcher}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            task.result()
    finally:
        for each in (task, watcher):
            each.cancel()
        await asyncio.gather(task, watcher, return_exceptions=True)


class _Bridge:
    """Lets a copying thread wait for the event loop, and end when the stream does."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._pending: Future[Any] | None = None
        self._closed = False

    def call(self, work: Callable[[], Awaitable[T]]) -> T:
        async def run() -> T:
            return await work()

        if self._closed:
            raise Unavailable("the stream was ended")
        self._pending = future = asyncio.run_coroutine_threadsafe(run(), self._loop)
        try:
            return future.result(FILES_IDLE_S)
        except TimeoutError:
            future.cancel()
            raise DeadlineExceeded(f"the other end did not move for {FILES_IDLE_S:.0f} s") from None

    def close(self) -> None:
        self._closed = True
        if self._pending is not None:
            self._pending.cancel()


class _ChannelSink:
    def __init__(self, channel: Channel, bridge: _Bridge) -> None:
        self._channel, self._bridge = channel, bridge

    def write(self, data: bytes, /) -> int:
        self._bridge.call(lambda: self._channel.send(pack(Kind.DATA, data)))
        return len(data)


class _ChannelSource:
    def __init__(self, channel: Channel, bridge: _Bridge) -> None:
        self._channel, self._bridge = channel, bridge
        self._rest = b""
        self.ended = False

    def read(self, size: int, /) -> bytes:
        while not self._rest and not self.ended:
            self._receive()
        data, self._rest = self._rest[:size], self._rest[size:]
        return data

    def _receive(self) -> None:
        message = self._bridge.call(self._channel.receive)
        if message is None:
            raise Unavailable("the other end left before all files came")
        kind, payload = unpack(message)
        match kind:
            case Kind.DATA:
                self._rest = payload
            case Kind.END:
                self.ended = True
            case _:
                raise Invalid(f"a files stream takes no {kind.name}")


async def _copy(
    runner: Runner, path: str, work: Callable[[int, Ids], None], beyond: Callable[[Copier], None], bridge: _Bridge
) -> None:
    """Run `work` in a thread with the instance's root and id maps; `beyond` where its files are beyond the node's reach."""
    async with _copies.take(runner.project, "copies", within_s=FILES_WAIT_S):
        await _copy_now(runner, path, work, beyond, bridge)


async def _copy_now(
    runner: Runner, path: str, work: Callable[[int, Ids], None], beyond: Callable[[Copier], None], bridge: _Bridge
) -> None:
    runtime, pid = _running(runner)
    copier = await runtime.copier(runner.id)
    if copier is not None:
        try:
            await _in_thread(lambda: beyond(copier), bridge)
        except OSError as error:
            raise error_in_words(error, error.filename or path) from None
        return
    try:
        ids = Ids(IdMap.of(pid, "uid"), IdMap.of(pid, "gid"))
    except OSError:
        raise Conflict(f"instance {runner.id} has just ended") from None
    root = await runtime.root(runner.id)
    try:
        await _in_thread(lambda: work(root, ids), bridge)
    finally:
        os.close(root)


async def _in_thread(work: Callable[[], None], bridge: _Bridge) -> None:
    copying = asyncio.get_running_loop().run_in_executor(_copiers, work)
    try:
        await asyncio.shield(copying)
    finally:
        bridge.close()
        await asyncio.gather(copying, return_exceptions=True)


async def _get_files(channel: Channel, runner: Runner, path: str) -> None:
    bridge = _Bridge()
    sink = _ChannelSink(channel, bridge)
    await _copy(runner, path, lambda root, ids: pack_files(root, path, ids, sink), lambda copier: copier.pack(path, sink), bridge)
    await channel.send(pack(Kind.END))
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(FILES_IDLE_S):
            await channel.receive()  # the receiver's END: closing before it could cut what is under way


async def _put_files(channel: Channel, runner: Runner, path: str) -> None:
    bridge = _Bridge()
    source = _ChannelSource(channel, bridge)
    await _copy(
        runner, path, lambda root, ids: unpack_files(root, path, ids, source), lambda copier: copier.unpack(path, source), bridge
    )
    try:
        async with asyncio.timeout(FILES_IDLE_S):
            while not source.ended:
                message = await channel.receive()
                if message is None:
                    return
                source.ended = unpack(message)[0] is Kind.END  # tar's own padding behind its end
    except TimeoutError:
        raise DeadlineExceeded(f"the end of the files did not come within {FILES_IDLE_S:.0f} s; all that came is there") from None
    await channel.send(pack(Kind.END))
