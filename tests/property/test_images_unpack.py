"""Unpacking keeps what a layer says, and makes nothing outside its directory, whatever the layer is."""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import random
import shutil
import stat
import tarfile
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from atoll.images.entries import DEPTH_MAX
from atoll.images.unpack import unpack
from atoll.model.errors import AtollError, ImageError, Unavailable

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="owners, devices and overlay attributes need root")


class Entry(tarfile.TarInfo):
    data = b""


def entry(name: str, kind: bytes = tarfile.REGTYPE, *, data: bytes = b"", link: str = "", mode: int = 0o644, **more: int) -> Entry:
    info = Entry(name)
    info.type, info.linkname, info.mode, info.size = kind, link, mode, len(data)
    info.mtime = 1_000_000_000
    for key, value in more.items():
        setattr(info, key, value)
    info.data = data
    return info


def tar_of(*entries: Entry) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for info in entries:
            tar.addfile(info, io.BytesIO(info.data))
    return out.getvalue()


@pytest.fixture
def work() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


def unpack_bytes(work: Path, data: bytes, **options: object) -> Path:
    (work / "layer").write_bytes(data)
    unpack(work / "layer", work / "out", **options)  # type: ignore[arg-type]
    return work / "out"


PACKINGS = {
    "plain": lambda data: data,
    "gzip": gzip.compress,
    "two gzip members": lambda data: gzip.compress(data[:700]) + gzip.compress(data[700:]),
    "zstd": zstandard.ZstdCompressor().compress,
    "two zstd frames": lambda data: (
        zstandard.ZstdCompressor().compress(data[:700]) + zstandard.ZstdCompressor().compress(data[700:])
    ),
}


@pytest.mark.parametrize("packing", PACKINGS)
def test_owners_modes_times_links_and_devices_are_kept(work: Path, packing: str) -> None:
    data = tar_of(
        entry("bin", tarfile.DIRTYPE, mode=0o755),
        entry("bin/su", data=b"x" * 3000, mode=0o4755, uid=7, gid=8),
        entry("bin/hard", tarfile.LNKTYPE, link="bin/su"),
        entry("bin/soft", tarfile.SYMTYPE, link="/etc/passwd", uid=5),
        entry("tmp", tarfile.DIRTYPE, mode=0o1777, mtime=1_100_000_000),
        entry("tmp/pipe", tarfile.FIFOTYPE, mode=0o600),
        entry("null", tarfile.CHRTYPE, mode=0o666, devmajor=1, devminor=3),
    )
    out = unpack_bytes(work, PACKINGS[packing](data), diff_id=f"sha256:{hashlib.sha256(data).hexdigest()}")
    su = (out / "bin/su").stat()
    assert (su.st_mode & 0o7777, su.st_uid, su.st_gid, su.st_size, su.st_mtime) == (0o4755, 7, 8, 3000, 1_000_000_000)
    assert (out / "bin/hard").stat().st_ino == su.st_ino
    assert (out / "bin/soft").readlink() == Path("/etc/passwd")
    assert (out / "bin/soft").lstat().st_uid == 5
    tmp = (out / "tmp").stat()
    assert (tmp.st_mode & 0o7777, tmp.st_mtime) == (0o1777, 1_100_000_000)
    assert stat.S_ISFIFO((out / "tmp/pipe").stat().st_mode)
    assert (out / "null").stat().st_rdev == os.makedev(1, 3)


def test_attributes_of_images_are_kept_and_orders_to_overlayfs_are_not(work: Path) -> None:
    info = entry("ping", data=b"x", mode=0o755)
    capability = b"\x01\x00\x00\x02\x00\x20\x00\x00" + bytes(12)
    info.pax_headers = {
        "SCHILY.xattr.security.capability": capability.decode("utf-8", "surrogateescape"),
        "SCHILY.xattr.trusted.overlay.redirect": "/etc",
        "SCHILY.xattr.trusted.overlay.opaque": "y",
    }
    out = unpack_bytes(work, tar_of(info))
    assert os.getxattr(out / "ping", "security.capability") == capability
    assert [name for name in os.listxattr(out / "ping") if name.startswith("trusted.")] == []


def test_white_outs_become_overlayfs_own(work: Path) -> None:
    out = unpack_bytes(
        work,
        tar_of(
            entry("a", tarfile.DIRTYPE, mode=0o755),
            entry("a/.wh.gone"),
            entry("a/.wh..wh..opq"),
            entry("a/.wh..wh.plnk", tarfile.DIRTYPE),
            entry("b/.wh.stays"),
            entry("b/stays", data=b"x"),
            entry("c/dir", tarfile.DIRTYPE, mode=0o755),
            entry("c/.wh.dir"),
            entry("d/.wh.dir"),
            entry("d/dir", tarfile.DIRTYPE, mode=0o755),
        ),
    )
    gone = (out / "a/gone").stat()
    assert stat.S_ISCHR(gone.st_mode)
    assert gone.st_rdev == 0
    assert os.getxattr(out / "a", "trusted.overlay.opaque") == b"y"
    assert sorted(path.name for path in (out / "a").iterdir()) == ["gone"]
    assert (out / "b/stays").read_bytes() == b"x"
    assert os.getxattr(out / "c/dir", "trusted.overlay.opaque") == b"y"
    assert os.getxattr(out / "d/dir", "trusted.overlay.opaque") == b"y"


def test_an_empty_layer_is_a_layer(work: Path) -> None:
    """Docker makes such a one for a step that changes no file."""
    assert list(unpack_bytes(work, gzip.compress(bytes(1024))).iterdir()) == []


def test_the_umask_does_not_matter(work: Path) -> None:
    old = os.umask(0o077)
    try:
        out = unpack_bytes(work, tar_of(entry("implied/file", data=b"x")))
    finally:
        os.umask(old)
    assert [stat.S_IMODE(path.stat().st_mode) for path in (out, out / "implied", out / "implied/file")] == [0o755, 0o755, 0o644]


def test_a_later_entry_replaces_an_earlier_one(work: Path) -> None:
    out = unpack_bytes(
        work,
        tar_of(
            entry("x", data=b"1"),
            entry("x", data=b"22"),
            entry("d", tarfile.DIRTYPE, mode=0o755),
            entry("d/in", data=b"1"),
            entry("d", data=b"file"),
            entry("f", data=b"1"),
            entry("f", tarfile.DIRTYPE, mode=0o700),
        ),
    )
    assert (out / "x").read_bytes() == b"22"
    assert (out / "d").read_bytes() == b"file"
    assert (out / "f").is_dir()


def test_a_link_that_stays_inside_may_be_written_through(work: Path) -> None:
    out = unpack_bytes(
        work,
        tar_of(
            entry("usr/lib", tarfile.DIRTYPE, mode=0o755), entry("lib", tarfile.SYMTYPE, link="usr/lib"), entry("lib/x", data=b"x")
        ),
    )
    assert (out / "usr/lib/x").read_bytes() == b"x"
    assert (out / "lib").is_symlink()


def test_sparse_files_keep_their_holes(work: Path) -> None:
    (work / "sparse").write_bytes(b"")
    with (work / "sparse").open("r+b") as file:
        file.truncate(8 << 20)
        file.seek(4 << 20)
        file.write(b"middle")
    os.system(f"tar -C {work} --sparse --format=pax -cf {work}/layer.tar sparse")
    out = unpack_bytes(work, (work / "layer.tar").read_bytes())
    assert (out / "sparse").read_bytes() == (work / "sparse").read_bytes()
    assert (out / "sparse").stat().st_blocks * 512 < 1 << 20


HOSTILE = {
    "dot dot": [entry("../evil", data=b"x")],
    "dot dot below": [entry("a/../../evil", data=b"x")],
    "absolute": [entry("/tmp/evil-atoll", data=b"x")],
    "through an absolute link": [entry("a", tarfile.SYMTYPE, link="/tmp"), entry("a/evil-atoll", data=b"x")],
    "through a relative link": [entry("a", tarfile.SYMTYPE, link="../"), entry("a/evil", data=b"x")],
    "through two links": [
        entry("a", tarfile.SYMTYPE, link="."),
        entry("a/b", tarfile.SYMTYPE, link=".."),
        entry("b/evil", data=b"x"),
    ],
    "directory over a link": [entry("a", tarfile.SYMTYPE, link=".."), entry("a/evil", tarfile.DIRTYPE)],
    "hard link outside": [entry("a", tarfile.LNKTYPE, link="../../../../etc/passwd")],
    "hard link absolute": [entry("a", tarfile.LNKTYPE, link="/etc/passwd")],
    "hard link through a link": [entry("e", tarfile.SYMTYPE, link="/etc"), entry("a", tarfile.LNKTYPE, link="e/passwd")],
    "hard link to nothing": [entry("a", tarfile.LNKTYPE, link="b")],
    "white-out outside": [entry("a/.wh...", data=b"")],
    "white-out of nothing": [entry(".wh.")],
    "white-out through a link": [entry("a", tarfile.SYMTYPE, link=".."), entry("a/.wh.layer")],
    "below a file": [entry("a", data=b"x"), entry("a/b", data=b"x")],
    "through /proc": [entry("a", tarfile.SYMTYPE, link="/proc/self/root"), entry("a/tmp/evil-atoll", data=b"x")],
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_layer_is_refused_and_leaves_nothing(work: Path, kind: str) -> None:
    before = sorted(path.name for path in work.iterdir())
    with pytest.raises(ImageError):
        unpack_bytes(work, tar_of(*HOSTILE[kind]))
    assert sorted(path.name for path in work.iterdir()) == sorted([*before, "layer"])
    assert not Path("/tmp/evil-atoll").exists()


def test_a_wrong_diff_id_is_refused(work: Path) -> None:
    with pytest.raises(ImageError, match="digest"):
        unpack_bytes(work, tar_of(entry("a")), diff_id="sha256:" + "0" * 64)
    assert not (work / "out").exists()


@pytest.mark.parametrize("cut", [1, 100, 512, 700, 1400])
@pytest.mark.parametrize("packing", ["plain", "gzip", "zstd"])
def test_a_cut_layer_is_refused(work: Path, packing: str, cut: int) -> None:
    data = tar_of(entry("a", data=os.urandom(1000)), entry("b", data=os.urandom(1000)))
    packed = PACKINGS[packing](data)
    with pytest.raises(ImageError):
        unpack_bytes(work, packed[:cut], diff_id=f"sha256:{hashlib.sha256(data).hexdigest()}")
    assert not (work / "out").exists()


def test_bounds_hold_against_bombs(work: Path) -> None:
    with pytest.raises(ImageError, match="more than 1000000 bytes"):
        unpack_bytes(work, zstandard.ZstdCompressor().compress(tar_of(entry("a", data=bytes(5 << 20)))), bytes_max=1_000_000)
    with pytest.raises(ImageError, match="more than 10 entries"):
        unpack_bytes(work, tar_of(*(entry(f"f{n}") for n in range(11))), entries_max=10)
    long = "/".join(["d" * 200] * 15)
    for entries in ([entry(f"{long}/{n}", tarfile.DIRTYPE) for n in range(100)], [entry(f"{long}/{n}/file") for n in range(100)]):
        with pytest.raises(ImageError, match="too many directories"):
            unpack_bytes(work, tar_of(*entries), kept_bytes_max=250_000)
        unpack_bytes(work, tar_of(*entries), kept_bytes_max=400_000)
        shutil.rmtree(work / "out")
    unpack_bytes(work, tar_of(*[entry(long, tarfile.DIRTYPE)] * 100), kept_bytes_max=100_000)  # it is remembered once
    shutil.rmtree(work / "out")
    info = entry("a")
    info.pax_headers = {"comment": "x" * (2 << 20)}
    with pytest.raises(ImageError, match="header"):
        unpack_bytes(work, tar_of(info))
    info.pax_headers = {"comment": "7" * 500_000}
    with pytest.raises(ImageError, match="digits"):
        unpack_bytes(work, tar_of(info))
    assert not (work / "out").exists()


def test_stop_ends_it_and_leaves_nothing(work: Path) -> None:
    stop = threading.Event()
    stop.set()
    with pytest.raises(Unavailable):
        unpack_bytes(work, tar_of(entry("a")), stop=stop)
    assert not (work / "out").exists()


NAMES = st.lists(
    st.sampled_from(["a", "b", "..", ".", "", ".wh.a", ".wh..wh..opq", ".wh..", "ü", "x" * 300]), min_size=1, max_size=4
).map("/".join)
LINKS = st.one_of(NAMES, NAMES.map(lambda name: "/" + name), st.sampled_from(["/", "/tmp", "..", "../..", "/proc/self/cwd"]))
KINDS = st.sampled_from([tarfile.REGTYPE, tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE])


@st.composite
def layers(draw: st.DrawFn) -> bytes:
    return tar_of(
        *(
            entry(
                draw(NAMES),
                kind,
                data=b"evil" if kind == tarfile.REGTYPE else b"",
                link=draw(LINKS),
                mode=draw(st.integers(0, 0o7777)),
            )
            for kind in draw(st.lists(KINDS, min_size=1, max_size=8))
        )
    )


def outside(root: Path) -> list[tuple[str, int, int]]:
    found = []
    for path in [root, *sorted(root.iterdir())]:
        if path.name not in ("out", "layer"):
            status = path.lstat()
            found.append((path.name, status.st_mode, status.st_mtime_ns if path != root else 0))
    return found


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(layers())
def test_no_layer_touches_anything_outside_its_directory(data: bytes) -> None:
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        (root / "a").mkdir()
        (root / "b").write_bytes(b"kept")
        before = outside(root)
        try:
            unpack_bytes(root, data)
        except ImageError:
            assert not (root / "out").exists()
        assert outside(root) == before
        assert (root / "b").read_bytes() == b"kept"
        assert list((root / "a").iterdir()) == []


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.integers(0, 2**32), st.integers(1, 40), st.sampled_from(["plain", "gzip", "zstd"]))
def test_a_damaged_layer_is_an_error_of_ours_or_unpacks(seed: int, flips: int, packing: str) -> None:
    rng = random.Random(seed)
    info = entry("p" * 150, data=b"content")
    info.pax_headers = {"SCHILY.xattr.user.a": "b", "GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": "7"}
    data = bytearray(tar_of(entry("d", tarfile.DIRTYPE), info, entry("l", tarfile.SYMTYPE, link="d"), entry("f", data=b"x" * 600)))
    for _ in range(flips):
        data[rng.randrange(len(data))] = rng.choice([0, 0x30, 0x31, 0x37, 0x39, 0x0A, 0x20, 0x2F, 0x80, 0xFF, rng.randrange(256)])
    with tempfile.TemporaryDirectory() as name:
        try:
            unpack_bytes(Path(name), PACKINGS[packing](bytes(data)))
        except AtollError:
            assert not (Path(name) / "out").exists()


def test_a_name_that_is_deeper_than_can_be_removed_again_is_refused(work: Path) -> None:
    with pytest.raises(ImageError, match="257 deep"):
        unpack_bytes(work, tar_of(entry("a/" * DEPTH_MAX + "b")))
    out = unpack_bytes(work, tar_of(entry("a/" * (DEPTH_MAX - 1) + "b")))
    shutil.rmtree(out)
