"""The ACME client against authorities that fail: what is said of it, and when it may be tried again."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from email.utils import formatdate

import pytest

from atoll.model.records.certificate import AcmeKeys, AcmeSettings
from made_certificates import new_key, pem

acme = pytest.importorskip("atoll.control.acme", reason="the library `acme` is not installed")
from atoll.control.orders import AcmeFailed  # noqa: E402

LIMITED = {"type": "urn:ietf:params:acme:error:rateLimited", "detail": "too many orders", "status": 429}


def answer(status: int, body: str, *headers: str, kind: str = "application/problem+json") -> bytes:
    lines = (
        f"HTTP/1.1 {status} X",
        f"Content-Type: {kind}",
        f"Content-Length: {len(body)}",
        "Connection: close",
        *headers,
        "",
        body,
    )
    return "\r\n".join(lines).encode()


async def failure(make: Callable[[], bytes] | None) -> AcmeFailed:
    """Return what an order fails with at an authority that answers everything so; None: there is no authority."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        if make is not None:
            writer.write(make())
            await writer.drain()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    if make is None:
        server.close()
    settings = AcmeSettings(directory=f"http://127.0.0.1:{port}/dir", sealed=b"", updated_at=0.0)
    account = acme.AcmeAccount(settings, AcmeKeys(account=pem(new_key())))
    try:
        with pytest.raises(AcmeFailed) as caught:
            await account.begin("www.test")
    finally:
        server.close()
    return caught.value


async def test_a_limit_is_told_in_the_authoritys_words_with_the_time_of_the_next_try() -> None:
    error = await failure(lambda: answer(429, json.dumps(LIMITED), "Retry-After: 120"))
    assert (error.kind, error.retry_after_s) == ("rateLimited", 120.0)
    assert "too many orders" in error.message


async def test_the_time_of_the_next_try_may_be_a_date() -> None:
    error = await failure(lambda: answer(503, json.dumps(LIMITED), f"Retry-After: {formatdate(time.time() + 3_600, usegmt=True)}"))
    assert 3_000 < error.retry_after_s <= 3_600


@pytest.mark.parametrize("text", ["soon", "-5", "999999999999999", ""])
async def test_a_time_that_is_none_or_far_too_late_is_not_kept_to(text: str) -> None:
    error = await failure(lambda: answer(503, json.dumps(LIMITED), f"Retry-After: {text}"))
    assert 0 <= error.retry_after_s <= acme.RETRY_AFTER_MAX_S


async def test_an_authority_that_is_not_there_is_told_from_one_that_refuses() -> None:
    error = await failure(None)
    assert error.kind == "", "an order at it goes on"
    assert "cannot be reached" in error.message


@pytest.mark.parametrize("body", ["<html>", "[]", "{}", '{"newNonce": 5}'])
async def test_what_is_no_directory_is_said_and_ends_nothing(body: str) -> None:
    error = await failure(lambda: answer(200, body, kind="application/json"))
    assert error.kind == ""
    assert error.message
