"""Images that are shown before they are here: the kernel's FUSE, the cell's own registry, processes that are killed."""

from __future__ import annotations

import asyncio
import errno
import hashlib
import json
import mmap
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from atoll.entry.scratch import ScratchAtoll
from atoll.images.chunks import CHUNK_BYTES
from atoll.images.lazy.mount import refusal
from atoll.images.lazy.shown import LazyImages
from atoll.images.reference import CELL_HOST
from atoll.images.registry import Registries
from atoll.images.store import ImageStore
from atoll.images.transport import Access
from atoll.model.ports.runtime import Mount
from atoll.runtimes.idmap import IdMaps, make_user_namespace
from atoll.runtimes.mounts import MNT_DETACH, unmount
from atoll.runtimes.rootfs import show_mounts

pytestmark = [
    pytest.mark.system,
    pytest.mark.skipif(os.geteuid() != 0, reason="Atoll runs instances as root"),
    pytest.mark.skipif(bool(refusal()), reason=refusal() or "-"),
    pytest.mark.timeout(120),
]
WEIGHTS_BYTES = 24 << 20
MIDDLE = WEIGHTS_BYTES // 2


@pytest.fixture(scope="module")
def scratch() -> Iterator[ScratchAtoll]:
    with ScratchAtoll("atoll-lazy-") as scratch:
        scratch.environment["XDG_CACHE_HOME"] = str(scratch.data / "cache")
        yield scratch


class World:
    """One node's image store over the cell's registry, with one image in that."""

    def __init__(self, scratch: ScratchAtoll, directory: Path) -> None:
        self.data = os.urandom(WEIGHTS_BYTES)
        app = directory / "weights"
        (app / "below").mkdir(parents=True)
        (app / "weights.bin").write_bytes(self.data)
        (app / "below" / "small.txt").write_text("hello")
        (app / "below" / "link").symlink_to("../weights.bin")
        spec = {"name": "weights", "build": {"base": "scratch", "workdir": "/", "files": ["weights.bin", "below"]}}
        (app / "atoll.json").write_text(json.dumps(spec))
        self.reference = str(scratch.atoll_json("build", "--file", str(app / "atoll.json"))["image"])
        self.registry = scratch.data / "server"
        self.access = {CELL_HOST: Access(url=f"http://{scratch.api}", username="agent", password=scratch.token)}
        self.directory = directory / "images"
        self.directory.mkdir()
        self.lazy = LazyImages(self.directory / "lazy", self.access, bytes_min=1)

    def blob(self) -> Path:
        """Return the layer as the registry keeps it: the last large one that came."""
        files = [path for path in self.registry.rglob("*") if path.is_file() and path.stat().st_size > WEIGHTS_BYTES]
        return max(files, key=lambda path: path.stat().st_mtime_ns)

    def pids(self, part: str) -> list[int]:
        """Return the processes of this mount whose command line has `part`."""
        found = []
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                words = path.read_bytes().decode().split("\0")
            except OSError:
                continue
            if str(self.lazy.paths.directory) in " ".join(words) and part in " ".join(words[:4]):
                found.append(int(path.parent.name))
        return found

    def server(self) -> int:
        return until(lambda: self.pids("atoll.images.lazy.serve"))[0]

    def holder(self) -> int:
        return until(lambda: self.pids("holder.py"))[0]


def has_ended(pid: int) -> bool:
    """A process that ends has no command line any more before it lets go of its files, the mount's lock among them."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return True


def until(holds: Callable[[], list[int]], seconds: float = 20.0) -> list[int]:
    deadline = time.monotonic() + seconds
    while not (found := holds()):
        assert time.monotonic() < deadline, "it did not come about in time"
        time.sleep(0.01)
    return found


@pytest.fixture
def world(scratch: ScratchAtoll, tmp_path: Path) -> Iterator[World]:
    world = World(scratch, tmp_path)
    yield world
    unmount(world.lazy.paths.mount, MNT_DETACH)
    shutil.rmtree(world.lazy.paths.images, ignore_errors=True)  # else a copy of the mount in another's namespace would be served on
    until(lambda: [1] if not world.pids("lazy") else [])


def both(world: World, killed: int) -> list[int]:
    """Return the one that holds the mount and the one that serves it, once that is dead and both are there."""
    holders, servers = world.pids("holder.py"), world.pids("atoll.images.lazy.serve")
    return [*holders, *servers] if killed not in (*holders, *servers) and holders and servers else []


async def shown(world: World, store: ImageStore) -> Path:
    image = await store.ensure(world.reference, lazily=True)
    assert image.layers == ()
    return await store.tree(image)


def read_at(path: Path, offset: int, size: int) -> bytes:
    with path.open("rb", buffering=0) as file:
        return os.pread(file.fileno(), size, offset)


def test_an_image_is_read_before_it_is_here_by_every_instance_and_then_is_plain_files(world: World) -> None:
    async def main() -> None:
        registries = Registries(world.access)
        store = ImageStore(world.directory, registries, lazy=world.lazy)
        tree = await shown(world, store)
        assert tree.is_relative_to(world.lazy.paths.mount)
        weights = tree / "weights.bin"
        assert weights.stat().st_size == WEIGHTS_BYTES
        assert await asyncio.to_thread(read_at, weights, MIDDLE, 1000) == world.data[MIDDLE : MIDDLE + 1000]
        assert sorted(path.name for path in tree.iterdir()) == ["below", "weights.bin"]
        assert sorted(path.name for path in (tree / "below").iterdir()) == ["link", "small.txt"]
        assert (tree / "below" / "link").readlink() == Path("../weights.bin")
        assert await asyncio.to_thread((tree / "below" / "small.txt").read_text) == "hello"
        assert not (tree / "absent").exists()
        with pytest.raises(OSError, match="Read-only"):
            (tree / "new").write_text("x")

        # As instances are shown it: under ids of their own, the same file and so the same page cache for all.
        found = []
        for number in (1, 2):
            (place := world.directory / f"box{number}").mkdir()
            namespace = make_user_namespace(IdMaps.base(number))
            (point,) = show_mounts(place, [Mount(source=tree, target="/models", read_only=True)], userns=namespace)
            os.close(namespace)
            found.append((point / "weights.bin").stat())
            digest = await asyncio.to_thread(lambda at: hashlib.sha256((at / "weights.bin").read_bytes()).digest(), point)
            assert digest == hashlib.sha256(world.data).digest()
            unmount(point, MNT_DETACH)
        assert (found[0].st_dev, found[0].st_ino) == (found[1].st_dev, found[1].st_ino)
        assert found[0].st_uid != found[1].st_uid

        async with asyncio.timeout(30):
            while await store.find(world.reference) is None:  # noqa: ASYNC110 (another process brings it)
                await asyncio.sleep(0.05)
        image = await store.ensure(world.reference, lazily=True)
        plain = await store.tree(image)
        assert plain == image.layers[0]
        assert not plain.is_relative_to(world.lazy.paths.mount)
        assert (plain / "weights.bin").read_bytes() == world.data
        assert (plain / "weights.bin").stat().st_ino == (world.lazy.paths.image(image.digest) / "tree/weights.bin").stat().st_ino
        assert read_at(weights, MIDDLE, 10) == world.data[MIDDLE : MIDDLE + 10]  # who was shown it early reads on

        # The next agent finds it; and what nobody uses goes, the mount and its processes with it,
        # a copy of the mount in a stranger's namespace notwithstanding.
        stranger = await asyncio.create_subprocess_exec("unshare", "-m", "--propagation", "private", "sleep", "100")
        at = Path(f"/proc/{stranger.pid}/mountinfo")
        await asyncio.to_thread(until, lambda: [1] if "sleep" in Path(f"/proc/{stranger.pid}/comm").read_text() else [])
        assert str(world.lazy.paths.mount) in at.read_text()
        await store.close()
        again = LazyImages(world.lazy.paths.directory, world.access, bytes_min=1)
        store = ImageStore(world.directory, registries, lazy=again, hold_s=0)
        assert await store.find(world.reference) is not None
        await store.collect([])
        await asyncio.to_thread(until, lambda: [1] if not world.pids("lazy") else [])
        assert str(world.lazy.paths.mount) in at.read_text()
        stranger.kill()
        await stranger.wait()
        assert not any(world.lazy.paths.images.iterdir())
        await store.close()
        await registries.aclose()

    asyncio.run(main())


def test_readers_outlast_the_death_of_whoever_serves_them_and_never_see_wrong_bytes(world: World) -> None:
    def read_all(path: Path, wrong: list[str]) -> None:
        with path.open("rb", buffering=0) as file:
            at = 0
            while data := file.read(CHUNK_BYTES // 2):
                if data != world.data[at : at + len(data)]:
                    wrong.append(f"read at {at}")
                at += len(data)
            with mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped:
                wrong += [f"mapped at {at}" for at in range(0, WEIGHTS_BYTES, 65_536) if mapped[at] != world.data[at]]
            if at != WEIGHTS_BYTES:
                wrong.append(f"ends at {at}")

    async def main() -> None:
        registries = Registries(world.access)
        store = ImageStore(world.directory, registries, lazy=world.lazy)
        tree = await shown(world, store)
        wrong: list[str] = []
        reader = threading.Thread(target=read_all, args=(tree / "weights.bin", wrong))
        reader.start()
        killed = []
        # The one that serves, twice; then the one that holds the mount for it; then the one that serves again.
        for find in (world.server, world.server, world.holder, world.server):
            pid = await asyncio.to_thread(find)
            os.kill(pid, signal.SIGKILL)
            killed.append(pid)
            # Until another has its part: were both dead at a time, nobody would hold the mount.
            await asyncio.to_thread(until, lambda pid=pid: both(world, pid))
        await asyncio.to_thread(reader.join, 60)
        assert not reader.is_alive()
        assert wrong == []
        assert len(set(killed)) == 4
        assert world.holder() not in killed

        # With both killed at once nobody holds the mount: an error, and the next one who asks has it made anew.
        for pid in [world.holder(), world.server()]:
            os.kill(pid, signal.SIGSTOP)
        both_pids = [*world.pids("holder.py"), *world.pids("atoll.images.lazy.serve")]
        for pid in both_pids:
            os.kill(pid, signal.SIGKILL)
        await asyncio.to_thread(until, lambda: [1] if all(map(has_ended, both_pids)) and not world.pids("lazy") else [])
        with pytest.raises(OSError, match=r"not connected|abort"):
            (tree / "below" / "small.txt").read_text()
        tree = await world.lazy.tree((await store.ensure(world.reference, lazily=True)).digest)
        assert await asyncio.to_thread((tree / "below" / "small.txt").read_text) == "hello"
        await store.close()
        await registries.aclose()

    asyncio.run(main())


def test_a_piece_that_is_damaged_at_the_registry_is_an_error_and_an_event_and_comes_when_it_is_mended(world: World) -> None:
    async def main() -> None:
        blob = world.blob()
        good = blob.read_bytes()
        bad = bytearray(good)
        bad[len(good) // 2] ^= 1
        blob.write_bytes(bad)
        registries = Registries(world.access)
        store = ImageStore(world.directory, registries, lazy=world.lazy)
        tree = await shown(world, store)
        offsets = range(0, WEIGHTS_BYTES, CHUNK_BYTES // 2)
        refused = []
        for at in offsets:
            try:
                assert await asyncio.to_thread(read_at, tree / "weights.bin", at, 100) == world.data[at : at + 100]
            except OSError as error:
                refused.append((at, error.errno))
        assert 1 <= len(refused) <= 4
        assert all(abs(at - MIDDLE) <= 2 * CHUNK_BYTES and number == errno.EIO for at, number in refused)
        async with asyncio.timeout(10):
            trouble = await anext(aiter(store.troubles()))
        assert "damaged" in trouble.message
        assert trouble.digest == world.reference.partition("@")[2]
        assert await store.find(world.reference) is None

        blob.write_bytes(good)
        for at, _ in refused:
            assert await asyncio.to_thread(read_at, tree / "weights.bin", at, 100) == world.data[at : at + 100]
        await store.close()
        await registries.aclose()

    asyncio.run(main())
