"""Blobs on disk by their SHA-256, and the uploads that become blobs. Files are complete and synced before they have their name."""

from __future__ import annotations

import asyncio
import errno
import hashlib
import os
import re
import secrets
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from atoll.api.registry.names import RegistryError
from atoll.model.errors import TooLarge, Unavailable

BLOB_BYTES_MAX = 64 << 30
UPLOADS_MAX = 256
"""Uploads under way."""
PROJECT_UPLOADS_MAX = 64
"""Those of one project, so that no other has to wait until what one began and left is given up."""
WRITE_BYTES = 1 << 20
"""Bytes that are gathered before a thread writes and hashes them."""
READ_BYTES = 1 << 18

_ID = re.compile(r"[0-9a-f]{32}")


class Upload:
    """A blob that is coming in. `size_bytes` says how much has arrived for good."""

    def __init__(self, id: str, repository: str, path: Path) -> None:
        self.id = id
        self.repository = repository
        self.path = path
        self.size_bytes = 0
        self.digest = hashlib.sha256()
        self.busy = False
        self.touched = time.monotonic()

    def append(self, data: bytes) -> None:
        """Write and hash; for a thread."""
        with self.path.open("r+b") as file:
            file.seek(self.size_bytes)
            file.write(data)
            file.truncate()
        self.digest.update(data)
        self.size_bytes += len(data)

    def rehash(self) -> None:
        """Take up what an earlier server process left; for a thread."""
        with self.path.open("rb") as file:
            while data := file.read(WRITE_BYTES):
                self.digest.update(data)
                self.size_bytes += len(data)


class Blobs:
    """See the module. `root` is made if it is not there."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._blobs = root / "blobs" / "sha256"
        self._uploads = root / "uploads"
        self._open: dict[str, Upload] = {}
        self._blobs.mkdir(parents=True, exist_ok=True)
        self._uploads.mkdir(parents=True, exist_ok=True)

    def path(self, digest: str) -> Path:
        """Return where a blob is or would be; `digest` has been checked."""
        hex_digest = digest.removeprefix("sha256:")
        return self._blobs / hex_digest[:2] / hex_digest

    def size(self, digest: str) -> int | None:
        try:
            return self.path(digest).stat().st_size
        except FileNotFoundError:
            return None

    def all(self) -> list[Path]:
        return [path for folder in self._blobs.iterdir() if folder.is_dir() for path in folder.iterdir()]

    async def begin(self, repository: str) -> Upload:
        """Raises RegistryError when too many are under way, in all or of the repository's project."""
        if len(self._open) >= UPLOADS_MAX:
            raise RegistryError("TOOMANYREQUESTS", 429, f"{UPLOADS_MAX} uploads are under way; try again later")
        project = repository.partition("/")[0]
        if sum(upload.repository.startswith(f"{project}/") for upload in self._open.values()) >= PROJECT_UPLOADS_MAX:
            words = f"{PROJECT_UPLOADS_MAX} uploads of project '{project}' are under way; finish or cancel some, or try again later"
            raise RegistryError("TOOMANYREQUESTS", 429, words)
        id = secrets.token_hex(16)
        upload = self._open[id] = Upload(id, repository, self._uploads / id)
        try:
            await _disk(upload.path.write_bytes, b"")
            await _disk(self._owner(id).write_text, repository)
        except BaseException:
            self._open.pop(id, None)
            raise
        return upload

    async def find(self, id: str, repository: str) -> Upload:
        """Return an upload under way, also one that an earlier server process began. Raises RegistryError."""
        if _ID.fullmatch(id) is None:
            raise _unknown(id)
        upload = self._open.get(id)
        if upload is None:
            upload = await asyncio.to_thread(self._resume, id)
            upload = self._open.setdefault(id, upload)
        if upload.repository != repository:
            raise _unknown(id)
        if upload.busy:
            raise RegistryError("BLOB_UPLOAD_INVALID", 409, "another request writes to this upload right now")
        return upload

    def _resume(self, id: str) -> Upload:
        try:
            upload = Upload(id, self._owner(id).read_text(), self._uploads / id)
            upload.rehash()
        except FileNotFoundError:
            raise _unknown(id) from None
        return upload

    async def receive(self, upload: Upload, chunks: AsyncIterator[bytes]) -> None:
        """Add what comes to the upload. What has arrived when the sender goes away stays, so that it can be resumed.

        Raises TooLarge, RegistryError (the disk is full); what had arrived is gone after the latter, so that there is room again.
        """
        upload.busy = True
        try:
            waiting = bytearray()
            try:
                async for chunk in chunks:
                    waiting += chunk
                    if upload.size_bytes + len(waiting) > BLOB_BYTES_MAX:
                        raise TooLarge(f"a blob has at most {BLOB_BYTES_MAX} bytes")
                    if len(waiting) >= WRITE_BYTES:
                        data, waiting = bytes(waiting), bytearray()
                        await _disk(upload.append, data)
            except Unavailable:
                await _disk(upload.append, bytes(waiting))
                raise
            if waiting:
                await _disk(upload.append, bytes(waiting))
        except RegistryError:
            await self.abort(upload)
            raise
        finally:
            upload.busy = False
            upload.touched = time.monotonic()

    async def finish(self, upload: Upload, digest: str) -> None:
        """Make the upload a blob. Raises RegistryError when its content is not what `digest` says; the upload is gone then."""
        actual = f"sha256:{upload.digest.hexdigest()}"
        if actual != digest:
            await self.abort(upload)
            raise RegistryError("DIGEST_INVALID", 400, f"the content is {actual}, not {digest}")
        upload.busy = True
        try:
            await _disk(self._keep, upload.path, digest)
        finally:
            upload.busy = False
        self._open.pop(upload.id, None)
        await asyncio.to_thread(self._owner(upload.id).unlink, missing_ok=True)

    def _keep(self, source: Path, digest: str) -> None:
        target = self.path(digest)
        with source.open("rb") as file:
            os.fsync(file.fileno())
        target.parent.mkdir(exist_ok=True)
        source.replace(target)
        sync_directory(target.parent)

    async def put(self, data: bytes, digest: str) -> None:
        """Keep a small blob whose digest has been checked."""
        if self.size(digest) is not None:
            return
        path = self._uploads / secrets.token_hex(16)
        await _disk(path.write_bytes, data)
        await _disk(self._keep, path, digest)

    async def abort(self, upload: Upload) -> None:
        self._open.pop(upload.id, None)
        await asyncio.to_thread(upload.path.unlink, missing_ok=True)
        await asyncio.to_thread(self._owner(upload.id).unlink, missing_ok=True)

    async def read(self, digest: str, start: int, count: int) -> AsyncIterator[bytes]:
        """Yield `count` bytes of a blob from `start` on."""
        file = await asyncio.to_thread(self.path(digest).open, "rb")
        try:
            file.seek(start)
            while count > 0:
                data = await asyncio.to_thread(file.read, min(READ_BYTES, count))
                if not data:
                    return
                count -= len(data)
                yield data
        finally:
            file.close()

    def sweep_uploads(self, age_s: float) -> int:
        """Remove uploads that nobody has written to for `age_s`; return how many files went. For a thread."""
        now = time.time()
        count = 0
        for path in self._uploads.iterdir():
            id = path.name.removesuffix(".owner")
            upload = self._open.get(id)
            if upload is not None and (upload.busy or time.monotonic() - upload.touched < age_s):
                continue
            try:
                data = self._uploads / id
                newest = data.stat().st_mtime if data.exists() else path.stat().st_mtime
                if now - newest < age_s:
                    continue
                path.unlink()
            except FileNotFoundError:
                continue
            self._open.pop(id, None)
            count += 1
        return count

    def _owner(self, id: str) -> Path:
        return self._uploads / f"{id}.owner"


def sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


async def _disk(call: Any, *args: Any) -> Any:
    """Do blocking work in a thread; a full disk becomes an error that says so."""
    try:
        return await asyncio.to_thread(call, *args)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise RegistryError("TOOMANYREQUESTS", 507, "the registry's disk is full; make room and push again") from None
        raise


def _unknown(id: str) -> RegistryError:
    return RegistryError("BLOB_UPLOAD_UNKNOWN", 404, f"no upload {id[:40]}; it may have been given up")
