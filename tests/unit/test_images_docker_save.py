"""What `docker save` wrote before version 25: a manifest.json, configs by digest, and a directory with a tar for each layer."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from pathlib import Path

from atoll.cli.untar import unpack
from atoll.images.archive import as_layout
from atoll.images.layout import Layout, LayoutImage
from atoll.images.manifest import machine_architecture


def _layer(content: bytes) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        info = tarfile.TarInfo("file")
        info.size = len(content)
        tar.addfile(info, io.BytesIO(content))
    return out.getvalue()


def old_docker_save(path: Path) -> tuple[bytes, ...]:
    """Write such an archive; the third layer is the first again, for which Docker wrote a link. Return the layers."""
    first, second = _layer(b"one"), _layer(b"two")
    digests = [f"sha256:{hashlib.sha256(layer).hexdigest()}" for layer in (first, second, first)]
    config = json.dumps(
        {"architecture": machine_architecture(), "os": "linux", "rootfs": {"type": "layers", "diff_ids": digests}}
    ).encode()
    name = hashlib.sha256(config).hexdigest() + ".json"
    with tarfile.open(path, "w") as archive:

        def add(name: str, data: bytes) -> None:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))

        for number, layer in enumerate((first, second)):
            directory = tarfile.TarInfo(f"layer{number}/")
            directory.type = tarfile.DIRTYPE
            archive.addfile(directory)
            add(f"layer{number}/VERSION", b"1.0")
            add(f"layer{number}/layer.tar", layer)
        link = tarfile.TarInfo("layer2/layer.tar")
        link.type, link.linkname = tarfile.SYMTYPE, "../layer0/layer.tar"
        archive.addfile(link)
        add(name, config)
        layers = [f"layer{number}/layer.tar" for number in range(3)]
        add("manifest.json", json.dumps([{"Config": name, "RepoTags": ["web:1"], "Layers": layers}]).encode())
        add("repositories", b'{"web": {"1": "layer2"}}')
    return first, second, first


async def test_an_archive_of_an_older_docker_becomes_a_layout(tmp_path: Path) -> None:
    layers = old_docker_save(tmp_path / "web.tar")
    (tmp_path / "archive").mkdir()
    with tarfile.open(tmp_path / "web.tar") as archive:
        unpack(archive, tmp_path / "archive")
    layout, digest = await as_layout(tmp_path / "archive", tmp_path / "layout", name="web:1")
    resolved = await LayoutImage(Layout(layout), digest=digest).resolve()
    assert [layer.digest for layer in resolved.manifest.layers] == [f"sha256:{hashlib.sha256(each).hexdigest()}" for each in layers]
    assert [Layout(layout).blob(layer.digest).read_bytes() for layer in resolved.manifest.layers] == list(layers)
