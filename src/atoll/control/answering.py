"""Whether the ingresses answer a challenge: asked before the authority looks, since one look that finds nothing ends the order."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

import structlog

from atoll.model.certificates import CHALLENGE_PATH
from atoll.model.records import Ingress
from atoll.store.cache import State

ANSWER_S = 10.0
"""The longest wait for all of them; the authority may reach one that this server cannot, so the order goes on all the same."""
TRY_S = 2.0
PAUSE_S = 0.1
ANSWER_BYTES_MAX = 8_192

log = structlog.get_logger()


class Answering:
    """Asks every ingress that is registered, as the authority would; one without an address at this machine's loopback."""

    def __init__(self, state: State, wait_s: float = ANSWER_S) -> None:
        self._state = state
        self._wait_s = wait_s

    async def __call__(self, host: str, answers: Mapping[str, str]) -> None:
        """Return once every ingress gives all of `answers` (token → text) for `host`, or after the wait; it raises nothing."""
        known = {name: held.record for name, held in self._state.records(Ingress).items()}
        asking = {name: asyncio.create_task(self._until(each, host, answers)) for name, each in known.items()}
        if not asking:
            return
        try:
            await asyncio.wait(asking.values(), timeout=self._wait_s)
        finally:
            for task in asking.values():
                task.cancel()
            await asyncio.gather(*asking.values(), return_exceptions=True)
        silent = sorted(name for name, task in asking.items() if task.cancelled())
        if silent:
            log.warning("ingresses do not answer a challenge, as far as this server can see", host=host, ingresses=silent[:10])

    async def _until(self, ingress: Ingress, host: str, answers: Mapping[str, str]) -> None:
        for token, text in answers.items():
            address = ingress.address or "127.0.0.1"
            while not await _gives(address, ingress.http_port, host, token, text):  # noqa: ASYNC110 - it is another process
                await asyncio.sleep(PAUSE_S)


async def _gives(address: str, port: int, host: str, token: str, text: str) -> bool:
    try:
        async with asyncio.timeout(TRY_S):
            reader, writer = await asyncio.open_connection(address, port)
            try:
                writer.write(f"GET {CHALLENGE_PATH}{token} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode())
                head, _, body = (await reader.read(ANSWER_BYTES_MAX)).partition(b"\r\n\r\n")
            finally:
                writer.close()
    except (OSError, TimeoutError):
        return False
    return head.startswith(b"HTTP/1.1 200 ") and body.strip() == text.encode()
