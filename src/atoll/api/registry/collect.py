"""What the registry removes by itself: uploads that were given up, manifests that nothing names, blobs that nothing refers to."""

from __future__ import annotations

import time
from collections.abc import Set
from pathlib import Path

import structlog

from atoll.api.registry.blobs import Blobs
from atoll.api.registry.repositories import Repositories

UPLOAD_KEEP_S = 3_600.0
"""An upload that was silent for so long is given up."""
MANIFEST_KEEP_S = 7 * 86_400.0
"""A manifest without a tag, which no release runs, is kept for so long, so that a rollback by hand still finds it."""
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
    tags = (repositories.digest_of(repository, tag) for tag in repositories.tags(repository) or ())
    roots = {digest for digest in tags if digest is not None} | set(pinned)
    roots |= {path.name for path in repositories.digests(repository, "manifests") if not _older(path, at, MANIFEST_KEEP_S)}
    manifests: set[str] = set()
    wanted: set[str] = set()
    while roots:
        digest = roots.pop()
        manifests.add(digest)
        manifest = repositories.read_manifest(digest)
        if manifest is not None:
            wanted.update(manifest.blobs)
            roots.update(set(manifest.children) - manifests)
    kept: set[str] = set()
    for path in repositories.digests(repository, "manifests"):
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


def _older(path: Path, at: float, age_s: float) -> bool:
    try:
        return at - path.stat().st_mtime > age_s
    except FileNotFoundError:
        return False
