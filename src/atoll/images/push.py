"""Pushing an image from a layout to a registry: the blobs that it lacks, then the manifest."""

from __future__ import annotations

import asyncio
import contextlib
import functools
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import httpx

from atoll.images.answers import Retriable, network_errors, refused
from atoll.images.layout import Layout, LayoutImage
from atoll.images.manifest import Descriptor
from atoll.images.reference import Reference, parse
from atoll.images.registry import Registries
from atoll.images.threads import in_thread
from atoll.images.transport import Transport
from atoll.model.errors import DeadlineExceeded, ImageError, Unavailable
from atoll.model.ports.images import PullProgress

UPLOADS_MAX = 4
PIECE_BYTES = 64 << 20
"""A larger blob goes up in several requests, so that no proxy between has to take it whole."""
READ_BYTES = 256 << 10
PUSH_DEADLINE_S = 3600.0

Progress = Callable[[PullProgress], None]


async def push(
    registries: Registries,
    layout: Path,
    digest: str,
    reference: str,
    *,
    progress: Progress | None = None,
    deadline_s: float = PUSH_DEADLINE_S,
    piece_bytes: int = PIECE_BYTES,
) -> str:
    """Push the image `digest` of `layout` to `reference`; return the reference with its digest. Safe to repeat.

    Progress has the phase `upload`. Raises ImageError (refused, incomplete layout), Unavailable, DeadlineExceeded.
    """
    target = parse(reference, default_registry=registries.default)
    image = Layout(layout)
    resolved = await LayoutImage(image, digest=digest, architecture=registries.architecture).resolve()
    parts = list({part.digest: part for part in (resolved.manifest.config, *resolved.manifest.layers)}.values())
    upload = _Upload(registries.transport, target, image, piece_bytes, progress, sum(part.size for part in parts))
    try:
        async with asyncio.timeout(deadline_s):
            try:
                async with asyncio.TaskGroup() as group:
                    for part in parts:
                        group.create_task(upload.blob(part))
            except BaseExceptionGroup as errors:
                error: BaseException = errors
                while isinstance(error, BaseExceptionGroup):
                    error = error.exceptions[0]
                raise error from None
            await upload.manifest(resolved.data, resolved.manifest.media_type, target.tag or resolved.digest)
    except TimeoutError:
        raise DeadlineExceeded(f"pushing {reference} took more than {deadline_s:.0f} s", mend="try again") from None
    return f"{target.host}/{target.repository}@{resolved.digest}"


class _Upload:
    def __init__(
        self, transport: Transport, target: Reference, layout: Layout, piece_bytes: int, progress: Progress | None, total: int
    ) -> None:
        self._transport = transport
        self._target = target
        self._layout = layout
        self._piece_bytes = piece_bytes
        self._progress = progress
        self._total = total
        self._done: dict[str, int] = {}
        self._slots = asyncio.Semaphore(UPLOADS_MAX)
        self._scope = f"repository:{target.repository}:pull,push"
        self._path = f"/v2/{target.repository}"

    async def blob(self, part: Descriptor) -> None:
        async def attempt() -> None:
            if not await self._exists(part):
                await self._send(part)

        async with self._slots:
            await self._transport.retried(attempt)
            self._tell(part.digest, part.size)

    async def manifest(self, data: bytes, media_type: str, version: str) -> None:
        async def attempt() -> None:
            headers = {"Content-Type": media_type}
            async with self._request("PUT", f"{self._path}/manifests/{version}", headers=headers, content=data) as response:
                await self._expect(response, (201,), f"the manifest of {self._target}")

        await self._transport.retried(attempt)

    async def _exists(self, part: Descriptor) -> bool:
        async with self._request("HEAD", f"{self._path}/blobs/{part.digest}") as response:
            return response.status_code == 200

    async def _send(self, part: Descriptor) -> None:
        """Upload one blob: in one request when it is small, else piece by piece."""
        async with self._request("POST", f"{self._path}/blobs/uploads/", headers={"Content-Length": "0"}) as response:
            await self._expect(response, (202,), "an upload")
            where = self._location(response)
        start = 0
        while part.size - start > self._piece_bytes:
            end = start + self._piece_bytes
            headers = {"Content-Range": f"{start}-{end - 1}", **_binary(end - start)}
            async with self._request("PATCH", where, headers=headers, content=self._content(part, start, end)) as response:
                await self._expect(response, (202,), "a piece of a blob")
                where = self._location(response)
            start = end
        url = str(httpx.URL(where).copy_merge_params({"digest": part.digest}))
        headers = {"Content-Range": f"{start}-{part.size - 1}"} if start else {}
        headers |= _binary(part.size - start)
        async with self._request("PUT", url, headers=headers, content=self._content(part, start, part.size)) as response:
            await self._expect(response, (201,), f"blob {part.digest}")

    def _content(self, part: Descriptor, start: int, end: int) -> Callable[[], AsyncIterator[bytes]]:
        async def content() -> AsyncIterator[bytes]:
            try:
                file = self._layout.blob(part.digest).open("rb")
            except OSError as error:
                raise ImageError(f"the layout has no blob {part.digest}: {error.strerror}") from None
            with file:
                file.seek(start)
                left = end - start
                while left > 0:
                    data = await in_thread(functools.partial(file.read, min(left, READ_BYTES)))
                    if not data:
                        raise ImageError(f"blob {part.digest} of the layout is shorter than its manifest says")
                    left -= len(data)
                    yield data
                    self._tell(part.digest, end - left)

        return content

    @contextlib.asynccontextmanager
    async def _request(
        self,
        method: str,
        path: str,
        *,
        headers: dict[str, str] | None = None,
        content: Callable[[], AsyncIterator[bytes]] | bytes | None = None,
    ) -> AsyncIterator[httpx.Response]:
        async with self._transport.stream(
            method, self._target.host, path, scope=self._scope, headers=headers, content=content
        ) as response:
            yield response

    async def _expect(self, response: httpx.Response, statuses: tuple[int, ...], what: str) -> None:
        if response.status_code in statuses:
            return
        host = self._target.host
        with network_errors(host):
            words = bytearray()
            async for data in response.aiter_raw():
                words += data
                if len(words) > 2048:
                    break
        text = words.decode("utf-8", "replace")[:300].strip()
        if response.status_code in (404, 416):  # the upload has been forgotten: begin it again
            raise Retriable(Unavailable(f"registry {host} answers {response.status_code} to {what}: {text}"))
        raise refused(host, f"it answers {response.status_code} to {what}: {text}")

    def _location(self, response: httpx.Response) -> str:
        base = self._transport.base(self._target.host)
        location = response.headers.get("Location", "")
        try:
            return str(httpx.URL(f"{base}/").join(location))
        except httpx.InvalidURL:
            raise ImageError(f"registry {self._target.host} names no usable place for an upload") from None

    def _tell(self, digest: str, done: int) -> None:
        self._done[digest] = done
        if self._progress is not None:
            self._progress(PullProgress("upload", sum(self._done.values()), self._total))


def _binary(size: int) -> dict[str, str]:
    return {"Content-Type": "application/octet-stream", "Content-Length": str(size)}
