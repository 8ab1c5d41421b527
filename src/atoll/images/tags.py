"""Which tags of a repository name an image, as its registry says (the OCI distribution specification, "Content Discovery")."""

from __future__ import annotations

import asyncio
from collections.abc import Collection

from msgspec import Struct

from atoll.images.answers import network_errors, read_bounded
from atoll.images.manifest import ACCEPT
from atoll.images.reference import parse
from atoll.images.registry import Registries
from atoll.model import codec
from atoll.model.errors import ImageError

TAGS_MAX = 100
"""Tags of one repository that are looked at."""
ASKED_AT_ONCE = 8
LIST_BYTES_MAX = 4 << 20


class _Listed(Struct, frozen=True):
    tags: tuple[str, ...] | None = None


async def tags_of(registries: Registries, repository: str, digests: Collection[str]) -> dict[str, tuple[str, ...]]:
    """Return for each of `digests` the tags of `repository` (`HOST/NAME`) that name it, in order; one that has none is left out.

    Of more than TAGS_MAX tags, those that are the beginning of a digest go first. Raises ImageError, Unavailable, DeadlineExceeded.
    """
    place = parse(repository, default_registry=registries.default)
    scope = f"repository:{place.repository}:pull"
    transport = registries.transport
    turns = asyncio.Semaphore(ASKED_AT_ONCE)

    async def listed() -> tuple[str, ...]:
        async with transport.stream("GET", place.host, f"/v2/{place.repository}/tags/list", scope=scope) as response:
            if response.status_code != 200:
                raise ImageError(f"registry {place.host} answers {response.status_code} when asked for the tags of {repository}")
            with network_errors(place.host):
                body = await read_bounded(response, LIST_BYTES_MAX, f"the tags of {repository}")
        return codec.decode_known(body, _Listed).tags or ()

    async def digest_of(tag: str) -> str:
        async def attempt() -> str:
            where = f"/v2/{place.repository}/manifests/{tag}"
            async with transport.stream("HEAD", place.host, where, scope=scope, headers={"Accept": ACCEPT}) as response:
                return response.headers.get("Docker-Content-Digest", "") if response.status_code == 200 else ""

        async with turns:
            return await transport.retried(attempt)

    starts = tuple(digest.removeprefix("sha256:") for digest in digests)
    known = await transport.retried(listed)
    known = tuple(sorted(known, key=lambda tag: (not any(start.startswith(tag) for start in starts), tag)))[:TAGS_MAX]
    found: dict[str, list[str]] = {}
    for tag, digest in zip(known, await asyncio.gather(*map(digest_of, known)), strict=True):
        if digest in digests:
            found.setdefault(digest, []).append(tag)
    return {digest: tuple(sorted(tags)) for digest, tags in found.items()}
