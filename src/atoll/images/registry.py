"""A client of any registry that speaks the OCI distribution specification (or Docker's registry API v2)."""

from __future__ import annotations

import functools
import random
from collections.abc import AsyncGenerator, Callable, Mapping
from pathlib import Path

import httpx

from atoll.images.answers import Retriable, network_errors, read_bounded
from atoll.images.auth import Find
from atoll.images.manifest import (
    ACCEPT,
    INDEX_DEPTH_MAX,
    MANIFEST_BYTES_MAX,
    Descriptor,
    Index,
    choose,
    machine_architecture,
    parse_document,
    sha256,
)
from atoll.images.reference import Reference, parse
from atoll.images.source import CHUNK_BYTES, BlobSink, Resolved
from atoll.images.threads import in_thread
from atoll.images.transport import Access, Patience, Transport
from atoll.model.errors import ImageError, Unavailable, Unsupported


class Registries:
    """All registries that a node may pull from. `aclose` it in the end.

    `access` says by host how to reach one and with what credentials, and of others `find`, if that knows them; the rest are tried
    over https without any.
    `default` is the registry of references that name none.
    """

    def __init__(
        self,
        access: Mapping[str, Access] | None = None,
        *,
        default: str | None = None,
        architecture: str | None = None,
        patience: Patience | None = None,
        http: httpx.AsyncClient | None = None,
        rng: random.Random | None = None,
        find: Find | None = None,
    ) -> None:
        self.default = default
        self.architecture = architecture or machine_architecture()
        self.transport = Transport(access, patience=patience, http=http, rng=rng, find=find)

    async def aclose(self) -> None:
        await self.transport.aclose()

    def source(self, reference: str) -> RegistryImage:
        """Return the place that `reference` names. Raises ImageError for one that does not parse."""
        return RegistryImage(self.transport, parse(reference, default_registry=self.default), self.architecture)


class RegistryImage:
    """One image in a registry; implements `Source`."""

    def __init__(self, transport: Transport, reference: Reference, architecture: str) -> None:
        self._transport = transport
        self._reference = reference
        self._architecture = architecture
        self._scope = f"repository:{reference.repository}:pull"

    def pinned(self, digest: str) -> str:
        """Return the reference of the image `digest` at this place."""
        return f"{self._reference.host}/{self._reference.repository}@{digest}"

    async def resolve(self) -> Resolved:
        what = f"image {self._reference}"
        version, digest = self._reference.version, self._reference.digest
        for _ in range(INDEX_DEPTH_MAX):
            data = await self._manifest(version, digest)
            document = parse_document(data, what)
            if not isinstance(document, Index):
                return Resolved(sha256(data), data, document)
            digest = version = choose(document, what, architecture=self._architecture).digest
        raise ImageError(f"{what} is an index of indices more than {INDEX_DEPTH_MAX} deep")

    async def fetch(self, descriptor: Descriptor, target: Path, on_bytes: Callable[[int], None]) -> None:
        done = 0

        def count(size: int) -> None:
            nonlocal done
            done = max(done, size)
            on_bytes(size)

        async def attempt() -> None:
            await self._fetch_once(descriptor, target, count)

        await self._transport.retried(attempt, progress=lambda: done)

    async def read_range(self, descriptor: Descriptor, start: int, end: int) -> AsyncGenerator[bytes, None]:
        """Yield the blob's bytes from `start` up to `end` as they come, unverified; one try, exactly so many.

        Raises Unsupported (this registry gives whole blobs only), ImageError, Unavailable, DeadlineExceeded.
        """
        host, path = self._reference.host, f"/v2/{self._reference.repository}/blobs/{descriptor.digest}"
        headers = {"Range": f"bytes={start}-{end - 1}"}
        left = end - start
        try:
            async with self._transport.stream("GET", host, path, scope=self._scope, headers=headers) as response:
                if response.status_code == 404:
                    raise ImageError(f"image {self._reference} is incomplete: registry {host} has no {descriptor.digest}")
                if response.status_code != 206 or not _continues(response, start):
                    raise Unsupported(f"registry {host} gives no parts of {descriptor.digest} (status {response.status_code})")
                with network_errors(host):
                    async for data in response.aiter_raw():
                        left -= len(data)
                        if left < 0:
                            raise ImageError(f"registry {host} gives more of {descriptor.digest} than was asked for")
                        yield data
        except Retriable as error:
            raise error.error from None
        if left:
            raise Unavailable(f"registry {host} ends a part of {descriptor.digest} {left} bytes early")

    async def _manifest(self, version: str, digest: str | None) -> bytes:
        reference = self._reference

        async def attempt() -> bytes:
            path = f"/v2/{reference.repository}/manifests/{version}"
            async with self._transport.stream(
                "GET", reference.host, path, scope=self._scope, headers={"Accept": ACCEPT}
            ) as response:
                if response.status_code == 404:
                    raise ImageError(f"there is no image {reference}", mend="check the name and the tag, or push it")
                if response.status_code != 200:
                    raise ImageError(f"registry {reference.host} answers {response.status_code} when asked for {reference}")
                with network_errors(reference.host):
                    return await read_bounded(response, MANIFEST_BYTES_MAX, f"the manifest of {reference}")

        data = await self._transport.retried(attempt)
        if digest is not None and sha256(data) != digest:
            raise ImageError(
                f"image {reference} is damaged: its manifest has digest {sha256(data)}, not {digest}",
                mend="push it again; if that does not help, the registry is not to be trusted",
            )
        return data

    async def _fetch_once(self, descriptor: Descriptor, target: Path, on_bytes: Callable[[int], None]) -> None:
        reference = self._reference
        sink = await in_thread(lambda: BlobSink(target, descriptor))
        try:
            if sink.size < descriptor.size:
                headers = {"Range": f"bytes={sink.size}-"} if sink.size else {}
                path = f"/v2/{reference.repository}/blobs/{descriptor.digest}"
                async with self._transport.stream("GET", reference.host, path, scope=self._scope, headers=headers) as response:
                    await self._receive(response, sink, on_bytes)
            try:
                await in_thread(sink.finish)
            except ImageError as error:
                if sink.resumed:  # the beginning that lay here may be what is wrong
                    raise Retriable(error, after_s=0) from None
                raise
        finally:
            sink.close()

    async def _receive(self, response: httpx.Response, sink: BlobSink, on_bytes: Callable[[int], None]) -> None:
        host = self._reference.host
        if response.status_code == 404:
            raise ImageError(f"image {self._reference} is incomplete: registry {host} has no {sink.descriptor.digest}")
        if response.status_code == 416 or (response.status_code == 206 and not _continues(response, sink.size)):
            sink.restart()
            raise Retriable(ImageError(f"registry {host} cannot continue {sink.descriptor.digest}"), after_s=0)
        if response.status_code == 200:
            sink.restart()
        elif response.status_code != 206:
            raise ImageError(f"registry {host} answers {response.status_code} when asked for {sink.descriptor.digest}")
        buffer = bytearray()
        try:
            with network_errors(host):
                async for data in response.aiter_raw():
                    buffer += data
                    if sink.size + len(buffer) > sink.descriptor.size:
                        raise sink.damaged(f"more than the {sink.descriptor.size} bytes that its manifest says")
                    if len(buffer) >= CHUNK_BYTES:
                        await in_thread(functools.partial(sink.write, buffer))
                        buffer = bytearray()
                        on_bytes(sink.size)
        except Retriable:
            await in_thread(functools.partial(sink.write, buffer))
            on_bytes(sink.size)
            raise
        await in_thread(functools.partial(sink.write, buffer))
        on_bytes(sink.size)
        if sink.size < sink.descriptor.size:
            raise Retriable(
                Unavailable(f"registry {host} ends {sink.descriptor.digest} after {sink.size} of {sink.descriptor.size} bytes")
            )


def _continues(response: httpx.Response, offset: int) -> bool:
    return str(response.headers.get("Content-Range", "")).startswith(f"bytes {offset}-")
