"""What the cell's registry keeps and what it lets go of, and how much of it one project may take up."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from atoll.api.registry.blobs import PROJECT_UPLOADS_MAX, UPLOADS_MAX, Blobs
from atoll.api.registry.collect import MANIFEST_KEEP_S, collect
from atoll.api.registry.names import RegistryError
from atoll.api.registry.repositories import OCI_INDEX, OCI_MANIFEST, Repositories

WEB = "default/web"
DAY_S = 86_400.0
KEEP_DAYS = MANIFEST_KEEP_S / DAY_S


class Registry:
    """One on disk, where a file is as old as this clock says."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.blobs = Blobs(root)
        self.repositories = Repositories(root, self.blobs)
        self.now = time.time() + DAY_S  # later than any file that has just been made

    async def push(self, content: str, *tags: str) -> str:
        """Push an image as a deploy does, under the beginning of its digest, and under `tags`; return its digest."""
        config = await self._blob(content.encode())
        self.repositories.link_blob(WEB, config)
        return await self._manifest({"mediaType": OCI_MANIFEST, "config": {"digest": config}}, tags)

    async def push_index(self, child: str, *tags: str) -> str:
        return await self._manifest({"mediaType": OCI_INDEX, "manifests": [{"digest": child}]}, tags)

    async def _manifest(self, manifest: dict[str, Any], tags: Iterable[str]) -> str:
        digest = await self._blob(json.dumps(manifest).encode())
        self.repositories.link_manifest(WEB, digest, manifest["mediaType"])
        for tag in (digest.removeprefix("sha256:")[:12], *tags):
            self.repositories.tag(WEB, tag, digest)
        for path in self.root.rglob("*"):
            if path.is_file() and path.stat().st_mtime < time.time() + 1:
                os.utime(path, (self.now, self.now))
        return digest

    async def _blob(self, data: bytes) -> str:
        digest = f"sha256:{hashlib.sha256(data).hexdigest()}"
        await self.blobs.put(data, digest)
        return digest

    def pass_days(self, days: float, *, pinned: Iterable[str] = ()) -> None:
        """Let time go by, with the upkeep every hour."""
        for _ in range(int(days * 24)):
            self.now += DAY_S / 24
            collect(self.blobs, self.repositories, set(pinned), now=self.now)

    def has(self, digest: str) -> bool:
        return self.repositories.media_type(WEB, digest) is not None and self.blobs.size(digest) is not None


async def test_what_deploys_pushed_stays_while_a_release_names_it_and_goes_some_days_after(tmp_path: Path) -> None:
    registry = Registry(tmp_path)
    old, new = await registry.push("old"), await registry.push("new")
    registry.pass_days(30, pinned=[old, new])
    assert registry.has(old)
    registry.pass_days(KEEP_DAYS - 1, pinned=[new])
    assert registry.has(old)
    registry.pass_days(3, pinned=[new])
    assert not registry.has(old)
    assert registry.has(new)
    assert registry.repositories.tags(WEB) == [new.removeprefix("sha256:")[:12]]
    assert len(registry.blobs.all()) == 2


async def test_an_image_that_never_ran_goes_some_days_after_its_push(tmp_path: Path) -> None:
    registry = Registry(tmp_path)
    image = await registry.push("image")
    registry.pass_days(KEEP_DAYS - 1)
    assert registry.has(image)
    registry.pass_days(3)
    assert registry.blobs.all() == []


async def test_a_tag_of_one_s_own_keeps_its_image_and_the_days_count_from_when_it_leaves(tmp_path: Path) -> None:
    registry = Registry(tmp_path)
    image = await registry.push("image", "1")
    index = await registry.push_index(image, "all")
    registry.pass_days(30)
    assert registry.has(index)
    assert registry.repositories.remove_tag(WEB, "all")
    other = await registry.push("other", "1")
    registry.pass_days(KEEP_DAYS - 1)
    assert registry.has(image)
    assert registry.has(index)
    registry.pass_days(3)
    assert not registry.has(image)
    assert not registry.has(index)
    assert registry.has(other)


async def test_a_short_tag_that_happens_to_begin_the_digest_keeps_its_image(tmp_path: Path) -> None:
    registry = Registry(tmp_path)
    image = await registry.push("image")
    registry.repositories.tag(WEB, image.removeprefix("sha256:")[0], image)
    registry.pass_days(30)
    assert registry.has(image)


async def test_uploads_that_one_project_began_and_left_leave_room_for_another(tmp_path: Path) -> None:
    blobs = Blobs(tmp_path)
    begun = [await blobs.begin(f"default/app{number % 3}") for number in range(PROJECT_UPLOADS_MAX)]
    with pytest.raises(RegistryError, match="of project 'default'") as refused:
        await blobs.begin("default/other")
    assert (refused.value.status, refused.value.oci_code) == (429, "TOOMANYREQUESTS")
    await blobs.begin("default-two/app")
    await blobs.abort(begun[0])
    await blobs.begin("default/other")
    for number in range(UPLOADS_MAX - PROJECT_UPLOADS_MAX - 1):
        await blobs.begin(f"p{number}/app")
    with pytest.raises(RegistryError, match=f"{UPLOADS_MAX} uploads are under way"):
        await blobs.begin("late/app")
