"""What a monitor wrote is taken in without being trusted: it may have been taken over by its guest."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from atoll.model.errors import RuntimeFailed
from atoll.runtimes.loop_disk import copy_written
from atoll.runtimes.vm.written import clear, keep_base, open_to, take_in

MIB = 1 << 20


@pytest.fixture
def place(tmp_path: Path) -> Path:
    (tmp_path / "own").mkdir()
    return tmp_path / "own"


def secret(tmp_path: Path) -> Path:
    (tmp_path / "other").mkdir()
    (tmp_path / "other/memory").write_text("another tenant's")
    return tmp_path / "other"


@pytest.mark.parametrize(
    "lie",
    [
        lambda place, other: (place / "memory").symlink_to(other / "memory"),
        lambda place, other: os.mkfifo(place / "memory"),
        lambda place, other: (place / "memory").mkdir(),
        lambda place, other: (place / "memory").write_bytes(bytes(2 * MIB)),
        lambda place, other: (place.rmdir(), place.symlink_to(other)),
        lambda place, other: None,
    ],
    ids=["link", "pipe", "directory", "too large", "linked directory", "nothing"],
)
def test_nothing_but_a_file_of_its_own_within_its_bound_is_taken(
    place: Path, tmp_path: Path, lie: Callable[[Path, Path], object]
) -> None:
    lie(place, secret(tmp_path))
    with pytest.raises(RuntimeFailed):
        take_in(place, "memory", tmp_path / "taken", bytes_max=MIB)
    assert not (tmp_path / "taken").exists()


@pytest.mark.parametrize(
    "make", [os.mkfifo, os.mkdir, lambda path: path.symlink_to("/etc/passwd")], ids=["pipe", "directory", "link"]
)
def test_a_disk_in_whose_place_is_something_else_is_not_waited_for(
    place: Path, tmp_path: Path, make: Callable[[Path], object]
) -> None:
    make(place / "disk.img")
    with pytest.raises(OSError, match=r"disk\.img"):
        copy_written(place / "disk.img", tmp_path / "taken")
    assert not (tmp_path / "taken").exists()


def test_a_directory_that_is_a_link_is_neither_given_away_nor_cleared(place: Path, tmp_path: Path) -> None:
    other = secret(tmp_path)
    place.rmdir()
    place.symlink_to(other)
    before = other.stat().st_uid
    with pytest.raises(RuntimeFailed, match="no directory"):
        open_to(place, 4711)
    with pytest.raises(OSError, match="own"):
        clear(place, ["memory"])
    assert other.stat().st_uid == before
    assert (other / "memory").exists()


def test_zeros_take_no_room_and_changes_are_laid_over_what_they_are_changes_to(place: Path, tmp_path: Path) -> None:
    (place / "memory").write_bytes(b"a" * 4096 + bytes(8 * MIB - 8192) + b"z" * 4096)
    take_in(place, "memory", tmp_path / "whole", bytes_max=8 * MIB)
    whole = tmp_path / "whole"
    assert whole.read_bytes() == (place / "memory").read_bytes()
    assert whole.stat().st_blocks * 512 < MIB
    keep_base(tmp_path / "base", whole)
    clear(place, ["memory"])
    whole.unlink()
    with (place / "memory").open("wb") as file:
        file.truncate(8 * MIB)
        file.write(bytes(4096))  # the page is zeros now, which is a change
        file.seek(4 * MIB)
        file.write(b"m" * 4096)
    take_in(place, "memory", tmp_path / "second", bytes_max=8 * MIB, base=tmp_path / "base")
    second = (tmp_path / "second").read_bytes()
    assert second[:4096] == bytes(4096)
    assert second[4 * MIB : 4 * MIB + 4096] == b"m" * 4096
    assert second[-4096:] == b"z" * 4096
    (place / "memory").write_bytes(b"short")
    with pytest.raises(RuntimeFailed, match="changes"):
        take_in(place, "memory", tmp_path / "third", bytes_max=8 * MIB, base=tmp_path / "base")
    assert not (tmp_path / "third").exists()
