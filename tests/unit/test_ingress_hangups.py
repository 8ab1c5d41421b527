"""Who has hung up, and who only has said all: on a unix socket that nobody reads from."""

from __future__ import annotations

import asyncio
import tempfile
from pathlib import Path

import pytest

from atoll.ingress.hangups import Hangups

LIMIT_S = 30.0


async def test_a_closed_connection_ends_its_own_wait_and_neither_a_half_closed_ones_nor_a_quiet_ones() -> None:
    hangups = Hangups()
    hangups.start()
    waits: list[asyncio.Task[None]] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        async def wait() -> None:
            async with hangups.ending(writer):
                await asyncio.get_running_loop().create_future()

        waits.append(asyncio.ensure_future(wait()))

    with tempfile.TemporaryDirectory(dir="/tmp") as directory:
        path = Path(directory) / "s"
        server = await asyncio.start_unix_server(serve, path)
        writers: list[asyncio.StreamWriter] = []
        async with asyncio.timeout(LIMIT_S):
            for number in range(4):
                writers.append((await asyncio.open_unix_connection(path))[1])
                while len(waits) <= number:  # noqa: ASYNC110 - what is waited for tells nobody
                    await asyncio.sleep(0.001)
            halved, _, full, closed = writers
            halved.write_eof()
            full.write(b"x" * (4 << 20))
            full.transport.abort()
            with pytest.raises(ConnectionError):
                await waits[2]
            closed.close()
            with pytest.raises(ConnectionError):
                await waits[3]
            assert not waits[0].done()
            assert not waits[1].done()
            for wait in waits[:2]:
                wait.cancel()
            await asyncio.wait(waits)
        assert all(wait.cancelled() for wait in waits[:2]), "what is cancelled from without is just that"
        hangups.stop()
        for writer in writers:
            writer.close()
        server.close()
