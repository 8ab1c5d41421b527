"""The HTTP side: an ASGI application over one engine. Every request is bounded in size, in tokens, and in how many may wait."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import msgspec

from llama.engine import Delta, EngineThread, Full, Request
from llama.wire import TOKENS_DEFAULT, Answer, ApiError, Asked, ChatAsked, TextAsked, parse

BODY_BYTES_MAX = 1 << 20
BODY_S = 30.0
"""How long a body may take to arrive."""
RETRY_AFTER_S = 1

Scope = dict[str, Any]
Receive = Callable[[], Awaitable[dict[str, Any]]]
Send = Callable[[dict[str, Any]], Awaitable[None]]


@dataclass
class Served:
    """What the application has to give: nothing until the model is loaded."""

    name: str
    thread: EngineThread | None = None
    since: int = 0
    gone: str = ""
    """Why it will never be ready."""

    def engine(self) -> EngineThread:
        """Raises ApiError while there is none."""
        failure = self.thread.failure if self.thread is not None else None
        if self.gone or failure is not None:
            raise ApiError(503, f"the model has failed: {self.gone or failure}")
        if self.thread is None:
            raise ApiError(503, "the model is being loaded")
        return self.thread


class App:
    """ASGI 3. `served` may be filled after the application has begun to answer."""

    def __init__(self, served: Served) -> None:
        self._served = served
        self._answers: dict[int, int] = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        began = time.monotonic()
        reply = _Reply(send)
        try:
            await self._route(scope, receive, reply)
        except ApiError as error:
            if reply.status is None:
                extra = [(b"retry-after", b"%d" % RETRY_AFTER_S)] if error.status in (429, 503) else []
                await reply.whole(error.status, msgspec.json.encode(error.body), extra=extra)
        status = reply.status or 499
        self._answers[status] = self._answers.get(status, 0) + 1
        if scope["path"] not in ("/healthz", "/metrics"):
            print(f"{scope['method']} {scope['path']} {status} {time.monotonic() - began:.3f} s {reply.note}".rstrip(), flush=True)

    async def _route(self, scope: Scope, receive: Receive, reply: _Reply) -> None:
        path, method = scope["path"], scope["method"]
        kinds: dict[str, type[ChatAsked] | type[TextAsked]] = {"/v1/chat/completions": ChatAsked, "/v1/completions": TextAsked}
        if path in kinds:
            _expect(method, "POST")
            await self._complete(await _body(receive), kinds[path], receive, reply)
            return
        _expect(method, "GET", "HEAD")
        if path == "/healthz":
            self._served.engine()
            await reply.whole(200, b"ok\n", kind=b"text/plain")
        elif path == "/metrics":
            await reply.whole(200, self._metrics().encode(), kind=b"text/plain; version=0.0.4")
        elif path == "/v1/models":
            await reply.whole(200, msgspec.json.encode({"object": "list", "data": [self._model()]}))
        elif path.startswith("/v1/models/"):
            self._check_name(path.removeprefix("/v1/models/"))
            await reply.whole(200, msgspec.json.encode(self._model()))
        else:
            raise ApiError(404, f"there is nothing at {path}", code="not_found")

    async def _complete(self, body: bytes, kind: type[ChatAsked] | type[TextAsked], receive: Receive, reply: _Reply) -> None:
        asked = parse(body, kind)
        self._check_name(asked.model)
        thread = self._served.engine()
        prompt = asked.prompt(thread.engine.model.tokenizer)
        deltas: asyncio.Queue[Delta] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def deliver(delta: Delta) -> None:
            loop.call_soon_threadsafe(deltas.put_nowait, delta)

        request = Request(
            prompt=prompt,
            tokens_max=_tokens_max(asked, len(prompt), thread.engine.context),
            deliver=deliver,
            sampling=asked.sampling,
            stop=asked.stops,
        )
        try:
            thread.submit(request)
        except Full as error:
            raise ApiError(429, f"too many requests: {error}", code="queue_full") from None
        except RuntimeError as error:
            raise ApiError(503, str(error)) from None
        answer = Answer(asked, len(prompt))
        try:
            async with _gone(receive) as gone:
                if asked.stream:
                    await _stream(deltas, answer, reply, gone)
                else:
                    await _whole(deltas, answer, reply, gone)
        finally:
            request.cancelled = True  # of no effect once it has finished
            reply.note = f"prompt={len(prompt)} completion={answer.tokens}"

    def _check_name(self, name: str) -> None:
        if name != self._served.name:
            message = f"there is no model {name!r}; this server has {self._served.name!r}"
            raise ApiError(404, message, param="model", code="model_not_found")

    def _model(self) -> dict[str, Any]:
        return {"id": self._served.name, "object": "model", "created": self._served.since, "owned_by": "atoll"}

    def _metrics(self) -> str:
        lines = []

        def add(name: str, kind: str, text: str, *values: tuple[str, float]) -> None:
            lines.extend([f"# HELP {name} {text}", f"# TYPE {name} {kind}"])
            lines.extend(f"{name}{labels} {value:g}" for labels, value in values)

        if self._served.thread is not None:
            engine = self._served.thread.engine
            device = engine.model.device
            add("queue_depth", "gauge", "Requests taken in and not yet answered.", ("", engine.depth))
            add("requests_active", "gauge", "Requests that are being answered now.", ("", engine.active))
            add("tokens_per_second", "gauge", "Tokens of answers over the last 10 s.", ("", engine.tokens_per_second))
            add("tokens_total", "counter", "Tokens of answers.", ("", engine.tokens_total))
            add("prompt_tokens_total", "counter", "Tokens of prompts that were read.", ("", engine.prompt_tokens_total))
            add("gpu", "gauge", "1 where a GPU computes.", (f'{{name="{device.gpu or "none"}"}}', 1 if device.gpu else 0))
            if device.gpu:
                add("gpu_memory_used_bytes", "gauge", "Of the whole device, or partition.", ("", device.memory_used_bytes()))
        answers = [(f'{{status="{status}"}}', count) for status, count in sorted(self._answers.items())]
        add("http_requests_total", "counter", "Answers by status; 499 are clients that went away.", *answers)
        return "\n".join(lines) + "\n"


class _Reply:
    """What is sent for one request. `status` is None until it has begun."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self.status: int | None = None
        self.note = ""

    async def whole(
        self, status: int, body: bytes, *, kind: bytes = b"application/json", extra: list[tuple[bytes, bytes]] | None = None
    ) -> None:
        await self._begin(status, [(b"content-type", kind), (b"content-length", b"%d" % len(body)), *(extra or ())])
        await self._send({"type": "http.response.body", "body": body})

    async def begin_events(self) -> None:
        await self._begin(200, [(b"content-type", b"text/event-stream"), (b"cache-control", b"no-cache")])

    async def event(self, data: bytes, *, last: bool = False) -> None:
        await self._send({"type": "http.response.body", "body": data, "more_body": not last})

    async def _begin(self, status: int, headers: list[tuple[bytes, bytes]]) -> None:
        self.status = status
        await self._send({"type": "http.response.start", "status": status, "headers": headers})


def _expect(method: str, *methods: str) -> None:
    if method not in methods:
        raise ApiError(405, f"{method} is not possible here, only {' and '.join(methods)}")


def _tokens_max(asked: Asked, prompt: int, context: int) -> int:
    """Return how long the answer may be. Raises ApiError when prompt and answer do not fit."""
    if prompt == 0:
        raise ApiError(400, "the prompt is empty", param="prompt")
    wanted = asked.tokens_max or max(1, min(TOKENS_DEFAULT, context - prompt))
    if prompt + wanted > context:
        raise ApiError(
            400,
            f"the prompt has {prompt} tokens, the answer may have {wanted}, and the context is {context}",
            param="max_tokens" if prompt < context else None,
            code="context_length_exceeded",
        )
    return wanted


async def _body(receive: Receive) -> bytes:
    """Raises ApiError for a body that is too large or too slow."""
    parts: list[bytes] = []
    size = 0
    try:
        async with asyncio.timeout(BODY_S):
            while True:
                message = await receive()
                if message["type"] != "http.request":
                    raise ApiError(400, "the client went away")
                parts.append(message.get("body", b""))
                size += len(parts[-1])
                if size > BODY_BYTES_MAX:
                    raise ApiError(413, f"the body is over {BODY_BYTES_MAX} bytes")
                if not message.get("more_body", False):
                    return b"".join(parts)
    except TimeoutError:
        raise ApiError(408, f"the body did not arrive within {BODY_S:g} s") from None


@contextlib.asynccontextmanager
async def _gone(receive: Receive) -> AsyncIterator[asyncio.Task[None]]:
    """Give a task that ends when the client has gone away."""

    async def wait() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    task = asyncio.create_task(wait())
    try:
        yield task
    finally:
        task.cancel()


async def _next(deltas: asyncio.Queue[Delta], gone: asyncio.Task[None]) -> Delta | None:
    """Return the next piece; None when the client has gone away."""
    if not deltas.empty():
        return deltas.get_nowait()
    getting = asyncio.ensure_future(deltas.get())
    await asyncio.wait({getting, gone}, return_when=asyncio.FIRST_COMPLETED)
    if getting.done():
        return getting.result()
    getting.cancel()
    return None


async def _whole(deltas: asyncio.Queue[Delta], answer: Answer, reply: _Reply, gone: asyncio.Task[None]) -> None:
    texts: list[str] = []
    while (delta := await _next(deltas, gone)) is not None:
        texts.append(delta.text)
        answer.tokens += delta.tokens
        if delta.finish == "error":
            raise ApiError(500, "the engine failed while it answered")
        if delta.finish is not None:
            await reply.whole(200, answer.whole("".join(texts), delta.finish))
            return


async def _stream(deltas: asyncio.Queue[Delta], answer: Answer, reply: _Reply, gone: asyncio.Task[None]) -> None:
    await reply.begin_events()
    await reply.event(answer.opening())
    while (delta := await _next(deltas, gone)) is not None:
        answer.tokens += delta.tokens
        if delta.finish == "error":
            error = ApiError(500, "the engine failed while it answered")
            await reply.event(b"data: " + msgspec.json.encode(error.body) + b"\n\n", last=True)
            return
        if delta.text or delta.finish is not None:
            await reply.event(answer.piece(delta.text, delta.finish))
        if delta.finish is not None:
            await reply.event(answer.closing(), last=True)
            return
