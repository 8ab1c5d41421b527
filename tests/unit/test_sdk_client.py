"""The client against an API in memory: pages, retries, watches that go on, contexts, live streams."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from atoll.model import codec
from atoll.model.errors import (
    BY_CODE,
    AtollError,
    Compacted,
    Conflict,
    Invalid,
    NotFound,
    OutcomeUnknown,
    StaleRevision,
    Unauthenticated,
    Unavailable,
)
from atoll.model.records import Job, Project
from atoll.model.spec import AppSpec, JobSpec, Port
from atoll.model.streams import ErrorBody, ExecOptions, Kind, LogLine, LogOptions, pack
from atoll.model.views import ErrorAnswer, Page, WatchLine
from atoll.sdk import answers, context, streams, watching
from atoll.sdk.client import Client
from atoll.sdk.fake import FakeApi
from atoll.sdk.transport import Answer, Lines, Unreachable

SPEC = AppSpec(name="web", image="registry.example/web:1", ports=(Port(port=80),))


class Flaky(FakeApi):
    """Loses some answers after it has acted on the requests."""

    def __init__(self, losses: int, error: Exception) -> None:
        super().__init__()
        self.losses = losses
        self.error = error

    async def request(self, method: str, path: str, **options: Any) -> Answer:
        answer = await super().request(method, path, **options)
        if self.losses:
            self.losses -= 1
            raise self.error
        return answer


async def test_a_write_whose_answer_was_lost_is_repeated_and_acts_once() -> None:
    api = Flaky(2, OutcomeUnknown("cut"))
    await Client(api).create_job(JobSpec(name="sum", image="x"))
    keys = {headers["Idempotency-Key"] for _, _, headers in api.requests}
    assert (len(api.requests), len(keys)) == (3, 1)
    assert len(api.under("jobs")) == 1
    with pytest.raises(Conflict):
        await Client(api).create_job(JobSpec(name="sum", image="x"))


async def test_a_write_that_is_cut_every_time_says_that_its_outcome_is_unknown() -> None:
    with pytest.raises(OutcomeUnknown):
        await Client(Flaky(99, OutcomeUnknown("cut"))).put_app(SPEC)


class Unsure(FakeApi):
    """Acts, and answers some requests as a server whose store broke meanwhile."""

    def __init__(self, times: int, code: str) -> None:
        super().__init__()
        self.times = times
        self.said = ErrorAnswer(ErrorBody(code=code, message="the store broke"))

    async def request(self, method: str, path: str, **options: Any) -> Answer:
        answer = await super().request(method, path, **options)
        self.times -= 1
        return answer if self.times < 0 else Answer(500, {}, codec.encode(self.said))


async def test_a_write_whose_outcome_the_server_does_not_know_is_repeated_and_acts_once() -> None:
    api = Unsure(2, "outcome-unknown")
    await Client(api).create_job(JobSpec(name="sum", image="x"))
    keys = {headers["Idempotency-Key"] for _, _, headers in api.requests}
    assert (len(api.requests), len(keys)) == (3, 1)
    with pytest.raises(OutcomeUnknown):
        await Client(Unsure(3, "outcome-unknown")).create_job(JobSpec(name="sum", image="x"))
    api = Unsure(1, "internal")
    with pytest.raises(AtollError, match="the store broke"):
        await Client(api).create_job(JobSpec(name="sum", image="x"))
    assert len(api.requests) == 1


async def test_nobody_listening_is_told_at_once() -> None:
    api = Flaky(99, Unreachable("refused"))
    with pytest.raises(Unavailable):
        await Client(api).apps("default")
    assert len(api.requests) == 1


async def test_a_conditional_write_fails_when_the_app_has_changed() -> None:
    client = Client(FakeApi())
    view = await client.put_app(SPEC, if_revision=0)
    await client.scale("default", "web", 2)
    with pytest.raises(StaleRevision):
        await client.put_app(SPEC, if_revision=view.revision)


class Paged(FakeApi):
    """Answers with pages of two."""

    async def request(self, method: str, path: str, **options: Any) -> Answer:
        names = [f"p{number}/{number}" for number in range(5)]
        after = path.partition("after=")[2].replace("%2F", "/")
        rest = [name for name in names if name > after]
        items = tuple(Project(name=name, created_at=0) for name in rest[:2])
        following = items[-1].name if len(rest) > 2 else None
        return Answer(200, {}, codec.encode(Page(items=items, revision=1, next=following)))


async def test_a_list_is_read_to_its_last_page() -> None:
    assert [project.name for project in await Client(Paged()).projects()] == ["p0/0", "p1/1", "p2/2", "p3/3", "p4/4"]


@pytest.mark.parametrize("code", sorted(BY_CODE))
def test_every_error_comes_back_as_its_class(code: str) -> None:
    error = answers.from_body(ErrorBody(code=code, message="why", mend="how", field="a.b"))
    assert (type(error), error.message, error.field) == (BY_CODE[code], "why", "a.b")
    assert error.mend == "how" or code == "unauthenticated"


def test_an_error_of_a_newer_server_is_still_an_error() -> None:
    error = answers.from_answer(418, b'{"error":{"code":"teapot","message":"short and stout"}}')
    assert (error.code, error.message) == ("internal", "short and stout")


async def test_an_answer_that_is_not_understood_asks_for_the_same_version() -> None:
    class Newer(FakeApi):
        async def request(self, method: str, path: str, **options: Any) -> Answer:
            return Answer(200, {}, b'{"what": "ever"}')

    with pytest.raises(Exception, match="not what this version understands"):
        await Client(Newer()).info()


async def take(lines: AsyncIterator[WatchLine], count: int) -> list[WatchLine]:
    async with asyncio.timeout(5):
        return [await anext(lines) for _ in range(count)]


async def test_a_watch_goes_on_after_its_connection_was_cut() -> None:
    api = FakeApi()
    lines = Client(api).watch(("projects",))
    assert (await take(lines, 1))[0].key == "default"
    waiting = asyncio.ensure_future(anext(lines))
    await asyncio.sleep(0.01)
    api.cut_watches()
    api.put("projects", "two", Project(name="two", created_at=0))
    assert (await asyncio.wait_for(waiting, 5)).key == "two"
    await lines.aclose()  # type: ignore[attr-defined]


class Forgetful(FakeApi):
    """Has compacted what a resuming watch asks for."""

    @asynccontextmanager
    async def lines(self, path: str, *, silence_s: float = 25.0) -> AsyncIterator[Lines]:
        if "from=" in path:
            raise Compacted("too old")
        async with super().lines(path) as found:
            yield found  # type: ignore[misc]


async def test_a_watch_that_missed_too_much_tells_what_is_gone() -> None:
    api = Forgetful()
    api.put("projects", "old", Project(name="old", created_at=0))
    lines = Client(api).watch(("projects",))
    assert {line.key for line in await take(lines, 2)} == {"default", "old"}
    waiting = asyncio.ensure_future(take(lines, 3))
    await asyncio.sleep(0.01)
    api.cut_watches()
    await asyncio.sleep(0)
    api.remove("projects", "old")
    api.put("projects", "new", Project(name="new", created_at=0))
    told = await waiting
    assert [(line.key, line.record is None) for line in told] == [("default", False), ("new", False), ("old", True)]
    await lines.aclose()  # type: ignore[attr-defined]


async def test_a_watch_from_a_revision_that_is_gone_says_so() -> None:
    with pytest.raises(Compacted):
        await anext(Client(Forgetful()).watch(("projects",), start=7))


async def test_a_watch_gives_up_when_the_api_stays_away() -> None:
    api = FakeApi()
    lines = watching.watch(api, ("projects",), give_up_s=0.3)
    await take(lines, 1)
    waiting = asyncio.ensure_future(anext(lines))
    await asyncio.sleep(0.01)
    api.down = Unavailable("away")
    api.cut_watches()
    with pytest.raises(Unavailable, match="away"):
        await asyncio.wait_for(waiting, 5)


async def test_a_command_takes_input_sizes_and_gives_its_status() -> None:
    api = FakeApi()
    client = Client(api)
    await client.put_app(SPEC)
    id = (await client.instances("default", app="web"))[0].instance.id
    running = await client.exec("default", id, ExecOptions(argv=("cat",)))
    big = b"x" * 300_000
    await running.send(big)
    await running.end_input()
    assert b"".join([data async for _, data in running]) == big
    assert running.code == 0
    sized = await client.exec("default", id, ExecOptions(argv=("size",), tty=True))
    await sized.resize(50, 132)
    await sized.end_input()
    assert b"".join([data async for _, data in sized]) == b"24x80\n50x132\n"


class Script:
    """A channel that says what it was told to."""

    def __init__(self, *messages: bytes | None) -> None:
        self.messages = list(messages)
        self.sent: list[bytes] = []

    async def send(self, message: bytes) -> None:
        self.sent.append(message)

    async def receive(self) -> bytes | None:
        return self.messages.pop(0) if self.messages else None

    async def close(self) -> None: ...


async def test_streams_that_break_or_lie_are_errors() -> None:
    told = pack(Kind.ERROR, codec.encode(ErrorBody(code="not-found", message="gone")))
    cases: list[tuple[tuple[bytes, ...], type[Exception]]] = [
        ((), Unavailable),
        ((told,), NotFound),
        ((pack(Kind.RESIZE),), Invalid),
    ]
    cases += [((b"",), Invalid), ((bytes([99]),), Invalid)]
    for messages, error in [*cases, ((pack(Kind.EXIT, b"x"),), Invalid)]:
        with pytest.raises(error):
            [_ async for _ in streams.Exec(Script(*messages))]
    for messages, error in cases:
        with pytest.raises(error):
            [_ async for _ in streams.log_lines(Script(*messages))]
        with pytest.raises(error):
            [_ async for _ in streams.receive_files(Script(*messages))]
        with pytest.raises(error):
            await streams.send_files(Script(*messages), parts())


async def parts() -> AsyncIterator[bytes]:
    yield b"data"


async def test_logs_are_read_to_their_end() -> None:
    api = FakeApi()
    client = Client(api)
    await client.put_app(SPEC)
    id = (await client.instances("default", app="web"))[0].instance.id
    api.logs[id] = [LogLine(at=float(at), stream="stdout", text=str(at)) for at in range(5)]
    assert [line.text async for line in client.logs("default", id, LogOptions(tail=2))] == ["3", "4"]
    assert [line.text async for line in client.logs("default", id, LogOptions(since=4.0))] == ["4"]


def resolved(environment: Mapping[str, str], tmp_path: Path, **given: Any) -> context.Context:
    return context.resolve(
        **given, environment={"XDG_CONFIG_HOME": str(tmp_path / "config"), **environment}, data=tmp_path / "data"
    )


def test_what_is_given_beats_the_environment_and_that_beats_the_files(tmp_path: Path) -> None:
    assert resolved({}, tmp_path).address == "http://127.0.0.1:7600"
    context.save(tmp_path / "data" / "client.json", context.Saved(address="http://data:1", token="d"))
    assert resolved({}, tmp_path).token == "d"
    context.save(
        context.config_path({"XDG_CONFIG_HOME": str(tmp_path / "config")}), context.Saved(address="http://config:1", token="c")
    )
    assert (resolved({}, tmp_path).address, resolved({}, tmp_path).token) == ("http://config:1", "c")
    found = resolved({"ATOLL_API": "http://env:1", "ATOLL_TOKEN": "e"}, tmp_path)
    assert (found.address, found.token, found.source) == ("http://env:1", "e", "ATOLL_API")
    found = resolved({"ATOLL_API": "http://env:1"}, tmp_path, address="http://given:1", token="g", project="shop")
    assert (found.address, found.token, found.project) == ("http://given:1", "g", "shop")


def test_a_token_from_a_file_is_never_sent_to_another_address(tmp_path: Path) -> None:
    context.save(tmp_path / "data" / "client.json", context.Saved(address="http://127.0.0.1:7600", token="admin"))
    assert resolved({}, tmp_path, address="http://elsewhere:7600").token is None
    assert resolved({}, tmp_path, address="127.0.0.1:7600").token == "admin"


def test_saved_tokens_are_for_their_owner_alone(tmp_path: Path) -> None:
    path = tmp_path / "new" / "config.json"
    context.save(path, context.Saved(address="http://h", token="secret"))
    assert path.stat().st_mode & 0o777 == 0o600
    assert context.load(path) == context.Saved(address="http://h", token="secret")


def test_a_damaged_context_says_which_file(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text("{")
    with pytest.raises(Invalid, match=r"config\.json"):
        context.load(path)


async def test_a_refused_token_says_how_to_give_one() -> None:
    class Closed(FakeApi):
        async def request(self, method: str, path: str, **options: Any) -> Answer:
            return Answer(401, {}, b'{"error":{"code":"unauthenticated","message":"no token"}}')

    with pytest.raises(Unauthenticated) as caught:
        await Client(Closed()).apps("default")
    assert "ATOLL_TOKEN" in (caught.value.mend or "")


async def test_records_with_defaults_survive_the_way_through_json() -> None:
    api = FakeApi()
    await Client(api).create_job(JobSpec(name="sum", image="x", completions=2))
    job = (await Client(api).job("default", "sum")).job
    assert isinstance(job, Job)
    assert job.spec == JobSpec(name="sum", image="x", completions=2)


def test_who_has_no_token_is_told_of_the_data_directory_and_finds_one_there(tmp_path: Path) -> None:
    told = answers.from_answer(401, codec.encode({"error": {"code": "unauthenticated", "message": "no token"}}))
    assert "ATOLL_DATA=D" in (told.mend or "")
    context.save(tmp_path / "client.json", context.Saved(address="http://127.0.0.1:7601", token="t"))
    environment = {"ATOLL_DATA": str(tmp_path), "XDG_CONFIG_HOME": str(tmp_path / "none")}
    found = context.resolve(environment=environment)
    assert (found.address, found.token) == ("http://127.0.0.1:7601", "t")
