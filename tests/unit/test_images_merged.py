"""Layers as one plain directory: as overlayfs would show them, and without a copy of any file."""

from __future__ import annotations

import os
import stat
import subprocess
from pathlib import Path

import pytest

from atoll.images.entries import OPAQUE_ATTRIBUTE
from atoll.images.merged import merge
from atoll.model.errors import ImageError

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="white-outs are made by root")


def put(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def whiteout(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    os.mknod(path, stat.S_IFCHR, 0)


@pytest.fixture
def layers(tmp_path: Path) -> list[Path]:
    low, middle, high = (tmp_path / name for name in ("low", "middle", "high"))
    put(low / "kept/model.bin", "weights")
    put(low / "kept/old", "old")
    put(low / "hidden/a", "a")
    put(low / "emptied/b", "b")
    put(low / "turned/into/link", "deep")
    put(low / "file", "below")
    (low / "link").symlink_to("/etc")
    whiteout(middle / "kept/old")
    whiteout(middle / "hidden")
    put(middle / "emptied/c", "c")
    os.setxattr(middle / "emptied", OPAQUE_ATTRIBUTE, b"y")
    put(middle / "link/now", "a directory")
    put(high / "file/inside", "a directory too")
    (high / "turned").symlink_to("/etc")
    (high / "kept").mkdir()
    (high / "kept").chmod(0o750)
    os.chown(high / "kept", 1000, 1001)
    os.utime(high / "kept", ns=(5_000_000_000, 6_000_000_000))
    return [low, middle, high]


def shown(root: Path) -> dict[str, str]:
    """What a tree holds: text of files, targets of links, modes and owners of directories."""
    found = {}
    for path in sorted(root.rglob("*")):
        name, status = str(path.relative_to(root)), path.lstat()
        if path.is_symlink():
            found[name] = f"-> {path.readlink()}"
        elif path.is_dir():
            found[name] = f"{stat.S_IMODE(status.st_mode):o} {status.st_uid} {status.st_gid} {status.st_mtime_ns}"
        else:
            found[name] = path.read_text()
    return found


def test_a_merged_tree_is_what_overlayfs_shows(tmp_path: Path, layers: list[Path]) -> None:
    merge(layers, tmp_path / "tree")
    overlay = tmp_path / "overlay"
    overlay.mkdir()
    lower = ":".join(str(layer) for layer in reversed(layers))
    mounted = subprocess.run(["mount", "-t", "overlay", "overlay", "-o", f"lowerdir={lower}", str(overlay)], check=False)
    if mounted.returncode != 0:
        pytest.skip("no overlay file system here")
    try:
        assert shown(tmp_path / "tree") == shown(overlay)
    finally:
        subprocess.run(["umount", str(overlay)], check=True)


def test_its_files_are_the_layers_own_and_the_layers_stay_as_they_are(tmp_path: Path, layers: list[Path]) -> None:
    before = [shown(layer) for layer in layers[:1]]
    merge(layers, tmp_path / "tree")
    assert (tmp_path / "tree/kept/model.bin").samefile(layers[0] / "kept/model.bin")
    assert [shown(layer) for layer in layers[:1]] == before


def test_more_directories_than_can_be_remembered_are_refused_and_those_of_many_layers_count_once(tmp_path: Path) -> None:
    layers = [tmp_path / name for name in ("low", "middle", "high")]
    for layer in layers:
        for at in range(100):
            (layer / f"{at}").mkdir(parents=True)
    merge(layers, tmp_path / "tree", kept_bytes_max=100_000)
    with pytest.raises(ImageError, match="too many directories"):
        merge(layers, tmp_path / "other", kept_bytes_max=10_000)


def test_an_image_without_layers_is_an_empty_directory(tmp_path: Path) -> None:
    merge([], tmp_path / "tree")
    assert list((tmp_path / "tree").iterdir()) == []
