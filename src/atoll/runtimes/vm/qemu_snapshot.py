"""How a QEMU machine is written down, and how copies of it share its memory.

    SNAPSHOT/state   devices, as QEMU migrates them      ram   the guest's memory      disk   the instance's own disk

A copy maps the memory copy-on-write and reads nothing of it before its guest does. What it maps is a file in memory of the agent's
that nobody can write to any more (sealed): QEMU insists on opening it for writing, and a monitor that was taken over must not
change the memory of other copies. QEMU documentation: devel/migration (`x-ignore-shared`).
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import functools
import io
import os
import re
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

from atoll.model.errors import Exhausted, RuntimeFailed
from atoll.runtimes.loop_disk import extents, fill
from atoll.runtimes.mounts import descriptor
from atoll.runtimes.snapshots import MANIFEST, check_content, load
from atoll.runtimes.vm.boxes import VmPlan
from atoll.runtimes.vm.jail import INSIDE
from atoll.runtimes.vm.qemu_stream import split
from atoll.runtimes.vm.qmp import Session, session
from atoll.runtimes.vm.sockets import open_socket

STATE, RAM = "state", "ram"
RAM_FD, STATE_FD = 14, 15
OWN_DESCRIPTORS, DESCRIPTORS = Path("/proc/self/fd"), Path("/fd")
"""What a monitor has open, and where it sees that in its jail, which has no /proc."""
SAVE_S_MAX, LOAD_S_MAX, LISTEN_S_MAX = 60.0, 20.0, 10.0
MEMORIES_MAX = 64
RESERVE_BYTES = 256 << 20
"""Of the node's memory, what reading a snapshot's leaves to others."""
REMOVED_S = 10.0
"""How often is looked whether a snapshot whose memory is held was removed."""
_SOCKET = "snapshot.sock"
_STEP_S = 0.001
_BANDWIDTH_MAX = 1 << 40
_IGNORE = {"capabilities": [{"capability": "x-ignore-shared", "state": True}]}
_SEALS = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE


def memory_budget_bytes() -> int:
    """Return how much of this node's memory the memories of snapshots may take which no start is using: an eighth."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 8


def available_bytes() -> int:
    """Return how much memory this node could give away without swapping (proc(5), MemAvailable)."""
    found = re.search(r"^MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text(), re.MULTILINE)
    return int(found[1]) << 10 if found else 0


class SharedMemories:
    """The memories of the snapshots that were last restored, each ready to be mapped by more copies. Calls come from any thread.

    A memory that is let go of lives on as long as a copy maps it; the next restore of its snapshot reads it again.
    """

    def __init__(self, budget_bytes: int, available: Callable[[], int] = available_bytes) -> None:
        """`available` says how many bytes the node has to give."""
        self._budget_bytes = budget_bytes
        self._available = available
        self._lock = threading.Lock()
        self._held: dict[str, tuple[int, int]] = {}
        self._users: dict[str, int] = {}

    def take(self, snapshot: str) -> None:
        """Have the memory of a snapshot ready until `give`; its content is checked when it is read. Blocking.

        Raises Corrupt, NotFound, Exhausted, RuntimeFailed.
        """
        with self._lock:
            held = self._held.pop(snapshot, None) or self._read(Path(snapshot))
            self._held[snapshot] = held
            self._users[snapshot] = self._users.get(snapshot, 0) + 1
            self._shrink()

    def give(self, snapshot: str) -> None:
        with self._lock:
            self._users[snapshot] -= 1
            if not self._users[snapshot]:
                del self._users[snapshot]
            self._shrink()

    def let_go_of_removed(self) -> bool:
        """Let go of the memories whose snapshots are there no more; return whether any is held still. Blocking."""
        with self._lock:
            for snapshot in self._unused():
                if not (Path(snapshot) / MANIFEST).exists():
                    self._let_go(snapshot)
            return bool(self._held)

    def path(self, snapshot: str) -> str:
        """Return where another process of root's can open what was taken."""
        return f"/proc/{os.getpid()}/fd/{self._held[snapshot][0]}"

    def close(self) -> None:
        with self._lock:
            for fd, _ in self._held.values():
                os.close(fd)
            self._held.clear()

    def _read(self, directory: Path) -> tuple[int, int]:
        manifest = load(directory)
        try:
            with descriptor(os.open(directory / RAM, os.O_RDONLY | os.O_CLOEXEC)) as file:
                self._make_room(sum(end - start for start, end in extents(file, os.fstat(file).st_size)))
                check_content(directory, manifest)
                return _sealed(file)
        except OSError as error:
            raise Exhausted(f"the snapshot's memory cannot be read: {error}", mend="free memory on the node") from None

    def _make_room(self, wanted_bytes: int) -> None:
        """Raises Exhausted where the node has not as much memory to give, not even without those that no start is using."""
        unused = self._unused()
        before_bytes = -1
        while (spare_bytes := self._available() - RESERVE_BYTES) < wanted_bytes:
            could_bytes = sum(self._held[snapshot][1] for snapshot in unused)
            # What copies have mapped is not free for being let go of here.
            if spare_bytes + could_bytes < wanted_bytes or spare_bytes == before_bytes:
                raise Exhausted(
                    f"the snapshot's memory has {wanted_bytes >> 20} MiB, and the node {max(0, spare_bytes) >> 20} MiB to spare",
                    mend="free memory on the node",
                )
            before_bytes = spare_bytes
            self._let_go(unused.pop(0))

    def _shrink(self) -> None:
        for snapshot in self._unused():
            if len(self._held) <= MEMORIES_MAX and sum(size for _, size in self._held.values()) <= self._budget_bytes:
                return
            self._let_go(snapshot)

    def _unused(self) -> list[str]:
        """Return the snapshots whose memories no start is using, the longest unused first."""
        return [snapshot for snapshot in self._held if snapshot not in self._users]

    def _let_go(self, snapshot: str) -> None:
        os.close(self._held.pop(snapshot)[0])


def _sealed(file: int) -> tuple[int, int]:
    """Return a file in memory with what `file` holds, which nobody can change, and the bytes that it takes. Raises OSError."""
    fd = os.memfd_create("atoll-snapshot", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        fill(file, fd)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
        return fd, os.fstat(fd).st_blocks * 512
    except OSError:
        os.close(fd)
        raise


def shared_memory(plan: VmPlan, name: str) -> list[str]:
    """Return QEMU's arguments for a copy's memory: mapped, its own where it writes; and that it waits to be told what it is.

    The memory has the name that it has in a machine which was given none, as QEMU's documentation of `memory-backend` has it.
    """
    backend = f"memory-backend-file,id={name},size={plan.ram_bytes},mem-path={DESCRIPTORS / str(RAM_FD)},share=off,prealloc=off"
    return [
        "-object",
        f"{backend},x-use-canonical-path-for-ramblock-id=off",
        "-machine",
        f"memory-backend={name}",
        "-incoming",
        "defer",
    ]


async def save(plan: VmPlan, directory: Path, memory: str) -> None:
    """Write the machine, which stands still, to `state` and `ram` in `directory`. Raises RuntimeFailed, Unavailable, OSError."""
    own = Path(plan.directory) / "vm"
    listener = await asyncio.to_thread(_listen, own, plan.uid)
    way = _Way(listener)
    try:
        taking = asyncio.ensure_future(asyncio.to_thread(_take, way, directory, plan.ram_bytes, memory))
        try:
            async with session(own / "qmp.sock", deadline_s=SAVE_S_MAX, what="migrate") as monitor:
                await monitor.ask("migrate-set-capabilities", _IGNORE)
                await monitor.ask("migrate-set-parameters", {"max-bandwidth": _BANDWIDTH_MAX})
                await monitor.ask("migrate", {"uri": f"unix:{INSIDE / _SOCKET}"})
                await asyncio.shield(taking)
                await _completed(monitor)
        except BaseException:
            way.shut()
            await asyncio.gather(taking, return_exceptions=True)
            raise
    finally:
        way.shut()
        listener.close()
        await asyncio.to_thread((own / _SOCKET).unlink, missing_ok=True)


class _Way:
    """Where the monitor's stream comes in, which another thread can shut at any time: it may have no end of its own."""

    def __init__(self, listener: socket.socket) -> None:
        self._lock = threading.Lock()
        self._is_shut = False
        self._listener = listener
        self._connection: socket.socket | None = None

    @contextlib.contextmanager
    def connection(self) -> Iterator[socket.socket]:
        """Give the first connection that comes. Raises OSError."""
        connection, _ = self._listener.accept()
        try:
            with self._lock:
                if self._is_shut:
                    raise ConnectionAbortedError("nobody waits for it any more")
                self._connection = connection
            yield connection
        finally:
            with self._lock:
                self._connection = None
                connection.close()

    def shut(self) -> None:
        """Have whoever waits for a connection, or reads from it, come to an end. Safe to repeat."""
        with self._lock:
            self._is_shut = True
            for end in (self._listener, self._connection):
                if end is not None:
                    with contextlib.suppress(OSError):  # the other side went first
                        end.shutdown(socket.SHUT_RDWR)


def _listen(own: Path, uid: int) -> socket.socket:
    (own / _SOCKET).unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    listener.settimeout(LISTEN_S_MAX)
    try:
        with descriptor(os.open(own, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)) as fd:
            listener.bind(f"/proc/self/fd/{fd}/{_SOCKET}")  # the path itself may be longer than an address can be
        listener.listen(1)
        os.chown(own / _SOCKET, uid, uid, follow_symlinks=False)
    except OSError:
        listener.close()
        raise
    return listener


def _take(way: _Way, directory: Path, ram_bytes: int, memory: str) -> None:
    with contextlib.ExitStack() as stack:
        try:
            connection = stack.enter_context(way.connection())
        except OSError as error:
            raise RuntimeFailed(f"the machine's monitor did not begin to write: {error}") from None
        connection.settimeout(LISTEN_S_MAX)
        raw = connection.makefile("rb", buffering=0)
        with io.BufferedReader(raw, 1 << 20) as stream, (directory / STATE).open("xb") as state:
            with descriptor(os.open(directory / RAM, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)) as ram:
                split(stream, state, ram, ram_bytes=ram_bytes, block=memory)


async def _completed(monitor: Session) -> None:
    """Return when a migration has ended well. Raises RuntimeFailed; waits no longer than the session may last."""
    while True:
        found = await monitor.ask("query-migrate")
        match found.get("status"):
            case "completed":
                return
            case "failed" | "cancelled":
                raise RuntimeFailed(f"QEMU could not go through with it: {found.get('error-desc', 'no reason given')}"[:300])
            case _:
                await asyncio.sleep(_STEP_S)


async def go_on(socket_path: Path, gone: asyncio.Event) -> None:
    """Have a monitor that waits load what was opened for it, and let its machine go on.

    Raises RuntimeFailed, Unavailable, DeadlineExceeded.
    """
    opening = functools.partial(_when_it_listens, gone=gone)
    async with session(socket_path, deadline_s=LOAD_S_MAX, what="migrate-incoming", opening=opening) as monitor:
        await monitor.ask("migrate-set-capabilities", _IGNORE)
        await monitor.ask("migrate-incoming", {"uri": f"fd:{STATE_FD}"})
        await _completed(monitor)
        await monitor.ask("cont")


async def _when_it_listens(path: Path, *, gone: asyncio.Event) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Connect as soon as the monitor takes connections, which is some time after its start. The caller sets the deadline."""
    step_s = _STEP_S
    while True:
        try:
            return await open_socket(path)
        except OSError:
            if gone.is_set():
                raise
        await asyncio.sleep(step_s)
        step_s = min(step_s * 1.2, 0.01)
