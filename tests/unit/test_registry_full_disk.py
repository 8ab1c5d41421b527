"""The cell's registry on a full disk: who pushes is told the cause, and what had arrived makes room again."""

from __future__ import annotations

import errno
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest

from atoll.api.registry.blobs import Blobs, Upload
from atoll.api.registry.names import RegistryError
from atoll.images.answers import raise_for_status
from atoll.model.errors import Exhausted


class FullDisk(Upload):
    """Takes one write, then the disk is full."""

    def append(self, data: bytes) -> None:
        if self.size_bytes:
            raise OSError(errno.ENOSPC, "No space left on device")
        super().append(data)


async def chunks() -> AsyncIterator[bytes]:
    for _ in range(3):
        yield bytes(1 << 20)


async def test_an_upload_that_fills_the_disk_leaves_nothing(tmp_path: Path) -> None:
    blobs = Blobs(tmp_path)
    begun = await blobs.begin("default/app")
    upload = FullDisk(begun.id, begun.repository, begun.path)
    with pytest.raises(RegistryError, match="disk is full") as refused:
        await blobs.receive(upload, chunks())
    assert refused.value.status == 507
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
    with pytest.raises(RegistryError, match="no upload"):
        await blobs.find(begun.id, begun.repository)


def test_a_push_to_a_full_disk_names_the_cause() -> None:
    with pytest.raises(Exhausted, match=r"the disk of registry .* is full") as failed:
        raise_for_status(httpx.Response(507), "cell.internal", "PUT")
    assert failed.value.mend
