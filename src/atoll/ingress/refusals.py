"""The activator's own answers, for when an app does not wake: HTTP/1.1, and as much of HTTP/2 (RFC 9113) as one answer needs."""

from __future__ import annotations

import asyncio
import struct
from collections.abc import Iterator

import msgspec

LINGER_S = 1.0
"""How long what still comes in is read and thrown away: closing with unread bytes would take the answer away with them."""
LINGER_BYTES_MAX = 64 << 20
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_DATA, _HEADERS, _SETTINGS = 0, 1, 4
_END_STREAM, _END_HEADERS, _ACK = 1, 4, 1
_FRAME_MAX = 1 << 24
_STATUS_INDEX = 8
"""`:status` in HPACK's static table (RFC 7541, appendix A); written with this name and a literal value."""


async def refuse(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, status: int, code: str, message: str, *, http2: bool
) -> None:
    """Answer what waits on the connection with `status`, and read on until the other side is done with it."""
    body = msgspec.json.encode({"error": {"code": code, "message": message, "mend": "see `atoll status` and `atoll logs` of it"}})
    try:
        async with asyncio.timeout(LINGER_S):
            if http2:
                await _refuse_http2(reader, writer, status, body)
            else:
                head = f"HTTP/1.1 {status} {'Gateway Timeout' if status == 504 else 'Service Unavailable'}\r\n"
                head += f"content-type: application/json\r\ncontent-length: {len(body)}\r\nconnection: close\r\n\r\n"
                writer.write(head.encode() + body)
                await writer.drain()
                writer.write_eof()
                await _throw_away(reader)
    except (TimeoutError, ConnectionError, asyncio.IncompleteReadError):
        return


async def _throw_away(reader: asyncio.StreamReader) -> None:
    left = LINGER_BYTES_MAX
    while left > 0 and (data := await reader.read(1 << 16)):
        left -= len(data)


async def _refuse_http2(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, status: int, body: bytes) -> None:
    if await reader.readexactly(len(PREFACE)) != PREFACE:
        return
    writer.write(_frame(_SETTINGS, 0, 0, b""))
    left = LINGER_BYTES_MAX
    while left > 0:
        head = await reader.readexactly(9)
        length = int.from_bytes(head[:3], "big")
        kind, flags, stream = head[3], head[4], struct.unpack(">I", head[5:])[0] & 0x7FFFFFFF
        left -= length + 9
        await reader.readexactly(length)
        if kind == _SETTINGS and not flags & _ACK:
            writer.write(_frame(_SETTINGS, _ACK, 0, b""))
        elif kind == _HEADERS:
            for frame in _answer(stream, status, body):
                writer.write(frame)
        await writer.drain()


def _answer(stream: int, status: int, body: bytes) -> Iterator[bytes]:
    value = str(status).encode()
    kind = b"application/json"
    # Literals without indexing: `:status` and `content-type` (31) by their place in the static table.
    headers = bytes((_STATUS_INDEX, len(value))) + value + bytes((0x0F, 31 - 15, len(kind))) + kind
    yield _frame(_HEADERS, _END_HEADERS, stream, headers)
    yield _frame(_DATA, _END_STREAM, stream, body)


def _frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    return struct.pack(">I", len(payload))[1:] + bytes((kind, flags)) + struct.pack(">I", stream) + payload
