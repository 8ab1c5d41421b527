"""Ports of this machine that programs outside of instances listen on, as /proc/net tells."""

from __future__ import annotations

from pathlib import Path

TAKEN_MAX = 1_024
"""Ports that are told; of more, the lowest."""
_PROC = Path("/proc/thread-self/net")
_LISTENS = {"tcp": "0A", "udp": "07"}
"""The kernel's state of a socket that waits for strangers."""


def taken_ports(proc: Path = _PROC) -> tuple[str, ...]:
    """Return the ports that cannot be published on this machine's addresses, as `tcp/22`, lowest first.

    What listens on a loopback address only is in nobody's way; clients' own ports, which come and go, are left out.
    """
    first = _first_of_clients()
    found: set[tuple[int, str]] = set()
    for protocol, state in _LISTENS.items():
        for family in ("", "6"):
            try:
                lines = (proc / f"{protocol}{family}").read_text().splitlines()[1:]
            except OSError:
                continue
            for fields in map(str.split, lines):
                address, _, number = fields[1].rpartition(":")
                if fields[3] == state and not _is_loopback(address) and int(number, 16) < first:
                    found.add((int(number, 16), protocol))
    return tuple(f"{protocol}/{number}" for number, protocol in sorted(found)[:TAKEN_MAX])


def _is_loopback(address: str) -> bool:
    """Whether the kernel's hexadecimal `address` (words of four bytes, each in the machine's order) is 127.0.0.0/8 or ::1."""
    if len(address) == 8:
        return address.endswith("7F")
    return address == "0" * 24 + "01000000" or (address.startswith("0" * 16 + "FFFF0000") and address.endswith("7F"))


def _first_of_clients() -> int:
    try:
        return int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    except (OSError, ValueError, IndexError):
        return 32_768
