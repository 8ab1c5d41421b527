"""What this machine lacks for instances' networks, for `atoll doctor`. Changes nothing."""

from __future__ import annotations

import ctypes.util
import os
import subprocess
from pathlib import Path

from msgspec import Struct

from atoll.model.errors import AtollError
from atoll.model.fabric import network_of
from atoll.network import resolvers
from atoll.network.outward import Outward
from atoll.network.slots import routes
from atoll.network.sysctls import no_ipv6, read_sysctl

_ADMIN_BITS = (12, 21)
"""CAP_NET_ADMIN and CAP_SYS_ADMIN in the kernel's numbers."""
LISTING_S = 5.0
"""The longest that other software's rules are waited for."""


class Check(Struct, frozen=True):
    """`ok` None is something to know that stops nothing."""

    name: str
    ok: bool | None
    detail: str
    mend: str = ""


def check_network(subnet: str = "10.64.0.0/16", *, held: str | None = None, outward: str = "") -> tuple[Check, ...]:
    """Return what was found, in the order in which it should be mended. `held` is the subnet that the node here has already,
    `outward` the address by which instances are to reach the world by IPv6, where the operator named one."""
    of_instances = _subnet(subnet) if held is None else Check("instances' subnet", True, f"{held}, held by the agent that runs")
    by_ipv6 = (_ipv6(), *_outward(outward))
    return (_capabilities(), _nftables(), _sysctl(), of_instances, _forwarding(), *by_ipv6, _resolvers(), *_neighbours())


def _capabilities() -> Check:
    status = Path("/proc/self/status").read_text()
    effective = int(next(line.split()[1] for line in status.splitlines() if line.startswith("CapEff:")), 16)
    missing = [name for name, bit in zip(("CAP_NET_ADMIN", "CAP_SYS_ADMIN"), _ADMIN_BITS, strict=True) if not effective >> bit & 1]
    if missing:
        return Check(
            "network capabilities", False, f"missing: {', '.join(missing)}", "run as root, outside of a restricted container"
        )
    return Check("network capabilities", True, "namespaces and links can be made")


def _nftables() -> Check:
    if ctypes.util.find_library("nftables") is None and not _library_loads():
        return Check("nftables", False, "libnftables.so.1 is not installed", "apt-get install nftables")
    return Check("nftables", True, "libnftables is installed")


def _library_loads() -> bool:
    try:
        ctypes.CDLL("libnftables.so.1")
    except OSError:
        return False
    return True


def _sysctl() -> Check:
    if os.access("/proc/sys/net/ipv4/ip_forward", os.W_OK):
        return Check("/proc/sys/net", True, "writable")
    return Check("/proc/sys/net", False, "not writable", "run as root, with /proc/sys mounted for writing")


def _subnet(subnet: str) -> Check:
    try:
        network = network_of(subnet, "subnet")
    except AtollError as error:
        return Check("instances' subnet", False, str(error), error.mend or "")
    taken = [f"{other} ({link})" for link, other in routes() if other.subnet_of(network) and not link.startswith("at")]
    if taken:
        return Check("instances' subnet", False, f"{network} holds {', '.join(taken[:3])}", "give another: --subnet 10.N.0.0/16")
    return Check("instances' subnet", True, f"{network} is free")


def _forwarding() -> Check:
    if read_sysctl("ipv4/ip_forward") == "1":
        return Check("IPv4 forwarding", True, "on")
    return Check("IPv4 forwarding", None, "off; the agent turns it on when it starts, and leaves it on")


def drops_forwarded(rules: str) -> bool:
    """Return whether `rules`, as `ip6tables -S` prints them, drop what instances send each other: a policy of DROP, as Docker and
    ufw set it, without the two rules for our links that mend it, in FORWARD or in a chain that all of FORWARD passes through."""
    lines = [line.split() for line in rules.splitlines()]
    chains = ["FORWARD"]
    for chain in chains:  # which grows
        chains += [line[3] for line in lines if line[:3] == ["-A", chain, "-j"] and len(line) == 4 and line[3] not in chains]
    mended = all(any(["-A", chain, way, "at+", "-j", "ACCEPT"] in lines for chain in chains) for way in ("-i", "-o"))
    return ["-P", "FORWARD", "DROP"] in lines and not mended


def ipv6_off() -> tuple[str, str]:
    """Return why instances of this machine are to have no IPv6, and what to do about it; nothing where they are to have it.

    Where it would be dropped they have none: a name that means an address which does not answer is worse than one that does not.
    """
    why = no_ipv6()
    if why:
        return why, "sysctl -w net.ipv6.conf.all.disable_ipv6=0, if it is to be there"
    try:
        done = subprocess.run(["ip6tables", "-S"], capture_output=True, text=True, timeout=LISTING_S, check=False)
    except (OSError, subprocess.TimeoutExpired):  # not installed: then nobody's rules are there either
        return "", ""
    if drops_forwarded(done.stdout):
        mend = "ip6tables -I FORWARD -i 'at+' -j ACCEPT; ip6tables -I FORWARD -o 'at+' -j ACCEPT; then start the agent again"
        return "ip6tables drops what is forwarded, as Docker or ufw have it", mend
    return "", ""


def _ipv6() -> Check:
    why, mend = ipv6_off()
    if why:
        return Check("IPv6 of instances", None, f"none: {why}", mend)
    if read_sysctl("ipv6/conf/all/force_forwarding"):
        return Check("IPv6 of instances", True, "within the cell, unless the agent is started with --no-ipv6")
    if read_sysctl("ipv6/conf/all/forwarding") != "0":
        return Check("IPv6 of instances", True, "within the cell, unless the agent is started with --no-ipv6; forwarding is on")
    detail = "IPv6 forwarding is off; the agent turns it on for the whole machine, which goes on to hear of its routers"
    return Check(
        "IPv6 of instances",
        None,
        detail,
        "start the agent with --no-ipv6 to leave it off; Linux 6.17 needs it for no more than instances' links",
    )


def _outward(named: str) -> tuple[Check, ...]:
    name = "IPv6 to the world"
    if ipv6_off()[0]:
        return ()
    try:
        found = Outward(named).find()
    except AtollError as error:
        return (Check(name, False, str(error), error.mend or ""),)
    if found:
        return (Check(name, True, f"instances leave as {found}"),)
    if named:
        mend = f"give {named} to a link of this machine, and it a route to the world"
        return (Check(name, None, f"none as {named}: it is not there, or leads nowhere; instances use IPv4", mend),)
    mend = "give this machine a global address, or name one of its own that is translated further on: --ipv6-address"
    return (Check(name, None, "none: this machine has no global IPv6 address with a way out; instances use IPv4", mend),)


def _resolvers() -> Check:
    named = resolvers.read()
    if named.servers:
        return Check("name servers", True, ", ".join(named.servers))
    return Check(
        "name servers",
        None,
        "none that an instance could ask; instances get the image's resolv.conf",
        "name a server that is not on a loopback address in /etc/resolv.conf",
    )


def _neighbours() -> tuple[Check, ...]:
    """Other software whose rules cut what ours let through."""
    if not Path("/sys/class/net/docker0").exists():
        return ()
    detail = "Docker drops forwarded packets that it does not know, and with them what instances send out"
    return (
        Check(
            "Docker",
            None,
            detail,
            "iptables -I DOCKER-USER -i 'at+' -j ACCEPT; iptables -I DOCKER-USER -o 'at+' -j ACCEPT; the same with ip6tables",
        ),
    )
