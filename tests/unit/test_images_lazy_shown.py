"""Images that are shown before they are here, as the agent keeps them: one tree for an image, whatever names it has."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncGenerator
from pathlib import Path

import pytest

from atoll.images.layer import LayerBlob, LayerWriter
from atoll.images.lazy.mount import LazyMount
from atoll.images.lazy.record import TREE, LazyPaths, read_image
from atoll.images.lazy.shown import LazyImages
from atoll.images.manifest import ConfigFile, Descriptor, Manifest, RootFs
from atoll.images.registry import RegistryImage
from atoll.images.source import Resolved
from atoll.model.ports.images import Image

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="unpacking layers needs root")

DIGEST = "sha256:" + "d" * 64
FIRST, SECOND = "registry.test/models:1", "registry.test/models:latest"


class NoMount(LazyMount):
    """Shows nothing, on any machine."""

    def __init__(self, paths: LazyPaths, events: list[str]) -> None:
        super().__init__(paths, {})
        self._events = events
        self.refusal = ""

    async def keep(self) -> None:
        pass

    def end(self) -> None:
        self._events.append("nothing is left")


class Place(RegistryImage):
    """A registry that gives the blob when `open` is set."""

    def __init__(self, data: bytes, events: list[str]) -> None:
        self.data = data
        self.open = asyncio.Event()
        self._events = events

    def pinned(self, digest: str) -> str:
        return f"registry.test/models@{digest}"

    async def read_range(self, descriptor: Descriptor, start: int, end: int) -> AsyncGenerator[bytes, None]:
        self._events.append("asked")
        await self.open.wait()
        yield self.data[start:end]


class World:
    def __init__(self, directory: Path) -> None:
        writer = LayerWriter(directory / "layer", chunked=True)
        writer.bytes("weights", b"w" * 100_000)
        self.blob: LayerBlob = writer.close()
        self.events: list[str] = []
        self.place = Place((directory / "layer").read_bytes(), self.events)
        mount = NoMount(LazyPaths(directory / "lazy"), self.events)
        self.lazy = LazyImages(directory / "lazy", {}, bytes_min=1, mount=mount)

    def show(self, reference: str) -> asyncio.Task[Image | None]:
        layer = Descriptor(
            media_type=self.blob.descriptor.media_type,
            digest=self.blob.descriptor.digest,
            size=self.blob.descriptor.size,
            annotations=self.blob.annotations,
        )
        manifest = Manifest(config=layer, layers=(layer,))
        config = ConfigFile(rootfs=RootFs(diff_ids=(self.blob.diff_id,)))
        return asyncio.create_task(self.lazy.show(reference, self.place, Resolved(DIGEST, b"", manifest), config))

    def tree(self) -> tuple[int, int]:
        """Return the number that the server knows the image by, and which directory its files are in."""
        directory = self.lazy.paths.image(DIGEST)
        return read_image(directory).number, (directory / TREE).stat().st_ino


def test_an_image_shown_under_two_names_at_once_is_laid_out_once(tmp_path: Path) -> None:
    async def main() -> None:
        world = World(tmp_path)
        first, second = world.show(FIRST), world.show(SECOND)
        await asyncio.sleep(0)
        world.place.open.set()
        assert await first is not None
        before = world.tree()
        assert await second is not None
        assert world.tree() == before
        assert world.events == ["asked"]
        for reference in (FIRST, SECOND):
            found = world.lazy.find(reference)
            assert found is not None
            assert found.digest == DIGEST

    asyncio.run(main())


def test_an_image_is_not_laid_out_again_before_its_removal_has_ended(tmp_path: Path) -> None:
    async def main() -> None:
        world = World(tmp_path)
        world.place.open.set()
        await world.show(FIRST)
        number, _ = world.tree()
        removing = asyncio.create_task(world.lazy.collect(lambda _: False))
        await asyncio.sleep(0)
        assert await world.show(SECOND) is not None
        await removing
        assert world.events == ["asked", "nothing is left", "asked"]
        assert world.tree()[0] == number + 1
        assert world.lazy.digests == (DIGEST,)

    asyncio.run(main())
