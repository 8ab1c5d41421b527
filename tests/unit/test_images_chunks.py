"""Layers in pieces: an ordinary layer for everyone else, and a tree that can be shown before its contents have come."""

from __future__ import annotations

import os
import stat
import tarfile
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
import zstandard
from msgspec.structs import replace

from atoll.images.chunks import ANNOTATION, CHUNK_BYTES, REST_BYTES_MAX, Place, Table, parse_place, parse_table
from atoll.images.layer import LayerBlob, LayerWriter
from atoll.images.lazy.skeleton import make_skeleton
from atoll.images.manifest import sha256
from atoll.images.unpack import unpack
from atoll.model.errors import ImageError

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="unpacking layers needs root")

BIG = os.urandom(2 * CHUNK_BYTES + 777)


def chunked(path: Path) -> LayerBlob:
    writer = LayerWriter(path, mtime=1_700_000_000, chunked=True)
    writer.directory("models", 0o750)
    writer.bytes("models/big.bin", BIG)
    writer.bytes("models/empty", b"", 0o600)
    writer.add("models/link", tarfile.SYMTYPE, mode=0o777, link="big.bin")
    writer.add("models/same", tarfile.LNKTYPE, mode=0o644, link="models/big.bin")
    writer.bytes("small.txt", b"hello", 0o755)
    return writer.close()


def table_of(path: Path, blob: LayerBlob) -> tuple[Table, Place]:
    place = parse_place(blob.annotations[ANNOTATION], blob.size)
    assert place is not None
    return parse_table(path.read_bytes()[place.offset : place.offset + place.size], place), place


def listed(root: Path) -> dict[str, tuple[int, int, int, int, int]]:
    found = {}
    for path in sorted(root.rglob("*")):
        status = path.lstat()
        size = 0 if stat.S_ISDIR(status.st_mode) else status.st_size
        found[str(path.relative_to(root))] = (status.st_mode, status.st_uid, size, status.st_mtime_ns, status.st_nlink)
    return found


def test_a_layer_in_pieces_unpacks_as_any_other(tmp_path: Path) -> None:
    blob = chunked(tmp_path / "layer")
    unpacked = unpack(tmp_path / "layer", tmp_path / "tree", diff_id=blob.diff_id)
    assert unpacked.diff_id == blob.diff_id
    assert (tmp_path / "tree/models/big.bin").read_bytes() == BIG
    assert sha256((tmp_path / "layer").read_bytes()) == blob.digest


def test_the_same_files_give_the_same_layer(tmp_path: Path) -> None:
    assert chunked(tmp_path / "one") == chunked(tmp_path / "two")


def test_pieces_and_table_are_the_whole_layer(tmp_path: Path) -> None:
    blob = chunked(tmp_path / "layer")
    table, place = table_of(tmp_path / "layer", blob)
    data, at, plain = (tmp_path / "layer").read_bytes(), 0, b""
    for chunk, size in enumerate(table.packed):
        frame = data[at : at + size]
        assert sha256(frame) == f"sha256:{table.digest(chunk).hex()}"
        piece = zstandard.ZstdDecompressor().decompress(frame)
        begin, end = table.plain_range(chunk)
        assert len(piece) == end - begin
        plain, at = plain + piece, at + size
    assert at + 8 == place.offset
    assert sha256(plain) == blob.diff_id
    contents = [plain[offset : offset + size] for offset, size in table.content]
    assert contents == [BIG, b"hello"]


def test_the_tree_is_shown_as_it_will_be_but_empty(tmp_path: Path) -> None:
    blob = chunked(tmp_path / "layer")
    table, _ = table_of(tmp_path / "layer", blob)
    entries = make_skeleton(table, tmp_path / "early")
    unpack(tmp_path / "layer", tmp_path / "tree")
    assert listed(tmp_path / "early") == listed(tmp_path / "tree")
    assert (tmp_path / "early/models/big.bin").read_bytes() == bytes(len(BIG))
    assert (tmp_path / "early/models/big.bin").stat().st_blocks == 0
    assert [entry.name for entry in entries] == ["", "models", "small.txt", "big.bin", "empty", "link", "same"]
    by_name = {entry.name: entry for entry in entries}
    assert by_name["big.bin"].offset == by_name["same"].offset == table.content[0][0]
    assert by_name["link"].target == "big.bin"


def test_a_table_with_another_digest_is_refused(tmp_path: Path) -> None:
    blob = chunked(tmp_path / "layer")
    place = parse_place(blob.annotations[ANNOTATION], blob.size)
    assert place is not None
    payload = bytearray((tmp_path / "layer").read_bytes()[place.offset : place.offset + place.size])
    payload[-1] ^= 1
    with pytest.raises(ImageError, match="another digest"):
        parse_table(bytes(payload), place)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda table: replace(table, chunk_bytes=1), "absurd"),
        (lambda table: replace(table, plain_bytes=0), "absurd"),
        (lambda table: replace(table, packed=table.packed[1:]), "pieces"),
        (lambda table: replace(table, digests=table.digests[:-1]), "pieces"),
        (lambda table: replace(table, packed=(table.packed[0] + 1, *table.packed[1:])), "do not end"),
        (lambda table: replace(table, packed=(1 << 40, *table.packed[1:])), "absurd size"),
        (lambda table: replace(table, content=table.content[::-1]), "overlap"),
        (lambda table: replace(table, content=((0, 0),)), "overlap"),
        (lambda table: replace(table, content=()), "not the whole"),
        (lambda table: replace(table, rest=table.rest + b"\0"), "not the whole"),
    ],
)
def test_a_table_that_contradicts_itself_is_refused(tmp_path: Path, change: Callable[[Table], Table], why: str) -> None:
    blob = chunked(tmp_path / "layer")
    table, place = table_of(tmp_path / "layer", blob)
    payload = zstandard.compress(msgspec.json.encode(change(table)))
    lying = Place(place.offset, len(payload), sha256(payload).removeprefix("sha256:"))
    with pytest.raises(ImageError, match=why):
        parse_table(payload, lying)


@pytest.mark.parametrize("text", ["", "1 2", "1 2 sha256:00", f"999 2 sha256:{'0' * 64}", f"0 {1 << 40} sha256:{'0' * 64}"])
def test_an_annotation_that_cannot_be_is_none(text: str) -> None:
    assert parse_place(text, 1000) is None


def test_headers_that_differ_from_the_table_are_refused(tmp_path: Path) -> None:
    blob = chunked(tmp_path / "layer")
    table, _ = table_of(tmp_path / "layer", blob)
    (first, size), *others = table.content
    # The header says one size, the table another: a byte of content is called rest.
    lying = replace(table, content=((first, size - 1), *others), rest=table.rest + b"\0")
    with pytest.raises(ImageError):
        make_skeleton(lying, tmp_path / "early")


def test_a_layer_with_more_headers_than_the_bound_has_no_table(tmp_path: Path) -> None:
    writer = LayerWriter(tmp_path / "layer", chunked=True)
    for number in range(REST_BYTES_MAX // 512 + 1):
        writer.bytes(f"f{number}", b"")
    blob = writer.close()
    assert blob.annotations == {}
    assert sha256((tmp_path / "layer").read_bytes()) == blob.digest
