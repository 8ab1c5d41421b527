"""Health probes: one try each, bounded by the check's timeout; the answer is why it failed, or nothing."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable

from atoll.model.errors import AtollError
from atoll.model.ports.runtime import Runtime
from atoll.model.spec import Health, HealthKind
from atoll.model.units import format_seconds

GATE_S = 1.0
"""Deadline of one connection to a port that has no health check."""
ANSWER_BYTES_MAX = 4_096
"""What is read of an HTTP answer: its status line must be within."""
OUTPUT_BYTES_MAX = 512
"""What is kept of a failing command's output, for the message."""
_H2_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes.fromhex("000000040000000000")
_H2_SETTINGS = 4


class NetworkProber:
    """Implements `tools.Prober` from the node's own network namespace."""

    async def probe_port(self, address: str, port: int) -> str:
        return await _bounded(GATE_S, lambda: _tcp(address, port))

    async def probe(self, runtime: Runtime, id: str, address: str | None, health: Health, port: int, http2: bool) -> str:
        match health.kind:
            case HealthKind.EXEC:
                return await _bounded(health.timeout, lambda: _exec(runtime, id, health.command))
            case _ if address is None:
                return "it has no address"
            case HealthKind.TCP:
                return await _bounded(health.timeout, lambda: _tcp(address, port))
            case HealthKind.HTTP if http2:
                return await _bounded(health.timeout, lambda: _http2(address, port))
            case HealthKind.HTTP:
                return await _bounded(health.timeout, lambda: _http(address, port, health.path))


async def _bounded(timeout_s: float, probe: Callable[[], Awaitable[str]]) -> str:
    try:
        async with asyncio.timeout(timeout_s):
            return await probe()
    except TimeoutError:
        return f"no answer within {format_seconds(timeout_s)}"
    except OSError as error:
        return os.strerror(error.errno).lower() if error.errno else str(error)
    except AtollError as error:
        return str(error)


async def _tcp(address: str, port: int) -> str:
    _, writer = await asyncio.open_connection(address, port)
    writer.transport.abort()
    return ""


async def _http(address: str, port: int, path: str) -> str:
    reader, writer = await asyncio.open_connection(address, port, limit=ANSWER_BYTES_MAX)
    try:
        target = path.encode("ascii", "replace").replace(b" ", b"%20").replace(b"\r", b"").replace(b"\n", b"")
        writer.write(b"GET %b HTTP/1.1\r\nHost: %b:%d\r\nUser-Agent: atoll-health\r\n" % (target, address.encode(), port))
        writer.write(b"Accept: */*\r\nConnection: close\r\n\r\n")
        try:
            line = await reader.readline()
        except ValueError:
            return "its answer is not HTTP"
    finally:
        writer.transport.abort()
    version, _, rest = line.partition(b" ")
    status = rest[:3]
    if not version.startswith(b"HTTP/1.") or not status.isdigit():
        return "its answer is not HTTP" if line else "it closed the connection without an answer"
    return "" if 200 <= int(status) < 400 else f"GET {path} answered {int(status)}"


async def _http2(address: str, port: int) -> str:
    """An HTTP/2 server answers the connection preface with SETTINGS (RFC 9113, 3.4); the path is not asked for."""
    reader, writer = await asyncio.open_connection(address, port, limit=ANSWER_BYTES_MAX)
    try:
        writer.write(_H2_PREFACE)
        header = await reader.readexactly(9)
    except asyncio.IncompleteReadError:
        return "it closed the connection without an answer"
    finally:
        writer.transport.abort()
    return "" if header[3] == _H2_SETTINGS else "its answer is not HTTP/2"


async def _exec(runtime: Runtime, id: str, command: tuple[str, ...]) -> str:
    execution = await runtime.exec(id, command)
    try:
        await execution.close_stdin()
        output = b""
        while (chunk := await execution.read()) is not None:
            output = (output + chunk[1])[-OUTPUT_BYTES_MAX:]
        code = await execution.wait()
    finally:
        await execution.close()
    if code == 0:
        return ""
    words = output.decode("utf-8", "replace").strip()
    return f"{command[0]} exited with status {code}" + (f": {words}" if words else "")
