"""The process that answers the kernel for the tree at `mnt/`, and fetches what is read: one per node.

    python -m atoll.images.lazy.serve LAZY FUSE LOCK_FD HOLDER      run by `holder.py`

It keeps nothing in memory that its successor could not read from the disk. Should the one that holds the mount for it die, it
takes that one's part, and so has a new one of itself started.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import errno
import logging
import os
import signal
import sys
from collections.abc import AsyncGenerator, Callable, Mapping
from pathlib import Path

import msgspec

from atoll.images.auth import Access
from atoll.images.lazy import fuse, holder
from atoll.images.lazy.fetch import Fetcher
from atoll.images.lazy.fuse import Op, Request
from atoll.images.lazy.pieces import Pieces
from atoll.images.lazy.record import TROUBLE, LazyImage, LazyPaths, Trouble, read_image, write_whole
from atoll.images.registry import Registries
from atoll.images.transport import Patience
from atoll.model.errors import AtollError

LOOK_S = 2.0
"""Between two looks for images that are new, or gone, or whether the whole directory is gone."""
READS_MAX = 256
"""Reads that are answered at a time; the kernel keeps the others."""
PATIENCE = Patience(connect_s=5.0, stall_s=10.0, tries=2)
_PR_SET_PDEATHSIG = 1

log = logging.getLogger("atoll.lazy")


class Shown:
    """One image, while it is shown."""

    def __init__(self, directory: Path, image: LazyImage, registries: Callable[[], Registries]) -> None:
        self.directory = directory
        self.image = image
        self.inode = directory.stat().st_ino
        self.pieces = Pieces(directory, image)
        registries().source(image.source)  # raises for one that cannot be
        self._registries = registries
        self.fetcher = Fetcher(self.pieces, self._ranges, told=self._told)
        self._failures = 0
        self.children: dict[int, dict[str, int]] = {}
        for at, entry in enumerate(image.entries[1:], 1):
            self.children.setdefault(entry.parent, {})[entry.name] = at
        self.filling = asyncio.create_task(self._fill())

    def _ranges(self, start: int, end: int) -> AsyncGenerator[bytes, None]:
        return self._registries().source(self.image.source).read_range(self.image.layer, start, end)

    async def close(self) -> None:
        self.filling.cancel()
        await asyncio.gather(self.filling, return_exceptions=True)
        await self.fetcher.close()

    async def _fill(self) -> None:
        await self.fetcher.fill()
        self.pieces.finish()
        log.info("all of %s is here", self.image.digest)

    def _told(self, message: str | None) -> None:
        """Leave word for the agent, which may be away."""
        if message is None and not self._failures:
            return
        self._failures = self._failures + 1 if message is not None else 0
        with contextlib.suppress(OSError):
            write_whole(self.directory / TROUBLE, msgspec.json.encode(Trouble(message or "", self._failures)))
        if message is not None:
            log.warning("pieces of %s did not come: %s (%d in a row)", self.image.digest, message, self._failures)


class Server:
    def __init__(self, paths: LazyPaths, descriptor: int) -> None:
        self._paths = paths
        self._fd = descriptor
        access = paths.read_access()
        self._registries = Registries(access, patience=PATIENCE)
        self._access_at = self._written(access)
        """When what says how to reach registries was written: a new agent may have another token, a certificate be renewed."""
        self._shown: dict[int, Shown] = {}
        self._reads = asyncio.Semaphore(READS_MAX)
        self._tasks: set[asyncio.Task[None]] = set()
        self._ended = asyncio.Event()

    async def run(self) -> None:
        """Serve until the mount is gone."""
        loop = asyncio.get_running_loop()
        await self._look()
        with contextlib.suppress(OSError):  # nothing to give again where nothing was agreed on yet
            os.write(self._fd, fuse.resend())
        loop.add_reader(self._fd, self._readable)
        looks = asyncio.create_task(self._look_again())
        await self._ended.wait()
        loop.remove_reader(self._fd)
        looks.cancel()
        for task in self._tasks:
            task.cancel()
        for shown in self._shown.values():
            await shown.close()
        await self._registries.aclose()

    # images

    def _read_access(self) -> None:
        with contextlib.suppress(OSError, msgspec.DecodeError):
            access = self._paths.read_access()
            if (written := self._written(access)) != self._access_at:
                # The former one is left to what still uses it.
                self._access_at, self._registries = written, Registries(access, patience=PATIENCE)

    def _written(self, access: Mapping[str, Access]) -> tuple[int, ...]:
        files = [self._paths.access, *(Path(one.identity) for one in access.values() if one.identity)]
        return tuple(file.stat().st_mtime_ns for file in files)

    async def _look_again(self) -> None:
        while True:
            await asyncio.sleep(LOOK_S)
            if not self._paths.lock.exists():  # the node's data was removed
                ctypes.CDLL(None).umount2(bytes(self._paths.mount), 2)
            await self._look()
            # A stranger's mount namespace may have a copy of the mount, for as long as it likes: nothing is left to be read there.
            if not self._shown and not self._paths.is_mounted():
                self._ended.set()

    async def _look(self) -> None:
        """Show what is new, and let go of what was removed."""
        self._read_access()
        for number, shown in list(self._shown.items()):
            try:
                gone = shown.directory.stat().st_ino != shown.inode
            except OSError:
                gone = True
            if gone:
                del self._shown[number]
                await shown.close()
        known = {shown.directory.name for shown in self._shown.values()}
        with contextlib.suppress(OSError):
            for directory in self._paths.images.iterdir():
                if directory.name not in known:
                    self._show(directory)

    def _show(self, directory: Path) -> Shown | None:
        try:
            image = read_image(directory)
            shown = Shown(directory, image, lambda: self._registries)
        except FileNotFoundError:
            return None  # it is being made
        except (OSError, msgspec.DecodeError, AtollError) as error:
            log.warning("%s cannot be shown: %s", directory, error)
            return None
        self._shown[image.number] = shown
        return shown

    def _find(self, name: str) -> Shown | None:
        for shown in self._shown.values():
            if shown.directory.name == name:
                with contextlib.suppress(OSError):
                    if shown.directory.stat().st_ino == shown.inode:
                        return shown
        return self._show(self._paths.images / name) if name.isalnum() else None

    # requests

    def _readable(self) -> None:
        for _ in range(64):
            try:
                data = os.read(self._fd, fuse.REQUEST_BYTES_MAX)
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno == errno.ENODEV:
                    self._ended.set()
                    return
                if error.errno in (errno.ENOENT, errno.EINTR):  # it was taken back meanwhile
                    continue
                raise
            request = fuse.parse_request(data)
            if request.op == Op.READ:
                task = asyncio.create_task(self._read(request))
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)
            elif request.op not in fuse.UNANSWERED:
                try:
                    self._answer(request, self._reply(request))
                except OSError as error:
                    self._answer(request, b"", error.errno or errno.EIO)

    def _answer(self, request: Request, data: bytes, error: int = 0) -> None:
        try:
            os.writev(self._fd, [fuse.header(request.unique, len(data), error), data])
        except OSError as failure:
            if failure.errno not in (errno.ENOENT, errno.ENODEV):  # who asked is gone; the mount is gone
                log.warning("request %d was not answered: %s", request.op, failure)

    def _reply(self, request: Request) -> bytes:
        """Return the answer to what needs no content. Raises OSError."""
        match request.op:
            case Op.INIT:
                return fuse.init_answer(request.body)
            case Op.DESTROY:
                return b""
            case Op.STATFS:
                images = [shown.image for shown in self._shown.values()]
                return fuse.statfs_answer(sum(image.plain_bytes for image in images), sum(len(image.entries) for image in images))
        if request.node == fuse.ROOT:
            return self._of_root(request)
        shown, at = self._entry(request.node)
        entry = shown.image.entries[at]
        number = shown.image.number
        match request.op:
            case Op.GETATTR:
                return fuse.attributes_answer(request.node, entry)
            case Op.READLINK:
                return entry.target.encode()
            case Op.LOOKUP:
                name = request.body.partition(b"\0")[0].decode("utf-8", "surrogateescape")
                child = shown.children.get(at, {}).get(name)
                if child is None:
                    raise OSError(errno.ENOENT, "no such entry")
                return fuse.entry_answer(fuse.node_of(number, child), shown.image.entries[child])
            case Op.READDIR:
                found = [(fuse.node_of(number, child), name) for name, child in shown.children.get(at, {}).items()]
                parent = fuse.node_of(number, entry.parent) if at else fuse.ROOT
                own = [(request.node, ".", entry.mode), (parent, "..", entry.mode)]
                listed = [(node, name, shown.image.entries[fuse.entry_of(node)[1]].mode) for node, name in found]
                return fuse.directory_answer(own + listed, fuse.parse_read(request.body))
        # OPEN and OPENDIR too: the kernel then asks no more, and keeps what it has read.
        raise OSError(errno.ENOSYS, "not known")

    def _of_root(self, request: Request) -> bytes:
        match request.op:
            case Op.GETATTR:
                return fuse.attributes_answer(fuse.ROOT, fuse.ROOT_ENTRY)
            case Op.READDIR:
                own = [(fuse.ROOT, ".", fuse.ROOT_ENTRY.mode), (fuse.ROOT, "..", fuse.ROOT_ENTRY.mode)]
                return fuse.directory_answer(own, fuse.parse_read(request.body))
            case Op.LOOKUP:
                shown = self._find(request.body.partition(b"\0")[0].decode("utf-8", "surrogateescape"))
                if shown is None:
                    raise OSError(errno.ENOENT, "no such image")
                # Asked anew each time: an image may be removed, and come back under another number.
                return fuse.entry_answer(fuse.node_of(shown.image.number, 0), shown.image.entries[0], valid_s=0)
        raise OSError(errno.ENOSYS, "not known")

    def _entry(self, node: int) -> tuple[Shown, int]:
        number, at = fuse.entry_of(node)
        shown = self._shown.get(number)
        if shown is None or at >= len(shown.image.entries):
            raise OSError(errno.ESTALE, "the image was removed")
        return shown, at

    async def _read(self, request: Request) -> None:
        async with self._reads:
            try:
                shown, at = self._entry(request.node)
                read = fuse.parse_read(request.body)
                await shown.fetcher.need(shown.pieces.chunks_of(at, read.offset, read.size))
                data = await asyncio.to_thread(shown.pieces.read, at, read.offset, read.size)
            except AtollError as error:
                log.warning("a read of %s failed: %s", shown.image.digest, error)
                self._answer(request, b"", errno.EIO)
            except OSError as error:
                self._answer(request, b"", errno.ESTALE if error.errno == errno.ESTALE else errno.EIO)
            else:
                self._answer(request, data)


def take_over(paths: LazyPaths, descriptor: int, lock: int) -> None:
    """Become the one that holds the mount, in this process; it starts the next server."""
    for fd in (descriptor, lock):
        os.set_inheritable(fd, True)
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, 0, 0, 0, 0)
    command = [*holder_command(), "--adopt", str(descriptor), str(lock), str(paths.log), *server_command(paths)]
    os.execv(sys.executable, command)  # noqa: S606 (no shell is wanted)


def holder_command() -> list[str]:
    return [sys.executable, "-I", "-S", str(Path(holder.__file__))]


def server_command(paths: LazyPaths) -> list[str]:
    """Without the two descriptors and its own id, which the holder appends."""
    return [sys.executable, "-m", "atoll.images.lazy.serve", str(paths.directory)]


async def _main(paths: LazyPaths, descriptor: int, lock: int, parent: int) -> None:
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGUSR1, take_over, paths, descriptor, lock)
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGUSR1, 0, 0, 0)
    if os.getppid() != parent:  # it died before that was asked for
        take_over(paths, descriptor, lock)
    await Server(paths, descriptor).run()


if __name__ == "__main__":
    # Not the agent's structured log: its library takes a third of the time in which this process starts.
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", level=logging.INFO)
    logging.getLogger("httpx").setLevel(logging.WARNING)
    asyncio.run(_main(LazyPaths(Path(sys.argv[1])), *map(int, sys.argv[2:5])))
