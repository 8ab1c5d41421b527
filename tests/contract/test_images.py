"""What every implementation of the Images port keeps: the node's store on a registry in memory, and the fake."""

from __future__ import annotations

import asyncio
import hashlib
import io
import json
import os
import tarfile
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Protocol

import httpx
import pytest

from atoll.images.fake import FakeImages
from atoll.images.manifest import OCI_CONFIG, OCI_LAYER_TAR, OCI_MANIFEST, machine_architecture
from atoll.images.registry import Registries
from atoll.images.store import ImageStore
from atoll.images.transport import Patience
from atoll.model.errors import ImageError
from atoll.model.ports.images import Images, PullProgress

REFERENCE = "reg.example/app:1"
STACKED = "reg.example/stacked:1"


class World(Protocol):
    """An implementation, and the registry behind it, with `REFERENCE`, `reg.example/other:1`, and `STACKED` of two layers."""

    images: Images

    def pulls(self) -> int:
        """How often `REFERENCE` was asked of the registry."""
        ...

    def break_next(self) -> None:
        """Let the next pull fail."""
        ...

    def push_again(self) -> None:
        """Let the tag of `REFERENCE` name another image."""
        ...


class FakeWorld:
    def __init__(self) -> None:
        self.images = fake = FakeImages(anything=False, delay_s=0.01)
        self._fake = fake
        fake.add(REFERENCE)
        fake.add("reg.example/other:1")
        fake.add(STACKED, layers=(Path("/layers/1"), Path("/layers/2")))

    def pulls(self) -> int:
        return self._fake.pulls.count(REFERENCE)

    def push_again(self) -> None:
        self._fake.add(REFERENCE, content="new")

    def break_next(self) -> None:
        self._fake.fail(REFERENCE, ImageError("broken"))


class StoreWorld:
    """The real store; the registry is httpx's own fake transport."""

    def __init__(self, directory: Path, *, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._blobs: dict[str, bytes] = {}
        self._manifests = {"app": self._image(b"app"), "other": self._image(b"other"), "stacked": self._image(b"low", b"high")}
        self._asked: list[str] = []
        self._broken = False
        self.http = httpx.AsyncClient(transport=httpx.MockTransport(self._answer))
        registries = Registries(http=self.http, patience=Patience(tries=1))
        self.images = ImageStore(directory, registries, hold_s=0, monotonic=monotonic)

    def pulls(self) -> int:
        return self._asked.count("/v2/app/manifests/1")

    def push_again(self) -> None:
        self._manifests["app"] = self._image(b"new")

    def alias(self, name: str) -> str:
        """Give the image of `REFERENCE` another name."""
        self._manifests[name] = self._manifests["app"]
        return f"reg.example/{name}:1"

    def break_next(self) -> None:
        self._broken = True

    def _answer(self, request: httpx.Request) -> httpx.Response:
        self._asked.append(request.url.path)
        _, _, name, kind, version = request.url.path.split("/")
        if kind == "blobs":
            data = self._blobs[version]
            if self._broken:
                self._broken, data = False, b"x" * len(data)
            return httpx.Response(200, content=streamed(data))
        if name not in self._manifests or version != "1":
            return httpx.Response(404)
        return httpx.Response(200, content=streamed(self._manifests[name]))

    def _put(self, data: bytes, media_type: str) -> dict[str, object]:
        digest = f"sha256:{hashlib.sha256(data).hexdigest()}"
        self._blobs[digest] = data
        return {"mediaType": media_type, "digest": digest, "size": len(data)}

    def _image(self, *contents: bytes) -> bytes:
        """An image with a layer for each content, all of which have a `file`, and one that is called as the content."""
        layers = [self._layer(content) for content in contents]
        config = {
            "architecture": machine_architecture(),
            "os": "linux",
            "rootfs": {"diff_ids": [layer["digest"] for layer in layers], "type": "layers"},
        }
        parts = {"config": self._put(json.dumps(config).encode(), OCI_CONFIG), "layers": layers}
        return json.dumps({"schemaVersion": 2, "mediaType": OCI_MANIFEST, **parts}).encode()

    def _layer(self, content: bytes) -> dict[str, object]:
        out = io.BytesIO()
        with tarfile.open(fileobj=out, mode="w") as tar:
            for name in ("file", content.decode()):
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
        return self._put(out.getvalue(), OCI_LAYER_TAR)


async def streamed(data: bytes) -> AsyncIterator[bytes]:
    """A body that arrives as from a socket: httpx lets only such a one be read raw."""
    yield data


@pytest.fixture(params=["fake", "store"])
async def world(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[World]:
    if request.param == "fake":
        yield FakeWorld()
        return
    if os.geteuid() != 0:
        pytest.skip("unpacking layers needs root")
    world = StoreWorld(tmp_path / "images")
    yield world
    await world.http.aclose()


async def test_an_image_is_not_found_before_it_was_ensured(world: World) -> None:
    assert await world.images.find(REFERENCE) is None
    image = await world.images.ensure(REFERENCE)
    assert await world.images.find(REFERENCE) == image
    assert image.reference == REFERENCE
    assert image.digest.startswith("sha256:")


async def test_what_is_ready_is_not_pulled_again(world: World) -> None:
    first = await world.images.ensure(REFERENCE)
    assert await world.images.ensure(REFERENCE) == first
    assert world.pulls() == 1


async def test_a_tag_that_was_pushed_again_is_seen_when_it_is_looked_up(world: World) -> None:
    first = await world.images.ensure(REFERENCE)
    assert await world.images.current(REFERENCE) == first.digest
    world.push_again()
    assert await world.images.ensure(REFERENCE) == first
    digest = await world.images.current(REFERENCE)
    assert digest != first.digest
    second = await world.images.ensure(REFERENCE, digest=digest)
    assert second.digest == digest
    assert await world.images.find(REFERENCE) == second
    old = await world.images.find(f"{REFERENCE}@{first.digest}")
    assert old is None or old.digest == first.digest


async def test_the_digest_of_an_absent_image_is_an_image_error(world: World) -> None:
    with pytest.raises(ImageError):
        await world.images.current("reg.example/nothing:1")


async def test_calls_for_one_image_at_once_share_one_pull(world: World) -> None:
    images = await asyncio.gather(*(world.images.ensure(REFERENCE) for _ in range(10)))
    assert len({image.digest for image in images}) == 1
    assert world.pulls() == 1


async def test_a_caller_that_leaves_does_not_end_the_pull_of_another(world: World) -> None:
    leaves = asyncio.create_task(world.images.ensure(REFERENCE))
    stays = asyncio.create_task(world.images.ensure(REFERENCE))
    await asyncio.sleep(0)
    leaves.cancel()
    assert (await stays).reference == REFERENCE


async def test_a_pull_that_all_have_left_can_be_made_again(world: World) -> None:
    leaves = asyncio.create_task(world.images.ensure(REFERENCE))
    await asyncio.sleep(0.001)
    leaves.cancel()
    assert (await world.images.ensure(REFERENCE)).reference == REFERENCE


async def test_an_absent_image_is_an_image_error(world: World) -> None:
    with pytest.raises(ImageError) as caught:
        await world.images.ensure("reg.example/nothing:1")
    assert caught.value.mend


async def test_a_failed_pull_leaves_no_image_and_may_be_repeated(world: World) -> None:
    world.break_next()
    with pytest.raises(ImageError):
        await world.images.ensure(REFERENCE)
    assert await world.images.find(REFERENCE) is None
    assert await world.images.ensure(REFERENCE)


async def test_progress_never_passes_its_total(world: World) -> None:
    seen: list[PullProgress] = []
    await world.images.ensure(REFERENCE, progress=seen.append)
    assert seen
    assert all(0 <= step.done_bytes <= step.total_bytes for step in seen)
    assert {step.phase for step in seen} <= {"resolve", "download", "unpack"}


async def test_collect_keeps_what_it_is_told_to_and_frees_the_rest(world: World) -> None:
    kept = await world.images.ensure(REFERENCE)
    await world.images.ensure("reg.example/other:1")
    assert await world.images.collect([kept.digest]) > 0
    assert await world.images.find(REFERENCE) == kept
    assert await world.images.find("reg.example/other:1") is None
    assert await world.images.collect([kept.digest]) == 0
    assert await world.images.ensure("reg.example/other:1")


@pytest.mark.parametrize("reference", [REFERENCE, STACKED])
async def test_the_files_of_an_image_are_one_directory_for_all_who_ask(world: World, reference: str) -> None:
    image = await world.images.ensure(reference)
    trees = await asyncio.gather(*(world.images.tree(image) for _ in range(5)))
    by_digest = await world.images.find(f"{reference}@{image.digest}")
    assert by_digest is not None
    assert {await world.images.tree(by_digest), *trees} == {trees[0]}
    other = await world.images.tree(await world.images.ensure("reg.example/other:1"))
    assert other != trees[0]


@pytest.mark.skipif(os.geteuid() != 0, reason="unpacking layers needs root")
async def test_a_tree_has_the_files_of_all_layers_without_copies_survives_a_restart_and_goes_with_its_image(tmp_path: Path) -> None:
    world = StoreWorld(tmp_path / "images")
    image = await world.images.ensure(STACKED)
    tree = await world.images.tree(image)
    assert {path.name: path.read_text() for path in tree.iterdir()} == {"file": "high", "high": "high", "low": "low"}
    assert (tree / "low").samefile(image.layers[0] / "low")
    again = ImageStore(tmp_path / "images", Registries(http=world.http), hold_s=0)
    assert await again.tree(image) == tree
    assert await again.collect([image.digest]) == 0
    assert (tree / "low").read_text() == "low"
    await again.collect([])
    assert not tree.exists()
    await world.http.aclose()


@pytest.mark.skipif(os.geteuid() != 0, reason="unpacking layers needs root")
async def test_all_names_of_one_image_that_come_at_once_are_kept(tmp_path: Path) -> None:
    world = StoreWorld(tmp_path / "images")
    names = [REFERENCE, *(world.alias(f"again{number}") for number in range(8))]
    images = await asyncio.gather(*(world.images.ensure(name) for name in names))
    assert len({image.digest for image in images}) == 1
    again = ImageStore(tmp_path / "images", Registries(http=world.http), hold_s=0)
    for store in (world.images, again):
        assert [found.reference for name in names if (found := await store.find(name))] == names
    await world.http.aclose()


@pytest.mark.skipif(os.geteuid() != 0, reason="unpacking layers needs root")
async def test_an_image_that_gets_another_name_is_not_collected_meanwhile(tmp_path: Path) -> None:
    now = 0.0
    world = StoreWorld(tmp_path / "images", monotonic=lambda: now)
    first = await world.images.ensure(REFERENCE)
    world.push_again()
    second = await world.images.ensure("reg.example/app:1", digest=await world.images.current(REFERENCE))
    now = 1.0
    naming = asyncio.create_task(world.images.ensure(REFERENCE, digest=first.digest))
    await asyncio.sleep(0)
    now = 2.0
    await world.images.collect([])
    assert (await naming).layers[0].is_dir()
    again = ImageStore(tmp_path / "images", Registries(http=world.http), hold_s=0)
    assert again.digests() == world.images.digests()
    assert first.digest in again.digests()
    assert second.digest != first.digest
    await world.http.aclose()


async def test_an_image_that_cannot_be_shown_early_is_fetched_whole_by_who_takes_it_lazily(world: World) -> None:
    image = await world.images.ensure(REFERENCE, lazily=True)
    assert await world.images.find(REFERENCE) == image
    assert await world.images.find(REFERENCE, lazily=True) == image
    assert image == await world.images.ensure(REFERENCE)
    assert world.pulls() == 1


async def test_what_is_not_here_is_not_found_lazily_either(world: World) -> None:
    assert await world.images.find(REFERENCE, lazily=True) is None
