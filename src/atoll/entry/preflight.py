"""What would keep `atoll up` from working on this machine, said before anything is started."""

from __future__ import annotations

import errno
from pathlib import Path

from atoll.entry.config import Config
from atoll.model.errors import AtollError, Exhausted, Invalid, Unsupported
from atoll.model.fabric import network_of
from atoll.network.outward import Outward

CAPABILITIES = {
    "CHOWN": 0,
    "DAC_OVERRIDE": 1,
    "KILL": 5,
    "SETGID": 6,
    "SETUID": 7,
    "NET_ADMIN": 12,
    "SYS_CHROOT": 18,
    "SYS_PTRACE": 19,
    "SYS_ADMIN": 21,
}
"""Those without which no container starts, by the kernel's numbers."""


def held_capabilities() -> int:
    """Return this process's effective capabilities, one bit each."""
    status = Path("/proc/self/status").read_text()
    return int(next(line.split()[1] for line in status.splitlines() if line.startswith("CapEff:")), 16)


def check_settings(config: Config, *, held: int | None = None) -> None:
    """Raise Invalid for a subnet, store or data directory that cannot be, Unsupported for a lacking capability. Changes nothing.

    `held` are the capabilities, one bit each; None for this process's own.
    """
    if config.subnet:
        network_of(config.subnet, "subnet")
    Outward(config.ipv6_address)
    config.store_place, config.node_labels, config.node_taints  # noqa: B018 - each raises
    held = held_capabilities() if held is None else held
    lacking = [name for name, bit in CAPABILITIES.items() if not held >> bit & 1]
    if lacking:
        names = ", ".join(f"CAP_{name}" for name in lacking)
        raise Unsupported(
            f"this process lacks the capability {names}, without which no instance starts",
            mend="run it outside of a restricted container, or give that capability; `atoll doctor` checks the rest",
        )
    nearest = next(path for path in (config.data, *config.data.parents) if path.exists())
    if not nearest.is_dir():
        raise Invalid(
            f"--data: {nearest} is not a directory", field="data", mend="give a directory, or a path where one can be made"
        )


def make_data(config: Config) -> None:
    """Make the data directory. Raises Exhausted for a full disk, Invalid where there can be none. Safe to repeat."""
    try:
        config.data.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as error:
        raise data_error(config, error) from None


def data_error(config: Config, error: OSError) -> AtollError:
    """Return what an error from the data directory's file system means to the user."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return Exhausted(f"--data: the disk of {config.data} is full", field="data", mend="make room, or give another --data")
    return Invalid(f"--data: cannot use {config.data}: {error.strerror}", field="data", mend="give another --data")
