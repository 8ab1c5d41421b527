"""The HTTP client for monitors, against whatever a monitor that its guest has taken over may say."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest

from atoll.model.errors import AtollError, DeadlineExceeded, RuntimeFailed, Unavailable
from atoll.runtimes.vm.firecracker_api import DESCRIBE, PAUSE, START, InstanceInfo
from atoll.runtimes.vm.http_api import ANSWER_BYTES_MAX, HttpApi, Refused, fault_words
from atoll.runtimes.vm.hybrid_vsock import connect_to_guest

Handler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]
WITHIN_S = 0.3
HANG_S = 20.0


@contextlib.asynccontextmanager
async def monitor(directory: Path, handler: Handler, within_s: float = HANG_S / 2) -> AsyncIterator[HttpApi]:
    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            await handler(reader, writer)
        writer.close()

    path = directory / "a-directory-with-a-name-as-long-as-those-of-instances-are-in-a-real-agent" / "so-that-no-address-holds-it"
    path.mkdir(parents=True)
    with contextlib.chdir(path):  # only to bind: the client has no such way out
        server = await asyncio.start_unix_server(connected, "api.sock")
    try:
        yield HttpApi(path / "api.sock", name="Firecracker", deadline_s=within_s)
    finally:
        server.close()


def says(data: bytes) -> Handler:
    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(data)
        await writer.drain()

    return handler


def endlessly(first: bytes, then: bytes, pause_s: float = 0.0) -> Handler:
    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(first)
        while True:
            writer.write(then)
            await writer.drain()
            await asyncio.sleep(pause_s)

    return handler


def open_files() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.read()


async def test_an_answer_without_a_body_is_taken(tmp_path: Path) -> None:
    async with monitor(tmp_path, says(b"HTTP/1.1 204 \r\nServer: Firecracker API\r\nConnection: keep-alive\r\n\r\n")) as api:
        assert await api.send(START) == b""


async def test_the_request_is_whole_and_says_no_more_than_it_must(tmp_path: Path) -> None:
    seen: list[bytes] = []

    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        seen.append(await reader.readuntil(b"\r\n\r\n"))
        seen.append(await reader.readexactly(18))
        writer.write(b"HTTP/1.1 204 \r\n\r\n")

    async with monitor(tmp_path, handler) as api:
        await api.send(PAUSE)
    head = seen[0].decode().lower().splitlines()
    assert head[0] == "patch /vm http/1.1"
    assert {line.partition(":")[0] for line in head[1:] if line} == {"host", "accept", "content-type", "content-length"}
    assert seen[1] == b'{"state":"Paused"}'


async def test_a_refusal_has_the_monitor_s_own_words_and_nothing_that_a_terminal_obeys(tmp_path: Path) -> None:
    body = b'{"fault_message": "no\\u001b[31m such\\nthing"}'
    answer = b"HTTP/1.1 400 \r\nContent-Length: %d\r\n\r\n%s" % (len(body), body)
    async with monitor(tmp_path, says(answer)) as api:
        with pytest.raises(Refused, match="refused PUT /actions: no") as raised:
            await api.send(START)
    assert raised.value.http_status == 400
    assert str(raised.value).isprintable()


def test_words_are_found_in_every_form_of_refusal() -> None:
    assert fault_words(b'{"fault_message":"a"}') == "a"
    assert fault_words(b'["Error from API","The VM could not boot","why"]') == "Error from API: The VM could not boot: why"
    assert fault_words(b"plain words") == "plain words"
    assert fault_words(b'{"error":"b"}') == "b"
    assert fault_words(b"\xff\xfe") == "\ufffd\ufffd"
    assert fault_words(b"") == ""
    assert fault_words(b'{"fault_message": 7}') == ""
    assert fault_words(b"[" * 100_000) == "[" * 300
    assert len(fault_words(b"x" * 10_000)) == 300


@pytest.mark.parametrize(
    ("handler", "kind"),
    [
        (silent, DeadlineExceeded),
        (endlessly(b"", b""), DeadlineExceeded),
        (endlessly(b"HTTP/1.1 200 OK\r\n", b"X: y\r\n", 0.01), AtollError),
        (endlessly(b"HTTP/1.1 200 OK\r\nX: ", b"y" * 4096), RuntimeFailed),
        (endlessly(b"", b"HTTP/1.1 100 Continue\r\n\r\n"), AtollError),
        (endlessly(b"HTTP/1.1 200 OK\r\n\r\n", b"y" * 4096), RuntimeFailed),
        (endlessly(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", b"400\r\n" + b"y" * 1024 + b"\r\n"), RuntimeFailed),
        (endlessly(b"HTTP/1.1 200 OK\r\nContent-Length: 99999999999\r\n\r\n", b"y" * 4096), RuntimeFailed),
        (endlessly(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n", b"y", 0.05), DeadlineExceeded),
        (says(b""), RuntimeFailed),
        (says(b"HTTP/1.1 2"), RuntimeFailed),
        (says(b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nabc"), RuntimeFailed),
        (says(b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n"), RuntimeFailed),
        (says(b"HTTP/9.9 200 OK\r\n\r\n"), RuntimeFailed),
        (says(b"SSH-2.0-OpenSSH\r\n"), RuntimeFailed),
        (says(b"HTTP/1.1 302 Found\r\nLocation: http://127.0.0.1/\r\nContent-Length: 0\r\n\r\n"), Refused),
        (says(b"HTTP/1.1 500 \r\nContent-Length: 0\r\n\r\n"), Refused),
        (says(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n" + b"[" * 100_000), RuntimeFailed),
        (says(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}"), RuntimeFailed),
        (says(b'HTTP/1.1 200 OK\r\nContent-Length: 13\r\n\r\n{"state":"x"}'), RuntimeFailed),
        (says(b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: 3\r\n\r\nabc"), RuntimeFailed),
    ],
)
async def test_whatever_a_monitor_says_ends_as_one_clear_error(tmp_path: Path, handler: Handler, kind: type[AtollError]) -> None:
    runs_out = issubclass(DeadlineExceeded, kind)  # else a busy machine is given the time for the answer it expects
    async with monitor(tmp_path, handler, WITHIN_S if runs_out else HANG_S / 2) as api:
        before = open_files()
        with pytest.raises(kind, match="Firecracker") as raised:
            await asyncio.wait_for(api.ask(DESCRIBE, InstanceInfo), HANG_S)
        assert str(raised.value).isprintable()
        assert len(str(raised.value)) < 600
        await asyncio.sleep(0)
        assert open_files() <= before + 2  # the server's own side of the connection


async def test_random_bytes_are_no_answer(tmp_path: Path) -> None:
    random_bytes = random.Random(7)
    beginnings = (b"", b"HTTP/1.1 ", b"HTTP/1.1 200 OK\r\n", b"HTTP/1.1 200 OK\r\nContent-Length: 40\r\n\r\n")

    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(random_bytes.choice(beginnings) + random_bytes.randbytes(random_bytes.randrange(200)))

    async with monitor(tmp_path, handler) as api:
        for _ in range(300):
            with pytest.raises(AtollError, match="Firecracker"):
                await asyncio.wait_for(api.ask(DESCRIBE, InstanceInfo), HANG_S)


async def test_nobody_there_a_file_and_a_link_are_all_nobody(tmp_path: Path) -> None:
    for make in (lambda path: None, lambda path: path.write_text(""), lambda path: path.symlink_to("/run/other.sock")):
        make(tmp_path / "api.sock")
        with pytest.raises(Unavailable, match="does not listen"):
            await HttpApi(tmp_path / "api.sock", name="Firecracker").send(START)
        (tmp_path / "api.sock").unlink(missing_ok=True)


async def test_a_large_answer_is_taken_up_to_its_bound(tmp_path: Path) -> None:
    for size, fits in ((ANSWER_BYTES_MAX, True), (ANSWER_BYTES_MAX + 1, False)):
        (tmp_path / str(size)).mkdir()
        answer = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % size + b"y" * size
        async with monitor(tmp_path / str(size), says(answer)) as api:
            if fits:
                assert len(await api.send(START, deadline_s=HANG_S)) == size
                continue
            with pytest.raises(RuntimeFailed, match="more than"):
                await api.send(START, deadline_s=HANG_S)


@pytest.mark.parametrize("answer", [b"", b"NO\n", b"OK" + b"1" * 200, b"\n", b"OK 1"])
async def test_a_vsock_that_answers_nonsense_is_nobody(tmp_path: Path, answer: bytes) -> None:
    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        assert await reader.readline() == b"CONNECT 1024\n"
        writer.write(answer)

    async with monitor(tmp_path, handler) as api:
        with pytest.raises(OSError, match=r"port 1024|vsock"):
            await asyncio.wait_for(connect_to_guest(api.socket, 1024), HANG_S)
