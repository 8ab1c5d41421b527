"""IPv6 of instances, as far as no kernel is needed: addresses, who hears of them, and that no wall of IPv4 is without its like."""

from __future__ import annotations

import ipaddress
import re
import socket
import struct
from collections.abc import AsyncIterator
from pathlib import Path
from random import Random

import dns.message
import dns.rcode
import pytest
from hypothesis import given
from hypothesis import strategies as st

from atoll.api.service import KINDS, Service
from atoll.entry.config import Config
from atoll.entry.process import parse
from atoll.model import codec, keys
from atoll.model.errors import AtollError, Conflict, Invalid, NotFound, Unavailable
from atoll.model.fabric import (
    Fabric,
    FabricBatch,
    FabricGrant,
    FabricNode,
    FabricOffer,
    FabricPaths,
    Member,
    ipv6_network_of,
    ipv6_of,
    new_ula,
)
from atoll.model.flows import Reason, Refusal
from atoll.model.ports.clock import SystemClock
from atoll.model.spec import Allow, NetworkRules
from atoll.model.spec.network import check_network
from atoll.network import firewall, ipv6_rules
from atoll.network.checks import drops_forwarded
from atoll.network.counted import EGRESS, PORT, Counted, flows_of, keys_of
from atoll.network.fabric import FILE, Kept, load, settle
from atoll.network.ledger import Entry, Ledger
from atoll.network.names import ANSWERS_IPV6_MAX, Directory, NameServer
from atoll.network.outward import Outward, is_global, let_forward, uplinks
from atoll.network.policies import LEARNED_MAX, Policies
from atoll.network.rules import Ruled, elements_of
from atoll.network.sysctls import forward_ipv6, read_sysctl, restore_forwarding
from atoll.network.tunnels import Kind, Way, ipv6_way, ways_of
from atoll.store.cache import State
from atoll.store.memory import MemoryStore

ULA = "fd12:3456:789a::/48"


@given(st.binary(min_size=5, max_size=5), st.ip_addresses(v=4))
def test_an_address_is_of_the_cells_own_network_and_ends_in_the_ipv4_one(random: bytes, address: ipaddress.IPv4Address) -> None:
    ula = new_ula(random)
    assert ipaddress.IPv6Network(ula).subnet_of(ipaddress.IPv6Network("fd00::/8"))
    found = ipaddress.IPv6Address(ipv6_of(ula, str(address)))
    assert found in ipaddress.IPv6Network(ula)
    assert found.packed[-4:] == address.packed


@given(st.ip_addresses(v=4), st.ip_addresses(v=4), st.integers(8, 29))
def test_a_nodes_prefix_has_the_addresses_of_its_instances_and_no_others(
    one: ipaddress.IPv4Address, other: ipaddress.IPv4Address, length: int
) -> None:
    prefix = ipaddress.IPv4Network((one, length), strict=False)
    inside = ipaddress.IPv6Address(ipv6_of(ULA, str(other))) in ipaddress.IPv6Network(ipv6_network_of(ULA, str(prefix)))
    assert inside == (other in prefix)


# Names


def member(name: str, last: int, *, ipv6: bool = True, ready: bool = True) -> Member:
    return Member(id=name, project="shop", owner="web", node="n1", address=f"10.64.16.{last}", ready=ready, ipv6=ipv6)


def ask(server: NameServer, kind: str, source: str) -> tuple[str, list[str]]:
    wire = server.answer(dns.message.make_query("web.shop.internal", kind).to_wire(), source)
    assert wire is not None
    answer = dns.message.from_wire(wire)
    return dns.rcode.to_text(answer.rcode()), [str(one) for rrset in answer.answer for one in rrset]


def test_who_has_ipv6_hears_of_the_ipv6_of_others_that_have_it_and_nobody_else_does() -> None:
    found = Directory("n1", "local", "local", ULA)
    found.see([member("a", 2), member("b", 3, ipv6=False), member("c", 4, ready=False)])
    projects = {"10.64.16.2": "shop", "10.64.16.3": "shop", "10.64.16.9": "spy"}
    server = NameServer(found, "127.0.0.1", projects.get, tuple, has_ipv6={"10.64.16.2", "10.64.16.9"}.__contains__)
    for _ in range(2):  # also when the answer was kept
        assert ask(server, "AAAA", "10.64.16.2") == ("NOERROR", [ipv6_of(ULA, "10.64.16.2")])
        assert ask(server, "AAAA", "10.64.16.3") == ("NOERROR", [])
        assert ask(server, "AAAA", "10.64.16.9") == ("NXDOMAIN", [])
        assert ask(server, "A", "10.64.16.2") == ("NOERROR", ["10.64.16.2", "10.64.16.3"])


def test_on_a_node_without_ipv6_no_name_means_any() -> None:
    found = Directory("n1", "local", "local")
    found.see([member("a", 2)])
    assert found.find(["web", "shop"], "shop").ipv6 == ()


def test_an_answer_of_ipv6_addresses_fits_a_small_datagram() -> None:
    found = Directory("n1", "local", "local", ULA)
    found.see(member(f"m{n}", n + 2) for n in range(40))
    server = NameServer(found, "127.0.0.1", {"10.64.16.2": "shop"}.get, tuple, has_ipv6=lambda _: True)
    wire = server.answer(dns.message.make_query("web.shop.internal", "AAAA").to_wire(), "10.64.16.2")
    assert wire is not None
    assert len(wire) <= 512
    assert len(dns.message.from_wire(wire).answer[0]) == ANSWERS_IPV6_MAX


# Walls

ONLY_IPV4 = {
    "plain": "the node's own calls are tracked",
    "resolvers": "names are asked for by IPv4",
    "askers": "names are asked for by IPv4",
    "closed": "what is open of the world is said instead (`world`)",
    "endpoints": "nodes reach each other by IPv4",
    "vxlans": "nodes reach each other by IPv4",
}


def encoded() -> dict[str, tuple[bytes, ...]]:
    return ipv6_rules.rules(ula=ULA, links="at123456", tunnels=("av123456", "aw123456"), connections_max=5)


def text(ula: str) -> str:
    return firewall.ruleset(
        table="t", prefix="at", subnet="10.64.0.0/20", node_address="10.64.0.1", resolvers=(), ula=ula, names=True,
        tunnels=("av", "aw"),
    )  # fmt: skip


def test_every_set_that_a_rule_of_ipv4_looks_into_one_of_ipv6_does_too_or_is_said_why_not() -> None:
    looked_into = set(re.findall(r"@([a-z_]+)", text(""))) - {"th"}  # which is no set
    rules = b"".join(rule for chain in encoded().values() for rule in chain)
    found = {name for name in looked_into if name.encode() + b"\0" in rules}
    assert looked_into - found == ONLY_IPV4.keys()


def test_every_chain_whose_rules_come_second_begins_with_dropping_everything() -> None:
    assert encoded().keys() == {*ipv6_rules.CHAINS, *ipv6_rules.PASSED}
    for name in ipv6_rules.CHAINS:
        assert f"chain {name} {{ drop; }}" in text(ULA)


def test_without_ipv6_what_comes_from_instances_and_other_nodes_is_dropped() -> None:
    assert "_six {" not in text("").replace("set admitted_six {", "").replace("set permitted_six {", "").replace(
        "set turned_away_six {", ""
    )
    for chain in ("from_link", "from_others"):
        body = text("").split(f"chain {chain} {{")[1].split("}")[0]
        assert "meta nfproto ipv6 drop" in body


def test_a_rule_of_ipv6_addresses_opens_nothing_by_ipv4() -> None:
    rules = NetworkRules(egress=(Allow(cidr="::/0", ports=(80,)), Allow(cidr="192.0.2.0/24")), ingress=(Allow(cidr=f"{ULA}"),))
    found = elements_of([Ruled("10.0.0.2", "p", rules)], {}, {})
    assert found["permitted_six"] == ["10.0.0.2 . ::/0 . tcp . 80", "10.0.0.2 . ::/0 . udp . 80"]
    assert found["permitted"] == [f"10.0.0.2 . 192.0.2.0/24 . {protocol} . 0-65535" for protocol in ("tcp", "udp")]
    assert found["admitted"] == []
    assert found["admitted_six"] == [f"10.0.0.2 . {ULA} . {protocol} . 0-65535" for protocol in ("tcp", "udp")]


@pytest.mark.parametrize("cidr", ["fe80::1%eth0/128", "fe80::%x } ; flush ruleset/64", "fd00::1/48", "::1/129", "example.org"])
def test_a_cidr_that_is_no_plain_network_is_refused_by_name(cidr: str) -> None:
    with pytest.raises(Invalid) as caught:
        check_network(NetworkRules(egress=(Allow(cidr=cidr),)))
    assert caught.value.field == "network.egress[0].cidr"


def test_a_refused_way_out_of_the_cell_is_told_with_its_address() -> None:
    def refused(target: str, port: int, reason: int) -> Counted:
        key = socket.inet_aton("10.0.0.2") + socket.inet_pton(socket.AF_INET6, target) + struct.pack("!BxxxHxx", 6, port)
        return Counted(key + struct.pack("=I", reason), 3, 180)

    turned = refused("2001:db8::7", 443, EGRESS)
    found = flows_of([], [], [turned, refused("2001:db8::7", 80, PORT)], {"10.0.0.2": ("shop", "web")}.get)
    assert Refusal(
        project="shop", source="web", address="2001:db8::7", port=443, reason=Reason.EGRESS, packets=3
    ) in found.refusals  # fmt: skip
    assert len(found.refusals) == 2
    assert keys_of([turned], {socket.inet_aton("10.0.0.2")}, 1) == [turned.key]


# The world outside


@pytest.mark.parametrize(
    ("address", "open_"),
    [
        ("2a00:1450:4001::1", True),
        ("2001:db8::1", True),
        ("2620:fe::fe", True),
        ("fd00:ec2::254", False),  # metadata of AWS
        ("fd20:ce::254", False),  # of Google
        ("fe80::a9fe:a9fe", False),
        ("fc00::1", False),
        ("ff0e::1", False),
        ("::1", False),
        ("::ffff:169.254.169.254", False),
        ("64:ff9b::a9fe:a9fe", False),
        ("64:ff9b:1::1", False),
        ("2002:a9fe:a9fe::1", False),
        ("2001::1", False),  # Teredo
        ("4000::1", False),
        ("5f00::1", False),
        ("fec0::1", False),
    ],
)
def test_only_global_addresses_that_stand_for_no_ipv4_one_are_open(address: str, open_: bool) -> None:
    wanted = ipaddress.IPv6Address(address)
    ranges = [tuple(map(ipaddress.IPv6Address, one.split("-"))) for one in ipv6_rules.WORLD]
    assert any(first <= wanted <= last for first, last in ranges) is open_


@pytest.mark.parametrize("address", ["2a00:1450:4001::1", "2620:fe::fe"])
def test_a_global_address_leads_back(address: str) -> None:
    assert is_global(ipaddress.IPv6Address(address))


@pytest.mark.parametrize("address", ["2001:db8::1", "fd00::2", "fe80::1", "::1", "ff0e::1"])
def test_no_other_address_is_taken_for_one_that_the_world_knows(address: str) -> None:
    assert not is_global(ipaddress.IPv6Address(address))


@pytest.mark.parametrize("address", ["192.0.2.1", "fe80::1", "::1", "::", "ff02::1", "::ffff:192.0.2.1", "2001:db8::1%eth0", "me"])
def test_an_address_that_leads_nowhere_is_refused_by_the_options_name(address: str) -> None:
    with pytest.raises(Invalid, match="--ipv6-address") as caught:
        Outward(address)
    assert caught.value.field == "ipv6-address"
    assert caught.value.mend


def test_an_address_that_this_machine_does_not_have_is_no_way() -> None:
    assert Outward("2001:db8:dead::1", world="::1").find() == ""


def test_whoever_has_an_address_beyond_the_link_is_an_uplink(tmp_path: Path) -> None:
    lines = (
        f"{'0' * 31}1 01 80 10 80 lo",
        "fd4a2917c4e300000000000000000001 01 80 00 82 lo",
        "20010db8000000000000000000000001 02 40 00 80 eth0",
        "fe8000000000000000fc00fffe000001 02 40 20 80 eth0",
        "fe8000000000000000fc00fffe000002 03 40 20 80 eth1",
        "fd000000000000000000000000000002 04 40 00 80 br0",
        "fd4a2917c4e300000000000000000002 05 80 00 80 av123456",
    )
    listing = tmp_path / "if_inet6"
    listing.write_text("".join(f"{line}\n" for line in lines))
    assert uplinks(("at123456", "av123456"), listing) == ("br0", "eth0")
    assert uplinks((), tmp_path / "no-ipv6-here") == ()


def test_links_that_only_agents_let_forward_are_known_also_to_the_next_agent(tmp_path: Path) -> None:
    marks = tmp_path / "marks"
    made = machine(tmp_path, all__forwarding="0", eth0__force_forwarding="0", eth1__force_forwarding="1")
    for _ in range(2):
        assert let_forward(("eth0", "eth1", "gone"), made, marks) == ("eth0",)
    assert read_sysctl("ipv6/conf/eth0/force_forwarding", made) == "1"
    (made / "ipv6/conf/all/forwarding").write_text("1\n")
    assert let_forward(("eth0", "eth1"), made, marks) == ()  # a router by its operator's will


def test_a_machine_that_forwards_as_a_whole_is_left_as_it_is(tmp_path: Path) -> None:
    made = machine(tmp_path, all__forwarding="1", eth0__force_forwarding="0")
    assert let_forward(("eth0",), made, tmp_path / "marks") == ()
    assert read_sysctl("ipv6/conf/eth0/force_forwarding", made) == "0"


def test_a_name_of_an_egress_rule_means_its_ipv6_addresses_too() -> None:
    policies = Policies()
    policies.rule("10.0.0.2", "p", NetworkRules(egress=(Allow(host="api.example", ports=(443,)),)))
    assert policies.learn("10.0.0.2", "api.example", ["192.0.2.1"])
    many = [f"2001:db8::{n:x}" for n in range(LEARNED_MAX + 3)]
    assert policies.learn("10.0.0.2", "api.example", many)
    assert not policies.learn("10.0.0.2", "api.example", many[3:])
    found = policies.wanted()
    assert found["permitted"] == [f"10.0.0.2 . 192.0.2.1/32 . {protocol} . 443" for protocol in ("tcp", "udp")]
    said = {line.split(" . ")[1] for line in found["permitted_six"]}
    addresses = {each for network in said for each in map(str, ipaddress.IPv6Network(network))}
    assert addresses == set(many[3:])


# Ways to other nodes


def node(name: str, number: int, *, site: str = "ams", ipv6: bool = True) -> FabricNode:
    return FabricNode(
        name=name, site=site, region=site, prefix=f"10.64.{number * 16}.0/20", endpoint=f"192.0.2.{number}", public_key="k" + name,
        ipv6=ipv6,
    )  # fmt: skip


def test_ipv6_goes_where_ipv4_goes_and_only_by_nodes_that_lead_it() -> None:
    own, near, far, plain = node("e1", 1), node("e2", 2), node("w1", 3, site="iad"), node("e3", 4, ipv6=False)
    nodes = {each.name: each for each in (near, far, plain)}
    ways = ways_of(own, nodes, {})
    assert {network for network, way in ways.items() if way.ipv6} == {
        "10.64.32.1/32", "10.64.32.0/20", "10.64.48.1/32", "10.64.48.0/20",
    }  # fmt: skip
    assert ipv6_way(ULA, ways[near.prefix]) == Way(
        "fd12:3456:789a::a40:2000/116", Kind.VXLAN, "fd12:3456:789a::a40:2001", True
    )  # fmt: skip
    assert ipv6_way(ULA, ways["10.64.48.1/32"]) == Way("fd12:3456:789a::a40:3001/128", Kind.WIREGUARD, None, True)
    assert ways_of(own, nodes, {"w1": "e2"})[far.prefix].ipv6
    assert not ways_of(own, nodes, {"w1": "e3"})[far.prefix].ipv6


# What the machine is told


def machine(directory: Path, **settings: str) -> Path:
    for name, value in settings.items():
        link, _, key = name.partition("__")
        (directory / "ipv6/conf" / link).mkdir(parents=True, exist_ok=True)
        (directory / "ipv6/conf" / link / key).write_text(f"{value}\n")
    return directory


def test_a_kernel_that_lets_each_link_forward_by_itself_is_left_as_it_is(tmp_path: Path) -> None:
    made = machine(tmp_path, all__forwarding="0", all__force_forwarding="0", eth0__accept_ra="1")
    assert not forward_ipv6(made)
    assert (made / "ipv6/conf/all/forwarding").read_text() == "0\n"
    assert (made / "ipv6/conf/eth0/accept_ra").read_text() == "1\n"


def test_an_older_kernel_forwards_and_goes_on_to_hear_of_its_routers(tmp_path: Path) -> None:
    made = machine(tmp_path, all__forwarding="0", all__accept_ra="1", eth0__accept_ra="1", eth1__accept_ra="0", lo__mtu="1")
    assert forward_ipv6(made)
    assert read_sysctl("ipv6/conf/all/forwarding", made) == "1"
    assert [read_sysctl(f"ipv6/conf/{link}/accept_ra", made) for link in ("all", "eth0", "eth1", "lo")] == ["1", "2", "0", ""]
    assert not forward_ipv6(made)


MENDED = "-A {0} -i at+ -j ACCEPT\n-A {0} -o at+ -j ACCEPT\n"


@pytest.mark.parametrize(
    ("rules", "drops"),
    [
        ("", False),
        ("-P INPUT DROP\n-P FORWARD ACCEPT\n", False),
        ("-P FORWARD DROP\n-A FORWARD -i docker0 -j ACCEPT\n", True),
        (f"-P FORWARD DROP\n{MENDED.format('FORWARD')}", False),
        (f"-P FORWARD DROP\n-A FORWARD -j DOCKER-USER\n{MENDED.format('DOCKER-USER')}", False),
        (f"-P FORWARD DROP\n-A FORWARD -j one\n-A one -j two\n-A two -j one\n{MENDED.format('two')}", False),
        ("-P FORWARD DROP\n-A FORWARD -i at+ -j ACCEPT\n", True),
        ("-P FORWARD DROP\n-A FORWARD -o at+ -j ACCEPT\n", True),
        (f"-P FORWARD DROP\n-N DOCKER-USER\n{MENDED.format('DOCKER-USER')}", True),
        (f"-P FORWARD DROP\n-A FORWARD -i eth0 -j DOCKER-USER\n{MENDED.format('DOCKER-USER')}", True),
        (f"-P FORWARD DROP\n{MENDED.format('INPUT')}", True),
        ("-P FORWARD DROP\n-A FORWARD -i at+ -s fd00::/8 -j ACCEPT\n-A FORWARD -o at+ -j ACCEPT\n", True),
        ("-P FORWARD DROP\n-A\n-A FORWARD\n\n", True),
        ("-P FORWARD DROP\n-A FORWARD -i at+ -j DROP\n", True),
    ],
)
def test_other_softwares_rules_that_drop_what_is_forwarded_are_seen(rules: str, drops: bool) -> None:
    assert drops_forwarded(rules) is drops


def test_forwarding_that_somebody_turned_off_is_on_again(tmp_path: Path) -> None:
    made = machine(tmp_path, all__forwarding="0", all__force_forwarding="0", at1__force_forwarding="1", at2__force_forwarding="1")
    (made / "ipv4").mkdir()
    (made / "ipv4/ip_forward").write_text("1\n")
    assert not restore_forwarding(["at1", "at2", "no-tunnel-yet"], made)
    for link in ("at1", "at2"):  # as the kernel does when somebody writes conf/all/forwarding
        (made / f"ipv6/conf/{link}/force_forwarding").write_text("0\n")
    assert restore_forwarding(["at1", "at2", "no-tunnel-yet"], made)
    assert [read_sysctl(f"ipv6/conf/{link}/force_forwarding", made) for link in ("at1", "at2")] == ["1", "1"]
    (made / "ipv4/ip_forward").write_text("0\n")
    assert restore_forwarding((), made)
    assert read_sysctl("ipv4/ip_forward", made) == "1"
    assert not restore_forwarding((), made)


# What a node is told when it starts


class Cell:
    """A control plane that answers what it is told to, in turn; the last answer for ever."""

    def __init__(self, *answers: FabricGrant | AtollError) -> None:
        self.answers = list(answers)
        self.asked = 0

    async def join_fabric(self, node: str, offer: FabricOffer) -> FabricGrant:
        self.asked += 1
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(answer, AtollError):
            raise answer
        return answer

    async def report_paths(self, paths: FabricPaths) -> None:
        raise NotImplementedError

    def fabric(self, node: str) -> AsyncIterator[FabricBatch]:
        raise NotImplementedError


def granted(prefix: str = "10.64.16.0/20", ula: str = ULA) -> FabricGrant:
    return FabricGrant(network="10.64.0.0/10", number=7, prefix=prefix, ula=ula)


async def settled(cell: Cell, directory: Path, subnet: str = "") -> tuple[str | None, str]:
    found = await settle(cell, "n1", FabricOffer(subnet=subnet), directory, former="10.64.0.0/16", stopped=lambda: False)
    kept = load(directory)
    return found, kept.grant.ula if kept is not None else ""


async def test_a_nodes_first_start_learns_the_cells_network_also_with_a_subnet_of_its_own(tmp_path: Path) -> None:
    one, other = tmp_path / "a", tmp_path / "b"
    one.mkdir()
    other.mkdir()
    assert await settled(Cell(Unavailable("not yet"), granted()), one) == ("10.64.16.0/20", ULA)
    cell = Cell(granted("10.9.0.0/16"))
    assert await settled(cell, other, "10.9.0.0/16") == ("10.9.0.0/16", ULA)
    assert await settled(cell, other, "10.9.0.0/16") == ("10.9.0.0/16", ULA)
    assert cell.asked == 1


@pytest.mark.parametrize("error", [Conflict("overlaps", field="subnet"), NotFound("an older server"), Invalid("no private one")])
async def test_a_cell_that_does_not_take_a_subnet_leaves_the_node_to_ipv4(tmp_path: Path, error: AtollError) -> None:
    assert await settled(Cell(error), tmp_path, "10.9.0.0/16") == ("10.9.0.0/16", "")


async def test_a_node_of_before_ipv6_asks_once_and_starts_whatever_the_answer(tmp_path: Path) -> None:
    (tmp_path / FILE).write_bytes(codec.encode(Kept(grant=granted(ula=""), keys_after=3.0)))
    assert await settled(Cell(Unavailable("away")), tmp_path) == ("10.64.16.0/20", "")
    assert await settled(Cell(granted()), tmp_path) == ("10.64.16.0/20", ULA)
    kept = load(tmp_path)
    assert kept is not None
    assert kept.keys_after == 3.0


@pytest.mark.parametrize(("subnet", "expected"), [("10.9.0.0/16", "10.9.0.0/16"), ("", "10.64.0.0/16")])
async def test_a_node_whose_instances_run_waits_for_nobody(tmp_path: Path, subnet: str, expected: str) -> None:
    (tmp_path / FILE).write_bytes(b"damaged")
    ledger = Ledger(tmp_path / "links")
    ledger.open()
    ledger.write([Entry(id="web-1", project="shop", number=2)])
    ledger.close()
    cell = Cell(Unavailable("away"))
    offer = FabricOffer(subnet=subnet)
    found = await settle(cell, "n1", offer, tmp_path, former="10.64.0.0/16", stopped=lambda: cell.asked > 0)
    assert (found, cell.asked) == (expected, 0)


def test_the_operator_can_do_without() -> None:
    assert not parse("agent", Config().arguments()).no_ipv6
    assert parse("agent", Config(no_ipv6=True).arguments()).no_ipv6


NODES = (("n2", "192.0.2.2"), ("n3", "192.0.2.3"))


@pytest.fixture
async def service() -> AsyncIterator[Service]:
    clock = SystemClock()
    store = MemoryStore(clock)
    async with State(store, KINDS) as state, Service(store, state, clock, Random(1), bytes(32)) as service:
        yield service
    await store.close()


async def test_every_node_of_a_cell_is_told_the_same_network_and_a_cell_of_before_gets_one(service: Service) -> None:
    store = service.context.store
    await service.context.reach(await store.put(keys.fabric(), codec.encode(Fabric(number=7, keys_after=3.0, allocations=4))))
    first = await service.fabrics.join("n1", FabricOffer(endpoint="192.0.2.1", ipv6=True))
    assert ipaddress.IPv6Network(first.ula).prefixlen == 48
    assert (first.number, first.prefix) == (7, "10.64.0.0/20")
    others = [
        await service.fabrics.join(name, FabricOffer(endpoint=f"192.0.2.{number}")) for number, name in ((2, "n2"), (3, "n3"))
    ]
    assert {grant.ula for grant in others} == {first.ula}
    assert await service.fabrics.join("n1", FabricOffer(endpoint="192.0.2.1", ipv6=True)) == first
    held = service.context.state.get(Fabric, "cell")
    assert held is not None
    assert held.record == Fabric(number=7, keys_after=3.0, allocations=7)
    assert [node.ipv6 for node in service.fabrics.nodes()] == [True, False, False]


async def test_a_node_that_was_in_the_fabric_before_gets_the_network_without_another_prefix(service: Service) -> None:
    store = service.context.store
    node = FabricNode(name="n1", prefix="10.64.0.0/20", endpoint="192.0.2.1")
    await store.put(keys.fabric(), codec.encode(Fabric(number=7, allocations=1)))
    await service.context.reach(await store.put(keys.fabric_node("n1"), codec.encode(node)))
    grant = await service.fabrics.join("n1", FabricOffer(endpoint="192.0.2.1"))
    assert grant.prefix == node.prefix
    held = service.context.state.get(Fabric, "cell")
    assert held is not None
    assert held.record == Fabric(number=7, allocations=1)
    assert grant.ula


@pytest.mark.parametrize("there", [Fabric(number=7), Fabric(number=7, ula=ULA)])
async def test_a_server_of_before_ipv6_that_writes_the_fabric_leaves_the_cell_its_network(service: Service, there: Fabric) -> None:
    store = service.context.store
    await service.context.reach(await store.put(keys.fabric(), codec.encode(there)))
    first = await service.fabrics.join("n1", FabricOffer(endpoint="192.0.2.1", ipv6=True))
    assert first.ula == there.ula or not there.ula
    await service.context.reach(await store.put(keys.fabric(), b'{"number":7,"allocations":2}'))
    later = [await service.fabrics.join(name, FabricOffer(endpoint=address)) for name, address in NODES]
    assert {grant.ula for grant in later} == {first.ula}
    await service.fabrics.rotate()
    assert await service.fabrics.join("n1", FabricOffer(endpoint="192.0.2.1", ipv6=True)) == first
