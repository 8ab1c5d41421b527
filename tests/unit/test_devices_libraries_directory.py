"""A driver's libraries as one directory: what is in it, when another is made, and when files stay mounts of their own."""

from __future__ import annotations

from pathlib import Path

import pytest
from msgspec.structs import replace

from atoll.devices.libraries_directory import DIRECTORIES_MAX, LibraryDirectories
from atoll.model.ports.devices import Edits, FileMount

INSIDE = "/usr/local/nvidia/lib64"


def edits_of(node: Path, *names: str) -> Edits:
    node.mkdir(exist_ok=True)
    for name in names:
        (node / name).write_text(name)
    mounts = [FileMount(str(node / name), f"{INSIDE}/{name}") for name in names]
    tool = FileMount(str(node / names[0]), "/usr/bin/nvidia-smi")
    links = ((f"{INSIDE}/libcuda.so", "libcuda.so.1"), ("/usr/lib/elsewhere.so", "x"))
    return Edits(mounts=(*mounts, tool), links=links, library_directories=(INSIDE,))


@pytest.fixture
def made(tmp_path: Path) -> LibraryDirectories:
    return LibraryDirectories(tmp_path / "made")


def test_libraries_and_their_links_are_one_mount_and_the_rest_stays(made: LibraryDirectories, tmp_path: Path) -> None:
    edits = edits_of(tmp_path / "node", "libcuda.so.1", "libnvidia-ml.so.1")
    gathered = made.gather(edits)
    tool, directory = gathered.mounts
    assert tool == edits.mounts[-1]
    assert directory.target == INSIDE
    assert directory.options == edits.mounts[0].options
    assert gathered.links == (("/usr/lib/elsewhere.so", "x"),)
    shown = Path(directory.source)
    assert sorted(path.name for path in shown.iterdir()) == ["libcuda.so", "libcuda.so.1", "libnvidia-ml.so.1"]
    assert (shown / "libcuda.so").read_text() == "libcuda.so.1"
    assert (shown / "libcuda.so.1").stat().st_ino == (tmp_path / "node/libcuda.so.1").stat().st_ino
    assert replace(gathered, mounts=edits.mounts, links=edits.links) == edits


def test_the_same_libraries_are_one_directory_and_a_new_driver_s_another(made: LibraryDirectories, tmp_path: Path) -> None:
    edits = edits_of(tmp_path / "node", "libcuda.so.1", "libnvidia-ml.so.1")
    first = made.gather(edits)
    assert made.gather(edits) == first
    (tmp_path / "node/libcuda.so.1").unlink()
    (tmp_path / "node/libcuda.so.1").write_text("another driver")
    second = made.gather(edits)
    assert second.mounts[-1].source != first.mounts[-1].source
    assert (Path(first.mounts[-1].source) / "libcuda.so.1").read_text() == "libcuda.so.1"  # what runs keeps its own
    assert (Path(second.mounts[-1].source) / "libcuda.so.1").read_text() == "another driver"


def test_a_library_that_is_a_link_on_the_node_is_the_file_that_it_leads_to(made: LibraryDirectories, tmp_path: Path) -> None:
    edits = edits_of(tmp_path / "node", "libcuda.so.1", "libnvidia-ml.so.1")
    (tmp_path / "node/libcuda.so.1").rename(tmp_path / "node/libcuda.so.550")
    (tmp_path / "node/libcuda.so.1").symlink_to("libcuda.so.550")
    shown = Path(made.gather(edits).mounts[-1].source)
    assert not (shown / "libcuda.so.1").is_symlink()
    assert (shown / "libcuda.so.1").read_text() == "libcuda.so.1"


def test_what_cannot_be_linked_to_stays_as_it_is(made: LibraryDirectories, tmp_path: Path) -> None:
    edits = edits_of(tmp_path / "node", "libcuda.so.1", "libnvidia-ml.so.1")
    gone = replace(edits, mounts=(*edits.mounts, FileMount("/proc/version", f"{INSIDE}/libother.so.1")))
    assert made.gather(gone) == gone  # another file system
    absent = replace(edits, mounts=(*edits.mounts, FileMount(str(tmp_path / "none"), f"{INSIDE}/libother.so.1")))
    assert made.gather(absent) == absent
    assert not [path for path in (tmp_path / "made").iterdir() if path.name.startswith(".")]


def test_files_with_options_of_their_own_or_below_the_directory_stay_as_they_are(made: LibraryDirectories, tmp_path: Path) -> None:
    edits = edits_of(tmp_path / "node", "libcuda.so.1", "libnvidia-ml.so.1")
    for entry in (
        FileMount(str(tmp_path / "node/libcuda.so.1"), f"{INSIDE}/libodd.so.1", ("rw", "bind")),
        FileMount(str(tmp_path / "node/libcuda.so.1"), f"{INSIDE}/vdpau/libdeep.so.1"),
    ):
        odd = replace(edits, mounts=(*edits.mounts, entry))
        assert made.gather(odd) == odd


def test_directories_are_bounded_and_go_when_nothing_is_held(made: LibraryDirectories, tmp_path: Path) -> None:
    for number in range(DIRECTORIES_MAX):
        made.gather(edits_of(tmp_path / f"node{number}", "libcuda.so.1", "libnvidia-ml.so.1"))
    one_more = edits_of(tmp_path / "node", "libcuda.so.1", "libnvidia-ml.so.1")
    assert made.gather(one_more) == one_more
    made.clear()
    assert made.gather(one_more) != one_more
