"""How an agent enters the fabric: the subnet of its instances, the address at which other nodes find it, and whom it tells."""

from __future__ import annotations

import asyncio
import os
import socket
from pathlib import Path

import structlog
from msgspec.structs import replace

from atoll.entry.config import SUBNET_FORMER, Config, is_loopback
from atoll.entry.process import Stop
from atoll.model.fabric import FabricOffer, node_address
from atoll.model.ports.clock import Clock
from atoll.model.records import CELL_PROJECT, Event, Severity, event_id
from atoll.network.checks import ipv6_off
from atoll.network.claims import hold_subnet
from atoll.network.fabric import NodeFabric, load, names_served, settle
from atoll.network.links import LinkNetwork
from atoll.network.outward import Outward
from atoll.sdk.control_plane import HttpControlPlane
from atoll.sdk.transport import addresses_of

log = structlog.get_logger()

_NOWHERE = "192.0.2.1"
"""An address of documentation: asked only which of this machine's addresses would be used towards the world."""


def endpoint_of(config: Config, servers: str) -> str:
    """Return this machine's IPv4 address as other nodes know it: what the operator says, else that towards the servers."""
    if config.fabric_address:
        return config.fabric_address
    hosts = [address.host for address in addresses_of(servers)]
    for host in (*(host for host in hosts if not is_loopback(host)), _NOWHERE):
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking:
            try:
                asking.connect((host, 9))
                return str(asking.getsockname()[0])
            except OSError:
                continue
    return ""


async def enter(
    config: Config, control: HttpControlPlane, servers: str, node: str, directory: Path, clock: Clock, stop: Stop
) -> tuple[LinkNetwork, NodeFabric] | None:
    """Return the network of this node's instances and its part of the fabric; None when told to stop first.

    Raises Conflict: another agent of this machine has addresses of the subnet.
    """
    offer = FabricOffer(site=config.site, region=config.region, subnet=config.subnet, endpoint=endpoint_of(config, servers))
    subnet = await settle(control, node, offer, directory, former=SUBNET_FORMER, stopped=stop.is_set)
    if subnet is None:
        return None
    hold_subnet(subnet, f"process {os.getpid()} ({config.data})")  # for as long as this process lives
    names = names_served(node_address(subnet))
    kept = load(directory)
    ula = kept.grant.ula if kept is not None and not config.no_ipv6 else ""
    if ula and (why := (await asyncio.to_thread(ipv6_off))[0]):
        log.warning("network.no-ipv6", message=f"instances have no IPv6: {why}")
        ula = ""
    network = LinkNetwork(subnet, directory, names=names, ula=ula, outward=Outward(config.ipv6_address))
    offer = replace(offer, ipv6=bool(ula))

    async def say(code: str, message: str, bad: bool) -> None:
        at = clock.now()
        event = Event(
            id=event_id(at, f"{node}-{code}"),
            at=at,
            project=CELL_PROJECT,
            subject=f"node/{node}",
            code=code,
            message=message,
            severity=Severity.WARNING if bad else Severity.INFO,
            node=node,
        )
        await control.report(node, (), (event,))

    fabric = NodeFabric(control, network, directory, node=node, offer=offer, subnet=subnet, names=names, clock=clock, say=say)
    return network, fabric
