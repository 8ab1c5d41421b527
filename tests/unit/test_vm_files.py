"""What a guest may say while its files are copied: nothing of it gets out of the copy, or breaks the agent."""

from __future__ import annotations

import asyncio
import io
import struct
import tarfile
from collections.abc import Sequence

import pytest

from atoll.model.errors import DeadlineExceeded, Invalid, RuntimeFailed, TooLarge
from atoll.runtimes.vm.execution import GuestExecution
from atoll.runtimes.vm.files import GuestFiles


def record(
    kind: bytes, name: bytes, content: bytes = b"", *, link: bytes = b"", size: int | None = None, mode: int = 0o644
) -> bytes:
    """As native/guest/files.c writes it."""
    head = struct.pack("<c3xIIIQQHH", kind, mode, 7, 8, 9, len(content) if size is None else size, len(name), len(link))
    return head + name + link + content


class Guest(GuestExecution):
    """Says what it is told to say, and keeps what it hears."""

    def __init__(self, says: Sequence[tuple[int, bytes]], status: int = 0) -> None:
        self._says, self._end = list(says), status
        self.heard = b""
        self.left = False

    @property
    def ended(self) -> bool:
        return self._end != 0

    async def read(self) -> tuple[int, bytes] | None:
        return self._says.pop(0) if self._says else None

    async def write(self, data: bytes) -> None:
        self.heard += data

    async def close_stdin(self) -> None:
        pass

    async def wait(self) -> int:
        return self._end

    async def close(self) -> None:
        self.left = True


async def pack(says: Sequence[tuple[int, bytes]], status: int = 0) -> dict[str, tarfile.TarInfo]:
    guest, sink = Guest(says, status), io.BytesIO()

    async def start(way: str, path: str) -> GuestExecution:
        assert (way, path) == ("out", "/a/top")
        return guest

    try:
        await asyncio.to_thread(GuestFiles(start, asyncio.get_running_loop()).pack, "/a/top", sink)
    finally:
        assert guest.left
    sink.seek(0)
    with tarfile.open(fileobj=sink) as archive:
        return {member.name: member for member in archive}


async def test_what_the_guest_tells_in_pieces_becomes_an_archive() -> None:
    told = record(b"d", b"top") + record(b"f", b"top/file", b"x" * 1000) + record(b"l", b"top/link", link=b"/etc/passwd")
    found = await pack([(1, told[at : at + 7]) for at in range(0, len(told), 7)])
    assert [(name, found[name].size) for name in found] == [("top", 0), ("top/file", 1000), ("top/link", 0)]
    assert (found["top/file"].uid, found["top/file"].gid, found["top/file"].mtime) == (7, 8, 9)
    assert found["top/link"].linkname == "/etc/passwd"


@pytest.mark.parametrize(
    "told",
    [
        record(b"f", b"other"),
        record(b"f", b"/top"),
        record(b"d", b"top") + record(b"f", b"top/../../etc/passwd"),
        record(b"d", b"top") + record(b"f", b"elsewhere/file"),
        record(b"d", b"top") + record(b"f", b"top//file"),
        record(b"d", b"top") + record(b"f", b"top/nul\0"),
        record(b"d", b"top") + record(b"d", b"top"),
        record(b"c", b"top"),
        record(b"h", b"top", link=b"top"),
        record(b"d", b"top", size=5),
        record(b"f", b"top")[:20],
        record(b"f", b"x" * 5000),
        b"garbage" * 100,
    ],
)
async def test_what_is_no_copy_of_what_was_asked_for_is_refused(told: bytes) -> None:
    with pytest.raises((RuntimeFailed, TooLarge)):
        await pack([(1, told)])


async def test_a_file_larger_than_is_copied_at_once_is_refused_before_it_comes() -> None:
    with pytest.raises(TooLarge):
        await pack([(1, record(b"f", b"top", size=1 << 60))])


async def test_a_guest_that_breaks_off_fails_the_copy() -> None:
    with pytest.raises(RuntimeFailed):
        await pack([(1, record(b"f", b"top", b"half", size=1000))], status=137)
    with pytest.raises(FileNotFoundError):
        await pack([(2, b"2 /a/top")], status=1)
    with pytest.raises(RuntimeFailed):
        await pack([(2, b"\xff" * 100_000)], status=1)


async def test_what_is_copied_in_is_told_with_names_below_the_directory_only() -> None:
    packed = io.BytesIO()
    with tarfile.open(mode="w", fileobj=packed) as archive:
        member = tarfile.TarInfo("./a//b")
        member.size, member.uid, member.gid, member.mtime = 4, 7, 8, 9
        archive.addfile(member, io.BytesIO(b"data"))
    guest = Guest([])

    async def start(way: str, path: str) -> GuestExecution:
        return guest

    files = GuestFiles(start, asyncio.get_running_loop())
    packed.seek(0)
    await asyncio.to_thread(files.unpack, "/to", packed)
    assert guest.heard == record(b"f", b"a/b", b"data")
    for name, link, kind in (("../x", "", tarfile.REGTYPE), ("x", "../y", tarfile.LNKTYPE), ("x", "", tarfile.FIFOTYPE)):
        bad = io.BytesIO()
        with tarfile.open(mode="w", fileobj=bad) as archive:
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, link
            archive.addfile(member)
        bad.seek(0)
        with pytest.raises(Invalid):
            await asyncio.to_thread(files.unpack, "/to", bad)


class Endless(Guest):
    """Says the same again and again."""

    def __init__(self, head: bytes, number: int, piece: bytes, *, every_s: float = 0.0) -> None:
        super().__init__([(1, head)] if head else [])
        self._piece, self._every_s = (number, piece), every_s

    async def read(self) -> tuple[int, bytes] | None:
        said = await super().read()
        if said is None:
            await asyncio.sleep(self._every_s)
        return said or self._piece


async def copy(guest: Guest, way: str, *, idle_s: float) -> None:
    async def start(way: str, path: str) -> GuestExecution:
        return guest

    files = GuestFiles(start, asyncio.get_running_loop(), idle_s=idle_s)
    empty = io.BytesIO()
    tarfile.open(mode="w", fileobj=empty).close()
    empty.seek(0)
    if way == "out":
        await asyncio.to_thread(files.pack, "/a/top", io.BytesIO())
    else:
        await asyncio.to_thread(files.unpack, "/a", empty)


@pytest.mark.parametrize("way", ["out", "in"])
@pytest.mark.parametrize("number", [1, 2])
async def test_a_guest_that_never_comes_to_an_end_of_what_is_wrong_is_broken_off(way: str, number: int) -> None:
    guest = Endless(b"", number, b"1" * 1000)
    with pytest.raises(RuntimeFailed, match="what is none"):
        await copy(guest, way, idle_s=60)
    assert guest.left


@pytest.mark.parametrize(("way", "number"), [("out", 1), ("out", 2), ("in", 2)])
async def test_a_guest_that_says_a_byte_at_a_time_for_ever_is_given_up(way: str, number: int) -> None:
    guest = Endless(record(b"f", b"top", size=1 << 30) if way == "out" else b"", number, b"1", every_s=0.01)
    with pytest.raises(DeadlineExceeded, match="hardly moved"):
        await copy(guest, way, idle_s=0.1)
    assert guest.left
