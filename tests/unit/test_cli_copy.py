"""Copies out of an instance that cannot be unpacked here: they end, and say why."""

from __future__ import annotations

import asyncio
import io
import tarfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from atoll.cli.copy import _fetch, _pack, _unpack
from atoll.model.errors import AtollError, Invalid, RuntimeFailed


class Endless:
    """A client whose instance sends a file that is refused here, and then more without an end."""

    def __init__(self) -> None:
        self.left = False

    async def get_files(self, project: str, id: str, source: str) -> AsyncIterator[bytes]:
        head = io.BytesIO()
        with tarfile.open(fileobj=head, mode="w") as archive:
            archive.addfile(tarfile.TarInfo("../evil"))
        try:
            yield head.getvalue()[:1_024]
            while True:
                await asyncio.sleep(0)
                yield bytes(65_536)
        finally:
            self.left = True


async def test_what_cannot_be_unpacked_is_read_no_further(tmp_path: Path) -> None:
    client: Any = Endless()
    with pytest.raises(Invalid, match="not unpacked here"):
        async with asyncio.timeout(20):
            await _fetch(client, "default", "web-1", "/x", tmp_path, True, lambda size: None)
    assert client.left


class Broken:
    """A pipe whose other side is gone."""

    def __init__(self, error: OSError) -> None:
        self.error = error
        self.ended: AtollError | None = None

    def read(self, size: int) -> bytes:
        raise self.error

    def write(self, data: bytes) -> int:
        raise self.error

    def end(self, error: AtollError | None = None) -> None:
        self.ended = error

    def close(self) -> None: ...


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (TimeoutError("the other side did not move for 60 s"), "the other side did not move for 60 s"),
        (OSError(28, "No space left on device", "/here/file"), "/here/file: no space left on device"),
    ],
)
def test_an_error_without_a_number_is_told_in_its_words(error: OSError, said: str, tmp_path: Path) -> None:
    pipe: Any = Broken(error)
    with pytest.raises(RuntimeFailed, match=said):
        _unpack(pipe, tmp_path, None)
    _pack(tmp_path, "x", pipe)
    assert said in str(pipe.ended)
