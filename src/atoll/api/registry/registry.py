"""The registry as a whole: its directory, who may use which repository, and its upkeep."""

from __future__ import annotations

import asyncio
import hashlib
from pathlib import Path

import structlog

from atoll.api.registry.blobs import Blobs
from atoll.api.registry.collect import collect
from atoll.api.registry.names import RegistryError, blob_unknown, check_repository, is_digest, manifest_unknown
from atoll.api.registry.repositories import Repositories, parse_manifest
from atoll.api.service import Caller, Need, Service, authorize
from atoll.api.service.projects import require_project
from atoll.api.service.workloads import pinned_digests
from atoll.model.errors import Forbidden, NotFound
from atoll.model.records import App, Job, Release
from atoll.model.spec import Workload

COLLECT_S = 3_600.0

log = structlog.get_logger()


class Registry:
    """The cell's own registry, over one directory of this server. It tells `service` what tags mean."""

    def __init__(self, root: Path, service: Service) -> None:
        self.blobs = Blobs(root)
        self.repositories = Repositories(root, self.blobs)
        self._service = service
        service.use_images(self)

    def digest_of(self, repository: str, tag: str) -> str | None:
        """See `ImageResolver`."""
        try:
            check_repository(repository)
        except RegistryError:
            return None
        return self.repositories.digest_of(repository, tag)

    def admit(self, caller: Caller, repository: str, need: Need) -> None:
        """Raises RegistryError, Forbidden."""
        project = check_repository(repository)
        authorize(caller, need, project=project)
        try:
            require_project(self._service.context, project)
        except NotFound as error:
            raise RegistryError("NAME_UNKNOWN", 404, error.message) from None

    async def mount(self, caller: Caller, source: str, repository: str, digest: str) -> bool:
        """Give `repository` a blob that `source` has; False when that cannot be, and the client must upload."""
        try:
            self.admit(caller, source, Need.PULL)
        except (RegistryError, Forbidden):
            return False
        if not self.repositories.has_blob(source, digest):
            return False
        await asyncio.to_thread(self.repositories.link_blob, repository, digest)
        return True

    def find_manifest(self, repository: str, reference: str) -> tuple[str, str, int]:
        """Return digest, media type and size. Raises RegistryError."""
        digest = reference if is_digest(reference) else self.repositories.digest_of(repository, reference)
        media_type = self.repositories.media_type(repository, digest) if digest is not None else None
        size = self.blobs.size(digest) if digest is not None else None
        if digest is None or media_type is None or size is None:
            raise manifest_unknown(reference)
        return digest, media_type, size

    async def put_manifest(self, repository: str, reference: str, data: bytes, content_type: str) -> str:
        """Keep a manifest whose parts are all here, and return its digest. Raises RegistryError."""
        manifest, media_type = parse_manifest(data, content_type)
        digest = f"sha256:{hashlib.sha256(data).hexdigest()}"
        if is_digest(reference) and reference != digest:
            raise RegistryError("DIGEST_INVALID", 400, f"the manifest is {digest}, not {reference}")
        for blob in manifest.blobs:
            if not self.repositories.has_blob(repository, blob):
                raise RegistryError("MANIFEST_BLOB_UNKNOWN", 404, f"blob {blob} was not pushed to {repository}")
        for child in manifest.children:
            if self.repositories.media_type(repository, child) is None:
                raise RegistryError("MANIFEST_BLOB_UNKNOWN", 404, f"manifest {child} was not pushed to {repository}")
        await self.blobs.put(data, digest)
        await asyncio.to_thread(self.repositories.link_manifest, repository, digest, media_type)
        if not is_digest(reference):
            await asyncio.to_thread(self.repositories.tag, repository, reference, digest)
        return digest

    def check_blob(self, repository: str, digest: str) -> int:
        """Return a blob's size. Raises RegistryError."""
        size = self.blobs.size(digest)
        if size is None or not self.repositories.has_blob(repository, digest):
            raise blob_unknown(digest)
        return size

    async def run(self) -> None:
        """Tidy up for ever."""
        while True:
            await self.collect()
            await asyncio.sleep(COLLECT_S)

    async def collect(self) -> int:
        """Remove what nothing needs; return the bytes freed."""
        try:
            return await asyncio.to_thread(collect, self.blobs, self.repositories, self._pinned())
        except Exception:
            # The outer edge: one damaged file must not end the upkeep, nor the server.
            log.exception("the registry could not tidy up", retry_s=COLLECT_S)
            return 0

    def _pinned(self) -> set[str]:
        """Return the digests of the cell's own images that releases, apps and jobs name."""
        state = self._service.context.state
        specs: list[Workload] = [held.record.spec for held in state.records(Release).values()]
        specs += [held.record.spec for held in state.records(App).values()]
        specs += [held.record.spec for held in state.records(Job).values()]
        return set().union(*(pinned_digests(spec) for spec in specs))
