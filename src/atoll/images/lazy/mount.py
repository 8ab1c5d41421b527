"""The one mount of a node that shows images before they are here, and who holds it."""

from __future__ import annotations

import asyncio
import ctypes
import fcntl
import os
import platform
import re
import subprocess
import threading
from collections.abc import Mapping

import msgspec

from atoll.images.auth import Access
from atoll.images.lazy.record import LazyPaths, write_whole
from atoll.images.lazy.serve import holder_command, server_command
from atoll.images.threads import in_thread
from atoll.model.errors import Unavailable, Unsupported

KERNEL_MIN = (6, 12)
"""The first whose FUSE has idmapped mounts."""
MNT_DETACH = 2


def refusal() -> str:
    """Return why this machine cannot show images before they are here; nothing if it can."""
    match = re.match(r"(\d+)\.(\d+)", platform.release())
    if match is None or (int(match[1]), int(match[2])) < KERNEL_MIN:
        return f"Linux {platform.release()} has no idmapped mounts of FUSE: 6.12 has"
    if os.geteuid() != 0:
        return "only root can mount it"
    if not os.access("/dev/fuse", os.R_OK | os.W_OK):
        return "there is no /dev/fuse"
    return ""


class LazyMount:
    """Outlives the agent: its holder is found again by the lock that it has."""

    def __init__(self, paths: LazyPaths, access: Mapping[str, Access]) -> None:
        self._paths = paths
        self._access = dict(access)
        self._starting = asyncio.Lock()
        self._access_written = False
        self.refusal = refusal()

    async def keep(self) -> None:
        """Have somebody hold the mount. Safe to repeat. Raises Unavailable, Unsupported."""
        if self.refusal:
            raise Unsupported(f"images cannot be shown before they are here: {self.refusal}")
        async with self._starting:
            if not self._is_held():
                await in_thread(self._start)
            elif not self._access_written:
                write_whole(self._paths.access, msgspec.json.encode(self._access))
            self._access_written = True

    def end(self) -> None:
        """Take the mount away from its place. Who shows it elsewhere keeps it."""
        ctypes.CDLL(None).umount2(os.fsencode(self._paths.mount), MNT_DETACH)

    def _is_held(self) -> bool:
        """Whether somebody holds the mount, and it is in its place: one that was taken away only lives on for those who show it."""
        try:
            fd = os.open(self._paths.lock, os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            return False
        try:
            fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return self._paths.is_mounted()
        finally:
            os.close(fd)
        return False

    def _start(self) -> None:
        self.end()  # what a holder that was killed has left
        self._paths.lock.unlink(missing_ok=True)  # one that lives on for others keeps its own
        self._paths.mount.mkdir(mode=0o755, parents=True, exist_ok=True)
        write_whole(self._paths.access, msgspec.json.encode(self._access))
        process = subprocess.Popen(
            [*holder_command(), str(self._paths.lock), str(self._paths.mount), str(self._paths.log), *server_command(self._paths)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            cwd="/",
        )
        said = ""
        if process.stdout is not None:
            with process.stdout as output:
                said = output.readline().decode(errors="replace").strip()
        threading.Thread(target=process.wait, daemon=True, name="lazy-holder").start()  # so that its end leaves no zombie
        if said != "mounted":
            process.kill()
            raise Unavailable(f"images cannot be shown before they are here: {said or 'the process that holds the mount ended'}")
