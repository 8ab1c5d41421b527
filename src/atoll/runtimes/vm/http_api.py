"""HTTP/1.1 to a virtual machine monitor over its unix socket: one request a connection, a deadline, and a bound on the answer.

A monitor may have been taken over by its guest: nothing that it says is trusted to be short, to be HTTP, or to end.
"""

from __future__ import annotations

import asyncio
import json
import os
import ssl
import stat
from pathlib import Path
from typing import Any, TypeVar

import httpx
import msgspec
from msgspec import Struct

from atoll.model.errors import DeadlineExceeded, RuntimeFailed, Unavailable

ANSWER_S_MAX = 10.0
ANSWER_BYTES_MAX = 1 << 20
_WORDS_MAX = 300
_HEADERS = {"Host": "localhost", "Accept": "application/json"}
T = TypeVar("T")
_UNUSED = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
"""httpx would read all certificates of the machine for each call, though nothing on a unix socket speaks TLS."""


class Call(Struct, frozen=True, kw_only=True):
    """One request. `body` is left out where it is None."""

    method: str
    path: str
    body: Any = None


class Refused(RuntimeFailed):
    """The monitor understood the request and did not do it; `status` is HTTP's, and the message holds the monitor's own words."""

    def __init__(self, message: str, *, http_status: int, mend: str | None = None) -> None:
        super().__init__(message, mend=mend)
        self.http_status = http_status


class HttpApi:
    """The API of the monitor that listens at `socket`; `name` is the monitor's in messages. Holds nothing open between calls."""

    def __init__(self, socket: Path, *, name: str, base: str = "", deadline_s: float = ANSWER_S_MAX) -> None:
        self.socket = socket
        self.name = name
        self.base = base
        self.deadline_s = deadline_s

    async def send(self, call: Call, *, deadline_s: float | None = None) -> bytes:
        """Return the body of the answer, empty for none.

        Raises Unavailable (nobody listens, or it went away; what was asked for may have been done), DeadlineExceeded, Refused, and
        RuntimeFailed for what is no answer at all.
        """
        within_s = deadline_s or self.deadline_s
        try:
            async with asyncio.timeout(within_s):
                status, body = await self._exchange(call)
        except TimeoutError:
            raise DeadlineExceeded(f"{self.name} did not answer {call.method} {call.path} within {within_s:g} s") from None
        if status in {200, 204}:
            return body
        words = fault_words(body) or f"HTTP status {status} without a word"
        raise Refused(f"{self.name} refused {call.method} {call.path}: {words}", http_status=status)

    async def ask(self, call: Call, kind: type[T], *, deadline_s: float | None = None) -> T:
        """Return the answer as `kind`. Raises as `send`, and RuntimeFailed for an answer of another form."""
        body = await self.send(call, deadline_s=deadline_s)
        try:
            return msgspec.json.decode(body, type=kind)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise RuntimeFailed(f"{self.name} answered {call.method} {call.path} with what cannot be read: {error}") from None

    async def _exchange(self, call: Call) -> tuple[int, bytes]:
        content = b"" if call.body is None else msgspec.json.encode(call.body)
        headers = _HEADERS | ({} if call.body is None else {"Content-Type": "application/json"})
        request = httpx.Request(call.method, f"http://localhost{self.base}{call.path}", headers=headers, content=content)
        fd = self._open()
        try:
            async with httpx.AsyncHTTPTransport(uds=f"/proc/self/fd/{fd}", retries=0, verify=_UNUSED) as transport:
                response = await transport.handle_async_request(request)
                try:
                    return response.status_code, await self._body(response, call)
                finally:
                    await response.aclose()
        except httpx.ConnectError as error:
            raise self._nobody(error) from None
        except (httpx.RemoteProtocolError, httpx.LocalProtocolError, httpx.DecodingError, ValueError) as error:
            raise RuntimeFailed(f"{self.name} answered {call.method} {call.path} with no HTTP: {printable(str(error))}") from None
        except httpx.TransportError as error:
            raise Unavailable(f"{self.name} went away during {call.method} {call.path}: {printable(str(error))}") from None
        finally:
            os.close(fd)

    def _open(self) -> int:
        """A descriptor's path is short, and it leads to no other socket than this one: a link in its place is not followed."""
        try:
            fd = os.open(self.socket, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError as error:
            raise self._nobody(error) from None
        if not stat.S_ISSOCK(os.fstat(fd).st_mode):
            os.close(fd)
            raise self._nobody(f"{self.socket} is no socket")
        return fd

    async def _body(self, response: httpx.Response, call: Call) -> bytes:
        body = bytearray()
        async for part in response.aiter_raw():
            body += part
            if len(body) > ANSWER_BYTES_MAX:
                raise RuntimeFailed(f"{self.name} answered {call.method} {call.path} with more than {ANSWER_BYTES_MAX} bytes")
        return bytes(body)

    def _nobody(self, why: object) -> Unavailable:
        return Unavailable(f"{self.name} does not listen: {printable(str(why))}")


def fault_words(body: bytes) -> str:
    """Return what a monitor says in the body of a refusal: Firecracker's `fault_message`, Cloud Hypervisor's list, or text."""
    try:
        said = json.loads(body)
    except (ValueError, RecursionError):
        said = body.decode(errors="replace")
    if isinstance(said, dict):
        said = said.get("fault_message") or said.get("error") or ""
    if isinstance(said, list):
        said = ": ".join(part for part in said if isinstance(part, str))
    return printable(said) if isinstance(said, str) else ""


def printable(words: str) -> str:
    """Return the beginning of `words`, on one line and without what a terminal would obey."""
    return "".join(letter if letter.isprintable() else " " for letter in words[:_WORDS_MAX]).strip()
