"""An OCI image layout on disk (image-layout specification): written by `build`, read by push, import and export."""

from __future__ import annotations

import functools
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import msgspec

from atoll.images.layer import LayerBlob
from atoll.images.manifest import (
    INDEX_DEPTH_MAX,
    MANIFEST_BYTES_MAX,
    OCI_CONFIG,
    OCI_MANIFEST,
    Descriptor,
    Index,
    Manifest,
    choose,
    machine_architecture,
    parse_document,
    sha256,
)
from atoll.images.source import BlobSink, Resolved
from atoll.images.threads import in_thread
from atoll.model.errors import ImageError
from atoll.model.ports.images import ImageConfig

NAME_ANNOTATION = "org.opencontainers.image.ref.name"


class Layout:
    """The layout in `directory`. `create` makes an empty one where there is none; writers go one at a time."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._blobs = directory / "blobs" / "sha256"

    def create(self) -> None:
        self._blobs.mkdir(parents=True, exist_ok=True)
        for name, content in (("oci-layout", {"imageLayoutVersion": "1.0.0"}), ("index.json", Index(manifests=()))):
            if not (self.directory / name).exists():
                _write(self.directory / name, msgspec.json.encode(content))

    def blob(self, digest: str) -> Path:
        return self._blobs / digest.removeprefix("sha256:")

    def blobs(self) -> list[Path]:
        return list(self._blobs.iterdir())

    def put(self, data: bytes) -> str:
        """Keep a small blob and return its digest. One that is here already counts as new, so that nothing old is tidied away."""
        digest = sha256(data)
        try:
            os.utime(self.blob(digest))
        except FileNotFoundError:
            _write(self.blob(digest), data)
        return digest

    def adopt(self, file: Path, digest: str) -> None:
        """Take a finished file as the blob `digest`."""
        file.rename(self.blob(digest))

    def put_image(self, layers: list[LayerBlob], config: ImageConfig, *, created: str, comment: tuple[str, ...]) -> Resolved:
        """Write config and manifest of an image whose layers are here; `comment` says for each layer where it is from."""
        document = {
            "created": created,
            "architecture": machine_architecture(),
            "os": "linux",
            "config": _run_config(config),
            "rootfs": {"type": "layers", "diff_ids": [layer.diff_id for layer in layers]},
            "history": [{"created": created, "created_by": text} for text in comment],
        }
        data = msgspec.json.encode(document)
        manifest = Manifest(
            media_type=OCI_MANIFEST,
            config=Descriptor(OCI_CONFIG, self.put(data), len(data)),
            layers=tuple(layer.descriptor for layer in layers),
        )
        encoded = msgspec.json.encode(manifest)
        return Resolved(self.put(encoded), encoded, manifest)

    def index(self) -> Index:
        """Return what the layout lists. Raises ImageError when it is none."""
        path = self.directory / "index.json"
        document = parse_document(read_file(path), str(path))
        if not isinstance(document, Index):
            raise ImageError(f"{path} is not an index")
        return document

    def tag(self, resolved: Resolved, name: str) -> None:
        """List the image under `name`, in place of one that has it."""
        entry = Descriptor(OCI_MANIFEST, resolved.digest, len(resolved.data), annotations={NAME_ANNOTATION: name})
        others = [item for item in self.index().manifests if item.annotations.get(NAME_ANNOTATION) != name]
        _write(self.directory / "index.json", msgspec.json.encode(Index(manifests=(*others, entry))))


class LayoutImage:
    """One image of a layout; implements `Source`. Without `digest` and `name` the layout must hold only one."""

    def __init__(
        self, layout: Layout, *, digest: str | None = None, name: str | None = None, architecture: str | None = None
    ) -> None:
        self._layout = layout
        self._digest = digest
        self._name = name
        self._architecture = architecture or machine_architecture()

    async def resolve(self) -> Resolved:
        return await in_thread(self._resolve)

    def _resolve(self) -> Resolved:
        what = f"image layout {self._layout.directory}"
        digest = self._digest or self._listed(what)
        for _ in range(INDEX_DEPTH_MAX):
            data = read_file(self._layout.blob(digest))
            if sha256(data) != digest:
                raise ImageError(f"{what} is damaged: {digest} has another digest")
            document = parse_document(data, what)
            if not isinstance(document, Index):
                return Resolved(digest, data, document)
            digest = choose(document, what, architecture=self._architecture).digest
        raise ImageError(f"{what} is an index of indices more than {INDEX_DEPTH_MAX} deep")

    def _listed(self, what: str) -> str:
        index = self._layout.index()
        names = [item.annotations.get(NAME_ANNOTATION, "") for item in index.manifests]
        if self._name is not None:
            for item, name in zip(index.manifests, names, strict=True):
                if name == self._name:
                    return item.digest
            raise ImageError(f"{what} has no image {self._name!r}; it has {', '.join(names) or 'nothing'}")
        if len({item.digest for item in index.manifests}) == 1:
            return index.manifests[0].digest
        if index.manifests and all(item.platform for item in index.manifests):
            return choose(index, what, architecture=self._architecture).digest
        raise ImageError(f"{what} holds {len(names)} images", mend=f"name one of {', '.join(names)}" if any(names) else None)

    async def fetch(self, descriptor: Descriptor, target: Path, on_bytes: Callable[[int], None]) -> None:
        await in_thread(functools.partial(self._copy, descriptor, target))
        on_bytes(descriptor.size)

    def _copy(self, descriptor: Descriptor, target: Path) -> None:
        target.unlink(missing_ok=True)
        with BlobSink(target, descriptor) as sink, _open(self._layout.blob(descriptor.digest)) as file:
            sink.copy_from(file)


def read_file(path: Path, bytes_max: int = MANIFEST_BYTES_MAX) -> bytes:
    """Return a small file of a layout. Raises ImageError when it is absent or too long."""
    with _open(path) as file:
        data = file.read(bytes_max + 1)
    if len(data) > bytes_max:
        raise ImageError(f"{path} has more than {bytes_max} bytes")
    return data


def _open(path: Path) -> BinaryIO:
    try:
        return os.fdopen(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC), "rb")
    except OSError as error:
        raise ImageError(
            f"cannot read {path}: {error.strerror}", mend="give an OCI layout or the output of `docker save`"
        ) from None


def _run_config(config: ImageConfig) -> dict[str, object]:
    fields: dict[str, object] = {
        "User": config.user,
        "ExposedPorts": {port: {} for port in config.exposed_ports},
        "Env": config.env,
        "Entrypoint": config.entrypoint,
        "Cmd": config.command,
        "WorkingDir": config.workdir,
        "Labels": config.labels,
        "StopSignal": config.stop_signal,
    }
    return {key: value for key, value in fields.items() if value}


def _write(path: Path, data: bytes) -> None:
    """Make the file appear whole."""
    fd, made = tempfile.mkstemp(dir=path.parent, prefix=".new-")
    with os.fdopen(fd, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
        os.fchmod(file.fileno(), 0o644)
    Path(made).rename(path)
