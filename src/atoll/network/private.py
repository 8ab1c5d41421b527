"""Which addresses are of one project, as the firewall's sets say it: pure bookkeeping of what must be added and removed.

Each project has a number of this node's own, which stands beside its instances' addresses in `project_of` and `member`; so a
packet is looked up twice, however many instances there are.
"""

from __future__ import annotations

import ipaddress
import socket
import struct
from collections.abc import Iterable, Iterator, Mapping

from atoll.model.fabric import FabricNode, Member, node_address
from atoll.network.elements import Elements

ELEMENTS_AT_ONCE = 500
"""A netlink attribute has at most 64 KiB, and a socket takes 200 KiB at once: they are added to both sets, or to none."""


class Private:
    """What the sets hold of instances: this node's own, and those of others."""

    def __init__(self, subnet: ipaddress.IPv4Network) -> None:
        self._subnet = subnet
        self._numbers: dict[str, int] = {}
        self._own: dict[str, str] = {}
        """Address → project."""
        self._others: dict[str, str] = {}

    def projects(self) -> dict[str, str]:
        """Return address → project of every instance that is known."""
        return {**self._others, **self._own}

    def admit(self, address: str, project: str) -> list[Elements]:
        """Return what to add for an instance of this node."""
        self._own[address] = project
        key, number = socket.inet_aton(address), struct.pack("=I", self._number(project))
        return [("project_of", [(key, number)]), ("member", [key + number])]

    def forget(self, address: str) -> list[Elements]:
        """Return what to delete of an instance of this node; `gone` says that it was."""
        project = self._own.get(address)
        return [] if project is None else self._elements({address: project})

    def gone(self, address: str) -> None:
        self._own.pop(address, None)

    def see(self, nodes: Mapping[str, FabricNode], members: Iterable[Member]) -> Iterator[tuple[list[Elements], list[Elements]]]:
        """Take in the instances of other nodes: yield, for one transaction each, what to delete and what to add.

        Each counts as done when the next is asked for, so that what could not be is made up for by the next call. One whose address
        is not of its node's prefix is left out: no node can give itself another's.
        """
        prefixes = {name: ipaddress.IPv4Network(node.prefix) for name, node in nodes.items()}
        wanted = {}
        for member in members:
            prefix = prefixes.get(member.node)
            if prefix is None or prefix.overlaps(self._subnet):
                continue
            address = ipaddress.IPv4Address(member.address)
            if address in prefix and str(address) != node_address(str(prefix)):
                wanted[member.address] = member.project
        # An address that is another project's now must go before it comes again.
        for part in _parts({address: project for address, project in self._others.items() if wanted.get(address) != project}):
            yield self._elements(part), []
            for gone in part:
                del self._others[gone]
        for part in _parts({address: project for address, project in wanted.items() if address not in self._others}):
            yield [], self._elements(part)
            self._others |= part

    def text(self) -> dict[str, list[str]]:
        """Return set → elements as the rules are written with."""
        everything = self.projects()
        numbers = {address: self._number(project) for address, project in everything.items()}
        return {
            "project_of": [f"{address} : {number:#x}" for address, number in numbers.items()],
            "member": [f"{address} . {number:#x}" for address, number in numbers.items()],
        }

    def _elements(self, found: Mapping[str, str]) -> list[Elements]:
        packed = [(socket.inet_aton(address), struct.pack("=I", self._number(project))) for address, project in found.items()]
        return [("project_of", packed), ("member", [address + number for address, number in packed])]

    def _number(self, project: str) -> int:
        return self._numbers.setdefault(project, len(self._numbers) + 1)


def _parts(found: Mapping[str, str]) -> list[dict[str, str]]:
    listed = list(found.items())
    return [dict(listed[at : at + ELEMENTS_AT_ONCE]) for at in range(0, len(listed), ELEMENTS_AT_ONCE)]


def of_nodes(own: FabricNode, nodes: Mapping[str, FabricNode], number: int | None = None) -> dict[str, list[str]]:
    """Return set → elements that say who the other nodes are; `number` is that of the cell's VXLAN, where it is known."""
    mine = ipaddress.IPv4Network(own.prefix)
    others = [node for node in nodes.values() if not ipaddress.IPv4Network(node.prefix).overlaps(mine)]
    near = {node.endpoint for node in others if node.endpoint and node.site == own.site and node.region == own.region}
    return {
        "peers": sorted(node.prefix for node in others),
        "nodes": sorted(node_address(node.prefix) for node in others),
        "endpoints": sorted(near),
        "vxlans": [] if number is None else [str(number)],
    }
