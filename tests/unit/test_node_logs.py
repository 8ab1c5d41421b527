"""Output of instances: from pipes to bounded files and back to readers."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from atoll.model.ports.clock import SystemClock
from atoll.model.streams import LogLine, LogOptions
from atoll.node import log_files
from atoll.node.directories import Directories
from atoll.node.log_files import FILE_BYTES_MAX, FILES_MAX, LogReader, LogWriter, decode_line, encode_line
from atoll.node.logs import BURST_BYTES, LINE_BYTES_MAX, RATE_BYTES_S, FileLogs


@asynccontextmanager
async def opened(data: Path) -> AsyncIterator[FileLogs]:
    directories = Directories(data)
    directories.make()
    logs = FileLogs(directories, SystemClock())
    try:
        yield logs
    finally:
        logs.shut()


async def put(path: Path, data: bytes) -> None:
    """Write as a process would, from a thread, since a full pipe blocks."""

    def write() -> None:
        with open(path, "wb", buffering=0) as pipe:
            rest = memoryview(data)
            while rest:
                rest = rest[pipe.write(rest) :]

    await asyncio.to_thread(write)


async def kept(logs: FileLogs, **options: object) -> list[LogLine]:
    return [line async for line in logs.read("default", "web-1", LogOptions(**options))]  # type: ignore[arg-type]


async def test_lines_carry_their_stream_and_time_and_survive_bad_bytes(tmp_path: Path) -> None:
    async with opened(tmp_path) as logs:
        out, err = logs.open("default", "web-1")
        await put(out, b"one\ntwo\n")
        await put(err, b"bad \xff\x00 bytes\n")
        await put(out, "grüße\n".encode())
        logs.drain("web-1")
        lines = await kept(logs)
    assert sorted((line.stream, line.text) for line in lines) == [
        ("stderr", "bad \ufffd\x00 bytes"),
        ("stdout", "grüße"),
        ("stdout", "one"),
        ("stdout", "two"),
    ]
    assert all(line.at > 1e9 for line in lines)


async def test_a_very_long_line_is_kept_in_parts(tmp_path: Path) -> None:
    text = bytes(ord("a") + n % 26 for n in range(3 * LINE_BYTES_MAX + 5))
    async with opened(tmp_path) as logs:
        out, _ = logs.open("default", "web-1")
        await put(out, text + b"\nshort\n")
        logs.drain("web-1")
        lines = await kept(logs)
    assert [line.partial for line in lines] == [True, True, True, False, False]
    assert "".join(line.text for line in lines[:4]).encode() == text
    assert lines[4].text == "short"


async def test_the_last_line_without_an_end_is_kept_when_the_process_ends(tmp_path: Path) -> None:
    async with opened(tmp_path) as logs:
        out, _ = logs.open("default", "web-1")
        await put(out, b"no newline")
        logs.drain("web-1")
        assert [line.text for line in await kept(logs)] == ["no newline"]


async def test_a_prompt_is_seen_before_its_line_ends(tmp_path: Path) -> None:
    async with opened(tmp_path) as logs:
        out, _ = logs.open("default", "web-1")
        lines = logs.read("default", "web-1", LogOptions(follow=True))
        await put(out, b"name? ")
        first = await asyncio.wait_for(anext(lines), 3)  # type: ignore[arg-type]
        assert (first.text, first.partial) == ("name? ", True)
        await put(out, b"Atoll\n")
        second = await asyncio.wait_for(anext(lines), 3)  # type: ignore[arg-type]
        assert (second.text, second.partial) == ("Atoll", False)


async def test_disk_use_is_bounded_and_the_newest_stays(tmp_path: Path) -> None:
    directory = tmp_path / "logs"
    writer = LogWriter(directory)
    block = b"".join(encode_line(float(n), "stdout", b"x" * 1000) for n in range(512))
    for _ in range(FILE_BYTES_MAX * (FILES_MAX + 2) // len(block)):
        writer.write(block)
    writer.write(encode_line(1.0, "stdout", b"the last"))
    writer.close()
    assert sum(path.stat().st_size for path in directory.iterdir()) <= FILES_MAX * FILE_BYTES_MAX + len(block)
    assert len(list(directory.iterdir())) == FILES_MAX
    with LogReader(directory, tail=1) as reader:
        (line,) = reader.read()
    entry = decode_line(line)
    assert entry is not None
    assert entry.text == "the last"


@pytest.mark.parametrize("tail", [0, 1, 2, 999, 1000, 1001, 3000, 10_000])
def test_tail_gives_exactly_the_last_lines_across_files(tmp_path: Path, tail: int) -> None:
    directory = tmp_path / "logs"
    directory.mkdir()
    for number in range(3):
        lines = [encode_line(float(number), "stdout", b"%d %b" % (number * 1000 + n, b"y" * 100)) for n in range(1000)]
        log_files.file_of(directory, number + 1).write_bytes(b"".join(lines))
    found: list[int] = []
    with LogReader(directory, tail=tail) as reader:
        while lines := reader.read():
            found += [int(line.split()[2]) for line in lines]
    assert found == list(range(max(0, 3000 - tail), 3000))


async def test_since_leaves_out_what_is_older(tmp_path: Path) -> None:
    async with opened(tmp_path) as logs:
        out, _ = logs.open("default", "web-1")
        await put(out, b"old\n")
        logs.drain("web-1")
        await asyncio.sleep(0.01)
        since = SystemClock().now()
        await put(out, b"new\n")
        logs.drain("web-1")
        assert [line.text for line in await kept(logs, since=since)] == ["new"]


async def test_followers_get_each_line_once_across_a_rotation_and_end_with_the_instance(tmp_path: Path) -> None:
    wanted = 3 * FILE_BYTES_MAX // 1000
    async with opened(tmp_path) as logs:
        out, _ = logs.open("default", "web-1")
        followers = [asyncio.create_task(_numbers(logs)) for _ in range(2)]
        await asyncio.sleep(0)
        await put(out, b"".join(b"%d %b\n" % (n, b"z" * 1000) for n in range(wanted)))
        logs.drain("web-1")
        await asyncio.sleep(0.3)
        logs.close("web-1")
        for found in await asyncio.wait_for(asyncio.gather(*followers), 20):
            assert found == list(range(wanted))


async def _numbers(logs: FileLogs) -> list[int]:
    found, text = [], ""
    async for line in logs.read("default", "web-1", LogOptions(follow=True)):
        text += line.text
        if not line.partial:  # a line in two parts, where writer and reader stood still for over a second
            found.append(int(text.split()[0]))
            assert text == f"{found[-1]} {'z' * 1000}"
            text = ""
    return found


async def test_following_a_quiet_log_wakes_within_milliseconds(tmp_path: Path) -> None:
    async with opened(tmp_path) as logs:
        out, _ = logs.open("default", "web-1")
        lines = logs.read("default", "web-1", LogOptions(follow=True))
        waiting = asyncio.ensure_future(anext(lines))  # type: ignore[arg-type]
        await asyncio.sleep(0.02)
        began = asyncio.get_running_loop().time()
        await put(out, b"hello\n")
        assert (await asyncio.wait_for(waiting, 1)).text == "hello"  # type: ignore[attr-defined]
        assert asyncio.get_running_loop().time() - began < 0.2
        await lines.aclose()  # type: ignore[attr-defined]


async def test_what_was_written_while_no_agent_was_there_is_read_by_the_next(tmp_path: Path) -> None:
    async with opened(tmp_path) as logs:
        out, _ = logs.open("default", "web-1")
        held = os.open(out, os.O_RDWR)  # as the runtime does
    os.write(held, b"meanwhile\n")
    async with opened(tmp_path) as logs:
        logs.open("default", "web-1")
        logs.drain("web-1")
        assert [line.text for line in await kept(logs)] == ["meanwhile"]
    os.close(held)


async def test_a_flood_leaves_turns_for_others_and_waits_when_over_its_budget(tmp_path: Path) -> None:
    size = BURST_BYTES + RATE_BYTES_S // 2
    async with opened(tmp_path) as logs:
        out, _ = logs.open("default", "web-1")
        loop = asyncio.get_running_loop()
        began = loop.time()
        flood = asyncio.create_task(put(out, b"flood of output\n" * (size // 16)))
        longest = 0.0
        while not flood.done():
            before = loop.time()
            await asyncio.sleep(0.001)
            longest = max(longest, loop.time() - before)
        took = loop.time() - began
    assert longest < 0.5
    assert took > 0.2


async def test_a_line_that_a_crash_cut_is_skipped_and_the_next_is_whole(tmp_path: Path) -> None:
    async with opened(tmp_path) as logs:
        directory = tmp_path / "logs/default/web-1"
        directory.mkdir(parents=True)
        log_files.file_of(directory, 1).write_bytes(encode_line(1.0, "stdout", b"whole") + b"17959.2")
        out, _ = logs.open("default", "web-1")
        await put(out, b"next\n")
        logs.drain("web-1")
        assert [line.text for line in await kept(logs)] == ["whole", "next"]


async def test_removal_leaves_no_file_and_no_pipe(tmp_path: Path) -> None:
    async with opened(tmp_path) as logs:
        out, _ = logs.open("default", "web-1")
        await put(out, b"x\n")
        logs.remove("default", "web-1")
        assert not out.exists()
        assert list((tmp_path / "logs").iterdir()) == []


def test_a_full_disk_loses_lines_and_never_raises(tmp_path: Path) -> None:
    writer = LogWriter(tmp_path / "logs/web-1")
    (tmp_path / "logs").write_text("in the way, so that nothing can be made below")
    assert not writer.write(b"lost\n")
    assert writer.lost_bytes == 5
    (tmp_path / "logs").unlink()
    assert writer.write(b"kept\n")
    writer.close()
