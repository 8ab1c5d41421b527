"""What the registry removes by itself: uploads that were given up, manifests that nothing names, blobs that nothing refers to."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Set
from pathlib import Path

import structlog

from atoll.api.registry.blobs import Blobs
from atoll.api.registry.repositories import Repositories

UPLOAD_KEEP_S = 3_600.0
"""An upload that was silent for so long is given up."""
MANIFEST_KEEP_S = 7 * 86_400.0
"""A manifest is kept for so long after its last tag and the last release that runs it: a rollback by hand still finds it."""
OWN_TAG_CHARS_MIN = 12
"""A tag that is the beginning of its image's digest, as each deploy pushes one, does not say that anyone wants the image."""
BLOB_KEEP_S = 86_400.0
"""A blob that no manifest refers to is kept for so long: its manifest may still come."""

log = structlog.get_logger()


def collect(blobs: Blobs, repositories: Repositories, pinned: Set[str], *, now: float | None = None) -> int:
    """Remove what is not needed and return the bytes freed; `pinned` are digests that releases run. For a thread."""
    at = time.time() if now is None else now
    blobs.sweep_uploads(UPLOAD_KEEP_S)
    linked: set[str] = set()
    for repository in repositories.all():
        linked |= _collect_repository(repositories, repository, pinned, at)
    freed = 0
    for path in blobs.all():
        if f"sha256:{path.name}" not in linked and _older(path, at, BLOB_KEEP_S):
            freed += path.stat().st_size
            path.unlink()
    if freed:
        log.info("the registry has removed what nothing needs", freed_bytes=freed)
    return freed


def _collect_repository(repositories: Repositories, repository: str, pinned: Set[str], at: float) -> set[str]:
    """Remove one repository's surplus links; return the digests that it still has."""
    tags = ((tag, repositories.digest_of(repository, tag)) for tag in repositories.tags(repository) or ())
    named = {digest for tag, digest in tags if digest is not None and not _is_own(tag, digest)}
    needed, _ = _reached(repositories, named | pinned)
    links = repositories.digests(repository, "manifests")
    for path in links:
        if path.name in needed:
            _touch(path, at)  # its time begins when it is no longer needed
    manifests, wanted = _reached(repositories, needed | {path.name for path in links if not _older(path, at, MANIFEST_KEEP_S)})
    kept: set[str] = set()
    for path in links:
        if path.name in manifests:
            kept.add(path.name)
        else:
            repositories.remove_manifest(repository, path.name)
    for path in repositories.digests(repository, "blobs"):
        if path.name in wanted or not _older(path, at, BLOB_KEEP_S):
            kept.add(path.name)
        else:
            repositories.remove_blob(repository, path.name)
    return kept


def _is_own(tag: str, digest: str) -> bool:
    return len(tag) >= OWN_TAG_CHARS_MIN and digest.removeprefix("sha256:").startswith(tag)


def _reached(repositories: Repositories, roots: Set[str]) -> tuple[set[str], set[str]]:
    """Return the manifests that these are and lead to, and the blobs of them all."""
    ahead = set(roots)
    manifests: set[str] = set()
    blobs: set[str] = set()
    while ahead:
        digest = ahead.pop()
        manifests.add(digest)
        manifest = repositories.read_manifest(digest)
        if manifest is not None:
            blobs.update(manifest.blobs)
            ahead.update(set(manifest.children) - manifests)
    return manifests, blobs


def _touch(path: Path, at: float) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.utime(path, (at, at))


def _older(path: Path, at: float, age_s: float) -> bool:
    try:
        return at - path.stat().st_mtime > age_s
    except FileNotFoundError:
        return False
