"""What an instance's runner works with: the ports of the outer layers, and three small ones of this package."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from atoll.model.ports.clock import Clock
from atoll.model.ports.control_plane import ControlPlane
from atoll.model.ports.devices import ForeignDevices
from atoll.model.ports.images import Images
from atoll.model.ports.network import Network
from atoll.model.ports.runtime import Runtime
from atoll.model.records import Capacity, Instance
from atoll.model.spec import Health, RuntimeName
from atoll.model.streams import LogLine, LogOptions
from atoll.node.directories import Directories
from atoll.node.gpus import Gpus
from atoll.node.record import LocalRecord
from atoll.node.report import Reporter

LAUNCHES_MAX = 16
"""Processes that a node starts at a time; more would only make each other slow."""


class Logs(Protocol):
    """The output of instances: read from pipes, kept in bounded files."""

    def open(self, project: str, id: str) -> tuple[Path, Path]:
        """Make the instance's pipes (stdout, stderr) if they are not there, and read them from now on. Safe to repeat.

        Raises Exhausted on a full disk.
        """
        ...

    def drain(self, id: str) -> None:
        """Take in all that the pipes hold, the last line without its end too."""
        ...

    def close(self, id: str) -> None:
        """Stop reading and remove the pipes; what was kept stays."""
        ...

    def remove(self, project: str, id: str) -> None:
        """Remove what was kept. Safe to repeat."""
        ...

    def strangers(self, known: set[str]) -> list[tuple[str, str]]:
        """Return (project, id) of logs whose instance is not among `known`."""
        ...

    def read(self, project: str, id: str, options: LogOptions) -> AsyncIterator[LogLine]:
        """Yield kept lines, oldest first, and with `follow` new ones as they come, until `close`."""
        ...

    def shut(self) -> None:
        """Stop reading everything; pipes and files stay for the next agent."""
        ...


class Prober(Protocol):
    async def probe_port(self, address: str, port: int) -> str:
        """Return why `port` accepts no connection, or nothing if it does."""
        ...

    async def probe(self, runtime: Runtime, id: str, address: str | None, health: Health, port: int, http2: bool) -> str:
        """Return why the check fails, or nothing if it succeeds; `health.timeout` bounds it."""
        ...


class Scraper(Protocol):
    async def scrape(self, address: str, port: int, path: str) -> bytes:
        """Return what an instance's metrics endpoint answers with.

        Raises Unavailable (nothing answers, or not with 200), TooLarge. Bounded by the caller's deadline; a retry is safe.
        """
        ...


class Machine(Protocol):
    def capacity(self) -> Capacity:
        """What instances may use: the machine less what the system and Atoll itself need."""
        ...

    def sample(self) -> tuple[int, int]:
        """Return (cpu in thousandths of a core since the last call, memory in bytes) in use on the whole machine."""
        ...

    def disk_used(self) -> float:
        """Return how full the disk with the agent's data is, 0 to 1."""
        ...

    def ports_taken(self) -> tuple[str, ...]:
        """Return the ports of the machine that its own programs listen on, as `tcp/22`."""
        ...

    def groups(self, pid: int) -> Sequence[str]:
        """Return the names of the control groups that a process is in, outermost first; none for one that is gone."""
        ...


@dataclass(frozen=True)
class Tools:
    node: str
    control: ControlPlane
    runtimes: Mapping[RuntimeName, Runtime]
    """Those that this machine can run."""
    images: Images
    network: Network
    clock: Clock
    record: LocalRecord
    logs: Logs
    prober: Prober
    scraper: Scraper
    directories: Directories
    reporter: Reporter
    gpus: Gpus | None = None
    """None on a node without any."""
    foreign: ForeignDevices | None = None
    """Devices of CDI specs; None where the operator allowed none."""
    peer_digest: Callable[[Instance, str | None], str | None] = lambda instance, volume: None
    """The digest of the image that another instance of the same release has here; of a volume, where one is named."""
    launches: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(LAUNCHES_MAX))
