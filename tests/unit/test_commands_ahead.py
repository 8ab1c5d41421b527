"""Streams that a client opens before it wants a command: when it keeps one, what is asked on it, what happens when it breaks."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from atoll.model import codec
from atoll.model.errors import AtollError, Invalid, NotFound, OutcomeUnknown, Unavailable
from atoll.model.ports.control_plane import TAKEN, Channel
from atoll.model.spec import AppSpec
from atoll.model.streams import ExecOptions, Kind, NextCommand, pack
from atoll.sdk import ahead
from atoll.sdk.ahead import Ahead
from atoll.sdk.client import Client
from atoll.sdk.fake import FakeApi
from atoll.sdk.transport import Address

ECHO = NextCommand(instance="web-1", options=ExecOptions(argv=("echo", "hi")))


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ahead, "FOLLOW_S", 0.0)


async def output(client: Client, id: str, *argv: str) -> bytes:
    running = await client.exec("default", id, ExecOptions(argv=argv))
    return b"".join([data async for _, data in running])


async def settle(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not holds():  # noqa: ASYNC110 - what is waited for tells nobody
            await asyncio.sleep(0.001)


async def test_from_its_second_command_on_a_client_has_a_stream_open_ahead() -> None:
    api = FakeApi()
    client = Client(api)
    await client.put_app(AppSpec(name="web", image="registry.example/web:1"))
    (view,) = await client.instances("default", app="web")
    id = view.instance.id
    kinds = []
    for _ in range(4):
        assert await output(client, id, "echo", "hi") == b"hi\n"
        await asyncio.sleep(0.01)
        kinds.append([path.split("?")[0].rpartition("/")[2] for path in api.channels])
    assert kinds == [["exec"], ["exec", "exec", "next"], ["exec", "exec", "next", "next"], ["exec", "exec", *["next"] * 3]]
    with pytest.raises(NotFound):
        await client.exec("default", "nobody", ExecOptions(argv=("echo",)))
    await client.close()
    await asyncio.sleep(0)
    assert not [task for task in asyncio.all_tasks() if "FakeChannel" in repr(task)], "nothing stays open"


class Script:
    """A server whose streams say what they were told to, and take nothing once they are `cut`."""

    def __init__(self, *answers: bytes | AtollError | None, refuse: AtollError | None = None, cut: bool = False) -> None:
        self.address = Address.parse("http://one")
        self.answers = list(answers)
        self.refuse = refuse
        self.cut = cut
        self.opened: list[str] = []
        self.sent: list[bytes] = []
        self.closed = 0

    async def channel(self, path: str, **options: object) -> Channel:
        self.opened.append(path)
        if self.refuse is not None:
            raise self.refuse
        return self

    async def send(self, message: bytes) -> None:
        if self.cut:
            raise Unavailable("the stream broke")
        self.sent.append(message)

    async def receive(self) -> bytes | None:
        if not self.answers:
            await asyncio.Event().wait()
        answer = self.answers.pop(0)
        if isinstance(answer, AtollError):
            raise answer
        return answer

    async def close(self) -> None:
        self.closed += 1


async def waiting(script: Script, project: str = "default") -> Ahead:
    kept = Ahead(script)  # type: ignore[arg-type]
    assert await kept.command(project, ECHO) is None
    assert await kept.command(project, ECHO) is None
    await settle(lambda: bool(script.opened))
    await asyncio.sleep(0)
    return kept


async def test_what_waits_is_asked_once_and_followed_by_another() -> None:
    script = Script(TAKEN)
    kept = await waiting(script)
    assert await kept.command("default", ECHO) is script
    assert [codec.decode(message, NextCommand) for message in script.sent] == [ECHO]
    await settle(lambda: len(script.opened) == 2)
    await kept.close()
    assert script.opened == ["/v1/projects/default/commands/next"] * 2
    assert script.closed == 1, "the one that waits; the other is its command's"


async def test_one_that_waits_is_for_its_project() -> None:
    script = Script(TAKEN)
    kept = await waiting(script)
    assert await kept.command("shop", ECHO) is None
    await settle(lambda: script.opened[-1] == "/v1/projects/shop/commands/next")
    assert (script.closed, script.sent) == (1, [])
    await kept.close()


async def test_one_that_broke_while_it_waited_costs_nothing() -> None:
    script = Script(cut=True)
    kept = await waiting(script)
    assert await kept.command("default", ECHO) is None, "nothing was asked for: another way may do"
    await kept.close()


@pytest.mark.parametrize(
    ("answer", "error", "words"),
    [
        (pack(Kind.ERROR, b'{"code":"not-found","message":"no instance web-1"}'), NotFound, "no instance web-1"),
        (pack(Kind.ERROR, b'{"code":"invalid","message":"argv: empty"}'), Invalid, "argv"),
        (pack(Kind.ERROR, b'{"code":"unavailable","message":"no tunnel"}'), Unavailable, "no tunnel"),
        (None, OutcomeUnknown, "may run"),
        (Unavailable("the stream broke"), OutcomeUnknown, "broke; the command may run"),
        (pack(Kind.STDOUT, b"x"), OutcomeUnknown, "STDOUT"),
    ],
)
async def test_what_goes_wrong_after_it_was_asked_is_told(answer: bytes | None, error: type[Exception], words: str) -> None:
    script = Script(answer)
    kept = await waiting(script)
    with pytest.raises(error, match=words):
        await kept.command("default", ECHO)
    assert script.closed == 1
    await kept.close()


async def test_a_server_that_does_not_answer_is_not_waited_for_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ahead, "ANSWER_S", 0.02)
    script = Script()
    kept = await waiting(script)
    with pytest.raises(OutcomeUnknown, match="may run"):
        await kept.command("default", ECHO)
    assert script.closed == 1
    await kept.close()


async def test_a_server_that_would_have_no_such_streams_is_left_alone_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ahead, "REFUSED_S", 0.05)
    script = Script(refuse=NotFound("no such path"))
    kept = await waiting(script)
    for _ in range(3):
        assert await kept.command("default", ECHO) is None
        await asyncio.sleep(0.002)
    assert len(script.opened) == 1
    await asyncio.sleep(0.05)
    await kept.command("default", ECHO)
    await settle(lambda: len(script.opened) == 2)
    await kept.close()


async def test_one_at_a_server_that_was_left_is_not_used() -> None:
    script = Script(TAKEN)
    kept = await waiting(script)
    script.address = Address.parse("http://other")
    assert await kept.command("default", ECHO) is None
    await settle(lambda: (len(script.opened), script.closed) == (2, 1))
    assert not script.sent
    await kept.close()


async def test_one_is_not_lost_to_a_command_that_cannot_be_said() -> None:
    script = Script(TAKEN)
    kept = await waiting(script)
    with pytest.raises(UnicodeEncodeError):
        await kept.command("default", NextCommand(instance="web-1", options=ExecOptions(argv=("\ud800",))))
    assert await kept.command("default", ECHO) is script
    await kept.close()


async def test_a_server_that_is_away_is_asked_again() -> None:
    script = Script(refuse=Unavailable("away"))
    kept = await waiting(script)
    assert await kept.command("default", ECHO) is None
    await settle(lambda: len(script.opened) == 2)
    await kept.close()


async def test_one_that_nobody_wants_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ahead, "KEPT_S", 0.02)
    script = Script()
    kept = await waiting(script)
    await settle(lambda: script.closed == 1)
    await kept.close()
    assert script.closed == 1
