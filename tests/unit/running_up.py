"""What a running `atoll up` holds, without one."""

from __future__ import annotations

import fcntl
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def running_up(data: Path) -> Iterator[str]:
    """Hold a data directory as process 4711 would, and yield an address at which something listens."""
    with socket.socket() as taken, open(data / "lock", "w+") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        lock.write("4711")
        lock.flush()
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        yield f"127.0.0.1:{taken.getsockname()[1]}"
