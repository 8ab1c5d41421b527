"""Repositories on disk: which blobs and manifests a repository has, and what its tags name.

    repositories/PROJECT/NAME/blobs/DIGEST       an empty file: the repository has this blob
                             /manifests/DIGEST   JSON: media type
                             /tags/TAG           the digest of a manifest

A blob is shared by all repositories, but can be had only through one that has it.
"""

from __future__ import annotations

import os
import secrets
from pathlib import Path

import msgspec

from atoll.api.registry.blobs import Blobs, sync_directory
from atoll.api.registry.names import RegistryError, check_digest

MANIFEST_BYTES_MAX = 4 << 20
OCI_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
OCI_INDEX = "application/vnd.oci.image.index.v1+json"
DOCKER_MANIFEST = "application/vnd.docker.distribution.manifest.v2+json"
DOCKER_LIST = "application/vnd.docker.distribution.manifest.list.v2+json"
_MANIFESTS = frozenset({OCI_MANIFEST, DOCKER_MANIFEST})
_INDICES = frozenset({OCI_INDEX, DOCKER_LIST})


class _Descriptor(msgspec.Struct, frozen=True):
    digest: str
    size: int = 0
    urls: tuple[str, ...] = ()


class Manifest(msgspec.Struct, frozen=True):
    """What the registry must know of a manifest or an index: what it refers to."""

    mediaType: str = ""  # noqa: N815 (the specification's name)
    config: _Descriptor | None = None
    layers: tuple[_Descriptor, ...] = ()
    manifests: tuple[_Descriptor, ...] | None = None

    @property
    def blobs(self) -> list[str]:
        """Digests of config and layers that the registry itself must have."""
        config = [self.config.digest] if self.config is not None else []
        return config + [layer.digest for layer in self.layers if not layer.urls]

    @property
    def children(self) -> list[str]:
        return [child.digest for child in self.manifests or ()]


class _Link(msgspec.Struct, frozen=True):
    media_type: str


def parse_manifest(data: bytes, content_type: str) -> tuple[Manifest, str]:
    """Return a manifest and its media type. Raises RegistryError for what is none."""
    try:
        manifest = msgspec.json.decode(data, type=Manifest)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise RegistryError("MANIFEST_INVALID", 400, f"not a manifest: {error}") from None
    media_type = manifest.mediaType or content_type.partition(";")[0].strip()
    if media_type not in _MANIFESTS | _INDICES:
        raise RegistryError("MANIFEST_INVALID", 415, f"media type {media_type[:80]!r} is not taken; OCI and Docker v2 images are")
    if media_type in _MANIFESTS and manifest.config is None:
        raise RegistryError("MANIFEST_INVALID", 400, "the manifest names no config")
    if media_type in _INDICES and manifest.manifests is None:
        raise RegistryError("MANIFEST_INVALID", 400, "the index has no list of manifests")
    for digest in (*manifest.blobs, *manifest.children):
        check_digest(digest)
    return manifest, media_type


class Repositories:
    """See the module. Names, tags and digests have been checked before they come here."""

    def __init__(self, root: Path, blobs: Blobs) -> None:
        self._root = root / "repositories"
        self._blobs = blobs
        self._root.mkdir(parents=True, exist_ok=True)

    def folder(self, repository: str) -> Path:
        return self._root / repository

    def all(self) -> list[str]:
        return sorted(f"{project.name}/{path.name}" for project in self._root.iterdir() for path in project.iterdir())

    def has_blob(self, repository: str, digest: str) -> bool:
        return (self.folder(repository) / "blobs" / digest).exists() and self._blobs.size(digest) is not None

    def link_blob(self, repository: str, digest: str) -> None:
        self._write(self.folder(repository) / "blobs" / digest, b"")

    def media_type(self, repository: str, digest: str) -> str | None:
        """Return a manifest's media type, None when the repository does not have it."""
        try:
            data = (self.folder(repository) / "manifests" / digest).read_bytes()
        except FileNotFoundError:
            return None
        return msgspec.json.decode(data, type=_Link).media_type

    def link_manifest(self, repository: str, digest: str, media_type: str) -> None:
        self._write(self.folder(repository) / "manifests" / digest, msgspec.json.encode(_Link(media_type)))

    def tag(self, repository: str, tag: str, digest: str) -> None:
        self._write(self.folder(repository) / "tags" / tag, digest.encode())

    def digest_of(self, repository: str, tag: str) -> str | None:
        """Return the digest that a tag names, None when there is none."""
        try:
            return (self.folder(repository) / "tags" / tag).read_text()
        except FileNotFoundError:
            return None

    def tags(self, repository: str) -> list[str] | None:
        """Return all tags in order, None when there is no such repository."""
        folder = self.folder(repository)
        if not folder.is_dir():
            return None
        try:
            return sorted(path.name for path in (folder / "tags").iterdir() if not path.name.startswith("."))
        except FileNotFoundError:
            return []

    def digests(self, repository: str, kind: str) -> list[Path]:
        """Return the links of one kind, `blobs` or `manifests`."""
        try:
            return [path for path in (self.folder(repository) / kind).iterdir() if not path.name.startswith(".")]
        except FileNotFoundError:
            return []

    def remove_tag(self, repository: str, tag: str) -> bool:
        return _remove(self.folder(repository) / "tags" / tag)

    def remove_manifest(self, repository: str, digest: str) -> bool:
        """Remove a manifest and every tag that names it."""
        for tag in self.tags(repository) or ():
            if self.digest_of(repository, tag) == digest:
                self.remove_tag(repository, tag)
        return _remove(self.folder(repository) / "manifests" / digest)

    def remove_blob(self, repository: str, digest: str) -> bool:
        return _remove(self.folder(repository) / "blobs" / digest)

    def read_manifest(self, digest: str) -> Manifest | None:
        try:
            return msgspec.json.decode(self._blobs.path(digest).read_bytes(), type=Manifest)
        except (FileNotFoundError, msgspec.DecodeError):
            return None

    def _write(self, path: Path, data: bytes) -> None:
        """Make a file whole and lasting before it has its name."""
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.parent / f".{secrets.token_hex(8)}"
        with draft.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
        sync_directory(path.parent)


def _remove(path: Path) -> bool:
    try:
        path.unlink()
    except FileNotFoundError:
        return False
    return True
