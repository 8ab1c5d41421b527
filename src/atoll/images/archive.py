"""Images as files: an OCI layout (directory or tar) or what `docker save` writes comes in, an OCI layout's tar goes out."""

from __future__ import annotations

import functools
import hashlib
import io
import os
import tarfile
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import msgspec
from msgspec import Struct

from atoll.images.beneath import open_beneath
from atoll.images.layout import NAME_ANNOTATION, Layout, LayoutImage, read_file
from atoll.images.manifest import (
    CONFIG_BYTES_MAX,
    LAYERS_MAX,
    OCI_CONFIG,
    OCI_INDEX,
    OCI_LAYER_TAR,
    OCI_MANIFEST,
    Descriptor,
    Index,
    Manifest,
    sha256,
)
from atoll.images.progress import Progress
from atoll.images.source import CHUNK_BYTES, BlobSink, Resolved, Source
from atoll.images.store import ImageStore
from atoll.images.threads import in_thread
from atoll.images.unpack import unpack
from atoll.model.errors import ImageError
from atoll.model.ports.images import Image


class _Saved(Struct, frozen=True, rename="pascal"):
    """One image in `manifest.json` of a `docker save` tar."""

    config: str
    layers: tuple[str, ...]
    repo_tags: tuple[str, ...] | None = None


async def import_archive(
    store: ImageStore, path: Path, reference: str, *, name: str | None = None, progress: Progress | None = None
) -> Image:
    """Take the image at `path` into `store` under the name `reference`, and return it. Safe to repeat.

    `path` is an OCI layout's directory, its tar, or the output of `docker save` (each may be compressed); `name` chooses
    one of several images. Raises ImageError when it is none of these, or damaged, or for another machine.
    """
    if path.is_dir():
        return await store.add(reference, _source(path, name), progress=progress)
    if not path.is_file():
        raise ImageError(f"there is no image archive {path}", mend="name an OCI layout or the output of `docker save`")
    with store.workplace() as work:
        await in_thread(lambda: unpack(path, work))
        return await store.add(reference, _source(work, name), progress=progress)


async def as_layout(directory: Path, scratch: Path, *, name: str | None = None) -> tuple[Path, str]:
    """Return the layout and the digest of the image in `directory`, ready to be pushed.

    `directory` is an OCI layout, or the content of a `docker save` tar, which is rewritten as one below `scratch`.
    """
    source = _source(directory, name)
    resolved = await source.resolve()
    if isinstance(source, LayoutImage):
        return directory, resolved.digest
    layout = Layout(scratch)
    await in_thread(layout.create)
    for part in (resolved.manifest.config, *resolved.manifest.layers):
        await source.fetch(part, layout.blob(part.digest), lambda _: None)
    layout.put(resolved.data)
    return scratch, resolved.digest


async def export_archive(layout: Path, digest: str, target: Path, *, name: str = "latest") -> None:
    """Write the image `digest` of `layout` as the tar of an OCI layout, which appears at `target` when it is whole."""
    source = Layout(layout)
    resolved = await LayoutImage(source, digest=digest).resolve()
    await in_thread(lambda: _export(source, resolved, target, name))


def _source(directory: Path, name: str | None) -> Source:
    if (directory / "index.json").exists():
        return LayoutImage(Layout(directory), name=name)
    if (directory / "manifest.json").exists():
        return DockerArchive(directory, name=name)
    raise ImageError(f"{directory.name} holds no image", mend="give an OCI layout or the output of `docker save`")


class DockerArchive:
    """An unpacked `docker save` tar without an OCI index, as older Docker and podman write it. Implements `Source`."""

    def __init__(self, directory: Path, *, name: str | None = None) -> None:
        self._directory = directory
        self._name = name
        self._paths: dict[str, str] = {}

    async def resolve(self) -> Resolved:
        return await in_thread(self._resolve)

    def _resolve(self) -> Resolved:
        try:
            saved = msgspec.json.decode(read_file(self._directory / "manifest.json"), type=list[_Saved])
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise ImageError(f"the archive's manifest.json is damaged: {error}") from None
        image = self._choose(saved)
        if len(image.layers) > LAYERS_MAX:
            raise ImageError(f"the archive has {len(image.layers)} layers; at most {LAYERS_MAX} are taken")
        manifest = Manifest(
            config=self._describe(image.config, OCI_CONFIG, CONFIG_BYTES_MAX),
            layers=tuple(self._describe(layer, OCI_LAYER_TAR, None) for layer in image.layers),
        )
        data = msgspec.json.encode(manifest)
        return Resolved(sha256(data), data, manifest)

    def _choose(self, saved: list[_Saved]) -> _Saved:
        tags = [tag for image in saved for tag in image.repo_tags or ()]
        found = [image for image in saved if self._name is None or self._name in (image.repo_tags or ())]
        if len(found) != 1:
            raise ImageError(
                f"the archive holds {len(found)} images{f' named {self._name!r}' if self._name else ''}",
                mend=f"name one of {', '.join(tags)}" if tags else None,
            )
        return found[0]

    def _describe(self, path: str, media_type: str, bytes_max: int | None) -> Descriptor:
        digest, size = hashlib.sha256(), 0
        with self._open(path) as file:
            while data := file.read(CHUNK_BYTES):
                digest.update(data)
                size += len(data)
                if bytes_max is not None and size > bytes_max:
                    raise ImageError(f"{path!r} of the archive has more than {bytes_max} bytes")
        text = f"sha256:{digest.hexdigest()}"
        self._paths[text] = path
        return Descriptor(media_type, text, size)

    def _open(self, path: str) -> BinaryIO:
        """Open a file of the archive; older archives hold links from one layer to another."""
        root = os.open(self._directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            return os.fdopen(open_beneath(root, os.fsencode(path), os.O_RDONLY | os.O_NONBLOCK), "rb")
        except (OSError, ValueError) as error:
            raise ImageError(f"the archive is damaged: {path[:120]!r}: {getattr(error, 'strerror', error)}") from None
        finally:
            os.close(root)

    async def fetch(self, descriptor: Descriptor, target: Path, on_bytes: Callable[[int], None]) -> None:
        await in_thread(functools.partial(self._copy, descriptor, target))
        on_bytes(descriptor.size)

    def _copy(self, descriptor: Descriptor, target: Path) -> None:
        target.unlink(missing_ok=True)
        with BlobSink(target, descriptor) as sink, self._open(self._paths[descriptor.digest]) as file:
            sink.copy_from(file)


def _export(layout: Layout, resolved: Resolved, target: Path, name: str) -> None:
    manifest = resolved.manifest
    entry = Descriptor(OCI_MANIFEST, resolved.digest, len(resolved.data), annotations={NAME_ANNOTATION: name})
    index = Index(media_type=OCI_INDEX, manifests=(entry,))
    fd, made = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}-")
    try:
        with os.fdopen(fd, "wb") as file, tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as tar:
            small = {"oci-layout": b'{"imageLayoutVersion":"1.0.0"}', "index.json": msgspec.json.encode(index)}
            for path, data in small.items():
                _add(tar, path, len(data), io.BytesIO(data))
            for digest in sorted({resolved.digest, manifest.config.digest, *(layer.digest for layer in manifest.layers)}):
                blob = layout.blob(digest)
                with blob.open("rb") as content:
                    _add(tar, f"blobs/sha256/{blob.name}", os.fstat(content.fileno()).st_size, content)
        Path(made).chmod(0o644)
        Path(made).rename(target)
    except BaseException as error:
        Path(made).unlink(missing_ok=True)
        if isinstance(error, FileNotFoundError):
            raise ImageError(f"the layout is incomplete: {error.filename}") from None
        raise


def _add(tar: tarfile.TarFile, name: str, size: int, content: BinaryIO) -> None:
    info = tarfile.TarInfo(name)
    info.size, info.mode = size, 0o644
    tar.addfile(info, content)
