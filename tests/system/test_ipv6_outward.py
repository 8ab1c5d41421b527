"""The world outside by IPv6, and what of it reaches an instance: real packets, to and from machines beyond the node."""

from __future__ import annotations

import asyncio
import os
import random
import socket
import struct
import subprocess
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import closing, contextmanager, suppress
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path

import pytest
from ipv6_packets import (
    ICMP,
    PATIENCE_S,
    UDP,
    connects,
    datagram,
    from_node,
    hears,
    listening,
    says,
    sends,
    six,
    socket_in,
    summed,
)

from atoll.model.errors import Unavailable
from atoll.model.fabric import ipv6_of, new_ula
from atoll.model.ports.network import Link
from atoll.model.spec import Allow, NetworkRules, Port, PortProtocol
from atoll.network import firewall, ipv6_rules, namespaces, slots, sysctls
from atoll.network.links import LinkNetwork
from atoll.network.outward import Outward

pytestmark = [
    pytest.mark.system,
    pytest.mark.skipif(os.geteuid() != 0, reason="making network namespaces needs root"),
    pytest.mark.skipif(bool(sysctls.no_ipv6()), reason=f"no IPv6 here: {sysctls.no_ipv6()}"),
]

WEB = Port(port=8000)
TALK = Port(name="talk", port=5353, protocol=PortProtocol.UDP)
PUBLISHED = 8154
METADATA = ("fd00:ec2::254", "fd20:ce::254")
LOOK_S = 0.1


@pytest.fixture
def subnet() -> str:
    return f"10.{random.randrange(124, 127)}.{random.randrange(256)}.0/24"


@pytest.fixture
def ula() -> str:
    return new_ula(random.randbytes(5))


def run(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout


@contextmanager
def beyond(name: str, third: int) -> Iterator[Link]:
    """A machine beyond the node, on a wire to it: `id` is the node's address on the wire. It leads everything to the node."""
    node, address = f"2001:db8:{third:x}::1", f"2001:db8:{third:x}::2"
    try:
        for command in (
            f"ip netns add {name}",
            f"ip link add {name} type veth peer name eth0 netns {name}",
            f"ip -6 addr add {node}/64 dev {name} nodad",
            f"ip link set {name} up",
            f"ip -n {name} -6 addr add {address}/64 dev eth0 nodad",
            f"ip -n {name} link set eth0 up",
            f"ip -n {name} link set lo up",
            f"ip -n {name} -6 route add default via {node}",
        ):
            run(*command.split())
        yield Link(id=node, netns=namespaces.DIRECTORY / name, address="", interface=name, ipv6=address)
    finally:
        for left in (("netns", "del", name), ("link", "del", name)):
            subprocess.run(["ip", *left], check=False, timeout=20, stderr=subprocess.DEVNULL)


@pytest.fixture
def third() -> int:
    return random.randrange(1, 0xFFFE)


@pytest.fixture
def outside(third: int) -> Iterator[Link]:
    with beyond(f"world{os.getpid() % 100_000}", third) as link:
        yield link


@pytest.fixture
async def network(tmp_path: Path, subnet: str, ula: str, outside: Link) -> AsyncIterator[LinkNetwork]:
    """A node whose operator named the address that it has on the wire."""
    network = LinkNetwork(
        subnet,
        tmp_path / "network",
        prepared=2,
        resolver_sources=(),
        rules_check_s=LOOK_S,
        ula=ula,
        outward=Outward(outside.id, world=six(outside)),
    )
    yield network
    await network.close()
    last = LinkNetwork(subnet, tmp_path / "network", prepared=0, ula=ula)
    await last.recover(())
    await last.close()


async def until(holds: Callable[[], bool]) -> None:
    for _ in range(200):
        if await asyncio.to_thread(holds):
            return
        await asyncio.sleep(0.05)
    pytest.fail("it did not come about")


def reaches(link: Link, address: str, port: int, server: socket.socket) -> bool:
    """Return whether a packet comes: the kernel drops those sent in the moment before it has seen that a new link is up."""
    for _ in range(20):
        says(link, six(link), address, port)
        if hears(server):
            while hears(server, 0.05):
                pass
            return True
    return False


async def test_instances_reach_the_world_with_the_nodes_address(network: LinkNetwork, outside: Link) -> None:
    link = await network.attach("a", project="p", ports=())
    assert network.outward == outside.id
    with listening(outside, 8000) as server, closing(socket_in(link)) as client:
        client.connect((six(outside), 8000))
        connection, peer = server.accept()
        with closing(connection):
            assert peer[0] == outside.id
            connection.sendall(b"welcome")
            assert client.recv(16) == b"welcome"
    with listening(outside, 5353, socket.SOCK_DGRAM) as server, closing(socket_in(link, kind=socket.SOCK_DGRAM)) as client:
        client.sendto(b"ask", (six(outside), 5353))
        question, peer = server.recvfrom(16)
        server.sendto(b"answer", peer)
        assert (question, peer[0], client.recv(16)) == (b"ask", outside.id, b"answer")
    with closing(socket_in(link)) as client, pytest.raises(ConnectionRefusedError):
        client.connect((six(outside), 9))  # the world's own word


async def test_what_is_no_address_of_the_world_stays_closed(
    network: LinkNetwork, outside: Link, ula: str, subnet: str, third: int
) -> None:
    """Each address is the other machine's, with a way to it, so that the rules alone stand in between."""
    one = await network.attach("a", project="p", ports=(TALK,))
    closed = (
        *METADATA,
        f"fd00:a72:{third:x}::2",  # another's unique local network
        f"{ula.removesuffix('::/48')}:1::2",  # the cell's, but of no instance
        "64:ff9b::a9fe:a9fe",  # 169.254.169.254, as NAT64 writes it
        "2002:a9fe:a9fe::1",  # as 6to4 does
        "2001:0:a9fe:a9fe::1",
        "fec0::2",
        "4000::2",
    )
    name = outside.interface
    try:
        for address in closed:
            await asyncio.to_thread(run, *f"ip -n {name} -6 addr add {address}/128 dev eth0 nodad".split())
            await asyncio.to_thread(run, *f"ip -6 route add {address}/128 via {six(outside)} dev {name}".split())
        with listening(outside, 5353, socket.SOCK_DGRAM) as server, listening(outside, 8000):
            assert reaches(one, six(outside), 5353, server)
            for address in closed:
                with closing(socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)) as node:
                    node.sendto(b"hello", (address, 5353))
                assert hears(server), address  # from the node it is there
            own = next(line.split()[3] for line in run("ip", "-o", "-n", name, "-6", "addr").splitlines() if "fe80" in line)
            for target in (*closed, own.partition("/")[0], "ff02::1", "ff05::2", "ff0e::1", "::1", f"::ffff:{one.address}"):
                says(one, six(one), target, 5353)
            assert not hears(server)
            assert not connects(socket_in(one), closed[0], 8000, PATIENCE_S)
            assert reaches(one, six(outside), 5353, server)
    finally:
        for address in closed:
            with suppress(subprocess.CalledProcessError):
                await asyncio.to_thread(run, *f"ip -6 route del {address}/128 dev {name}".split())


async def test_the_nodes_own_addresses_stay_closed_and_so_does_another_project(
    network: LinkNetwork, outside: Link, ula: str, subnet: str
) -> None:
    one, foreign = [await network.attach(name, project=name, ports=(WEB, TALK)) for name in ("a", "b")]
    with closing(socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)) as node, listening(foreign, 5353, socket.SOCK_DGRAM) as server:
        node.bind(("::", 0))
        number = node.getsockname()[1]
        with closing(socket_in(outside, kind=socket.SOCK_DGRAM)) as client:
            client.sendto(b"hello", (outside.id, number))
        assert hears(node)
        for target in (outside.id, ipv6_of(ula, subnet.replace(".0/24", ".1")), slots.GATEWAY_IPV6):
            says(one, six(one), target, number)
        says(one, six(one), six(foreign), 5353)
        assert not hears(node)
        assert not hears(server)
        assert not connects(socket_in(one), outside.id, number)
        assert not connects(socket_in(one), six(foreign), 8000)


async def test_nothing_leaves_by_another_source_than_the_instances_own(
    network: LinkNetwork, outside: Link, ula: str, subnet: str
) -> None:
    one, other = [await network.attach(name, project="p", ports=()) for name in ("a", "b")]
    end = six(one).rsplit("::", 1)[1]
    with listening(outside, 5353, socket.SOCK_DGRAM) as server:
        assert reaches(one, six(outside), 5353, server)
        for forged in (
            six(other),
            ipv6_of(ula, subnet.replace(".0/24", ".1")),
            outside.id,  # the node's
            f"{ula.removesuffix('::/48')}:0:1::{end}",
            f"2001:db8::{end}",
            f"fe80::{end}",
            f"::ffff:{one.address}",
            "::",
            "::1",
        ):
            says(one, forged, six(outside), 5353)
        assert not hears(server)
        assert reaches(one, six(outside), 5353, server)


async def test_an_apps_rules_hold_by_whole_addresses(network: LinkNetwork, outside: Link, third: int) -> None:
    look_alike = IPv4Address("192.0.2.77")
    twin = str(IPv6Address(int(IPv6Address(f"2001:db8:{third:x}::")) + int(look_alike)))
    await asyncio.to_thread(run, *f"ip -n {outside.interface} -6 addr add {twin}/64 dev eth0 nodad".split())

    def allow(cidr: str) -> NetworkRules:
        return NetworkRules(egress=(Allow(cidr=cidr, ports=(8000,)),))

    one = await network.attach("a", project="p", ports=(), rules=allow(f"{six(outside)}/128"))
    wide = await network.attach("b", project="p", ports=(), rules=allow("::/0"))
    by_four = await network.attach("c", project="p", ports=(), rules=allow(f"{look_alike}/32"))
    nothing = await network.attach("d", project="p", ports=(), rules=NetworkRules(egress=()))
    with listening(outside, 8000), listening(outside, 9000):
        assert connects(socket_in(one), six(outside), 8000)
        assert not connects(socket_in(one), six(outside), 9000)
        assert not connects(socket_in(one), twin, 8000)
        assert connects(socket_in(wide), twin, 8000)
        assert not connects(socket_in(wide), twin, 9000)
        for fenced in (by_four, nothing):
            assert not connects(socket_in(fenced), twin, 8000)  # an IPv4 address is none because it ends an IPv6 one
            assert not connects(socket_in(fenced), six(outside), 8000)
        # As the name server tells it: a name that means addresses of both families.
        named = NetworkRules(egress=(Allow(host="api.example", ports=(8000,)),))
        await network.attach("d", project="p", ports=(), rules=named)
        assert network.wants_name(nothing.address, "api.example") == "api.example"
        network.learn_name(nothing.address, "api.example", ("192.0.2.9", twin))
        assert connects(socket_in(nothing), twin, 8000)
        assert not connects(socket_in(nothing), six(outside), 8000)
    with listening(outside, 5353, socket.SOCK_DGRAM) as server:
        for body, protocol in ((datagram(six(one), six(outside), 5353)[:3], UDP), (b"", 59), (b"\x80\0" + bytes(6), ICMP)):
            sends(one, six(one), six(outside), body, protocol)
        options = struct.pack("!BB", UDP, 0) + b"\1\4\0\0\0\0"
        sends(one, six(one), six(outside), options + datagram(six(one), six(outside), 5353), 60)
        assert not hears(server)


def leads_out(link: Link) -> bool:
    return "default" in run("ip", "-n", link.netns.name, "-6", "route")


async def test_the_way_goes_with_the_nodes_address_and_comes_back_with_it(network: LinkNetwork, outside: Link) -> None:
    one = await network.attach("a", project="p", ports=())
    other = await network.attach("b", project="p", ports=(TALK,))
    wire = outside.interface
    assert leads_out(one)
    with listening(outside, 5353, socket.SOCK_DGRAM) as server, listening(outside, 8000):
        assert reaches(one, six(outside), 5353, server)
        await asyncio.to_thread(run, *f"ip -6 addr del {outside.id}/64 dev {wire}".split())
        await asyncio.to_thread(run, *f"ip -6 addr add fd00:a73::1/64 dev {wire} nodad".split())
        await asyncio.to_thread(run, *f"ip -6 route replace {six(outside)}/128 dev {wire}".split())
        await until(lambda: not leads_out(one))
        assert network.outward == ""
        with closing(socket_in(one)) as client, pytest.raises(OSError, match="unreachable"):
            client.connect((six(outside), 8000))  # at once: no program waits for it
        says(one, six(one), six(outside), 5353)
        assert not hears(server)
        with listening(other, TALK.port, socket.SOCK_DGRAM) as neighbour:
            assert reaches(one, six(other), TALK.port, neighbour)
        late = await network.attach("c", project="p", ports=())
        await until(lambda: not leads_out(late))
        await asyncio.to_thread(run, *f"ip -6 addr add {outside.id}/64 dev {wire} nodad".split())
        await until(lambda: leads_out(one) and leads_out(late))
        assert connects(socket_in(late), six(outside), 8000)
        assert reaches(one, six(outside), 5353, server)


async def test_half_a_wall_lets_nothing_out(network: LinkNetwork, outside: Link, tmp_path: Path, subnet: str, ula: str) -> None:
    """As where the kernel refuses the second half of the rules, and for as long as it does."""
    one = await network.attach("a", project="p", ports=())
    tag = slots.tag_of(tmp_path / "network")
    table = f"atoll_{tag}"
    with listening(outside, 5353, socket.SOCK_DGRAM) as server:
        assert reaches(one, six(outside), 5353, server)
        await network.close()
        elements = [
            firewall.add(table, "sources", [f'"{one.interface}" . {one.address}']),
            firewall.add(table, "world", ipv6_rules.WORLD),
        ]
        with closing(firewall.Nftables()) as nftables:
            nftables.run(
                firewall.ruleset(
                    table=table,
                    prefix=f"at{tag}",
                    subnet=subnet,
                    node_address=subnet.replace(".0/24", ".1"),
                    resolvers=(),
                    ula=ula,
                    outward=outside.id,
                    elements=elements,
                )
            )
        for _ in range(3):
            says(one, six(one), six(outside), 5353)
        assert not hears(server)


async def test_a_published_port_leads_to_the_instance_which_sees_who_asks(
    outside: Link, tmp_path: Path, subnet: str, ula: str, third: int
) -> None:
    """On a node that has no way to the world: whoever is on its wires asks nevertheless."""

    def node() -> LinkNetwork:
        return LinkNetwork(subnet, tmp_path / "network", prepared=1, resolver_sources=(), ula=ula)

    network = node()
    ports = (
        Port(port=8000, host=PUBLISHED),
        Port(name="dns", port=5353, host=PUBLISHED, protocol=PortProtocol.UDP),
        Port(name="inner", port=9000),
    )
    admitted = IPv4Address("10.77.0.5")
    twin = str(IPv6Address(int(IPv6Address(f"2001:db8:{third:x}::")) + int(admitted)))
    address = outside.id
    try:
        assert not connects(socket_in(outside), address, PUBLISHED)
        link = await network.attach("a", project="p", ports=ports)
        other = await network.attach("b", project="p", ports=(WEB,))
        assert leads_out(link)
        assert not leads_out(other)
        with listening(link, 8000) as server, listening(link, 9000), listening(link, 5353, socket.SOCK_DGRAM) as names:
            with closing(socket_in(outside)) as client:
                client.connect((address, PUBLISHED))
                accepted, peer = server.accept()
                accepted.sendall(b"hello")
                accepted.close()
                assert client.recv(16) == b"hello"
                assert peer[0] == six(outside)
            with closing(socket_in(outside, kind=socket.SOCK_DGRAM)) as client:
                client.sendto(b"ask", (address, PUBLISHED))
                question, peer = names.recvfrom(16)
                names.sendto(b"answer", peer)
                assert (question, client.recvfrom(16)[0], peer[0]) == (b"ask", b"answer", six(outside))
            assert from_node(address, PUBLISHED)
            # What is not published stays closed, to other instances the published one, too; and it leads to nothing of the world.
            assert not connects(socket_in(outside), address, 9000)
            assert not connects(socket_in(outside), six(link), 8000, PATIENCE_S)
            assert not connects(socket_in(other), address, PUBLISHED, PATIENCE_S)
            with listening(outside, 8000):
                assert not connects(socket_in(link), six(outside), 8000)
            with pytest.raises(Unavailable, match="instance a has it"):
                await network.attach("c", project="p", ports=ports[:1])
            # Its own rules are of whole addresses.
            await asyncio.to_thread(run, *f"ip -n {outside.interface} -6 addr add {twin}/64 dev eth0 nodad".split())
            for cidr, let_in in ((f"{admitted}/32", False), (f"{six(outside)}/128", False), (f"{twin}/128", True)):
                await network.attach("a", project="p", ports=ports, rules=NetworkRules(ingress=(Allow(cidr=cidr),)))
                with closing(socket_in(outside)) as client:
                    client.settimeout(PATIENCE_S * (10 if let_in else 1))
                    client.bind((twin, 0))
                    assert (client.connect_ex((address, PUBLISHED)) == 0) is let_in, cidr
            await network.attach("a", project="p", ports=ports)
            # Rules that are written afresh have it, and so does the next agent.
            await network.close()
            network = node()
            await network.recover(("a",))
            assert connects(socket_in(outside), address, PUBLISHED)
            await network.attach("a", project="p", ports=(Port(port=9000, host=PUBLISHED),))
            assert connects(socket_in(outside), address, PUBLISHED)
            await network.detach("a")
            assert not connects(socket_in(outside), address, PUBLISHED)
            with closing(socket.socket(socket.AF_INET6)) as program:
                program.bind((address, PUBLISHED))
                program.listen()
                with pytest.raises(Unavailable, match="a program of this machine listens on it"):
                    await network.attach("d", project="p", ports=ports[:1])
                assert connects(socket_in(outside), address, PUBLISHED)  # which goes on to be served
    finally:
        await network.recover(())
        await network.close()


@pytest.mark.skipif(
    sysctls.read_sysctl("ipv6/conf/all/force_forwarding") == "" or sysctls.read_sysctl("ipv6/conf/all/forwarding") != "0",
    reason="this machine forwards IPv6 as a whole, or its kernel knows nothing else (before Linux 6.17)",
)
async def test_a_node_is_no_router_for_others(network: LinkNetwork, outside: Link, third: int) -> None:
    with beyond(f"else{os.getpid() % 100_000}", third + 1) as elsewhere:
        one = await network.attach("a", project="p", ports=())
        with listening(elsewhere, 5353, socket.SOCK_DGRAM) as server:
            await until(lambda: sysctls.read_sysctl(f"ipv6/conf/{elsewhere.interface}/force_forwarding") == "1")
            assert reaches(one, six(elsewhere), 5353, server)
            with closing(socket_in(outside, kind=socket.SOCK_DGRAM)) as stranger:
                for _ in range(3):
                    stranger.sendto(b"hello", (six(elsewhere), 5353))
            assert not hears(server)
            assert reaches(one, six(elsewhere), 5353, server)


def test_a_checksum_is_of_an_upper_layer() -> None:
    """What these tests send would else be dropped, and prove nothing."""
    whole = datagram("2001:db8::1", "2001:db8::2", 7)
    assert summed("2001:db8::1", "2001:db8::2", UDP, whole) in (0, 0xFFFF)
