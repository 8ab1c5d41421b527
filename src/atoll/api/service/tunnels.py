"""Live streams between a client and the agent that runs an instance: exec, logs, files.

The server never dials a node. An agent keeps a tunnel open, is told of a stream that someone wants, and dials in with the
stream's id; here the two ends meet and are spliced by two bounded queues. One with sandboxes keeps some open ahead: whoever wants a
stream is given one of these, and nobody dials.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from msgspec import Struct

from atoll.model import codec
from atoll.model.errors import DeadlineExceeded, Exhausted, NotFound, TooLarge, Unavailable
from atoll.model.ports.control_plane import TAKEN, Channel, StreamRequest
from atoll.model.streams import MESSAGE_BYTES_MAX

PIPE_MESSAGES_MAX = 16
"""Messages that wait in one direction of a stream; with `MESSAGE_BYTES_MAX` each, at most 2 MiB."""
ANSWER_S = 4.0
"""How long an agent has to dial in, which includes the time until its tunnel is back after its own or the server's crash;
clients wait 5 s for a stream to open, and should hear why it does not."""
LOST_ANSWER_S = 1.0
"""How long another server has to show a tunnel of a node that counts as lost."""
REQUESTS_MAX = 256
"""Streams of one node that wait for its agent."""
REQUEST_BYTES_MAX = MESSAGE_BYTES_MAX
"""Of what an agent is told of one: a longer message would end its tunnel, and with it all other streams that wait."""
SPARES_MAX = 4
"""Streams of one node that may wait for whoever wants one."""
STREAMS_MAX = 4_096
"""Streams of all nodes together that wait for their agents."""


class Pipe:
    """One end of a two-way stream in memory, with back-pressure; implements the port `Channel`."""

    def __init__(self, inward: asyncio.Queue[bytes | None], outward: asyncio.Queue[bytes | None], closed: asyncio.Event) -> None:
        self._inward = inward
        self._outward = outward
        self._closed = closed
        self._ended = False

    async def send(self, message: bytes) -> None:
        """Wait until the other end has room. Raises Unavailable when either end has closed."""
        if self._outward.full() and not self._closed.is_set():
            await _first(self._outward.put(message), self._closed)
        elif not self._closed.is_set():
            self._outward.put_nowait(message)
            return
        if self._closed.is_set():
            raise Unavailable("the other end of the stream is gone")

    async def receive(self) -> bytes | None:
        """Return the next message; what was sent before the other end closed is still delivered."""
        if self._ended:
            return None
        if not self._inward.empty():
            message = self._inward.get_nowait()
        elif self._closed.is_set():
            message = None
        else:
            message = await _first(self._inward.get(), self._closed)
            if message is None and not self._inward.empty():
                message = self._inward.get_nowait()
        self._ended = message is None
        return message

    async def gone(self) -> None:
        await self._closed.wait()

    async def close(self) -> None:
        self._closed.set()

    @property
    def closed(self) -> bool:
        """Whether either end has closed."""
        return self._closed.is_set()


async def _first(wanted: Any, closed: asyncio.Event) -> Any:
    """Return the result of `wanted`, or None if `closed` is set before it is there."""
    task = asyncio.ensure_future(wanted)
    gone = asyncio.ensure_future(closed.wait())
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        return task.result() if task.done() else None
    finally:
        gone.cancel()
        task.cancel()


def pipe() -> tuple[Pipe, Pipe]:
    """Return the two ends of a stream."""
    there: asyncio.Queue[bytes | None] = asyncio.Queue(PIPE_MESSAGES_MAX)
    back: asyncio.Queue[bytes | None] = asyncio.Queue(PIPE_MESSAGES_MAX)
    closed = asyncio.Event()
    return Pipe(back, there, closed), Pipe(there, back, closed)


Elsewhere = Callable[[str, str, str, dict[str, Any]], Awaitable[Channel]]
"""`(node, kind, instance, options)` → a stream by another server, once one has the node's tunnel; cancelled when not needed."""


class _Waiting(Struct, frozen=True):
    """A stream whose client waits for the agent."""

    node: str
    request: StreamRequest
    answer: asyncio.Future[Pipe]


class Tunnels:
    """Where clients' streams wait for their agents. It lives in memory: a server's restart ends its streams."""

    def __init__(self, new_id: Callable[[], str] = lambda: secrets.token_hex(16)) -> None:
        self._new_id = new_id
        self._nodes: dict[str, asyncio.Queue[StreamRequest]] = {}
        self._waiting: dict[str, _Waiting] = {}
        self._spares: dict[str, list[Pipe]] = {}
        self.elsewhere: Elsewhere | None = None
        """Asked where the node has no tunnel here; None where this is the only server."""

    def connected(self, node: str) -> bool:
        return node in self._nodes

    async def requests(self, node: str) -> AsyncIterator[StreamRequest]:
        """Yield the streams that are wanted of `node`, those first that waited before it came, or that an agent which died
        may have taken with it. A newer tunnel of the same node takes over from an older."""
        queue: asyncio.Queue[StreamRequest] = asyncio.Queue(REQUESTS_MAX)
        for one in self._of(node)[:REQUESTS_MAX]:
            queue.put_nowait(one.request)
        self._nodes[node] = queue
        try:
            while self._nodes.get(node) is queue:
                yield await queue.get()
        finally:
            if self._nodes.get(node) is queue:
                del self._nodes[node]

    async def open(
        self,
        node: str,
        kind: str,
        instance: str,
        options: dict[str, Any],
        *,
        lost: bool = False,
        answer_s: float = ANSWER_S,
        here_only: bool = False,
    ) -> Channel:
        """Return the client's end of a new stream, once the agent has dialled in, here or (unless `here_only`) at another
        server. For the tunnel of a node that is `lost` nobody waits.

        Raises Unavailable: the agent has no tunnel; DeadlineExceeded: it did not answer; Exhausted: too many wait; TooLarge: what
        the agent would be told of it would break its tunnel.
        """
        request = StreamRequest(self._new_id(), kind, instance, options)
        if (size := len(codec.encode(request))) > REQUEST_BYTES_MAX:
            raise TooLarge(f"what is asked of the node has {size} bytes with its variables; at most {REQUEST_BYTES_MAX} are taken")
        if not lost and (spare := self._spare_of(node)) is not None:
            return await _ask(spare, request, node, answer_s)
        queue = self._nodes.get(node)
        elsewhere = None if here_only or queue is not None else self.elsewhere
        if queue is None and lost:
            if elsewhere is None:
                raise _unconnected(node)
            answer_s = min(answer_s, LOST_ANSWER_S)
        waiting = len(self._of(node))
        if waiting >= REQUESTS_MAX or len(self._waiting) >= STREAMS_MAX or (queue is not None and queue.full()):
            raise Exhausted(f"{waiting} streams wait for node '{node}' already")
        answer: asyncio.Future[Pipe] = asyncio.get_running_loop().create_future()
        self._waiting[request.id] = _Waiting(node, request, answer)
        if queue is not None:
            queue.put_nowait(request)
        asked = asyncio.ensure_future(elsewhere(node, kind, instance, options)) if elsewhere is not None else None
        try:
            return await _soonest(answer, asked, answer_s)
        except TimeoutError:
            if not self.connected(node):
                raise _unconnected(node) from None
            raise _late(node, answer_s) from None
        finally:
            self._waiting.pop(request.id, None)

    def accept(self, node: str, id: str) -> Pipe:
        """Return the agent's end of stream `id`. Raises NotFound: nobody waits for it (any more), or it is another node's."""
        waiting = self._waiting.get(id)
        if waiting is None or waiting.node != node or waiting.answer.done():
            raise NotFound("nobody waits for this stream")
        ours, theirs = pipe()
        waiting.answer.set_result(ours)
        return theirs

    def spare(self, node: str) -> Pipe:
        """Return the agent's end of a stream that waits for whoever wants one of `node` (NEXT_STREAM). Raises Exhausted."""
        there = [pipe for pipe in self._spares.get(node, ()) if not pipe.closed]
        if len(there) >= SPARES_MAX:
            raise Exhausted(f"{len(there)} streams of node '{node}' wait for whoever wants one")
        ours, theirs = pipe()
        self._spares[node] = [*there, ours]
        return theirs

    def _spare_of(self, node: str) -> Pipe | None:
        """Return a stream of the node's that waits, the newest, and have it wait no more; None where there is none."""
        there = [pipe for pipe in self._spares.pop(node, ()) if not pipe.closed]
        if len(there) > 1:
            self._spares[node] = there[:-1]
        return there[-1] if there else None

    def _of(self, node: str) -> list[_Waiting]:
        return [one for one in self._waiting.values() if one.node == node and not one.answer.done()]


async def _ask(spare: Pipe, request: StreamRequest, node: str, answer_s: float) -> Channel:
    """Return the client's end of a stream that waited, once its agent has the request. It is asked for once: nothing runs twice."""
    try:
        await spare.send(codec.encode(request))
        async with asyncio.timeout(answer_s):
            if await spare.receive() != TAKEN:
                raise Unavailable(f"node '{node}' has just left", mend="try again")
    except TimeoutError:
        await spare.close()
        raise _late(node, answer_s) from None
    except BaseException:
        await spare.close()
        raise
    return spare


def _late(node: str, answer_s: float) -> DeadlineExceeded:
    return DeadlineExceeded(
        f"node '{node}' did not open the stream within {answer_s:g} s", mend="look at its agent's log, then try again"
    )


async def _soonest(answer: asyncio.Future[Pipe], asked: asyncio.Future[Channel] | None, answer_s: float) -> Channel:
    """Return whichever end comes first; the other, should it come too, is closed. Raises TimeoutError, or what `asked` raises."""
    waits: set[asyncio.Future[Any]] = {answer} if asked is None else {answer, asked}
    kept: asyncio.Future[Any] | None = None
    try:
        done, _ = await asyncio.wait(waits, timeout=answer_s, return_when=asyncio.FIRST_COMPLETED)
        if not done:
            raise TimeoutError
        kept = answer if answer in done else asked
        assert kept is not None  # noqa: S101 (one of the two is done)
        channel: Channel = kept.result()
        return channel
    finally:
        for future in waits - {kept}:
            future.cancel()
            future.add_done_callback(let_go)


def let_go(future: asyncio.Future[Any]) -> None:
    """Close the channel that `future` has brought, if it has: a callback for one that nobody waits for any more."""
    if future.cancelled() or future.exception() is not None:
        return
    closing = asyncio.ensure_future(future.result().close())
    _CLOSING.add(closing)
    closing.add_done_callback(_CLOSING.discard)


_CLOSING: set[asyncio.Future[None]] = set()
"""Streams that nobody wanted any more, on their way out."""


def _unconnected(node: str) -> Unavailable:
    return Unavailable(f"node '{node}' has no connection to any server", mend="look at its agent's log; 'atoll nodes' shows it")
