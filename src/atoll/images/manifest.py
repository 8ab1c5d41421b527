"""Manifests, indices and configs of OCI and Docker images: bytes in, checked records out."""

from __future__ import annotations

import hashlib
import platform
from typing import Annotated, Any, TypeVar

import msgspec
from msgspec import Meta, Struct, field

from atoll.images.reference import is_digest
from atoll.model.errors import ImageError
from atoll.model.ports.images import ImageConfig

MANIFEST_BYTES_MAX = 4 << 20
"""The largest manifest or index that is read, in bytes (the distribution specification's own recommendation)."""
CONFIG_BYTES_MAX = 8 << 20
LAYERS_MAX = 256
LAYER_BYTES_MAX = 64 << 30
INDEX_DEPTH_MAX = 3

OCI_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
OCI_INDEX = "application/vnd.oci.image.index.v1+json"
OCI_CONFIG = "application/vnd.oci.image.config.v1+json"
OCI_LAYER_ZSTD = "application/vnd.oci.image.layer.v1.tar+zstd"
OCI_LAYER_TAR = "application/vnd.oci.image.layer.v1.tar"
DOCKER_MANIFEST = "application/vnd.docker.distribution.manifest.v2+json"
DOCKER_LIST = "application/vnd.docker.distribution.manifest.list.v2+json"
ACCEPT = ", ".join((OCI_MANIFEST, DOCKER_MANIFEST, OCI_INDEX, DOCKER_LIST))

T = TypeVar("T")
_ARCHITECTURES = {"x86_64": "amd64", "amd64": "amd64", "aarch64": "arm64", "arm64": "arm64", "riscv64": "riscv64"}


class Platform(Struct, frozen=True):
    architecture: str = ""
    os: str = ""
    variant: str = ""

    def __str__(self) -> str:
        return "/".join(part for part in (self.os, self.architecture, self.variant) if part)


class Descriptor(Struct, frozen=True, rename="camel", omit_defaults=True):
    media_type: str
    digest: str
    size: Annotated[int, Meta(ge=0)]
    platform: Platform | None = None
    annotations: dict[str, str] = {}


class Manifest(Struct, frozen=True, rename="camel", kw_only=True):
    schema_version: int = 2
    media_type: str = OCI_MANIFEST
    config: Descriptor
    layers: tuple[Descriptor, ...]
    annotations: dict[str, str] = {}


class Index(Struct, frozen=True, rename="camel", kw_only=True):
    schema_version: int = 2
    media_type: str = OCI_INDEX
    manifests: tuple[Descriptor, ...]
    annotations: dict[str, str] = {}


class RunConfig(Struct, frozen=True, kw_only=True, rename="pascal"):
    """The `config` part of an image's config; every field may be null, as Docker writes it."""

    entrypoint: tuple[str, ...] | None = None
    cmd: tuple[str, ...] | None = None
    env: tuple[str, ...] | None = None
    working_dir: str | None = None
    user: str | None = None
    stop_signal: str | None = None
    exposed_ports: dict[str, Any] | None = None
    labels: dict[str, str] | None = None


class RootFs(Struct, frozen=True):
    type: str = "layers"
    diff_ids: tuple[str, ...] = ()


class ConfigFile(Struct, frozen=True, kw_only=True):
    architecture: str = ""
    os: str = ""
    config: RunConfig | None = None
    rootfs: RootFs = field(default_factory=RootFs)

    def to_image_config(self) -> ImageConfig:
        run = self.config or RunConfig()
        return ImageConfig(
            entrypoint=run.entrypoint or (),
            command=run.cmd or (),
            env=run.env or (),
            workdir=run.working_dir or "/",
            user=run.user or "",
            stop_signal=run.stop_signal or None,
            exposed_ports=tuple(sorted(run.exposed_ports or {})),
            labels=run.labels or {},
        )


class _Kind(Struct, frozen=True, rename="camel"):
    """Enough of a document to tell what it is."""

    schema_version: int = 2
    media_type: str = ""
    config: msgspec.Raw = msgspec.Raw()
    manifests: msgspec.Raw = msgspec.Raw()


def sha256(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def machine_architecture() -> str:
    """Return this machine's architecture in OCI's words (`amd64`, `arm64`)."""
    machine = platform.machine()
    return _ARCHITECTURES.get(machine, machine)


def parse_document(data: bytes, what: str) -> Manifest | Index:
    """Return the manifest or index in `data`, checked. Raises ImageError naming `what`."""
    kind = _decode(data, _Kind, what)
    if kind.schema_version != 2:
        raise ImageError(
            f"{what}: manifest schema {kind.schema_version} is not supported", mend="push the image again with a newer tool"
        )
    if len(bytes(kind.manifests)) > 0:
        index = _decode(data, Index, what)
        for descriptor in index.manifests:
            _check(descriptor, what, MANIFEST_BYTES_MAX)
        return index
    manifest = _decode(data, Manifest, what)
    _check(manifest.config, what, CONFIG_BYTES_MAX)
    if len(manifest.layers) > LAYERS_MAX:
        raise ImageError(f"{what}: {len(manifest.layers)} layers; at most {LAYERS_MAX} are taken", mend="squash the image")
    for descriptor in manifest.layers:
        _check(descriptor, what, LAYER_BYTES_MAX)
    return manifest


def parse_config(data: bytes, manifest: Manifest, what: str, *, architecture: str) -> ConfigFile:
    """Return the config in `data`, checked against its manifest and this machine. Raises ImageError."""
    config = _decode(data, ConfigFile, what)
    if config.os not in ("", "linux") or config.architecture not in ("", architecture):
        raise ImageError(
            f"{what} is for {config.os}/{config.architecture}; this machine is linux/{architecture}",
            mend="push an image for this machine's architecture, or a manifest list that has it",
        )
    diff_ids = config.rootfs.diff_ids
    if len(diff_ids) != len(manifest.layers):
        raise ImageError(f"{what} is damaged: {len(manifest.layers)} layers, but {len(diff_ids)} diff ids")
    for diff_id in diff_ids:
        if not is_digest(diff_id):
            raise ImageError(f"{what} is damaged: {diff_id[:80]!r} is not a sha256 digest")
    return config


def choose(index: Index, what: str, *, architecture: str) -> Descriptor:
    """Return the index's entry for linux on `architecture`. Raises ImageError that lists what there is."""
    candidates = [
        descriptor
        for descriptor in index.manifests
        if descriptor.platform is not None and (descriptor.platform.os, descriptor.platform.architecture) == ("linux", architecture)
    ]
    if candidates:
        return min(candidates, key=lambda descriptor: descriptor.platform.variant if descriptor.platform else "")
    if len(index.manifests) == 1 and index.manifests[0].platform is None:
        return index.manifests[0]
    found = ", ".join(sorted({str(descriptor.platform or "unknown") for descriptor in index.manifests})[:16]) or "nothing"
    raise ImageError(
        f"{what} has no image for linux/{architecture}; it has {found}",
        mend="push one for this machine's architecture",
    )


def _check(descriptor: Descriptor, what: str, size_max: int) -> None:
    if not is_digest(descriptor.digest):
        raise ImageError(f"{what} is damaged: {descriptor.digest[:80]!r} is not a sha256 digest")
    if descriptor.size > size_max:
        raise ImageError(f"{what}: a part has {descriptor.size} bytes; at most {size_max} are taken")


def _decode(data: bytes, kind: type[T], what: str) -> T:
    try:
        return msgspec.json.decode(data, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ImageError(f"{what} is damaged: {error}") from None
