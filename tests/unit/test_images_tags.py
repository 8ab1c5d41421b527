"""Which tags name an image, asked of a registry over HTTP."""

from __future__ import annotations

import asyncio
import json

import pytest
from test_images_lying_registry import FakeRegistry, Request, digest_of, on, registry, respond

from atoll.images import tags
from atoll.images.registry import Registries
from atoll.images.tags import tags_of
from atoll.images.transport import Access, Patience
from atoll.model.errors import ImageError

__all__ = ["registry"]


def serve(registry: FakeRegistry, named: dict[str, str]) -> None:
    """Have the registry's `app` have these tags, each of the image with that digest."""

    async def answer(request: Request, writer: asyncio.StreamWriter) -> bool:
        if request.path.endswith("/tags/list"):
            respond(writer, 200, json.dumps({"name": "app", "tags": list(named)}).encode())
        else:
            respond(writer, 200, headers={"Docker-Content-Digest": named[request.path.rpartition("/")[2]]})
        return True

    registry.handlers.append(on("/v2/app/", answer))


async def ask(registry: FakeRegistry, *digests: str) -> dict[str, tuple[str, ...]]:
    registries = Registries({registry.host: Access()}, patience=Patience(connect_s=5, stall_s=5, tries=1, backoff_s=0.01))
    try:
        return await tags_of(registries, f"{registry.host}/app", digests)
    finally:
        await registries.aclose()


async def test_an_image_has_all_tags_that_name_it_and_no_other(registry: FakeRegistry) -> None:
    one, two, three = (digest_of(data) for data in (b"1", b"2", b"3"))
    serve(registry, {"stable": one, "1": one, "2": two})
    assert await ask(registry, one, three) == {one: ("1", "stable")}


async def test_the_tag_that_begins_the_digest_is_found_among_very_many(registry: FakeRegistry) -> None:
    wanted, other = digest_of(b"1"), digest_of(b"2")
    own = wanted.removeprefix("sha256:")[:12]
    serve(registry, {**{f"0{at}": other for at in range(tags.TAGS_MAX)}, own: wanted})
    assert await ask(registry, wanted) == {wanted: (own,)}
    assert len(registry.requests) == 1 + tags.TAGS_MAX


async def test_a_repository_that_is_not_there_is_an_error(registry: FakeRegistry) -> None:
    with pytest.raises(ImageError, match="404"):
        await ask(registry, digest_of(b"1"))
