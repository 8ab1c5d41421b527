"""The fake keeps the promises of the port that the simulator relies on."""

from __future__ import annotations

import asyncio

import pytest

from atoll.images.fake import FakeImages
from atoll.model.errors import ImageError


async def test_concurrent_calls_share_one_pull() -> None:
    images = FakeImages(delay_s=0.01)
    first, second = await asyncio.gather(images.ensure("a:1"), images.ensure("a:1"))
    assert first == second
    assert images.pulls == ["a:1"]


async def test_a_caller_that_gives_up_does_not_end_the_pull_of_another() -> None:
    images = FakeImages(delay_s=0.02)
    first = asyncio.create_task(images.ensure("a:1"))
    second = asyncio.create_task(images.ensure("a:1"))
    await asyncio.sleep(0)
    first.cancel()
    assert (await second).reference == "a:1"


async def test_a_scripted_failure_happens_as_often_as_told() -> None:
    images = FakeImages()
    images.fail("a:1", ImageError("damaged"))
    with pytest.raises(ImageError, match="damaged"):
        await images.ensure("a:1")
    assert await images.find("a:1") is None
    assert (await images.ensure("a:1")).digest.startswith("sha256:")


async def test_an_unknown_image_is_an_error_and_collect_forgets() -> None:
    images = FakeImages(anything=False)
    with pytest.raises(ImageError):
        await images.ensure("a:1")
    image = images.add("a:1", ready=True, size_bytes=7)
    assert await images.collect([image.digest]) == 0
    assert await images.collect([]) == 7
    assert await images.find("a:1") is None
