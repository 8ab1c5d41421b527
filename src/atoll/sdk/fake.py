"""An API in memory for tests of clients and of the CLI: the same calls, records and errors, with a world that obeys at once.

What is deployed is ready right away, unless `failing` says that it is not; jobs succeed. Pass it to `Client` as its transport.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from urllib.parse import parse_qs, unquote, urlsplit

from atoll.model import codec
from atoll.model.errors import AtollError, Compacted, NotFound, Unavailable
from atoll.model.ports.control_plane import Channel
from atoll.model.streams import ErrorBody, ExecOptions, FilesOptions, LogLine, LogOptions
from atoll.model.views import ErrorAnswer, WatchLine
from atoll.sdk import fake_streams
from atoll.sdk.fake_calls import FakeCalls
from atoll.sdk.transport import REQUEST_S, SILENCE_S, Address, Answer


class FakeApi(FakeCalls):
    """Implements `transport.Transport`. Everything that it holds may be read and changed by a test."""

    def __init__(self) -> None:
        super().__init__()
        self.address = Address.parse("http://fake")
        self.requests: list[tuple[str, str, dict[str, str]]] = []
        """Method, path and headers of each request."""
        self.channels: list[str] = []
        """Path of each live stream that was asked for."""
        self.logs: dict[str, list[LogLine]] = {}
        self.files: dict[str, bytes] = {}
        """Instance and path → tar stream: what `get` answers, and what `put` left."""
        self.down: AtollError | None = None
        """Raised by every call, as when nothing answers."""
        self._answers: dict[str, Answer] = {}

    async def request(
        self, method: str, path: str, *, headers: Mapping[str, str] | None = None, body: bytes = b"", timeout_s: float = REQUEST_S
    ) -> Answer:
        headers = dict(headers or {})
        self.requests.append((method, path, headers))
        key = headers.get("Idempotency-Key", "")
        if key in self._answers:
            return self._answers[key]
        try:
            self._check_up()
            segments, query = _parts(path)
            content = self.handle(method, segments, query, headers, body)
            answer = Answer(200, {}, b"" if content is None else codec.encode(content))
        except Unavailable:
            raise
        except AtollError as error:
            answer = Answer(error.status, {}, codec.encode(ErrorAnswer(ErrorBody.of(error))))
        if key:
            self._answers[key] = answer
        return answer

    @asynccontextmanager
    async def lines(self, path: str, *, silence_s: float = SILENCE_S) -> AsyncIterator[AsyncIterator[bytes]]:
        self._check_up()
        segments, query = _parts(path)
        if segments != ["watch"]:
            raise NotFound(f"no stream {path}")
        if query.get("from") == "-1":
            raise Compacted("too old")
        queue: asyncio.Queue[WatchLine | None] = asyncio.Queue()
        self.watchers.add(queue)
        try:
            yield self._watch(query, queue)
        finally:
            self.watchers.discard(queue)

    async def _watch(self, query: dict[str, str], queue: asyncio.Queue[WatchLine | None]) -> AsyncIterator[bytes]:
        kinds = query["kinds"].split(",")
        project = query.get("project")

        def wanted(kind: str, key: str) -> bool:
            return kind in kinds and (project is None or key.startswith(f"{project}/"))

        begin = int(query.get("from", "0"))
        for (kind, key), (record, revision) in list(self.records.items()):
            if wanted(kind, key) and revision >= begin:
                yield codec.encode(WatchLine(revision=revision, kind=kind, key=key, record=codec.to_plain(record)))
        yield codec.encode(WatchLine(revision=self.revision))
        while (line := await queue.get()) is not None:
            if wanted(line.kind or "", line.key or ""):
                yield codec.encode(line)
        raise Unavailable("the connection was cut")

    async def channel(self, path: str, *, acts: bool = False, close_s: float = 0.0) -> Channel:
        self._check_up()
        self.channels.append(path)
        segments, query = _parts(path)
        match segments:
            case ["projects", project, "instances", id, "exec"]:
                self.get("instances", f"{project}/{id}")
                return fake_streams.exec_channel(codec.decode(query["options"].encode(), ExecOptions))
            case ["projects", project, "commands", "next"]:
                return fake_streams.command_ahead_channel(lambda id: self.get("instances", f"{project}/{id}"))
            case ["projects", project, "instances", id, "logs"]:
                self.get("instances", f"{project}/{id}")
                return fake_streams.log_channel(self.logs.get(id, []), codec.decode(query["options"].encode(), LogOptions))
            case ["projects", project, "instances", id, "files"]:
                self.get("instances", f"{project}/{id}")
                where = f"{id}:{codec.decode(query['options'].encode(), FilesOptions).path}"
                return fake_streams.files_channel(self.files, where, query["mode"])
            case _:
                raise NotFound(f"no stream {path}")

    async def close(self) -> None: ...

    def _check_up(self) -> None:
        if self.down is not None:
            raise self.down


def _parts(path: str) -> tuple[list[str], dict[str, str]]:
    parts = urlsplit(path)
    segments = [unquote(segment) for segment in parts.path.removeprefix("/v1/").split("/")]
    return segments, {key: values[0] for key, values in parse_qs(parts.query).items()}
