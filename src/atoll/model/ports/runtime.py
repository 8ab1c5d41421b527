"""What every runtime offers to the agent, whatever stands behind it.

Calls for one instance are made one at a time (`exec` excepted); calls for different instances run side by side.
What a runtime cannot do it refuses with Unsupported, whose message says which can.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from msgspec import Struct

from atoll.model.copying import Copier
from atoll.model.ports.devices import Edits
from atoll.model.ports.images import Image
from atoll.model.records import Exit, Usage
from atoll.model.spec import RuntimeName
from atoll.model.worker import Worker


class Feature(enum.StrEnum):
    """What only some runtimes can do; `Runtime.features` lists them, and the CLI's table is made from it."""

    EXEC = "exec"
    TTY = "tty"
    PAUSE = "pause"
    RESIZE = "resize"
    SNAPSHOT = "snapshot"
    FORK = "fork"
    FILES = "files"
    GPU = "gpu"


class Mount(Struct, frozen=True):
    """A directory of the node that the instance sees at `target`."""

    source: Path
    target: str
    read_only: bool = False


class Limits(Struct, frozen=True):
    cpu_milli: int
    memory_bytes: int
    disk_bytes: int
    pids: int


class WorkerCode(Struct, frozen=True, kw_only=True):
    """What makes a box a worker: its modules are the image's, below `model.worker.MODULES`."""

    worker: Worker
    project: str
    port: int
    """Where it listens for requests."""
    alive_port: int | None = None
    """Where the process answers that it is alive, without asking the worker."""
    bindings: tuple[str, ...] = ()
    """Variables of the box's environment that the worker sees as text; nothing else of it does."""


class Box(Struct, frozen=True, kw_only=True):
    """Everything that a runtime needs to make one instance; nothing in it is a wish, all is decided."""

    id: str
    """Unique on the node; `Instance.id`."""
    directory: Path
    """The runtime's own for this instance; it is gone after `delete`."""
    image: Image
    argv: tuple[str, ...]
    """Empty for a worker."""
    env: tuple[tuple[str, str], ...]
    """Complete and in order; secrets are among them, so neither log nor print it."""
    workdir: str
    user: str
    """As in an image's config: `""`, `"1000"`, `"app:app"`; resolved against the image's /etc/passwd."""
    hostname: str
    limits: Limits
    mounts: tuple[Mount, ...] = ()
    devices: Edits = Edits()
    """What makes its GPUs appear inside; nothing else of the node's devices does."""
    worker: WorkerCode | None = None
    read_only_root: bool = False
    netns: Path | None = None
    resolv_conf: Path | None = None
    stdout: Path
    """A FIFO made by the agent, which holds a reading end; the runtime opens it for reading and writing, so that
    neither the agent's death nor its return breaks or ends the process."""
    stderr: Path
    attended: bool = False
    """Whether it is there to be worked in: what can be made ready for its commands is, beside its first process."""


class Started(Struct, frozen=True):
    pid: int
    """The instance's first process, as the node sees it (of a VM, its VMM)."""
    at: float


class Compatibility(Struct, frozen=True):
    """What a snapshot depends on: it is restored where all of it is the same."""

    runtime: RuntimeName
    version: str
    cpu: str
    """The processor's model and abilities in a word; `emulated` where it is not the node's."""
    kernel: str
    """The node's; empty where a machine does not depend on it."""


class SnapshotFile(Struct, frozen=True):
    name: str
    size_bytes: int


class Snapshot(Struct, frozen=True, kw_only=True):
    """A snapshot's manifest: what is in its directory, and what may be made of it."""

    digest: str
    """`sha256:…` of what its files hold."""
    compatibility: Compatibility
    image: str
    """The digest of the image that it was made from."""
    limits: Limits
    """Those of the instance: a copy has the same."""
    networked: bool
    files: tuple[SnapshotFile, ...]
    stored_bytes: int
    """What it takes on the node's disk."""
    taken_at: float


class Found(Struct, frozen=True):
    """An instance that `recover` found on the node, running or ended."""

    id: str
    pid: int | None
    exit: Exit | None


class Execution(Protocol):
    """A command that runs in an instance beside its main process. `close` kills it if it still runs."""

    async def read(self) -> tuple[int, bytes] | None:
        """Return the next output as (1 for stdout or 2 for stderr, bytes of at most 64 KiB); None when both have ended.

        With a tty all is stdout.
        """
        ...

    async def write(self, data: bytes) -> None:
        """Write to its stdin; returns when the pipe has taken it (back-pressure). Input after its end is dropped."""
        ...

    async def close_stdin(self) -> None: ...

    async def resize(self, rows: int, columns: int) -> None: ...

    async def signal(self, name: str) -> None: ...

    async def wait(self) -> int:
        """Return the exit status, 128 + n if signal n ended it."""
        ...

    async def close(self) -> None: ...


class Runtime(Protocol):
    name: RuntimeName
    features: frozenset[Feature]

    async def probe(self) -> str:
        """Return the version if this machine can run it. Raises Unsupported with the cause and the mend."""
        ...

    async def create(self, box: Box) -> None:
        """Make root, mounts, cgroup and configuration; no process of the instance runs yet.

        Raises RuntimeFailed, ImageError or Exhausted; then nothing is left behind.
        """
        ...

    async def start(self, id: str) -> Started:
        """Start the created instance's process.

        Raises RuntimeFailed (for a command that does not exist too, with its name in the message); the instance is
        then as `create` left it.
        """
        ...

    async def wait(self, id: str) -> Exit:
        """Return how the process ended; works for one that ended before the call or while no agent was there."""
        ...

    async def exec(
        self,
        id: str,
        argv: Sequence[str],
        *,
        env: Sequence[tuple[str, str]] = (),
        workdir: str | None = None,
        user: str | None = None,
        tty: bool = False,
        rows: int = 24,
        columns: int = 80,
    ) -> Execution:
        """Start a command in the running instance, with `env` added to the instance's own environment.

        Raises RuntimeFailed for one that cannot be started.
        """
        ...

    async def signal(self, id: str, name: str) -> None:
        """Send a signal (`"SIGTERM"`) to the first process. One that has ended is no error."""
        ...

    async def kill(self, id: str) -> None:
        """End every process of the instance at once. One that has ended is no error."""
        ...

    async def pause(self, id: str) -> None: ...

    async def resume(self, id: str) -> None: ...

    async def snapshot(self, id: str, directory: Path) -> Snapshot:
        """Write the state of the running or paused instance into `directory`, which does not exist yet; it then goes on, or stays
        paused.

        The directory is a snapshot only when its manifest is there, which is written last; on an error it is gone. Raises
        Unsupported, Conflict (it does not run), Exhausted, RuntimeFailed. A retry is safe.
        """
        ...

    async def restore(self, box: Box, directory: Path) -> Started:
        """Make and start an instance that goes on where the snapshot in `directory` was taken, under the names of `box`.

        Any number can be made of one snapshot; each has its own disk, address, hardware address, hostname, machine id, clock and
        randomness. Its processes are the snapshot's: `argv` and `env` count for commands beside them.

        Raises Unsupported (of another runtime, version, processor or kernel), Invalid (it does not fit the box), Corrupt, NotFound,
        Conflict, RuntimeFailed; nothing is left then, and a retry is safe. The directory is only read, and may go once this has
        returned.
        """
        ...

    async def usage(self, id: str) -> Usage:
        """Return what it uses; `cpu_milli` is the average since the last call."""
        ...

    async def root(self, id: str) -> int:
        """Return an open O_PATH descriptor of the instance's root directory, for copying files; the caller closes it.

        Names below it are the tenant's: resolve them with RESOLVE_IN_ROOT only.
        """
        ...

    async def copier(self, id: str) -> Copier | None:
        """Return what copies files of a running instance whose `root` cannot be had; None where it can."""
        ...

    async def delete(self, id: str) -> None:
        """Kill what runs and remove every trace: processes, cgroup, mounts, directory. Safe to repeat."""
        ...

    async def recover(self) -> Sequence[Found]:
        """Adopt what an earlier agent left: after it, every other call works for the ids returned.

        Half-made instances are among them with neither pid nor exit; the agent deletes or starts them.
        """
        ...

    async def close(self) -> None:
        """Let go of everything without ending an instance."""
        ...
