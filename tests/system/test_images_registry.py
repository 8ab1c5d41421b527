"""Images against Debian's docker-registry, filled by skopeo and by our own push."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import json
import os
import random
import re
import shutil
import stat
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import httpx
import pytest
import zstandard

from atoll.images.archive import as_layout, export_archive, import_archive
from atoll.images.layer import LayerBlob, LayerWriter
from atoll.images.layout import NAME_ANNOTATION, Layout, LayoutImage
from atoll.images.manifest import OCI_INDEX, OCI_LAYER_TAR, machine_architecture
from atoll.images.push import push
from atoll.images.registry import Registries
from atoll.images.store import ImageStore
from atoll.images.transport import Access, Patience
from atoll.images.unpack import unpack
from atoll.model.errors import Exhausted, ImageError, Unavailable
from atoll.model.ports.images import ImageConfig, PullProgress

pytestmark = [
    pytest.mark.system,
    pytest.mark.skipif(os.geteuid() != 0, reason="unpacking layers needs root"),
    pytest.mark.skipif(not shutil.which("docker-registry"), reason="no docker-registry on this machine"),
    pytest.mark.skipif(not shutil.which("skopeo"), reason="no skopeo on this machine"),
]

PATIENCE = Patience(connect_s=2, stall_s=2, tries=3, backoff_s=0.01)
USER, PASSWORD = "coral", "reef-42"
PASSWORD_BCRYPT = "$2b$04$t83aVejcz5L88FUNkhKdzO.1Oc3IDpG2Psr7DczW6rdlg540bsD0S"


def start_registry(directory: Path, auth: str = "") -> tuple[subprocess.Popen[bytes], str]:
    config = directory / "registry.yml"
    config.write_text(
        f"version: 0.1\nlog: {{level: info, accesslog: {{disabled: true}}}}\n"
        f"storage: {{filesystem: {{rootdirectory: {directory}/data}}, delete: {{enabled: true}}}}\n"
        f"http: {{addr: '127.0.0.1:0'}}\n{auth}"
    )
    log = directory / "log"  # a file: a pipe that nobody reads would fill and stop the registry
    with log.open("wb") as file:
        process = subprocess.Popen(["docker-registry", "serve", str(config)], stdout=file, stderr=file)
    for _ in range(500):
        if match := re.search(rb"listening on 127\.0\.0\.1:(\d+)", log.read_bytes()):
            return process, f"127.0.0.1:{int(match[1])}"
        time.sleep(0.01)
    process.kill()
    raise AssertionError(f"docker-registry did not start: {log.read_text()}")


@contextlib.contextmanager
def running_registry(directory: Path, auth: str = "") -> Iterator[str]:
    process, host = start_registry(directory, auth)
    try:
        yield host
    finally:
        process.kill()
        process.wait()


def make_layer(layout: Layout, name: str, files: dict[str, bytes]) -> LayerBlob:
    path = layout.directory / f"{name}.layer"
    writer = LayerWriter(path, mtime=1_000_000_000)
    for directory in sorted({str(parent) for file in files for parent in Path(file).parents} - {"."}):
        writer.directory(directory)
    for file, data in sorted(files.items()):
        writer.bytes(file, data)
    blob = writer.close()
    layout.adopt(path, blob.digest)
    return blob


@pytest.fixture(scope="module")
def layout(tmp_path_factory: pytest.TempPathFactory) -> Layout:
    """`it` has zstd layers, `plain` the same ones as bare tars."""
    layout = Layout(tmp_path_factory.mktemp("layout"))
    layout.create()
    layers = [
        make_layer(layout, "one", {"etc/name": b"lower\n", "etc/gone": b"x", "opt/old/a": b"a", "big": os.urandom(6 << 20)}),
        make_layer(layout, "two", {"etc/name": b"upper\n", "etc/.wh.gone": b"", "opt/old/.wh..wh..opq": b"", "opt/old/b": b"b"}),
    ]
    config = ImageConfig(command=("/bin/app",), env=("A=1",), workdir="/srv", user="1000", exposed_ports=("80/tcp",))
    for name, parts in (("it", layers), ("plain", [as_tar(layout, layer) for layer in layers])):
        layout.tag(layout.put_image(parts, config, created="2001-09-09T01:46:40Z", comment=("one", "two")), name)
    return layout


def as_tar(layout: Layout, layer: LayerBlob) -> LayerBlob:
    data = zstandard.ZstdDecompressor().decompressobj().decompress(layout.blob(layer.digest).read_bytes())
    assert layout.put(data) == layer.diff_id
    return LayerBlob(layer.diff_id, len(data), layer.diff_id, OCI_LAYER_TAR)


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with running_registry(tmp_path_factory.mktemp("registry")) as host:
        yield host


@pytest.fixture(scope="module")
def filled(registry: str, layout: Layout) -> str:
    """`raw/zstd` as we wrote it; `raw/gzip` and `raw/docker` compressed and converted by skopeo."""
    skopeo("copy", f"oci:{layout.directory}:plain", f"docker://{registry}/raw/gzip:1")
    skopeo("copy", "--format", "v2s2", f"oci:{layout.directory}:plain", f"docker://{registry}/raw/docker:1")
    # last, or skopeo remembers that there is a zstd form of the same layers and uses it for the others too
    skopeo("copy", f"oci:{layout.directory}:it", f"docker://{registry}/raw/zstd:1")
    return registry


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=100m", "tmpfs", str(disk)], check=True)
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def skopeo(*arguments: str) -> None:
    tls = [f"--{end}-tls-verify=false" for end, at in (("src", -2), ("dest", -1)) if arguments[at].startswith("docker://")]
    policy = ["--insecure-policy"]
    done = subprocess.run(["skopeo", *policy, arguments[0], *tls, *arguments[1:]], capture_output=True, timeout=60)
    assert done.returncode == 0, done.stderr.decode()


@pytest.fixture
async def registries(filled: str) -> AsyncIterator[Registries]:
    registries = Registries(default=filled, patience=PATIENCE)
    yield registries
    await registries.aclose()


@pytest.mark.parametrize("name", ["raw/zstd", "raw/gzip", "raw/docker"])
async def test_an_image_is_pulled_and_unpacked_for_overlayfs(registries: Registries, name: str, tmp_path: Path) -> None:
    store = ImageStore(tmp_path / "images", registries)
    seen: list[PullProgress] = []
    image = await store.ensure(f"{name}:1", progress=seen.append)
    lower, upper = image.layers
    assert (lower / "etc/name").read_bytes() == b"lower\n"
    assert (upper / "etc/name").read_bytes() == b"upper\n"
    gone = (upper / "etc/gone").stat()
    assert stat.S_ISCHR(gone.st_mode)
    assert gone.st_rdev == 0
    assert os.getxattr(upper / "opt/old", "trusted.overlay.opaque") == b"y"
    assert image.config.command == ("/bin/app",)
    assert image.config.exposed_ports == ("80/tcp",)
    assert {p.phase for p in seen} >= {"resolve", "download"}
    assert seen[-1].done_bytes <= seen[-1].total_bytes
    with mounted(image.layers, tmp_path / "root") as root:
        assert [path.name for path in (root / "opt/old").iterdir()] == ["b"]
        assert not (root / "etc/gone").exists()
    assert list((tmp_path / "images/blobs").iterdir()) == []
    assert list((tmp_path / "images/making").iterdir()) == []


@contextlib.contextmanager
def mounted(layers: tuple[Path, ...], target: Path) -> Iterator[Path]:
    target.mkdir()
    lower = ":".join(str(layer) for layer in reversed(layers))
    subprocess.run(["mount", "-t", "overlay", "overlay", "-o", f"lowerdir={lower}", str(target)], check=True)
    try:
        yield target
    finally:
        subprocess.run(["umount", str(target)], check=True)


async def test_what_we_push_is_what_we_and_skopeo_pull(
    registries: Registries, registry: str, layout: Layout, tmp_path: Path
) -> None:
    digest = next(item.digest for item in layout.index().manifests if item.annotations[NAME_ANNOTATION] == "it")
    seen: list[PullProgress] = []
    pinned = await push(
        registries, layout.directory, digest, f"{registry}/pushed/app:v1", progress=seen.append, piece_bytes=1 << 20
    )
    assert pinned == f"{registry}/pushed/app@{digest}"
    assert seen[-1].done_bytes == seen[-1].total_bytes
    await push(registries, layout.directory, digest, f"{registry}/pushed/app:v1")
    store = ImageStore(tmp_path / "images", registries)
    image = await store.ensure(pinned)
    assert image.digest == digest
    skopeo("copy", f"docker://{registry}/pushed/app:v1", f"oci:{tmp_path}/back:it")


async def test_a_manifest_list_gives_the_image_for_this_machine(
    registry: str, registries: Registries, layout: Layout, tmp_path: Path
) -> None:
    ours = next(item for item in layout.index().manifests if item.annotations[NAME_ANNOTATION] == "it")
    await push(registries, layout.directory, ours.digest, f"{registry}/raw/list:x")
    platform = {"architecture": machine_architecture(), "os": "linux"}
    other = {"architecture": "s390x", "os": "linux"}
    entries = [{"mediaType": ours.media_type, "digest": ours.digest, "size": ours.size, "platform": p} for p in (other, platform)]
    for tag, manifests in (("both", entries), ("other", entries[:1])):
        body = json.dumps({"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": manifests})
        url = f"http://{registry}/v2/raw/list/manifests/{tag}"
        async with httpx.AsyncClient() as http:
            assert (await http.put(url, content=body, headers={"Content-Type": OCI_INDEX})).status_code == 201
    store = ImageStore(tmp_path / "images", registries)
    assert (await store.ensure("raw/list:both")).digest == ours.digest
    with pytest.raises(ImageError, match="it has linux/s390x"):
        await store.ensure("raw/list:other")


async def test_a_missing_image_is_one_clear_error(registries: Registries, tmp_path: Path) -> None:
    store = ImageStore(tmp_path / "images", registries)
    with pytest.raises(ImageError, match="there is no image"):
        await store.ensure("raw/zstd:nothing")
    with pytest.raises(ImageError, match="there is no image"):
        await store.ensure("raw/zstd@sha256:" + "0" * 64)


async def test_basic_credentials_open_a_private_registry(layout: Layout, tmp_path: Path) -> None:
    (tmp_path / "htpasswd").write_text(f"{USER}:{PASSWORD_BCRYPT}\n")
    auth = f"auth: {{htpasswd: {{realm: reef, path: {tmp_path}/htpasswd}}}}\n"
    digest = layout.index().manifests[0].digest
    with running_registry(tmp_path, auth) as host:
        for access, refused in (
            (Access(username=USER, password=PASSWORD), False),
            (Access(username=USER, password="no"), True),
            (Access(), True),
        ):
            registries = Registries({host: access}, patience=PATIENCE)
            try:
                if refused:
                    with pytest.raises(ImageError, match="refuses"):
                        await ImageStore(tmp_path / "refused", registries).ensure(f"{host}/p/app:1")
                else:
                    await push(registries, layout.directory, digest, f"{host}/p/app:1")
                    image = await ImageStore(tmp_path / "images", registries).ensure(f"{host}/p/app:1")
                    assert image.digest == digest
            finally:
                await registries.aclose()


async def test_a_dead_registry_is_unavailable_and_ready_images_stay(registries: Registries, tmp_path: Path) -> None:
    first = await ImageStore(tmp_path / "images", registries).ensure("raw/zstd:1")
    dead = Registries(default="127.0.0.1:1", patience=PATIENCE)
    store = ImageStore(tmp_path / "images", dead)
    assert await store.find("raw/zstd:1") == first
    assert await store.ensure("raw/zstd:1") == first
    with pytest.raises(Unavailable, match="does not answer"):
        await store.ensure("raw/zstd:2")
    await dead.aclose()


async def test_collect_removes_what_is_not_kept_and_shares_layers(registries: Registries, tmp_path: Path) -> None:
    store = ImageStore(tmp_path / "images", registries, hold_s=0)
    zstd, gzip = await asyncio.gather(store.ensure("raw/zstd:1"), store.ensure("raw/gzip:1"))
    assert zstd.layers == gzip.layers
    assert await store.collect([zstd.digest]) == 0
    assert await store.find("raw/gzip:1") is None
    assert all(layer.is_dir() for layer in zstd.layers)
    assert await store.collect([]) > 6 << 20
    assert await store.find("raw/zstd:1") is None
    assert list((tmp_path / "images/layers").iterdir()) == []
    again = await store.ensure("raw/zstd:1")
    assert all(layer.is_dir() for layer in again.layers)


async def test_concurrent_callers_share_one_pull(registries: Registries, tmp_path: Path) -> None:
    store = ImageStore(tmp_path / "images", registries)
    images = await asyncio.gather(*(store.ensure("raw/zstd:1") for _ in range(20)))
    assert len({image.digest for image in images}) == 1
    assert len(list((tmp_path / "images/records").iterdir())) == 1


async def test_a_docker_archive_becomes_a_layout_that_can_be_pushed(
    layout: Layout, registries: Registries, registry: str, tmp_path: Path
) -> None:
    skopeo("copy", f"oci:{layout.directory}:plain", f"docker-archive:{tmp_path}/archive:reg.example/app:1")
    unpack(tmp_path / "archive", tmp_path / "content")
    made, digest = await as_layout(tmp_path / "content", tmp_path / "made")
    pinned = await push(registries, made, digest, f"{registry}/pushed/docker:1")
    image = await ImageStore(tmp_path / "images", registries).ensure(pinned)
    assert image.digest == digest
    assert await as_layout(layout.directory, tmp_path / "unused", name="it") == (
        layout.directory,
        next(item.digest for item in layout.index().manifests if item.annotations[NAME_ANNOTATION] == "it"),
    )


async def test_a_name_follows_the_image_that_was_added_last(layout: Layout, registries: Registries, tmp_path: Path) -> None:
    store = ImageStore(tmp_path / "images", registries)
    first = await store.add("reg.example/app:1", LayoutImage(layout, name="it"))
    second = await store.add("reg.example/app:1", LayoutImage(layout, name="plain"))
    assert first.digest != second.digest
    for again in (store, ImageStore(tmp_path / "images", registries)):
        assert await again.find("reg.example/app:1") == second
        kept = await again.find(f"reg.example/app@{first.digest}")
        assert kept is not None
        assert kept.layers == second.layers


@pytest.mark.parametrize("form", ["oci directory", "oci tar", "docker save", "docker save, gzip"])
async def test_archives_are_imported(layout: Layout, registries: Registries, tmp_path: Path, form: str) -> None:
    archive = tmp_path / "archive"
    if form == "oci directory":
        archive = layout.directory
    elif form == "oci tar":
        skopeo("copy", f"oci:{layout.directory}:it", f"oci-archive:{archive}:it")
    else:
        skopeo("copy", f"oci:{layout.directory}:plain", f"docker-archive:{archive}:reg.example/app:1")
        if "gzip" in form:
            archive.write_bytes(gzip.compress(archive.read_bytes(), 1))
    store = ImageStore(tmp_path / "images", registries)
    name = "it" if form == "oci directory" else None
    image = await import_archive(store, archive, "cell.internal/default/app:1", name=name)
    assert await store.find("cell.internal/default/app:1") == image
    assert (image.layers[0] / "etc/name").read_bytes() == b"lower\n"
    assert image.config.command == ("/bin/app",)
    assert list((tmp_path / "images/making").iterdir()) == []


async def test_an_exported_image_comes_back_with_its_digest(layout: Layout, registries: Registries, tmp_path: Path) -> None:
    digest = next(item.digest for item in layout.index().manifests if item.annotations[NAME_ANNOTATION] == "it")
    await export_archive(layout.directory, digest, tmp_path / "out.tar", name="v1")
    store = ImageStore(tmp_path / "images", registries)
    assert (await import_archive(store, tmp_path / "out.tar", "reg.example/app:1")).digest == digest
    skopeo("copy", f"oci-archive:{tmp_path}/out.tar:v1", f"dir:{tmp_path}/dir")


async def test_what_is_no_archive_is_one_clear_error(layout: Layout, registries: Registries, tmp_path: Path) -> None:
    store = ImageStore(tmp_path / "images", registries)
    (tmp_path / "noise").write_bytes(os.urandom(5000))
    (tmp_path / "empty").mkdir()
    for path in (tmp_path / "noise", tmp_path / "empty", tmp_path / "absent"):
        with pytest.raises(ImageError):
            await import_archive(store, path, "reg.example/app:1")
    with pytest.raises(ImageError, match="no image 'other'") as caught:
        await import_archive(store, layout.directory, "reg.example/app:1", name="other")
    assert "it, plain" in str(caught.value)
    assert list((tmp_path / "images/making").iterdir()) == []


async def test_a_disk_that_fills_up_leaves_nothing_half_made(layout: Layout, registries: Registries, small_disk: Path) -> None:
    """The layer is tiny when packed, so that only unpacking it finds the disk full."""
    bomb = make_layer(layout, "zeros", {"a": bytes(150 << 20)})
    image = layout.put_image([bomb], ImageConfig(), created="2001-09-09T01:46:40Z", comment=("zeros",))
    store = ImageStore(small_disk / "images", registries)
    with pytest.raises(Exhausted, match="the disk is full"):
        await store.add("reg.example/app:1", LayoutImage(layout, digest=image.digest))
    left = [path for path in (small_disk / "images").rglob("*") if path.parent != small_disk / "images"]
    assert left == []


async def test_a_layer_that_only_implies_a_directory_does_not_change_it(
    layout: Layout, registries: Registries, tmp_path: Path
) -> None:
    writer = LayerWriter(layout.directory / "sticky.layer", mtime=1)
    writer.directory("tmp", 0o1777)
    lower = writer.close()
    layout.adopt(layout.directory / "sticky.layer", lower.digest)
    writer = LayerWriter(layout.directory / "implied.layer", mtime=1)
    writer.bytes("tmp/x", b"x")
    upper = writer.close()
    layout.adopt(layout.directory / "implied.layer", upper.digest)
    store = ImageStore(tmp_path / "images", registries)
    image = layout.put_image([lower, upper], ImageConfig(), created="2001-09-09T01:46:40Z", comment=("a", "b"))
    ready = await store.add("reg.example/app:1", LayoutImage(layout, digest=image.digest))
    assert stat.S_IMODE((ready.layers[1] / "tmp").stat().st_mode) == 0o1777
    again = await store.add("reg.example/app:2", LayoutImage(layout, digest=image.digest))
    assert again.layers == ready.layers
    alone = layout.put_image([upper], ImageConfig(), created="2001-09-09T01:46:40Z", comment=("b",))
    other = await store.add("reg.example/app:3", LayoutImage(layout, digest=alone.digest))
    assert stat.S_IMODE((other.layers[0] / "tmp").stat().st_mode) == 0o755


PULL = """
import asyncio, sys
from pathlib import Path
from atoll.images.registry import Registries
from atoll.images.store import ImageStore
store = ImageStore(Path(sys.argv[1]), Registries())
print("ready", flush=True)
print(asyncio.run(store.ensure(sys.argv[2])).digest, flush=True)
"""


def test_kill_9_at_any_moment_of_a_pull_loses_nothing_and_leaves_nothing(registry: str, layout: Layout, tmp_path: Path) -> None:
    files = {f"d{n % 20}/f{n}": os.urandom(20_000) for n in range(300)}
    parts = [make_layer(layout, f"many{n}", dict(list(files.items())[n::3])) for n in range(3)]
    image = layout.put_image(parts, ImageConfig(), created="2001-09-09T01:46:40Z", comment=("a", "b", "c"))
    reference = f"{registry}/killed/app@{image.digest}"

    async def fill() -> None:
        registries = Registries(patience=PATIENCE)
        await push(registries, layout.directory, image.digest, f"{registry}/killed/app:1")
        await registries.aclose()

    asyncio.run(fill())
    rng = random.Random(7)
    for _ in range(6):
        process = subprocess.Popen([sys.executable, "-c", PULL, str(tmp_path / "images"), reference], stdout=subprocess.PIPE)
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        time.sleep(rng.uniform(0.05, 0.4))
        process.kill()
        process.communicate()
        assert process.returncode in (-9, 0)
    done = subprocess.run([sys.executable, "-c", PULL, str(tmp_path / "images"), reference], capture_output=True, timeout=60)
    assert image.digest.encode() in done.stdout, done.stderr.decode()
    store = ImageStore(tmp_path / "images", Registries())
    found = asyncio.run(store.find(reference))
    assert found is not None
    unpacked = {str(path.relative_to(layer)): path.read_bytes() for layer in found.layers for path in layer.rglob("f*")}
    assert unpacked == files
    left = [path for part in ("making", "trash", "blobs", "partial") for path in (tmp_path / "images" / part).iterdir()]
    assert left == []
    assert len(list((tmp_path / "images/layers").iterdir())) == 3
