"""Gives a network namespace back the addresses that a gVisor sandbox took out of it.

A sandbox moves them into its own network stack, and nothing puts them back when it ends; the next start in the same namespace
would have none. Blocking: call it from threads.
"""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct

from atoll.model.errors import RuntimeFailed

_IP_S_MAX = 10.0


class SavedLink(Struct, frozen=True):
    """The arguments of `ip` that bring back what was there: addresses, then neighbours, then routes."""

    commands: tuple[tuple[str, ...], ...]


def keep_link(netns: Path, directory: Path) -> None:
    """Note down in `directory` what the namespace has, or give back what was noted. Raises RuntimeFailed."""
    directory.mkdir(mode=0o700, exist_ok=True)
    for path in directory.iterdir():  # of namespaces that are gone
        if not netns.with_name(path.name).exists():
            path.unlink(missing_ok=True)
    file = directory / netns.name
    commands = _addresses(netns)
    if commands:
        commands += _neighbours(netns) + _routes(netns)
        file.write_bytes(msgspec.json.encode(SavedLink(tuple(tuple(command) for command in commands))))
    elif file.exists():
        for command in msgspec.json.decode(file.read_bytes(), type=SavedLink).commands:
            _ip(netns, *command)


def _addresses(netns: Path) -> list[list[str]]:
    return [
        [
            *("address", "replace", f"{address['local']}/{address['prefixlen']}", "dev", link["ifname"]),
            *(("nodad", "noprefixroute") if address["family"] == "inet6" else ()),
        ]
        for link in _ip(netns, "address", "show", "scope", "global")
        for address in link.get("addr_info", ())
        if "local" in address  # of others nothing is told
    ]


def _neighbours(netns: Path) -> list[list[str]]:
    found = _ip(netns, "neighbour", "show", "nud", "permanent")
    return [
        ["neighbour", "replace", each["dst"], "lladdr", each["lladdr"], "dev", each["dev"]] for each in found if "lladdr" in each
    ]


def _routes(netns: Path) -> list[list[str]]:
    commands = []
    # Those of IPv6 stay when the addresses go.
    for route in sorted(_ip(netns, "-4", "route", "show"), key=lambda route: "gateway" in route):  # the way to a gateway first
        command = ["route", "replace", route["dst"], "dev", route["dev"]]
        if "gateway" in route:
            command += ["via", route["gateway"], "onlink"]
        elif "scope" in route:
            command += ["scope", route["scope"]]
        commands.append(command)
    return commands


def _ip(netns: Path, *arguments: str) -> list[dict[str, Any]]:
    command = ["nsenter", f"--net={netns}", "ip", "-json", *arguments]
    try:
        result = subprocess.run(command, capture_output=True, timeout=_IP_S_MAX, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise RuntimeFailed(f"cannot look into the network namespace {netns}: {error}", mend="apt-get install iproute2") from None
    if result.returncode != 0:
        raise RuntimeFailed(f"cannot set up the network namespace {netns}: {result.stderr.decode(errors='replace').strip()}")
    found: list[dict[str, Any]] = msgspec.json.decode(result.stdout) if result.stdout.strip() else []
    return found
