"""The protocol between a node and the init of its guests, held by the real init, which serves a socket instead of a machine."""

from __future__ import annotations

import asyncio
import errno
import os
import random
import socket
import struct
import subprocess
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import pytest
from control_cell import run_virtual

from atoll.model.errors import DeadlineExceeded, Exhausted, RuntimeFailed, TooLarge, Unavailable
from atoll.runtimes.native import guest_path
from atoll.runtimes.oci import CAPABILITIES, process
from atoll.runtimes.users import User
from atoll.runtimes.vm.channel import (
    CONNECTION_S,
    FRAME_BYTES_MAX,
    GREETING_S,
    HEADER,
    MAGIC,
    SEND_S_MAX,
    STREAMS_MAX,
    VERSION,
    GuestChannel,
    Kind,
)
from atoll.runtimes.vm.config import (
    CAPABILITY_MASK,
    TRAILER_BYTES,
    GuestConfig,
    config_words,
    process_words,
    read_ending,
    write_config,
)
from atoll.runtimes.vm.execution import GuestExecution, start_beside

INPUTS_PER_KIND = 1_000
NOBODY = 65534
_ENV = (("PATH", "/usr/bin:/bin"),)


@contextmanager
def guest() -> Iterator[tuple[socket.socket, subprocess.Popen[bytes]]]:
    """Run the guest's init, as nobody, on one end of a socket; give the other."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        # As another user, and with few processes to be had: random frames may run random commands.
        started = subprocess.Popen([guest_path(), "serve"], stdin=theirs, user=NOBODY, group=NOBODY, extra_groups=[], cwd="/")
        theirs.close()
        try:
            yield ours, started
        finally:
            ours.close()
            started.wait(10)


@asynccontextmanager
async def session() -> AsyncIterator[GuestChannel]:
    with guest() as (ours, _):

        async def connect() -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
            return await asyncio.open_connection(sock=ours.dup())

        channel = await GuestChannel.open(connect, deadline_s=10)
        yield channel
        await channel.close()


def words(*argv: str, workdir: str = "/") -> bytes:
    return process_words(process(argv, _ENV, workdir, User(0, 0)), make_directory=False)


async def output_of(execution: GuestExecution) -> bytes:
    parts = []
    while (part := await asyncio.wait_for(execution.read(), 10)) is not None:
        parts.append(part[1])
    return b"".join(parts)


async def test_a_command_s_output_and_status_come_back() -> None:
    async with session() as channel:
        execution = await start_beside(channel, words("sh", "-c", "echo out; echo err >&2; exit 7"), "sh", None)
        seen = [await execution.read(), await execution.read()]
        assert sorted(part for part in seen if part) == [(1, b"out\n"), (2, b"err\n")]
        assert await execution.read() is None
        assert await execution.wait() == 7
        await execution.close()


async def test_much_data_goes_through_both_ways_without_loss() -> None:
    async with session() as channel:
        execution = await start_beside(channel, words("cat"), "cat", None)
        data = random.Random(1).randbytes(4 << 20)

        async def feed() -> None:
            await execution.write(data)
            await execution.close_stdin()

        feeding = asyncio.create_task(feed())
        assert await output_of(execution) == data
        await feeding
        await execution.close()


@pytest.fixture
def directory() -> Iterator[Path]:
    """A directory that the guest, which is nobody, may write to."""
    with tempfile.TemporaryDirectory(dir="/tmp") as name:
        Path(name).chmod(0o777)
        yield Path(name)


async def copy_into(channel: GuestChannel, directory: Path) -> GuestExecution:
    return await start_beside(channel, words("in", str(directory)), "a copy", None, kind=Kind.COPY)


def file_record(name: str, size: int) -> bytes:
    """As native/guest/files.c reads it."""
    return struct.pack("<c3xIIIQQHH", b"f", 0o644, NOBODY, NOBODY, 9, size, len(name), 0) + name.encode()


async def until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not holds():  # noqa: ASYNC110 - another process does it
            await asyncio.sleep(0.005)


async def test_two_copies_into_one_directory_at_a_time_do_not_get_at_each_other_s_files(directory: Path) -> None:
    async with session() as channel:
        slow, quick = await copy_into(channel, directory), await copy_into(channel, directory)
        await slow.write(file_record("a", 4) + b"aa")
        await until(lambda: bool(list(directory.iterdir())))
        await quick.write(file_record("b", 4) + b"bbbb")
        await quick.close_stdin()
        assert (await output_of(quick), await quick.wait()) == (b"", 0)
        await slow.write(b"aa")
        await slow.close_stdin()
        assert (await output_of(slow), await slow.wait()) == (b"", 0)
        await slow.close()
        await quick.close()
    assert {path.name: path.read_bytes() for path in directory.iterdir()} == {"a": b"aaaa", "b": b"bbbb"}


async def test_a_copy_that_is_cut_leaves_nothing_half_written(directory: Path) -> None:
    async with session() as channel:
        copying = await copy_into(channel, directory)
        await copying.write(file_record("a", 4) + b"aa")
        await until(lambda: bool(list(directory.iterdir())))
        await copying.close_stdin()
        assert await output_of(copying) == b"%d a" % errno.EPIPE
        await copying.close()
    assert list(directory.iterdir()) == []


async def test_output_that_nobody_reads_makes_the_command_wait_and_nobody_else() -> None:
    async with session() as channel:
        loud = await start_beside(channel, words("sh", "-c", "while :; do echo flood; done"), "sh", None)
        while loud._stream.pending_bytes < 200 << 10:  # noqa: ASYNC110 - another process fills it
            await asyncio.sleep(0.005)
        for _ in range(5):
            other = await start_beside(channel, words("echo", "still here"), "echo", None)
            assert await output_of(other) == b"still here\n"
            await other.close()
        assert loud._stream.pending_bytes <= 256 << 10
        await loud.close()
        assert await loud.wait() == 137


async def test_input_that_nobody_takes_makes_its_sender_wait() -> None:
    async with session() as channel:
        execution = await start_beside(channel, words("sleep", "1000"), "sleep", None)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(execution.write(bytes(1 << 20)), 0.3)
        await execution.signal("SIGTERM")
        assert await execution.wait() == 143
        await execution.close()


async def test_a_terminal_has_the_size_that_is_asked_for_and_changes_it() -> None:
    async with session() as channel:
        execution = await start_beside(channel, words("sh", "-c", "stty size; read x; stty size; exit 9"), "sh", (33, 99))
        seen = b""
        while b"33 99" not in seen:
            seen += (await execution.read() or (1, b""))[1]
        await execution.resize(44, 111)
        await execution.write(b"\n")
        assert b"44 111" in await output_of(execution)
        assert await execution.wait() == 9
        await execution.close()


async def test_what_cannot_be_started_is_named_with_its_cause() -> None:
    async with session() as channel:
        with pytest.raises(RuntimeFailed, match=r"'missing'.*No such file"):
            await start_beside(channel, words("missing"), "missing", None)
        with pytest.raises(RuntimeFailed, match="Permission denied"):
            await start_beside(channel, words("/etc/passwd"), "/etc/passwd", None)
        with pytest.raises(RuntimeFailed, match="working directory"):
            await start_beside(channel, words("true", workdir="/gone"), "true", None)
        assert await output_of(await start_beside(channel, words("echo", "fine"), "echo", None)) == b"fine\n"


async def test_more_commands_than_there_is_room_for_are_refused() -> None:
    async with session() as channel:
        running = [await start_beside(channel, words("sleep", "1000"), "sleep", None) for _ in range(STREAMS_MAX)]
        with pytest.raises(Exhausted):
            await start_beside(channel, words("true"), "true", None)
        await asyncio.gather(*(execution.close() for execution in running))
        assert await output_of(await start_beside(channel, words("echo", "again"), "echo", None)) == b"again\n"


async def test_a_new_session_ends_the_commands_of_the_one_before_and_begins_clean() -> None:
    with guest() as (ours, _):

        async def connect() -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
            return await asyncio.open_connection(sock=ours.dup())

        first = await GuestChannel.open(connect, deadline_s=10)
        execution = await start_beside(first, words("sh", "-c", "echo $$; exec sleep 1000"), "sh", None)
        part = await execution.read()
        assert part is not None
        # The agent dies in the middle of a frame.
        first._writer.write(HEADER.pack(FRAME_BYTES_MAX, Kind.EXEC, 0, 9) + b"half")
        await first._writer.drain()
        assert first._reading is not None
        first._reading.cancel()
        await asyncio.gather(first._reading, return_exceptions=True)

        second = await GuestChannel.open(connect, deadline_s=30)
        assert await output_of(await start_beside(second, words("echo", "new"), "echo", None)) == b"new\n"
        for _ in range(200):
            if not Path(f"/proc/{int(part[1])}").exists():
                break
            await asyncio.sleep(0.01)
        assert not Path(f"/proc/{int(part[1])}").exists()
        await second.close()


class Hostile:
    """A guest that answers the greeting, and then says what it is told to."""

    def __init__(self) -> None:
        self.ours, self._theirs = socket.socketpair()

    async def open(self, version: int = VERSION) -> tuple[GuestChannel, asyncio.StreamWriter]:
        reader, writer = await asyncio.open_connection(sock=self._theirs)

        async def connect() -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
            return await asyncio.open_connection(sock=self.ours)

        opening = asyncio.create_task(GuestChannel.open(connect, deadline_s=5))
        greeting = await reader.readexactly(28)
        writer.write(greeting[:16] + version.to_bytes(4, "little") + greeting[20:])
        return await opening, writer


class Deaf(asyncio.StreamWriter):
    """The way to a guest that answers the greeting, and then neither reads nor says anything. Time may be virtual."""

    def __init__(self) -> None:
        self.reader = asyncio.StreamReader()
        self.answers = self.reads = True
        self.aborted = False
        self.sent: list[int] = []

    @property
    def transport(self) -> Any:
        return self

    def get_write_buffer_size(self) -> int:
        return 0

    def write(self, data: Any) -> None:
        if MAGIC in data:
            self.reader.feed_data(data if self.answers else b"")
        else:
            self.sent.append(data[4])

    async def drain(self) -> None:
        while not self.reads:  # noqa: ASYNC110 - tests only say so
            await asyncio.sleep(0.1)

    def abort(self) -> None:
        self.aborted = True

    def close(self) -> None:
        pass

    async def open(self) -> GuestChannel:
        async def connect() -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
            return self.reader, self

        return await GuestChannel.open(connect, deadline_s=5)


def test_a_guest_that_stops_reading_is_cut_off_and_all_who_wait_for_it_are_told() -> None:
    async def main() -> None:
        guest = Deaf()
        channel = await guest.open()
        running = GuestExecution(channel, *channel.stream(), tty=False)
        guest.reads = False
        began = asyncio.get_running_loop().time()
        starts = [asyncio.ensure_future(start_beside(channel, words("true"), "true", None)) for _ in range(3)]
        asking = asyncio.ensure_future(channel.ask(Kind.STATS, Kind.STATISTICS, deadline_s=60))
        told = await asyncio.gather(*starts, asking, return_exceptions=True)
        assert [type(error) for error in told] == [RuntimeFailed] * 3 + [Unavailable]
        assert asyncio.get_running_loop().time() - began == pytest.approx(SEND_S_MAX)
        assert (channel.lost.is_set(), channel.was_cut, guest.aborted) == (True, True, True)
        assert await running.wait() == 137
        await running.close()
        assert guest.sent == [Kind.EXEC]

    run_virtual(main())


def test_a_guest_that_was_made_to_stand_still_is_waited_for_and_what_runs_there_goes_on() -> None:
    async def main() -> None:
        guest = Deaf()
        channel = await guest.open()
        still = True
        channel.stands_still = lambda: still
        running = GuestExecution(channel, *channel.stream(), tty=False)
        guest.reads = False
        sending = [asyncio.ensure_future(running.write(bytes(1_000))) for _ in range(3)]
        await asyncio.sleep(20 * SEND_S_MAX)
        assert not channel.lost.is_set()
        guest.reads, still = True, False
        await asyncio.wait(sending)
        assert guest.sent == [Kind.INPUT] * 3
        await channel.close()

    run_virtual(main())


def test_a_connection_on_which_no_answer_comes_is_made_anew_with_more_patience_each_time() -> None:
    async def main() -> None:
        ways = [Deaf(), Deaf(), Deaf()]
        for way in ways[:2]:
            way.answers = False
        left = iter(ways)

        async def connect() -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
            way = next(left)
            return way.reader, way

        channel = await GuestChannel.open(connect, deadline_s=10)
        assert [way.aborted for way in ways] == [True, True, False]
        assert asyncio.get_running_loop().time() == pytest.approx(3 * CONNECTION_S, abs=GREETING_S)
        await channel.close()

    run_virtual(main())


def test_who_gives_up_a_guest_that_does_not_read_is_free_after_a_few_seconds() -> None:
    async def main() -> None:
        guest = Deaf()
        channel = await guest.open()
        guest.reads = False
        starting = asyncio.ensure_future(start_beside(channel, words("true"), "true", None))
        await asyncio.sleep(1)
        starting.cancel()
        began = asyncio.get_running_loop().time()
        await asyncio.wait([starting])
        assert starting.cancelled()
        assert asyncio.get_running_loop().time() - began <= SEND_S_MAX + 3
        assert channel.lost.is_set()

    run_virtual(main())


def test_a_question_that_is_not_answered_is_kept_by_nobody() -> None:
    async def main() -> None:
        channel = await Deaf().open()
        for _ in range(5):
            with pytest.raises(DeadlineExceeded):
                await channel.ask(Kind.STATS, Kind.STATISTICS, deadline_s=2)
        assert not any(channel._answers.values())
        assert not channel.lost.is_set()
        await channel.close()

    run_virtual(main())


async def test_a_command_that_no_frame_can_hold_is_refused_and_the_others_run_on() -> None:
    async with session() as channel:
        beside = await start_beside(channel, words("cat"), "cat", None)
        room = FRAME_BYTES_MAX - 4 - len(words("true", ""))
        with pytest.raises(TooLarge, match=str(FRAME_BYTES_MAX)):
            await start_beside(channel, words("true", "x" * (room + 1)), "true", None)
        with pytest.raises(RuntimeFailed, match="Argument list too long"):  # the kernel's own bound for one word
            await start_beside(channel, words("true", "x" * room), "true", None)
        await beside.write(b"still here")
        await beside.close_stdin()
        assert await output_of(beside) == b"still here"
        await beside.close()


async def test_a_guest_of_another_version_is_refused_by_number() -> None:
    with pytest.raises(RuntimeFailed, match=f"version {VERSION + 1}"):
        await Hostile().open(VERSION + 1)


async def test_a_guest_that_sends_garbage_loses_its_channel_and_nothing_else() -> None:
    generator = random.Random(2)
    for _ in range(50):
        channel, writer = await Hostile().open()
        writer.write(b"\xff" * 8 + generator.randbytes(4096))
        await asyncio.wait_for(channel.lost.wait(), 5)
        with pytest.raises(Unavailable):
            await channel.ask(Kind.STATS, Kind.STATISTICS)
        await channel.close()
        writer.close()


async def test_a_guest_that_sends_more_than_it_may_is_cut_off() -> None:
    channel, writer = await Hostile().open()
    id, stream = channel.stream()
    frame = HEADER.pack(16 << 10, Kind.OUTPUT, 0, id) + bytes(16 << 10)
    for _ in range(64):
        writer.write(frame)
    await asyncio.wait_for(channel.lost.wait(), 5)
    assert stream.pending_bytes <= (256 + 16 + 16) << 10
    assert await stream.status == 9
    writer.close()


@pytest.mark.parametrize("kind", list(range(32)))
async def test_a_guest_s_random_frames_never_harm_the_node(kind: int) -> None:
    generator = random.Random(kind)
    left = INPUTS_PER_KIND
    while left:
        channel, writer = await Hostile().open()
        channel.stream()
        while left and not channel.lost.is_set():
            left -= 1
            body = generator.randbytes(generator.choice((0, 1, 4, 40, 300)))
            writer.write(HEADER.pack(len(body), kind, 0, generator.choice((0, 1, 2, 0xFFFF))) + body)
            await asyncio.sleep(0)
        await channel.close()
        writer.close()


async def test_a_guest_that_never_answers_is_given_up_at_the_deadline() -> None:
    ours, _theirs = socket.socketpair()

    async def connect() -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return await asyncio.open_connection(sock=ours)

    with pytest.raises(DeadlineExceeded):
        await GuestChannel.open(connect, deadline_s=0.05)
    gone = asyncio.Event()
    gone.set()

    async def nobody() -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        raise ConnectionRefusedError

    with pytest.raises(Unavailable):
        await GuestChannel.open(nobody, deadline_s=5, given_up=gone)


def _body(kind: int, generator: random.Random) -> bytes:
    """Return what might be, or nearly be, what such a frame holds."""
    if kind == Kind.EXEC and generator.random() < 0.5:
        good = bytearray(generator.randbytes(4) if generator.random() < 0.3 else bytes(4))
        good += words("true", "a" * generator.randrange(300))
        for _ in range(generator.randrange(4)):
            good[generator.randrange(len(good))] = generator.randrange(256)
        return bytes(good[: generator.randrange(len(good) + 1)] if generator.random() < 0.3 else good)
    if kind == Kind.SIGNAL:
        return generator.choice((28, 18, 0, 64, 65, 2**31, 2**32 - 1)).to_bytes(4, "little")[: generator.randrange(5)]
    return generator.randbytes(generator.choice((0, 0, 1, 3, 4, 5, 8, 72, 73, 200, 5000)))


@pytest.mark.parametrize("kind", list(range(24)))
def test_no_frame_of_any_kind_ends_the_guest(kind: int) -> None:
    """A thousand frames of each kind, on streams that are and are not there; then it still does as it is told."""
    generator = random.Random(kind)
    with guest() as (ours, started):
        ours.settimeout(20)
        _greet(ours)
        for at in range(INPUTS_PER_KIND):
            stream = generator.choice((0, 1, 2, 3, 0xFFFF))
            if at % 50 == 0:
                ours.sendall(_frame(Kind.CLOSE, 1) + _frame(Kind.EXEC, 1, bytes(4) + words("cat")))
            ours.sendall(_frame(kind, stream, _body(kind, generator)))
            if at % 16 == 0:
                _drain(ours)
        assert started.poll() is None
        _prove(ours)


def test_broken_lengths_and_cut_off_frames_are_skipped_up_to_the_next_greeting() -> None:
    generator = random.Random(3)
    with guest() as (ours, started):
        ours.settimeout(20)
        for _ in range(INPUTS_PER_KIND):
            _greet(ours)
            garbage = generator.randbytes(generator.randrange(1, 200))
            if generator.random() < 0.5:
                garbage = (FRAME_BYTES_MAX + 1 + generator.randrange(1 << 20)).to_bytes(4, "little") + garbage
            ours.sendall(garbage + MAGIC[: generator.randrange(16)])
        assert started.poll() is None
        ours.sendall(bytes(FRAME_BYTES_MAX + 64))
        _prove(ours)


def _frame(kind: int, stream: int, body: bytes = b"") -> bytes:
    return HEADER.pack(len(body), kind, 0, stream) + body


def _greet(ours: socket.socket) -> None:
    """Greet until it answers: what went before may have left half a frame."""
    nonce = os.urandom(8)
    seen = b""
    for _ in range(64):
        ours.sendall(MAGIC + VERSION.to_bytes(4, "little") + nonce)
        ours.settimeout(0.05)
        try:
            while nonce not in seen:
                seen += ours.recv(1 << 16)
            return
        except TimeoutError:
            ours.sendall(bytes(FRAME_BYTES_MAX // 8))
        finally:
            ours.settimeout(20)
    raise AssertionError("the guest does not answer any more")


def _drain(ours: socket.socket) -> None:
    ours.setblocking(False)
    try:
        while ours.recv(1 << 16):
            pass
    except BlockingIOError:
        pass
    finally:
        ours.settimeout(20)


def _prove(ours: socket.socket) -> None:
    _greet(ours)
    ours.sendall(_frame(Kind.EXEC, 77, bytes(4) + words("echo", "alive and well")))
    seen = b""
    while b"alive and well\n" not in seen:
        part = ours.recv(1 << 16)
        assert part, "the guest has gone"
        seen += part


def _config(**changes: Any) -> GuestConfig:
    fields: dict[str, Any] = {"hostname": "h", "hosts": "", "pids": 1, "memory_bytes": 1, "entropy": b"", "process": b""}
    return GuestConfig(**(fields | changes))


def test_a_disk_ends_with_what_the_guest_is_told_and_holds_no_ending_yet(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.write_bytes(b"x" * 8192)
    config = _config(process=words("sh", "-c", "x" * 10_000), entropy=b"\x01" * 64)
    for _ in range(2):  # it can be told again
        write_config(disk, 8192, config)
        data = disk.read_bytes()
        assert data[:8192] == b"x" * 8192
        assert data[8192 : 8192 + len(config_words(config))] == config_words(config)
        assert len(data) % TRAILER_BYTES == 0
        assert data[-TRAILER_BYTES:].startswith(b"atollbox")
        assert read_ending(disk) is None


def test_an_ending_that_is_no_ending_is_none(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    for data in (b"", b"short", bytes(4096), b"\xff" * 8192):
        disk.write_bytes(data)
        assert read_ending(disk) is None
    assert read_ending(tmp_path / "gone") is None
    link = tmp_path / "link"
    link.symlink_to("/etc/passwd")
    assert read_ending(link) is None
    os.mkfifo(tmp_path / "pipe")  # as a monitor that was taken over could put it there: nobody will ever write to it
    assert read_ending(tmp_path / "pipe") is None


def test_a_guest_s_root_holds_the_same_capabilities_as_a_container_s() -> None:
    from atoll.runtimes.inside import CAPABILITY_BITS

    assert sum(1 << CAPABILITY_BITS[name] for name in CAPABILITIES) == CAPABILITY_MASK
