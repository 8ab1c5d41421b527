"""The node's end of live streams, in memory: a shell of three commands, a log, and a place for files."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence

from atoll.model import codec
from atoll.model.errors import AtollError, Invalid, Unavailable
from atoll.model.ports.control_plane import TAKEN, Channel
from atoll.model.streams import ErrorBody, ExecOptions, Kind, LogLine, LogOptions, NextCommand, Resize, pack, unpack

MESSAGES_MAX = 64


class FakeChannel:
    """The client's end; `node` runs with the other one until it returns."""

    def __init__(self, node: Callable[[FakeNodeEnd], Awaitable[None]]) -> None:
        self._up: asyncio.Queue[bytes | None] = asyncio.Queue(MESSAGES_MAX)
        self._down: asyncio.Queue[bytes | None] = asyncio.Queue(MESSAGES_MAX)
        self._task = asyncio.ensure_future(self._run(node))

    async def _run(self, node: Callable[[FakeNodeEnd], Awaitable[None]]) -> None:
        await node(FakeNodeEnd(self._up, self._down))
        await self._down.put(None)

    async def send(self, message: bytes) -> None:
        if self._task.done():
            raise Unavailable("the other end is gone")
        await self._up.put(message)

    async def receive(self) -> bytes | None:
        return await self._down.get()

    async def gone(self) -> None:
        await asyncio.wait((self._task,))

    async def close(self) -> None:
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)


class FakeNodeEnd:
    """What the node reads and writes."""

    def __init__(self, up: asyncio.Queue[bytes | None], down: asyncio.Queue[bytes | None]) -> None:
        self._up, self._down = up, down

    async def send(self, kind: Kind, payload: bytes = b"") -> None:
        await self._down.put(pack(kind, payload))

    async def first(self) -> bytes:
        """Return the first message as it came."""
        return await self._up.get() or b""

    async def taken(self) -> None:
        await self._down.put(TAKEN)

    async def __aiter__(self) -> AsyncIterator[tuple[Kind, bytes]]:
        while (message := await self._up.get()) is not None:
            yield unpack(message)


def exec_channel(options: ExecOptions) -> Channel:
    """`echo WORDS…`, `cat` (until the input ends), `exit N`, `size` (of the terminal, at each change, until a key).

    Anything else cannot be started.
    """

    return FakeChannel(lambda node: _run(node, options))


def command_ahead_channel(check: Callable[[str], object]) -> Channel:
    """Wait for a `NextCommand`, then go on as its `exec_channel`; `check` raises for an instance that is not there."""

    async def run(node: FakeNodeEnd) -> None:
        wanted = codec.decode(await node.first(), NextCommand)
        try:
            check(wanted.instance)
        except AtollError as error:
            await node.send(Kind.ERROR, codec.encode(ErrorBody.of(error)))
            return
        await node.taken()
        await _run(node, wanted.options)

    return FakeChannel(run)


async def _run(node: FakeNodeEnd, options: ExecOptions) -> None:
    match options.argv:
        case ("echo", *words):
            await node.send(Kind.STDOUT, " ".join(words).encode() + b"\n")
            await node.send(Kind.EXIT, b"0")
        case ("exit", code):
            await node.send(Kind.STDERR, b"bye\n")
            await node.send(Kind.EXIT, code.encode())
        case ("cat",):
            async for kind, payload in node:
                if kind is Kind.STDIN:
                    await node.send(Kind.STDOUT, payload)
                elif kind is Kind.STDIN_END:
                    break
            await node.send(Kind.EXIT, b"0")
        case ("size",):
            await node.send(Kind.STDOUT, f"{options.rows}x{options.columns}\n".encode())
            async for kind, payload in node:
                if kind is Kind.RESIZE:
                    size = codec.decode(payload, Resize)
                    await node.send(Kind.STDOUT, f"{size.rows}x{size.columns}\n".encode())
                elif kind in (Kind.STDIN, Kind.STDIN_END):
                    break
            await node.send(Kind.EXIT, b"0")
        case _:
            told = ErrorBody(code="command-not-found", message=f"cannot start {options.argv[0]!r}: no such file or directory")
            await node.send(Kind.ERROR, codec.encode(told))


def log_channel(lines: Sequence[LogLine], options: LogOptions) -> Channel:
    """Send what is kept. A followed log ends there too: nothing writes to it."""

    async def run(node: FakeNodeEnd) -> None:
        wanted = [line for line in lines if options.since is None or line.at >= options.since]
        for line in wanted if options.tail is None else wanted[len(wanted) - min(options.tail, len(wanted)) :]:
            await node.send(Kind.LOG, codec.encode(line))
        await node.send(Kind.END)

    return FakeChannel(run)


def files_channel(files: dict[str, bytes], where: str, mode: str) -> Channel:
    """Read from or write to `files[where]`, a tar stream."""

    async def get(node: FakeNodeEnd) -> None:
        if where not in files:
            told = ErrorBody(code="not-found", message=f"no such file or directory: {where.partition(':')[2]}")
            await node.send(Kind.ERROR, codec.encode(told))
            return
        await node.send(Kind.DATA, files[where])
        await node.send(Kind.END)

    async def put(node: FakeNodeEnd) -> None:
        parts: list[bytes] = []
        async for kind, payload in node:
            if kind is Kind.END:
                break
            parts.append(payload)
        files[where] = b"".join(parts)
        await node.send(Kind.END)

    if mode not in ("get", "put"):
        raise Invalid(f"mode: {mode!r} is neither get nor put", field="mode")
    return FakeChannel(get if mode == "get" else put)
