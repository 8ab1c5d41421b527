"""Pieces of an image that come when they are read: what is asked for, in what order, and what is never given out."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncGenerator
from pathlib import Path

import pytest

from atoll.images.chunks import ANNOTATION, CHUNK_BYTES, parse_place, parse_table
from atoll.images.layer import LayerWriter
from atoll.images.lazy.fetch import Fetcher, Pace
from atoll.images.lazy.pieces import Pieces
from atoll.images.lazy.record import ALL, TREE, LazyImage
from atoll.images.lazy.skeleton import make_skeleton
from atoll.model.errors import DeadlineExceeded, ImageError, Unavailable
from atoll.model.ports.images import ImageConfig

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="unpacking layers needs root")

COUNT = 12
DATA = os.urandom(COUNT * CHUNK_BYTES - 20_000)
"""With its headers COUNT pieces."""
QUICK = Pace(read_s=5.0, again_s=0.001, rest_s=0.001, rest_max_s=0.002)


class Registry:
    """Gives ranges of a blob, and fails as it is told to."""

    def __init__(self, blob: bytes) -> None:
        self.blob = bytearray(blob)
        self.asked: list[tuple[int, int]] = []
        self.failures: list[Exception] = []
        self.hangs = False
        self.piece_bytes = 100_000

    async def __call__(self, start: int, end: int) -> AsyncGenerator[bytes, None]:
        self.asked.append((start, end))
        if self.hangs:
            await asyncio.Event().wait()
        if self.failures:
            raise self.failures.pop(0)
        for at in range(start, end, self.piece_bytes):
            await asyncio.sleep(0)
            yield bytes(self.blob[at : min(at + self.piece_bytes, end)])


class World:
    def __init__(self, directory: Path, pace: Pace = QUICK) -> None:
        directory.mkdir()
        self.directory = directory
        writer = LayerWriter(directory / "layer", chunked=True)
        writer.bytes("first", b"1")
        writer.bytes("weights", DATA)
        blob = writer.close()
        data = (directory / "layer").read_bytes()
        place = parse_place(blob.annotations[ANNOTATION], blob.size)
        assert place is not None
        table = parse_table(data[place.offset : place.offset + place.size], place)
        self.image = LazyImage(
            number=1,
            boot="",
            digest="sha256:" + "0" * 64,
            references=(),
            source="",
            config=ImageConfig(),
            layer=blob.descriptor,
            diff_id=blob.diff_id,
            chunk_bytes=table.chunk_bytes,
            plain_bytes=table.plain_bytes,
            packed=table.packed,
            digests=table.digests,
            content=table.content,
            entries=tuple(make_skeleton(table, directory / TREE)),
        )
        self.weights = [entry.name for entry in self.image.entries].index("weights")
        self.registry = Registry(data)
        self.told: list[str | None] = []
        self.pieces = Pieces(directory, self.image)
        self.fetcher = Fetcher(self.pieces, self.registry, told=self.told.append, pace=pace)

    async def read(self, offset: int, size: int) -> bytes:
        await self.fetcher.need(self.pieces.chunks_of(self.weights, offset, size))
        return self.pieces.read(self.weights, offset, size)

    def asked(self) -> list[list[int]]:
        """Return the pieces of each request."""
        starts = {self.pieces.packed_range(chunk, chunk)[0]: chunk for chunk in range(self.pieces.count)}
        ends = {self.pieces.packed_range(chunk, chunk)[1]: chunk for chunk in range(self.pieces.count)}
        return [list(range(starts[start], ends[end] + 1)) for start, end in self.registry.asked]


def test_a_reader_gets_its_bytes_and_only_the_pieces_that_hold_them_are_asked_for(tmp_path: Path) -> None:
    async def main() -> None:
        world = World(tmp_path / "image")
        assert world.pieces.count == COUNT
        middle = 5 * CHUNK_BYTES + 10
        assert await world.read(middle, 100) == DATA[middle : middle + 100]
        assert len(world.asked()) == 1
        assert len(world.asked()[0]) == 1
        assert world.pieces.missing == COUNT - 1
        edge = 8 * CHUNK_BYTES - 2000
        assert await world.read(edge, 4000) == DATA[edge : edge + 4000]
        assert len(world.registry.asked) == 2
        assert await world.read(edge, 10) == DATA[edge : edge + 10]
        assert len(world.registry.asked) == 2

    asyncio.run(main())


def test_readers_of_one_piece_share_one_request(tmp_path: Path) -> None:
    async def main() -> None:
        world = World(tmp_path / "image")
        found = await asyncio.gather(*(world.read(at, 1) for at in range(1, 50)))
        assert b"".join(found) == DATA[1:50]
        assert len(world.registry.asked) == 1

    asyncio.run(main())


def test_all_comes_in_growing_parts_from_behind_the_last_reader(tmp_path: Path) -> None:
    async def main() -> None:
        world = World(tmp_path / "image")
        await world.read(6 * CHUNK_BYTES, 1)
        await world.fetcher.fill()
        assert world.pieces.missing == 0
        assert world.asked()[1][0] == world.asked()[0][-1] + 1
        assert max(len(part) for part in world.asked()) > 1
        assert sorted(chunk for part in world.asked() for chunk in part) == list(range(COUNT))
        assert (tmp_path / "image" / TREE / "weights").read_bytes() == DATA
        assert (tmp_path / "image" / TREE / "first").read_bytes() == b"1"
        world.pieces.finish()
        assert (tmp_path / "image" / ALL).exists()

    asyncio.run(main())


def test_a_damaged_piece_is_refused_at_once_never_written_and_tried_again_by_the_next_reader(tmp_path: Path) -> None:
    async def main() -> None:
        world = World(tmp_path / "image")
        at = world.pieces.packed_range(5, 5)[0] + 1000
        world.registry.blob[at] ^= 1
        middle = 5 * CHUNK_BYTES
        with pytest.raises(ImageError, match=r"piece 5 .* damaged"):
            await world.read(middle, 10)
        assert not world.pieces.has(5)
        begin = middle - world.image.entries[world.weights].offset
        found = (tmp_path / "image" / TREE / "weights").read_bytes()
        assert found[begin : begin + CHUNK_BYTES] == bytes(CHUNK_BYTES)
        assert len(world.told) == 1
        assert "damaged" in str(world.told[0])
        world.registry.blob[at] ^= 1
        assert await world.read(middle, 10) == DATA[middle : middle + 10]
        assert world.told[-1] is None

    asyncio.run(main())


def test_the_good_pieces_of_a_request_with_a_damaged_one_are_kept(tmp_path: Path) -> None:
    async def main() -> None:
        world = World(tmp_path / "image")
        world.registry.blob[world.pieces.packed_range(3, 3)[0]] ^= 1
        with pytest.raises(ImageError):
            await world.fetcher.need(range(4))
        assert [world.pieces.has(chunk) for chunk in range(4)] == [True, True, True, False]

    asyncio.run(main())


def test_a_registry_that_fails_for_a_moment_is_asked_again_for_a_reader(tmp_path: Path) -> None:
    async def main() -> None:
        world = World(tmp_path / "image")
        world.registry.failures = [Unavailable("away"), Unavailable("away")]
        assert await world.read(0, 10) == DATA[:10]
        assert len(world.registry.asked) == 3

    asyncio.run(main())


def test_a_reader_gets_an_error_after_its_time_and_the_next_one_a_new_try(tmp_path: Path) -> None:
    async def main() -> None:
        world = World(tmp_path / "image", Pace(read_s=0.05, again_s=0.01))
        world.registry.failures = [Unavailable("away")] * 1000
        with pytest.raises(Unavailable, match="away"):
            await world.read(0, 10)
        world.registry.failures = []
        assert await world.read(0, 10) == DATA[:10]

    asyncio.run(main())


def test_a_registry_that_hangs_is_a_deadline_exceeded(tmp_path: Path) -> None:
    async def main() -> None:
        world = World(tmp_path / "image", Pace(read_s=0.02))
        world.registry.hangs = True
        with pytest.raises(DeadlineExceeded):
            await world.read(0, 10)
        await world.fetcher.close()

    asyncio.run(main())


def test_filling_outlasts_failures(tmp_path: Path) -> None:
    async def main() -> None:
        world = World(tmp_path / "image")
        world.registry.failures = [Unavailable("away"), Unavailable("away"), ImageError("odd")]
        await world.fetcher.fill()
        assert world.pieces.missing == 0
        assert world.told[:3] == ["away", "away", "odd"]

    asyncio.run(main())


def test_filling_ends_where_the_last_piece_comes_for_a_reader_while_it_waits_for_one(tmp_path: Path) -> None:
    async def main() -> None:
        world = World(tmp_path / "image")
        await world.fetcher.need(range(COUNT - 1))
        reader = asyncio.create_task(world.fetcher.need(range(COUNT - 1, COUNT)))
        await asyncio.sleep(0)
        await asyncio.gather(reader, world.fetcher.fill())
        assert world.pieces.missing == 0

    asyncio.run(main())


def test_a_successor_has_what_its_predecessor_fetched(tmp_path: Path) -> None:
    async def main() -> None:
        world = World(tmp_path / "image")
        await world.fetcher.need(range(2, 5))
        successor = Pieces(tmp_path / "image", world.image)
        assert [chunk for chunk in range(COUNT) if successor.has(chunk)] == [2, 3, 4]

    asyncio.run(main())
