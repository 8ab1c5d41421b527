"""A machine written down by a monitor that its guest has taken over: nothing that it sends goes on for ever."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import os
import shutil
import struct
from pathlib import Path

import pytest

from atoll.model.errors import Exhausted, RuntimeFailed
from atoll.model.ports.runtime import Compatibility, Limits
from atoll.model.spec import RuntimeName
from atoll.runtimes.snapshots import begin, seal
from atoll.runtimes.vm.boxes import VmPlan
from atoll.runtimes.vm.qemu_snapshot import RAM, RESERVE_BYTES, SharedMemories, save
from atoll.runtimes.vm.qemu_stream import PAGE_BYTES, TIMES_MAX, split
from atoll.runtimes.vm.sockets import open_socket

PAGES = 8
MEMORY_BYTES = 256 << 10
RAM_BYTES = PAGES * PAGE_BYTES
HEAD = struct.pack(">II", 0x5145564D, 3) + b"\1" + struct.pack(">I", 1) + b"\3ram" + struct.pack(">II", 0, 4)
LIMITS = Limits(cpu_milli=1000, memory_bytes=1 << 20, disk_bytes=1 << 20, pids=8)
END = struct.pack(">Q", 0x10) + b"\x7e" + struct.pack(">I", 1) + b"\4"
"""Of the memory's part; then come the devices."""


def page(number: int, data: bytes) -> bytes:
    flags = 0x08 if len(data) == PAGE_BYTES else 0x02
    return struct.pack(">Q", number * PAGE_BYTES | flags) + b"\3ram" + data


def taken(stream: bytes, directory: Path) -> bytes:
    fd = os.open(directory / "ram", os.O_RDWR | os.O_CREAT)
    try:
        split(io.BytesIO(stream), io.BytesIO(), fd, ram_bytes=RAM_BYTES, block="ram")
    finally:
        os.close(fd)
    return (directory / "ram").read_bytes()


@pytest.mark.parametrize("data", [b"x" * PAGE_BYTES, b"\0"], ids=["pages", "zeros"])
def test_a_machine_that_writes_its_memory_down_again_and_again_is_refused(tmp_path: Path, data: bytes) -> None:
    once = b"".join(page(number, data) for number in range(PAGES))
    whole = data if len(data) == PAGE_BYTES else data * PAGE_BYTES
    assert taken(HEAD + once * TIMES_MAX + END, tmp_path) == whole * PAGES
    with pytest.raises(RuntimeFailed, match="times over"):
        taken(HEAD + once * TIMES_MAX + page(0, data) + END, tmp_path)


class Monitor:
    """Agrees to all that it is asked, and when it is to write its machine down begins to, and never goes on."""

    def __init__(self, own: Path, head: bytes) -> None:
        self._own = own
        self._head = head
        self.began = asyncio.Event()
        self.cut_off = asyncio.Event()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b'{"QMP": {}}\n')
        async with asyncio.TaskGroup() as tasks:
            with contextlib.closing(writer):
                while line := await reader.readline():
                    if json.loads(line)["execute"] == "migrate":
                        tasks.create_task(self._write())
                    writer.write(b'{"return": {}}\n')

    async def _write(self) -> None:
        reader, writer = await open_socket(self._own / "snapshot.sock")
        with contextlib.closing(writer):
            writer.write(self._head)
            self.began.set()
            with contextlib.suppress(ConnectionResetError):
                await reader.read()  # nothing comes; it ends when the other side does
            self.cut_off.set()


def test_a_snapshot_that_is_given_up_cuts_off_the_monitor_that_writes_it(tmp_path: Path) -> None:
    own = tmp_path / "vm"
    own.mkdir()
    plan = VmPlan(
        id="i1",
        directory=str(tmp_path),
        uid=os.getuid(),
        vcpus=1,
        ram_bytes=RAM_BYTES,
        limits=LIMITS,
        disk_bytes=1 << 20,
        image="/images/x",
        stdout="/o",
        stderr="/e",
        hostname="i1",
        process={},
    )

    async def main() -> None:
        monitor = Monitor(own, HEAD)
        (tmp_path / "to").mkdir()
        with contextlib.chdir(own):  # the path itself may be longer than an address can be
            server = await asyncio.start_unix_server(monitor.serve, "qmp.sock")
        async with server:
            saving = asyncio.create_task(save(plan, tmp_path / "to", "ram"))
            await monitor.began.wait()
            saving.cancel()
            # Sooner than a silent monitor is given up by itself: one that is not silent never would be.
            await asyncio.wait([saving], timeout=5)
            assert saving.cancelled()
            await asyncio.wait_for(monitor.cut_off.wait(), 5)
        assert not (own / "snapshot.sock").exists()

    asyncio.run(main())


def snapshot(directory: Path) -> str:
    """Write a snapshot whose memory has MEMORY_BYTES that are not zeros, and as many that are."""
    begin(directory)
    with (directory / RAM).open("wb") as file:
        file.write(b"x" * MEMORY_BYTES)
        file.truncate(2 * MEMORY_BYTES)
    here = Compatibility(RuntimeName.QEMU, "7.2", "any", "")
    seal(directory, (RAM,), compatibility=here, image="sha256:0", limits=LIMITS, networked=False)
    return str(directory)


class Node:
    """How much memory it has to give, but for what its snapshots hold."""

    def __init__(self, memories: int) -> None:
        self.memories = SharedMemories(1 << 30, self.available)
        self._bytes = RESERVE_BYTES + memories * MEMORY_BYTES

    def available(self) -> int:
        return self._bytes - sum(size for _, size in self.memories._held.values())

    def start(self, snapshot: str) -> None:
        self.memories.take(snapshot)
        self.memories.give(snapshot)


def test_a_memory_that_the_node_has_no_room_for_is_refused_before_it_is_read(tmp_path: Path) -> None:
    first, second, third = (snapshot(tmp_path / name) for name in ("first", "second", "third"))
    node = Node(memories=2)
    node.memories.take(first)
    node.memories.take(second)
    with pytest.raises(Exhausted, match="0 MiB to spare"):
        node.memories.take(third)
    assert list(node.memories._held) == [first, second]
    node.memories.give(first)
    node.memories.take(third)  # what no start is using makes room
    assert list(node.memories._held) == [second, third]
    node.memories.close()


def test_memories_that_would_not_make_room_enough_are_kept(tmp_path: Path) -> None:
    first, second, large = snapshot(tmp_path / "first"), snapshot(tmp_path / "second"), snapshot(tmp_path / "large")
    node = Node(memories=2)
    for each in (first, second):
        node.start(each)
    node._bytes -= 2 * MEMORY_BYTES  # somebody else's now
    with pytest.raises(Exhausted):
        node.memories.take(large)
    assert list(node.memories._held) == [first, second]
    mapped = SharedMemories(1 << 30, lambda: RESERVE_BYTES + MEMORY_BYTES - 1)  # copies have them, and nothing comes of letting go
    for each in (first, second):
        mapped._held[each] = (os.memfd_create("held"), MEMORY_BYTES)
    with pytest.raises(Exhausted):
        mapped.take(large)
    assert list(mapped._held) == [second]
    node.memories.close()
    mapped.close()


def test_the_memory_of_a_snapshot_that_was_removed_is_let_go_of(tmp_path: Path) -> None:
    kept, removed, used = (snapshot(tmp_path / name) for name in ("kept", "removed", "used"))
    node = Node(memories=3)
    for each in (kept, removed):
        node.start(each)
    node.memories.take(used)
    for each in (removed, used):
        shutil.rmtree(each)
    assert node.memories.let_go_of_removed()
    assert list(node.memories._held) == [kept, used]
    node.memories.give(used)
    shutil.rmtree(kept)
    assert not node.memories.let_go_of_removed()
    assert node.available() == RESERVE_BYTES + 3 * MEMORY_BYTES
