"""Which subnets agents of this machine have: no two give out the same addresses, of whatever cells they are.

A claim is a lock on a file, in the name of which the subnet stands, and goes with its process however that ends. A cell that has no
instance just now has no route by which another would notice it.
"""

from __future__ import annotations

import contextlib
import fcntl
import ipaddress
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from atoll.model.errors import Conflict
from atoll.network.addresses import AddressPool
from atoll.network.slots import routes

DIRECTORY = Path("/run/atoll/subnets")
OTHERS = range(128, 256)
"""Second numbers of the networks `10.N.0.0/16` that are proposed."""


def hold_subnet(subnet: str, owner: str, directory: Path = DIRECTORY) -> int:
    """Hold `subnet` in this network namespace until the descriptor that is returned is closed, or this process ends.

    `owner` says to others whose it is. Raises Conflict: addresses of it are another's; Invalid.
    """
    directory.mkdir(parents=True, exist_ok=True)
    network = AddressPool(subnet).network
    space = Path("/proc/thread-self/ns/net").stat().st_ino
    with open(directory / ".lock", "a") as order:
        fcntl.flock(order, fcntl.LOCK_EX)  # held for a moment only: nobody waits below
        held = list(_held(directory, space))
        for other, whose in held:
            if other.overlaps(network):
                mend = (
                    f"a second cell on one machine needs addresses of its own: give it --subnet {_free(other for other, _ in held)}"
                )
                raise Conflict(f"the subnet {network} is used by {whose} on this machine", mend=mend, field="subnet")
        path = directory / f"{space}-{network.network_address}-{network.prefixlen}"
        claim = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
        fcntl.flock(claim, fcntl.LOCK_EX)
        os.write(claim, owner.encode())
        return claim


def held_by(words: str, directory: Path = DIRECTORY) -> str | None:
    """Return the subnet that is held by the one whose `owner` ends in `words`, None where there is none. Changes nothing."""
    space = Path("/proc/thread-self/ns/net").stat().st_ino
    for path in directory.glob(f"{space}-*"):
        with contextlib.suppress(ValueError, OSError), open(path) as file:
            network = ipaddress.IPv4Network(path.name.partition("-")[2].replace("-", "/"))
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                if file.read().endswith(words):
                    return str(network)
    return None


def _held(directory: Path, space: int) -> Iterator[tuple[ipaddress.IPv4Network, str]]:
    """Yield the subnets that are held, and whose they are; what nobody holds any more is removed."""
    for path in directory.glob(f"{space}-*"):
        _, _, name = path.name.partition("-")
        with contextlib.suppress(ValueError, OSError), open(path) as file:
            network = ipaddress.IPv4Network(name.replace("-", "/"))
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                yield network, file.read() or "another agent"
            else:
                path.unlink()


def _free(held: Iterable[ipaddress.IPv4Network]) -> str:
    taken = [*held, *(network for _, network in routes() if network.prefixlen)]
    candidates = (ipaddress.IPv4Network(f"10.{second}.0.0/16") for second in OTHERS)
    return str(next((one for one in candidates if not any(one.overlaps(other) for other in taken)), "10.N.0.0/16"))
