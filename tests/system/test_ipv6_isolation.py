"""What an IPv6 packet can and cannot do, tried from inside the namespaces of instances, with frames as their root sends them."""

from __future__ import annotations

import asyncio
import json
import os
import random
import socket
import struct
import subprocess
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import closing, contextmanager
from ipaddress import IPv6Address
from pathlib import Path

import pytest
from ipv6_packets import (
    FRAGMENT,
    ICMP,
    PATIENCE_S,
    TIMEOUT_S,
    UDP,
    connects,
    datagram,
    from_node,
    gets_through,
    hears,
    listening,
    says,
    sends,
    six,
    socket_in,
    summed,
)

from atoll.model.errors import RuntimeFailed
from atoll.model.fabric import FabricNode, Member, ipv6_of, new_ula
from atoll.model.flows import Flows, Reason
from atoll.model.ports.network import Link
from atoll.model.spec import Allow, NetworkRules, Port, PortProtocol
from atoll.network import firewall, namespaces, slots, sysctls
from atoll.network.elements import ElementSocket
from atoll.network.links import LinkNetwork
from atoll.network.rules import BURST_PACKETS_MIN

pytestmark = [
    pytest.mark.system,
    pytest.mark.skipif(os.geteuid() != 0, reason="making network namespaces needs root"),
    pytest.mark.skipif(bool(sysctls.no_ipv6()), reason=f"no IPv6 here: {sysctls.no_ipv6()}"),
]

WEB = Port(port=8000)
TALK = Port(name="talk", port=5353, protocol=PortProtocol.UDP)
ALL_NODES = "ff02::1"


@pytest.fixture
def subnet() -> str:
    return f"10.{random.randrange(112, 124)}.{random.randrange(256)}.0/24"


@pytest.fixture
def ula() -> str:
    return new_ula(random.randbytes(5))


@pytest.fixture
async def network(tmp_path: Path, subnet: str, ula: str) -> AsyncIterator[LinkNetwork]:
    network = LinkNetwork(subnet, tmp_path / "network", prepared=2, resolver_sources=(), ula=ula)
    yield network
    await network.close()
    last = LinkNetwork(subnet, tmp_path / "network", prepared=0, ula=ula)
    await last.recover(())
    await last.close()


async def test_instances_of_one_project_reach_declared_ports_and_nobody_else_does(network: LinkNetwork, ula: str) -> None:
    one, other = [await network.attach(name, project="p", ports=(WEB,)) for name in ("a", "b")]
    foreign = await network.attach("c", project="q", ports=(WEB,))
    assert six(one) == ipv6_of(ula, one.address)
    with listening(other, 8000), listening(other, 9000), listening(foreign, 8000):
        assert connects(socket_in(one), six(other), 8000)  # at once: no address is first looked for twice
        assert connects(socket_in(one, socket.AF_INET), other.address, 8000)
        assert not connects(socket_in(one), six(other), 9000)
        assert not connects(socket_in(one), six(foreign), 8000)
        assert not connects(socket_in(foreign), six(other), 8000)
        assert from_node(six(other), 8000)
        assert not from_node(six(other), 9000)
        await network.attach("b", project="p", ports=(Port(port=9000),))
        assert connects(socket_in(one), six(other), 9000)
        assert not connects(socket_in(one), six(other), 8000)
    await network.detach("b")
    assert not connects(socket_in(one), six(other), 9000)


async def test_what_is_sent_by_another_address_goes_nowhere(network: LinkNetwork, ula: str, subnet: str) -> None:
    one, other, target = [await network.attach(name, project="p", ports=(TALK,)) for name in ("a", "b", "c")]
    base = ula.removesuffix("::/48")
    embedded = six(one).rsplit("::", 1)[1]
    with listening(target, TALK.port, socket.SOCK_DGRAM) as server:
        assert gets_through(one, six(target), TALK.port, server)
        for forged in (
            six(other),
            ipv6_of(ula, subnet.replace(".0/24", ".1")),  # the node
            f"{base}:0:1::{embedded}",  # another network of the cell, with the right end
            f"2001:db8::{embedded}",
            f"fe80::{embedded}",
            f"::ffff:{one.address}",
            "::",
            "::1",
            ALL_NODES,
        ):
            says(one, forged, six(target), TALK.port)
        assert not hears(server)
        assert gets_through(one, six(target), TALK.port, server)


async def test_an_address_that_only_ends_in_an_instances_leads_nowhere(network: LinkNetwork, ula: str) -> None:
    one, target = [await network.attach(name, project="p", ports=(TALK,)) for name in ("a", "b")]
    end = six(target).rsplit("::", 1)[1]
    with listening(target, TALK.port, socket.SOCK_DGRAM) as server:
        assert gets_through(one, six(target), TALK.port, server)
        for wrong in (f"{ula.removesuffix('::/48')}:0:1::{end}", f"2001:db8::{end}", f"::{end}", f"::ffff:{target.address}"):
            says(one, six(one), wrong, TALK.port)
        assert not hears(server)


@contextmanager
def heard_by_node(port: int = 0) -> Iterator[socket.socket]:
    with closing(socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)) as server:
        server.bind(("::", port))
        yield server


async def test_the_node_link_local_and_multicast_addresses_are_closed(network: LinkNetwork, ula: str, subnet: str) -> None:
    one = await network.attach("a", project="p", ports=(TALK,))
    other = await network.attach("b", project="p", ports=(TALK,))
    mine = f"fd00:a70::{random.randrange(1, 0xFFFF):x}"
    listed("address", "add", f"{mine}/128", "dev", "lo")
    try:
        with heard_by_node() as server, listening(other, TALK.port, socket.SOCK_DGRAM) as neighbour:
            number = server.getsockname()[1]

            def from_here() -> bool:
                with closing(socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)) as local:
                    local.sendto(b"hello", (mine, number))
                return hears(server)

            assert any(from_here() for _ in range(20))  # the kernel takes a moment until it uses an address
            assert gets_through(one, six(other), TALK.port, neighbour)
            for source in (six(one), f"fe80::61:{random.randrange(1, 999)}"):
                for target in (ipv6_of(ula, subnet.replace(".0/24", ".1")), mine, slots.GATEWAY_IPV6, "::1", ALL_NODES, "ff05::2"):
                    for port in (number, TALK.port):
                        says(one, source, target, port)
            assert not hears(server)
            assert not hears(neighbour)
            assert not connects(socket_in(one), mine, number)
    finally:
        listed("address", "del", f"{mine}/128", "dev", "lo")


def listed(*command: str) -> str:
    return subprocess.run(["ip", "-6", *command], capture_output=True, text=True, check=True, timeout=20).stdout


async def test_no_instance_can_be_a_router_or_a_neighbour_to_the_node(network: LinkNetwork, ula: str, subnet: str) -> None:
    one = await network.attach("a", project="p", ports=())
    victim = await network.attach("b", project="p", ports=())
    node = ipv6_of(ula, subnet.replace(".0/24", ".1"))
    routes, neighbours = listed("route", "show", "dev", one.interface), listed("neighbour", "show", "dev", one.interface)
    option = b"\2\1" + bytes.fromhex("020000000666")
    advertised = b"\3\4\x40\xc0" + struct.pack("!III", 9999, 9999, 0) + IPv6Address("fd00:bad::").packed
    for source in (six(one), "fe80::666"):
        for target in (ALL_NODES, node, slots.GATEWAY_IPV6):
            for kind, body in (
                (134, struct.pack("!BBHII", 64, 0, 1800, 0, 0) + option + advertised),  # a router
                (136, struct.pack("!I", 0x60000000) + IPv6Address(six(victim)).packed + option),  # the other's neighbour
                (136, struct.pack("!I", 0x60000000) + IPv6Address(six(one)).packed + option),
                (137, bytes(4) + IPv6Address(six(victim)).packed + IPv6Address(six(victim)).packed),  # a redirect
            ):
                head = struct.pack("!BB", kind, 0)
                checksum = struct.pack("!H", summed(source, target, ICMP, head + b"\0\0" + body))
                sends(one, source, target, head + checksum + body, ICMP, 255)
    await asyncio.sleep(0.1)
    assert listed("route", "show", "dev", one.interface) == routes
    assert "fd00:bad" not in listed("route") + listed("address")
    assert listed("neighbour", "show", "dev", one.interface) == neighbours
    assert "PERMANENT" in neighbours


async def test_headers_in_front_and_fragments_open_no_port(network: LinkNetwork) -> None:
    one, target = [await network.attach(name, project="p", ports=(TALK,)) for name in ("a", "b")]
    here, there = six(one), six(target)
    with listening(target, TALK.port, socket.SOCK_DGRAM) as opened, listening(target, 5354, socket.SOCK_DGRAM) as closed:

        def everything(port: int) -> None:
            whole = datagram(here, there, port, bytes(64))
            options = struct.pack("!BB", UDP, 0) + b"\1\4\0\0\0\0"
            sends(one, here, there, options + whole, 60)
            sends(one, here, there, options + whole, 0)
            number = random.randrange(1 << 32)
            for at, more in ((0, 1), (24, 1), (48, 0)):
                part = whole[at : at + 24] if more else whole[at:]
                sends(one, here, there, struct.pack("!BxHI", UDP, at | more, number) + part, FRAGMENT)
            sends(one, here, there, struct.pack("!BxHI", UDP, 0, number + 1) + whole, FRAGMENT)  # a fragment that is all
            routing = struct.pack("!BBBBI", UDP, 2, 0, 1, 0) + IPv6Address(there).packed
            sends(one, here, there, routing + whole, 43)

        assert gets_through(one, there, TALK.port, opened)
        everything(TALK.port)
        assert hears(opened, TIMEOUT_S)
        everything(5354)
        sends(one, here, there, b"", 59)  # no next header
        sends(one, here, there, datagram(here, there, 5354)[:3], UDP)  # too short to have a port
        assert not hears(closed)


async def test_an_apps_own_rules_hold_for_both_families(network: LinkNetwork) -> None:
    one, other = [await network.attach(name, project="p", ports=(WEB,)) for name in ("a", "b")]
    guarded = await network.attach("c", project="p", ports=(WEB,), rules=NetworkRules(ingress=(Allow(cidr=f"{one.address}/32"),)))
    by_six = await network.attach("d", project="p", ports=(WEB,), rules=NetworkRules(ingress=(Allow(cidr=f"{six(one)}/128"),)))
    fenced = await network.attach(
        "e", project="p", ports=(), rules=NetworkRules(egress=(Allow(cidr=f"{six(one)}/128", ports=(8000,)),))
    )
    with listening(guarded, 8000), listening(by_six, 8000), listening(one, 8000), listening(one, 9000), listening(other, 8000):
        for target in (guarded, by_six):
            assert connects(socket_in(one), six(target), 8000)
            assert not connects(socket_in(other), six(target), 8000)
            assert from_node(six(target), 8000)
        assert connects(socket_in(one, socket.AF_INET), guarded.address, 8000)
        assert not connects(socket_in(one, socket.AF_INET), by_six.address, 8000)  # a rule of IPv6 addresses says nothing of others
        assert connects(socket_in(fenced), six(one), 8000)
        assert not connects(socket_in(fenced, socket.AF_INET), one.address, 8000)
        assert not connects(socket_in(fenced), six(one), 9000)
        assert not connects(socket_in(fenced), six(other), 8000)
        await network.attach("e", project="p", ports=())
        assert connects(socket_in(fenced), six(other), 8000)


async def test_a_limit_is_of_both_families_together_and_counted(network: LinkNetwork) -> None:
    limit = NetworkRules(packets=50)
    slow = await network.attach("a", project="p", ports=(), rules=limit)
    sink, narrow = [
        await network.attach(name, project="p", ports=(TALK,), rules=rules) for name, rules in (("b", None), ("c", limit))
    ]

    def lost(source: Link, target: Link) -> int:
        """Return how many of 400 packets do not come; of the others there are no more than the limit leaves in that time."""
        with (
            listening(target, TALK.port, socket.SOCK_DGRAM) as server,
            closing(socket_in(source, kind=socket.SOCK_DGRAM)) as client,
        ):
            server.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
            assert gets_through(source, six(target), TALK.port, server)
            count, began = 0, time.monotonic()
            for _ in range(200):
                client.sendto(b"x", (six(target), TALK.port))
                client.sendto(b"x", (f"::ffff:{target.address}", TALK.port))
            last = began
            while hears(server):
                count, last = count + 1, time.monotonic()
        assert 10 <= count <= BURST_PACKETS_MIN + 50 * (last - began) + 1
        return 400 - count

    gone = {"a": lost(slow, sink), "c": lost(sink, narrow)}  # of what it sends, and of what it is sent
    over = (await network.flows()).over
    assert over.keys() == gone.keys()
    assert all(over[name] > gone[name] // 2 for name in gone)


async def test_what_goes_between_apps_and_what_is_refused_is_counted(network: LinkNetwork, subnet: str) -> None:
    links = {
        name: await network.attach(name, project=project, ports=(WEB,), rules=rules)
        for name, project, rules in (
            ("web", "p", None),
            ("db", "p", NetworkRules(ingress=(Allow(app="web", ports=(8000,)),))),
            ("job", "p", NetworkRules(egress=())),
            ("foreign", "q", None),
        )
    }
    members = [
        Member(id=name, project="q" if name == "foreign" else "p", owner=name, node="here", address=link.address)
        for name, link in links.items()
    ]
    await network.see(FabricNode(name="here", prefix=subnet), {}, members)
    assert await network.flows() == Flows()
    with listening(links["db"], 8000) as server, closing(socket_in(links["web"])) as client:
        client.connect((six(links["db"]), 8000))
        taken, peer = server.accept()
        assert peer[0] == six(links["web"])
        with closing(taken):
            client.sendall(bytes(3_000))
            got = 0
            while got < 3_000:
                got += len(taken.recv(4_096))
    for source, target, port in (("web", "db", 9000), ("db", "web", 9000), ("job", "web", 8000), ("web", "foreign", 8000)):
        assert not connects(socket_in(links[source]), six(links[target]), port)
    says(links["db"], six(links["db"]), "2001:db8::53", 53)  # its link is up: it has answered
    await asyncio.sleep(0.1)

    flows = await network.flows()
    sent = {(flow.source, flow.target): flow for flow in flows.flows}
    assert sent["web", "db"].bytes > 3_000
    assert sent["web", "db"].connections == 2
    assert 0 < sent["db", "web"].bytes < sent["web", "db"].bytes
    assert {(one.source, one.target, one.address, one.protocol, one.port): one.reason for one in flows.refusals} == {
        ("web", "db", "", "tcp", 9000): Reason.INGRESS,
        ("db", "web", "", "tcp", 9000): Reason.PORT,
        ("job", "web", "", "tcp", 8000): Reason.EGRESS,
        ("web", "", links["foreign"].address, "tcp", 8000): Reason.PROJECT,
        ("db", "", "2001:db8::53", "udp", 53): Reason.CLOSED,
    }
    assert flows.complete
    await network.detach("db")
    assert not [one for one in (await network.flows()).refusals if one.source == "db"]


async def test_the_next_agent_has_it_all_and_one_without_ipv6_closes_it(
    network: LinkNetwork, tmp_path: Path, subnet: str, ula: str
) -> None:
    one, other = [await network.attach(name, project="p", ports=(WEB,)) for name in ("a", "b")]
    await network.close()
    with listening(other, 8000), listening(other, 9000):
        assert connects(socket_in(one), six(other), 8000)
        second = LinkNetwork(subnet, tmp_path / "network", prepared=0, resolver_sources=(), ula=ula, rules_check_s=0.1)
        assert list(await second.recover(("a", "b"))) == [one, other]
        assert connects(socket_in(one), six(other), 8000)
        assert not connects(socket_in(one), six(other), 9000)
        remove = ["nft", "delete", "table", "inet", f"atoll_{slots.tag_of(tmp_path / 'network')}"]
        await asyncio.to_thread(subprocess.run, remove, check=True, timeout=20)
        for _ in range(100):
            await asyncio.sleep(0.1)
            if not from_node(six(other), 9000):
                break
        assert not connects(socket_in(one), six(other), 9000)
        assert connects(socket_in(one), six(other), 8000)
        await second.close()
        third = LinkNetwork(subnet, tmp_path / "network", prepared=0)
        assert [link.ipv6 for link in await third.recover(("a", "b"))] == [None, None]
        assert not connects(socket_in(one), six(other), 8000, PATIENCE_S)
        assert connects(socket_in(one, socket.AF_INET), other.address, 8000)
        without = await third.attach("c", project="p", ports=(WEB,))
        assert without.ipv6 is None
        says(without, ipv6_of(ula, without.address), six(other), 8000)
        await third.close()
    # What was closed stays so until its instance is made anew.
    fourth = LinkNetwork(subnet, tmp_path / "network", prepared=0, ula=ula)
    assert [link.ipv6 for link in await fourth.recover(("a", "b", "c"))] == [None] * 3
    await fourth.detach("a")
    assert (await fourth.attach("a", project="p", ports=(WEB,))).ipv6 is not None
    await fourth.recover(())
    await fourth.close()
    assert ula.removesuffix("::/48") not in listed("route") + listed("address")


def written(directory: Path) -> dict[str, int]:
    """Return set → how many elements are in it."""
    command = ["nft", "-j", "list", "table", "inet", f"atoll_{slots.tag_of(directory)}"]
    done = json.loads(subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout)
    sets = [each.get("set") or each["map"] for each in done["nftables"] if "set" in each or "map" in each]
    return {one["name"]: len(one.get("elem", ())) for one in sets}


async def test_a_start_writes_no_more_into_the_firewall_than_without_ipv6(tmp_path: Path, ula: str) -> None:
    rules = NetworkRules(ingress=(Allow(cidr="10.0.0.0/8"),), packets=50)
    found = {}
    for name, network_of_cell in (("with", ula), ("without", "")):
        subnet = f"10.124.{random.randrange(256)}.0/24"
        network = LinkNetwork(subnet, tmp_path / name, prepared=0, resolver_sources=(), ula=network_of_cell)
        try:
            link = await network.attach("a", project="p", ports=(WEB, TALK), rules=rules)
            assert (link.ipv6 is not None) == (name == "with")
            found[name] = await asyncio.to_thread(written, tmp_path / name)
            del found[name]["uplinks"]  # the node's own links, whatever starts
        finally:
            await network.recover(())
            await network.close()
    assert found["with"] == found["without"]
    assert found["with"]["inbound"] == 2


async def test_half_a_wall_lets_nothing_through(network: LinkNetwork, tmp_path: Path, subnet: str, ula: str) -> None:
    """As where the kernel refuses the second half of the rules: what is in the first drops all IPv6."""
    one, other = [await network.attach(name, project="p", ports=(WEB,)) for name in ("a", "b")]
    tag = slots.tag_of(tmp_path / "network")
    table, source = f"atoll_{tag}", [f'"{link.interface}" . {link.address}' for link in (one, other)]
    with listening(other, 8000):
        assert connects(socket_in(one), six(other), 8000)
        nftables = firewall.Nftables()
        nftables.run(
            firewall.ruleset(
                table=table,
                prefix=f"at{tag}",
                subnet=subnet,
                node_address=subnet.replace(".0/24", ".1"),
                resolvers=(),
                ula=ula,
                elements=[
                    firewall.add(table, "sources", source),
                    firewall.add(table, "inbound", [f"{other.address} . tcp . 8000"]),
                ],
            )
        )
        nftables.close()
        assert from_node(other.address, 8000)
        with closing(socket_in(one)) as client:
            client.settimeout(PATIENCE_S)
            with pytest.raises(TimeoutError):
                client.connect((six(other), 8000))
        with closing(ElementSocket(table)) as sets, pytest.raises(RuntimeFailed, match="cannot write the firewall's rules"):
            sets.replace_rules({"links_six": (), "no_such_chain": ()})


@pytest.fixture
async def outside() -> AsyncIterator[Link]:
    """A machine beyond the node: a namespace of its own on a wire to the node, which leads the subnets of all tests back."""
    name = f"atollsix{os.getpid() % 100_000}"
    third = random.randrange(1, 0xFFFF)
    node_address, address = f"fd00:a71:{third:x}::1", f"fd00:a71:{third:x}::2"
    commands = (
        f"ip netns add {name}",
        f"ip link add {name} type veth peer name eth0 netns {name}",
        f"ip -6 addr add {node_address}/64 dev {name} nodad",
        f"ip link set {name} up",
        f"ip -n {name} -6 addr add {address}/64 dev eth0 nodad",
        f"ip -n {name} link set eth0 up",
        f"ip -n {name} -6 route add default via {node_address}",
    )
    try:
        for command in commands:
            await asyncio.to_thread(subprocess.run, command.split(), check=True, timeout=20)
        sysctls.open_ipv6(name)  # so that only the rules stand in the way
        yield Link(id=node_address, netns=namespaces.DIRECTORY / name, address="", interface=name, ipv6=address)
    finally:
        await asyncio.to_thread(subprocess.run, ["ip", "netns", "del", name], check=False, timeout=20)
        await asyncio.to_thread(subprocess.run, ["ip", "link", "del", name], check=False, timeout=20, stderr=subprocess.DEVNULL)


async def test_nothing_comes_from_the_world_outside_or_goes_there(network: LinkNetwork, outside: Link) -> None:
    link = await network.attach("a", project="p", ports=(TALK, WEB))
    with listening(link, TALK.port, socket.SOCK_DGRAM) as server, listening(outside, 5353, socket.SOCK_DGRAM) as world:
        assert connects(socket_in(outside), outside.id, 9) is False  # the wire is there: refused, not lost
        with closing(socket_in(outside, kind=socket.SOCK_DGRAM)) as client:
            client.sendto(b"hello", (six(link), TALK.port))
        assert not hears(server)
        says(link, six(link), six(outside), 5353)
        assert not hears(world)
        with closing(socket_in(link)) as client, pytest.raises(OSError, match="unreachable"):
            client.connect((six(outside), 5353))
