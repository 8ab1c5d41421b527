"""Copying files in and out of an instance's root: nothing leads out of it."""

from __future__ import annotations

import io
import os
import subprocess
import tarfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from atoll.model.errors import Invalid, NotFound, Unavailable
from atoll.node import files
from atoll.node.files import Ids, pack_files, unpack_files
from atoll.node.in_root import IdMap, open_in_root

IDS = Ids(IdMap("0 0 4294967295\n"), IdMap("0 0 4294967295\n"))


@pytest.fixture
def place(tmp_path: Path) -> Iterator[tuple[Path, int]]:
    path = tmp_path / "root"
    path.mkdir()
    fd = os.open(path, os.O_PATH | os.O_DIRECTORY)
    yield path, fd
    os.close(fd)


def packed(root: int, path: str) -> dict[str, tarfile.TarInfo]:
    out = io.BytesIO()
    pack_files(root, path, IDS, out)
    out.seek(0)
    return {member.name: member for member in tarfile.open(fileobj=out)}


def archive(*members: tuple[tarfile.TarInfo, bytes]) -> io.BytesIO:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for member, content in members:
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    out.seek(0)
    return out


def entry(name: str, content: bytes = b"", kind: bytes = tarfile.REGTYPE, link: str = "") -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.mode = kind, link, 0o644
    info.uid, info.gid = os.getuid(), os.getgid()
    return info, content


def test_a_tree_comes_back_as_it_was(place: tuple[Path, int], tmp_path: Path) -> None:
    path, root = place
    (path / "app/sub").mkdir(parents=True)
    (path / "app/data").write_bytes(b"x" * 100_000)
    (path / "app/data").chmod(0o750)
    (path / "app/link").symlink_to("/etc/passwd")
    os.mkfifo(path / "app/pipe")
    out = io.BytesIO()
    pack_files(root, "/app", IDS, out)
    other = tmp_path / "other"
    other.mkdir()
    target = os.open(other, os.O_PATH | os.O_DIRECTORY)
    out.seek(0)
    unpack_files(target, "/deep/place", IDS, out)
    os.close(target)
    copy = other / "deep/place/app"
    assert (copy / "data").read_bytes() == b"x" * 100_000
    assert (copy / "data").stat().st_mode & 0o777 == 0o750
    assert (copy / "link").readlink() == Path("/etc/passwd")
    assert (copy / "sub").is_dir()
    assert sorted(child.name for child in copy.iterdir()) == ["data", "link", "sub"]


def test_one_file_and_the_whole_root_can_be_copied(place: tuple[Path, int]) -> None:
    path, root = place
    (path / "file").write_text("hello")
    assert list(packed(root, "/file")) == ["file"]
    assert sorted(packed(root, "/")) == [".", "./file"]


def test_links_of_the_tenant_lead_nowhere_outside(place: tuple[Path, int], tmp_path: Path) -> None:
    path, root = place
    (tmp_path / "secret").write_text("of the node")
    (path / "absolute").symlink_to(tmp_path / "secret")
    (path / "up").symlink_to("../secret")
    (path / "magic").symlink_to("/proc/self/root")
    for name in ("absolute", "up", "magic/etc/passwd", "../secret", "../../../../etc/passwd"):
        with pytest.raises(NotFound):
            pack_files(root, name, IDS, io.BytesIO())
    (path / "etc").mkdir()
    (path / "etc/passwd").write_text("inside")
    (path / "rooted").symlink_to("/etc/passwd")
    assert packed(root, "rooted")["rooted"].size == len("inside")


def test_writing_through_a_link_stays_inside(place: tuple[Path, int], tmp_path: Path) -> None:
    path, root = place
    outside = tmp_path / "outside"
    outside.mkdir()
    (path / "trap").symlink_to(outside)
    (path / "climb").symlink_to("../outside")
    for name in ("trap", "climb"):
        with pytest.raises((Invalid, NotFound)):
            unpack_files(root, f"/{name}", IDS, archive(entry("f", b"x")))
    unpack_files(root, "/", IDS, archive(entry("evil", kind=tarfile.SYMTYPE, link=str(outside))))
    with pytest.raises((Invalid, NotFound)):
        unpack_files(root, "/", IDS, archive(entry("evil/f", b"x")))
    assert list(outside.iterdir()) == []


@pytest.mark.parametrize("name", ["../up", "a/../../up", "/../up"])
def test_names_that_climb_are_refused(place: tuple[Path, int], name: str) -> None:
    with pytest.raises(Invalid, match="leads out"):
        unpack_files(place[1], "/", IDS, archive(entry(name, b"x")))


def test_a_link_is_replaced_not_followed(place: tuple[Path, int]) -> None:
    path, root = place
    (path / "target").write_text("kept")
    (path / "name").symlink_to("target")
    unpack_files(root, "/", IDS, archive(entry("name", b"new")))
    assert (path / "target").read_text() == "kept"
    assert (path / "name").read_text() == "new"
    assert not (path / "name").is_symlink()


def test_devices_are_refused_and_a_directory_is_not_replaced_by_a_file(place: tuple[Path, int]) -> None:
    path, root = place
    (path / "dir").mkdir()
    with pytest.raises(Invalid, match="only files"):
        unpack_files(root, "/", IDS, archive(entry("null", kind=tarfile.CHRTYPE)))
    with pytest.raises(Invalid):
        unpack_files(root, "/", IDS, archive(entry("dir", b"x")))
    assert [child.name for child in path.iterdir()] == ["dir"]


def test_hard_links_point_inside_the_archive(place: tuple[Path, int]) -> None:
    path, root = place
    unpack_files(root, "/d", IDS, archive(entry("one", b"x"), entry("two", kind=tarfile.LNKTYPE, link="one")))
    assert (path / "d/one").stat().st_ino == (path / "d/two").stat().st_ino
    with pytest.raises(Invalid):
        unpack_files(root, "/d", IDS, archive(entry("three", kind=tarfile.LNKTYPE, link="../../etc/passwd")))


class Between(io.BytesIO):
    """A stream that does something once, in the middle of its first file."""

    def __init__(self, stream: io.BytesIO, work: Callable[[], None]) -> None:
        super().__init__(stream.getvalue())
        self._work: Callable[[], None] | None = work

    def read(self, size: int | None = -1, /) -> bytes:
        if self.tell() > 1024 and self._work is not None:
            work, self._work = self._work, None
            work()
        return super().read(min(size or 0, 1024))


def test_two_copies_into_one_directory_at_a_time_do_not_get_at_each_other_s_files(place: tuple[Path, int]) -> None:
    path, root = place
    second = archive(entry("b", b"b" * 50_000), entry("link", kind=tarfile.SYMTYPE, link="b"))
    first = Between(archive(entry("a", b"a" * 50_000)), lambda: unpack_files(root, "/", IDS, second))
    unpack_files(root, "/", IDS, first)
    assert (path / "a").read_bytes() == b"a" * 50_000
    assert (path / "b").read_bytes() == b"b" * 50_000
    assert sorted(child.name for child in path.iterdir()) == ["a", "b", "link"]


def test_a_copy_that_is_cut_leaves_nothing_half_written(place: tuple[Path, int]) -> None:
    path, root = place

    def cut() -> None:
        assert len(list(path.iterdir())) == 1
        raise Unavailable("the other end left")

    with pytest.raises(Unavailable):
        unpack_files(root, "/", IDS, Between(archive(entry("a", b"a" * 50_000)), cut))
    assert list(path.iterdir()) == []


def test_a_second_link_to_the_same_file_leaves_nothing_beside_it(place: tuple[Path, int]) -> None:
    path, root = place
    link = entry("two", kind=tarfile.LNKTYPE, link="one")
    unpack_files(root, "/", IDS, archive(entry("one", b"x"), link, link))
    assert sorted(child.name for child in path.iterdir()) == ["one", "two"]


def test_what_a_killed_copy_left_goes_with_a_later_copy_and_what_one_writes_right_now_stays(
    place: tuple[Path, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, root = place
    names = (".atoll-copy-0123abcd", "sub/.atoll-copy-00000000", ".atoll-copy-mine", "sub/mine")
    (path / "sub").mkdir()
    for name in names:
        (path / name).touch()
    again = archive(entry("sub", kind=tarfile.DIRTYPE))
    unpack_files(root, "/", IDS, again)
    assert all((path / name).exists() for name in names)
    later = time.time() + files.LEFTOVER_S + 1
    monkeypatch.setattr(files.time, "time", lambda: later)
    again.seek(0)
    unpack_files(root, "/", IDS, again)
    assert [name for name in names if (path / name).exists()] == [".atoll-copy-mine", "sub/mine"]


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")
def test_what_is_on_a_file_system_of_the_kernel_s_is_not_copied_either_way(place: tuple[Path, int]) -> None:
    path, root = place
    (path / "proc").mkdir()
    (path / "own").write_text("own")
    subprocess.run(["mount", "-t", "proc", "proc", path / "proc"], check=True)
    try:
        (path / "way").symlink_to("/proc/sys")
        with pytest.raises(Invalid, match="kernel"):
            pack_files(root, "/proc/cpuinfo", IDS, io.BytesIO())
        for name in ("/proc", "/way", "/way/kernel", "/proc/new"):
            if name != "/proc/new":
                with pytest.raises(Invalid, match="kernel"):
                    pack_files(root, name, IDS, io.BytesIO())
            with pytest.raises(Invalid, match="kernel"):
                unpack_files(root, name, IDS, archive(entry("f", b"x")))
        with pytest.raises(Invalid, match="kernel"):
            unpack_files(root, "/", IDS, archive(entry("proc/sys/kernel/f", b"x")))
        assert sorted(packed(root, "/")) == [".", "./own", "./proc", "./way"]
        unpack_files(root, "/", IDS, archive(entry("own", b"new")))
        assert (path / "own").read_text() == "new"
    finally:
        subprocess.run(["umount", path / "proc"], check=True)


def test_what_is_not_a_tar_stream_is_said_to_be_none(place: tuple[Path, int]) -> None:
    with pytest.raises(Invalid, match="not a tar"):
        unpack_files(place[1], "/", IDS, io.BytesIO(b"hello" * 1000))


def test_the_ids_of_an_instance_map_both_ways() -> None:
    ids = IdMap("0 100000 1000\n1000 0 1\n")
    assert [ids.to_node(id) for id in (0, 999, 1000, 5000)] == [100_000, 100_999, 0, 100_000]
    assert [ids.to_instance(id) for id in (100_000, 100_999, 0, 7)] == [0, 999, 1000, 0]


def test_openat2_is_there() -> None:
    root = os.open("/", os.O_PATH)
    os.close(open_in_root(root, "etc", os.O_PATH))
    os.close(root)
