"""Health probes against servers that answer, refuse, hang and lie."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from atoll.model.spec import Health, HealthKind
from atoll.model.units import Seconds
from atoll.node.health import ANSWER_BYTES_MAX, NetworkProber
from atoll.node.usage import LinuxMachine, architecture
from atoll.runtimes.fake import FakeRuntime

Serve = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]
PROBER = NetworkProber()


@asynccontextmanager
async def serving(serve: Serve) -> AsyncIterator[int]:
    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    yield server.sockets[0].getsockname()[1]
    server.close()


async def probe(port: int, kind: HealthKind = HealthKind.HTTP, *, path: str = "/", http2: bool = False) -> str:
    check = Health(kind=kind, path=path, timeout=Seconds(0.2))
    return await PROBER.probe(FakeRuntime(), "web-1", "127.0.0.1", check, port, http2)


def answering(answer: bytes) -> Serve:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(4096)
        writer.write(answer)
        await writer.drain()
        writer.close()

    return serve


@pytest.mark.parametrize(
    ("answer", "failure"),
    [
        (b"HTTP/1.1 200 OK\r\n\r\n", ""),
        (b"HTTP/1.0 302 Found\r\n\r\n", ""),
        (b"HTTP/1.1 204\r\n\r\n", ""),
        (b"HTTP/1.1 503 Busy\r\n\r\n", "GET / answered 503"),
        (b"HTTP/1.1 404 No\r\n\r\n", "GET / answered 404"),
        (b"SSH-2.0-OpenSSH\r\n", "its answer is not HTTP"),
        (b"", "it closed the connection without an answer"),
        (b"x" * (3 * ANSWER_BYTES_MAX), "its answer is not HTTP"),
    ],
)
async def test_http_counts_200_to_399(answer: bytes, failure: str) -> None:
    async with serving(answering(answer)) as port:
        assert await probe(port) == failure


async def test_the_path_is_asked_for_and_cannot_smuggle_headers() -> None:
    asked: list[bytes] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked.append(await reader.readuntil(b"\r\n\r\n"))
        writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
        writer.close()

    async with serving(serve) as port:
        assert await probe(port, path="/health z\r\nX: y") == ""
    assert asked[0].startswith(b"GET /health%20zX:%20y HTTP/1.1\r\nHost: 127.0.0.1:")


async def test_a_server_that_hangs_fails_within_the_timeout() -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        writer.close()

    async with serving(serve) as port:
        assert await probe(port) == "no answer within 0.2s"
        assert await probe(port, http2=True) == "no answer within 0.2s"
        assert await probe(port, HealthKind.TCP) == ""


async def test_a_closed_port_is_refused() -> None:
    async with serving(answering(b"")) as port:
        pass
    assert await probe(port, HealthKind.TCP) == "connection refused"
    assert await PROBER.probe_port("127.0.0.1", port) == "connection refused"


async def test_an_http2_server_is_known_by_its_settings() -> None:
    async with serving(answering(bytes.fromhex("000000040000000000"))) as port:
        assert await probe(port, http2=True) == ""
    async with serving(answering(b"HTTP/1.1 400 Bad Request\r\n\r\n")) as port:
        assert await probe(port, http2=True) == "its answer is not HTTP/2"
    async with serving(answering(b"")) as port:
        assert await probe(port, http2=True) == "it closed the connection without an answer"


async def test_without_an_address_nothing_is_asked() -> None:
    check = Health(kind=HealthKind.HTTP)
    assert await PROBER.probe(FakeRuntime(), "web-1", None, check, 80, False) == "it has no address"


async def test_a_command_that_cannot_run_is_a_failure_not_an_error() -> None:
    check = Health(kind=HealthKind.EXEC, command=("true",))
    assert "no instance web-1" in await PROBER.probe(FakeRuntime(), "web-1", None, check, 0, False)


def test_the_machine_s_capacity_is_less_than_the_machine(tmp_path: Path) -> None:
    machine = LinuxMachine(tmp_path / "not/yet/there")
    capacity = machine.capacity()
    assert 0 < capacity.cpu_milli < 1000 * 4096
    assert capacity.memory_bytes > 0
    assert capacity.disk_bytes > 0
    assert machine.sample()[0] == 0
    assert machine.sample()[1] > 0
    assert 0 < machine.disk_used() <= 1
    assert architecture() != "x86_64"


@pytest.mark.parametrize(
    "files",
    [
        {"memory.max": "1073741824\n", "cpu.max": "50000 100000\n"},
        {"memory/memory.limit_in_bytes": "1073741824\n", "cpu/cpu.cfs_quota_us": "50000\n", "cpu/cpu.cfs_period_us": "100000\n"},
    ],
)
def test_a_limit_on_the_agent_s_own_control_group_counts(tmp_path: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    capacity = LinuxMachine(tmp_path, cgroup=tmp_path).capacity()
    assert capacity.cpu_milli == 400
    assert capacity.memory_bytes == (1024 - 256) << 20


def test_no_limit_leaves_the_whole_machine(tmp_path: Path) -> None:
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "cpu.max").write_text("max 100000\n")
    limited = LinuxMachine(tmp_path, cgroup=tmp_path).capacity()
    assert limited == LinuxMachine(tmp_path, cgroup=tmp_path / "none").capacity()
