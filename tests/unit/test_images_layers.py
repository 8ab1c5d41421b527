"""How many layers are fetched and unpacked at once, of all images together."""

from __future__ import annotations

import asyncio
import hashlib
import threading
from collections.abc import Callable
from pathlib import Path

from atoll.images.disk import Disk
from atoll.images.layers import DOWNLOADS_MAX, UNPACKS_MAX, Layers
from atoll.images.manifest import OCI_CONFIG, ConfigFile, Descriptor, Manifest, RootFs
from atoll.images.progress import Meter
from atoll.images.source import Resolved
from atoll.images.unpack import Unpacked

LAYERS = 6
"""Of each of the two images."""
DEADLINE_S = 60.0


def digest(text: str) -> str:
    return f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"


def image(name: str) -> tuple[Resolved, ConfigFile]:
    layers = tuple(Descriptor("application/vnd.oci.image.layer.v1.tar", digest(f"{name} blob {n}"), 1) for n in range(LAYERS))
    manifest = Manifest(config=Descriptor(OCI_CONFIG, digest(name), 1), layers=layers)
    config = ConfigFile(rootfs=RootFs(diff_ids=tuple(digest(f"{name} {n}") for n in range(LAYERS))))
    return Resolved(digest(f"{name} manifest"), b"", manifest), config


class HeldSource:
    """Blobs that come only once they are let through."""

    def __init__(self) -> None:
        self.now = self.most = 0
        self.full = asyncio.Event()
        self.through = asyncio.Semaphore(0)

    async def resolve(self) -> Resolved:
        raise AssertionError("the manifest is known")

    async def fetch(self, descriptor: Descriptor, target: Path, on_bytes: Callable[[int], None]) -> None:
        self.now += 1
        self.most = max(self.most, self.now)
        if self.now == DOWNLOADS_MAX:
            self.full.set()
        await self.through.acquire()
        target.write_bytes(b"x")
        self.now -= 1


class MetUnpacking:
    """Each layer is unpacked when another is, too."""

    def __init__(self) -> None:
        self.now = self.most = 0
        self._lock = threading.Lock()
        self._met = threading.Barrier(UNPACKS_MAX, timeout=DEADLINE_S)

    def __call__(self, blob: Path, made: Path, *, diff_id: str, **_: object) -> Unpacked:
        with self._lock:
            self.now += 1
            self.most = max(self.most, self.now)
        self._met.wait()
        made.mkdir()
        with self._lock:
            self.now -= 1
        return Unpacked(diff_id, 1, ())


async def test_four_layers_are_fetched_at_once_and_two_unpacked_of_all_images_together(tmp_path: Path) -> None:
    source, unpacking = HeldSource(), MetUnpacking()
    layers = Layers(Disk(tmp_path), unpacked_bytes_max=1 << 20, unpacker=unpacking)
    assert (DOWNLOADS_MAX, UNPACKS_MAX) == (4, 2)
    assert LAYERS % UNPACKS_MAX == 0, "or the last would wait for another"
    async with asyncio.timeout(DEADLINE_S), asyncio.TaskGroup() as group:
        made = [group.create_task(layers.make(source, *image(name), Meter())) for name in ("one", "two")]
        await source.full.wait()
        for _ in range(100):
            await asyncio.sleep(0)  # time for a fifth to begin, were it let
        assert source.now == DOWNLOADS_MAX
        for _ in range(2 * LAYERS):
            source.through.release()
    assert (source.most, unpacking.most) == (DOWNLOADS_MAX, UNPACKS_MAX)
    assert [len(task.result()) for task in made] == [LAYERS, LAYERS]
