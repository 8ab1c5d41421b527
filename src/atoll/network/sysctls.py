"""The kernel's settings of networks, and those that IPv6 of instances needs; all of the namespace that the calling thread is in."""

from __future__ import annotations

import errno
from collections.abc import Sequence
from pathlib import Path

from atoll.model.errors import RuntimeFailed

DIRECTORY = Path("/proc/sys/net")
FORWARDING = "ipv4/ip_forward"


def write_sysctl(name: str, value: str, directory: Path = DIRECTORY) -> None:
    """Raises RuntimeFailed where /proc/sys is not writable; one that this kernel does not have is left out."""
    try:
        (directory / name).write_text(value)
    except FileNotFoundError:
        return
    except OSError as error:
        mend = "run as root, with a writable /proc/sys" if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM) else None
        raise RuntimeFailed(f"cannot set {name} to {value}: {error.strerror}", mend=mend) from None


def read_sysctl(name: str, directory: Path = DIRECTORY) -> str:
    """Return the value, or `""` where this kernel has no such setting."""
    try:
        return (directory / name).read_text().strip()
    except OSError:
        return ""


def no_ipv6() -> str:
    """Return why this machine has no IPv6 for instances, or nothing."""
    disabled = read_sysctl("ipv6/conf/all/disable_ipv6")
    if not disabled:
        return "this kernel has no IPv6"
    return "net.ipv6.conf.all.disable_ipv6 is set" if disabled != "0" else ""


def open_ipv6(interface: str) -> None:
    """Let the link have IPv6, and let what comes by it go on to others. Before it is brought up. Raises RuntimeFailed."""
    if read_sysctl("ipv6/conf/default/disable_ipv6") != "0":
        write_sysctl(f"ipv6/conf/{interface}/disable_ipv6", "0")
    write_sysctl(f"ipv6/conf/{interface}/force_forwarding", "1")


def forward_ipv6(directory: Path = DIRECTORY) -> bool:
    """Let links forward IPv6; return whether something of the whole machine was changed. Raises RuntimeFailed.

    Since Linux 6.17 each link is let by itself (`open_ipv6`). Before, all of the machine forwards or nothing does; so that it does
    not lose its own way out, what hears of routers goes on to do so (accept_ra 2; Documentation/networking/ip-sysctl).
    """
    if read_sysctl("ipv6/conf/all/force_forwarding", directory) or read_sysctl("ipv6/conf/all/forwarding", directory) != "0":
        return False
    for path in sorted((directory / "ipv6/conf").iterdir()):
        if path.name != "all" and read_sysctl(f"ipv6/conf/{path.name}/accept_ra", directory) == "1":
            write_sysctl(f"ipv6/conf/{path.name}/accept_ra", "2", directory)
    write_sysctl("ipv6/conf/all/forwarding", "1", directory)
    return True


def restore_forwarding(links: Sequence[str], directory: Path = DIRECTORY) -> bool:
    """Turn on again what somebody has turned off: IPv4 forwarding, and where there are `links` with IPv6 that of them; return
    whether anything was off. Raises RuntimeFailed.

    Who writes `conf/all/forwarding`, even what stands there already, turns it off for every link; so one link speaks for all.
    """
    off = read_sysctl(FORWARDING, directory) == "0"
    if off:
        write_sysctl(FORWARDING, "1", directory)
    if links:
        off |= forward_ipv6(directory)
        if read_sysctl(f"ipv6/conf/{links[0]}/force_forwarding", directory) == "0":
            off = True
            for link in links:
                write_sysctl(f"ipv6/conf/{link}/force_forwarding", "1", directory)
    return off
