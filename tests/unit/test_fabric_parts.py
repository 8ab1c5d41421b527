"""The fabric's pure parts: who is reached through whom, what names mean to whom, and rules as elements that never overlap."""

from __future__ import annotations

import asyncio
import ipaddress
from collections.abc import Sequence

import dns.edns
import dns.flags
import dns.message
import dns.rcode
import pytest
from hypothesis import given
from hypothesis import strategies as st

from atoll.model.errors import Invalid
from atoll.model.fabric import FabricNode, Member
from atoll.model.spec import Allow, NetworkRules, PortProtocol
from atoll.model.spec.network import check_network
from atoll.network import probe
from atoll.network.elements import Elements
from atoll.network.names import ANSWERS_MAX, PENDING_OF_ONE_MAX, Directory, Found, NameServer
from atoll.network.paths import LOST_S, STEADY, Paths
from atoll.network.private import Private, of_nodes
from atoll.network.rules import Ruled, elements_of
from atoll.network.tunnels import Kind, kind_of, ways_of


def node(name: str, number: int, site: str = "ams", region: str = "east", key: str = "k") -> FabricNode:
    return FabricNode(
        name=name, site=site, region=region, prefix=f"10.64.{number * 16}.0/20", endpoint=f"192.0.2.{number}", public_key=key
    )


E1, E2, W1, W2 = node("e1", 1), node("e2", 2), node("w1", 3, "iad", "west"), node("w2", 4, "iad", "west")
ALL = {one.name: one for one in (E1, E2, W1, W2)}


def others(own: FabricNode) -> dict[str, FabricNode]:
    return {name: one for name, one in ALL.items() if name != own.name}


def seen_from(own: FabricNode, silent: set[str], cannot: dict[str, list[str]]) -> Paths:
    """Return what a node makes of it that `silent` never answer and the others say what they cannot reach."""
    paths, nodes = Paths(own), others(own)
    paths.knows(nodes, 0.0)
    for tick in range(1, 12):
        now = tick * LOST_S / 4
        for name in nodes.keys() - silent:
            paths.heard(name, now, cannot.get(name, ()))
        paths.look(now)
    return paths


def test_within_a_site_packets_go_by_vxlan_and_between_sites_only_encrypted() -> None:
    assert kind_of(E1, E2) is Kind.VXLAN
    assert kind_of(E1, W1) is Kind.WIREGUARD
    assert kind_of(E1, node("w", 5, "iad", "west", key="")) is None


def test_both_ends_of_a_cut_link_choose_the_same_relay() -> None:
    one = seen_from(E1, {"w1"}, {})
    other = seen_from(W1, {"e1"}, {})
    assert one.via(others(E1)) == {"w1": "e2"}
    assert other.via(others(W1)) == {"e1": "e2"}


def test_a_relay_that_cannot_reach_the_other_end_is_none() -> None:
    one = seen_from(E1, {"w1"}, {"e2": [W1.prefix]})
    assert one.via(others(E1)) == {"w1": "w2"}
    alone = seen_from(E1, {"w1"}, {"e2": [W1.prefix], "w2": [W1.prefix]})
    assert alone.via(others(E1)) == {}
    assert alone.away(others(E1)) == {"w1"}


def test_a_bad_link_counts_as_good_only_after_answers_in_a_row() -> None:
    paths, nodes = seen_from(E1, {"w1"}, {}), others(E1)
    now = 100.0
    for name in nodes:
        paths.heard(name, now)
    for n in range(STEADY - 1):
        assert not paths.reaches("w1"), n
        now += LOST_S / 4
        paths.heard("w1", now)
    assert paths.reaches("w1")


def test_a_relayed_prefix_is_led_through_the_relay_but_its_node_is_still_asked_directly() -> None:
    ways = ways_of(E1, others(E1), {"w1": "e2"})
    assert ways[W1.prefix].kind is Kind.VXLAN
    assert ways[W1.prefix].gateway == "10.64.32.1"
    assert ways["10.64.48.1/32"].kind is Kind.WIREGUARD
    assert ways[W2.prefix].kind is Kind.WIREGUARD


def member(id: str, owner: str, on: FabricNode, last: int, *, project: str = "shop", ready: bool = True, index: int = 0) -> Member:
    address = on.prefix.replace(".0/20", f".{last}")
    return Member(
        id=id, project=project, owner=owner, index=index, node=on.name, site=on.site, region=on.region, address=address, ready=ready
    )


MEMBERS = (
    member("far", "web", W1, 2),
    member("near", "web", E2, 2, index=1),
    member("here", "web", E1, 2, index=2),
    member("ill", "web", E1, 3, ready=False, index=3),
    member("db", "db", W1, 4, ready=False),
)


def directory() -> Directory:
    found = Directory("e1", "ams", "east")
    found.see(MEMBERS)
    return found


def test_a_name_means_the_healthy_instances_nearest_first() -> None:
    assert directory().find(["web", "shop"], "shop").addresses == ("10.64.16.2", "10.64.32.2", "10.64.48.2")


def test_instances_and_sites_have_names_of_their_own() -> None:
    found = directory()
    assert found.find(["near", "web", "shop"], "shop").addresses == ("10.64.32.2",)
    assert found.find(["1", "web", "shop"], "shop").addresses == ("10.64.32.2",)
    assert found.find(["iad", "site", "web", "shop"], "shop").addresses == ("10.64.48.2",)
    assert not found.find(["nobody", "web", "shop"], "shop").known


def test_a_name_whose_instances_are_all_ill_is_known_but_means_nobody() -> None:
    found = directory().find(["db", "shop"], "shop")
    assert found.known
    assert not found.addresses


def test_instances_on_a_node_that_cannot_be_reached_are_not_named() -> None:
    found = directory()
    found.see(MEMBERS, frozenset({"w1"}))
    assert found.find(["web", "shop"], "shop").addresses == ("10.64.16.2", "10.64.32.2")


def test_an_answer_has_a_bound() -> None:
    found = Directory("e1", "ams", "east")
    found.see(member(f"m{n}", "web", E1, n + 2) for n in range(40))
    assert len(found.find(["web", "shop"], "shop").addresses) == ANSWERS_MAX


def ask(name: str, source: str) -> tuple[str, list[str]]:
    server = NameServer(directory(), "127.0.0.1", {"10.64.16.2": "shop", "10.64.16.9": "spy"}.get, tuple)
    wire = server.answer(dns.message.make_query(name, "A").to_wire(), source)
    assert wire is not None
    answer = dns.message.from_wire(wire)
    assert answer.flags & dns.flags.AA
    return dns.rcode.to_text(answer.rcode()), [str(one) for rrset in answer.answer for one in rrset]


def test_only_who_asks_from_an_address_of_the_project_learns_its_names() -> None:
    assert ask("Web.Shop.Internal", "10.64.16.2") == ("NOERROR", ["10.64.16.2", "10.64.32.2", "10.64.48.2"])
    assert ask("web.shop.internal", "10.64.16.9") == ("NXDOMAIN", [])
    assert ask("web.shop.internal", "192.0.2.77") == ("NXDOMAIN", [])


def test_an_answer_is_kept_for_its_project_only_and_until_something_changes() -> None:
    found = directory()
    server = NameServer(found, "127.0.0.1", {"10.64.16.2": "shop", "10.64.16.9": "spy"}.get, tuple)

    def asked(id: int, source: str) -> tuple[int, str, int]:
        query = dns.message.make_query("web.shop.internal", "A", id=id)
        wire = server.answer(query.to_wire(), source)
        assert wire is not None
        answer = dns.message.from_wire(wire)
        return answer.id, dns.rcode.to_text(answer.rcode()), sum(len(rrset) for rrset in answer.answer)

    assert asked(1, "10.64.16.2") == (1, "NOERROR", 3)
    assert asked(2, "10.64.16.2") == (2, "NOERROR", 3)
    assert asked(3, "10.64.16.9") == (3, "NXDOMAIN", 0)
    found.see(MEMBERS[:1])
    assert asked(4, "10.64.16.2") == (4, "NOERROR", 1)


def test_a_long_question_is_answered_and_its_answer_not_kept() -> None:
    looked: list[Sequence[str]] = []

    class Watched(Directory):
        def find(self, name: Sequence[str], project: str) -> Found:
            looked.append(name)
            return super().find(name, project)

    found = Watched("e1", "ams", "east")
    found.see(MEMBERS)
    server = NameServer(found, "127.0.0.1", {"10.64.16.2": "shop"}.get, tuple)
    for length, times in ((8, 1), (60_000, 2)):
        options = [dns.edns.GenericOption(65_001, bytes(length))]
        wire = dns.message.make_query("web.shop.internal", "A", use_edns=0, options=options).to_wire(max_size=65_535)
        looked.clear()
        first, second = server.answer(wire, "10.64.16.2"), server.answer(wire, "10.64.16.2")
        assert first is not None
        assert first == second
        assert sum(len(rrset) for rrset in dns.message.from_wire(first).answer) == 3
        assert len(looked) == times


def test_other_names_are_for_the_nodes_own_servers() -> None:
    server = NameServer(directory(), "127.0.0.1", {}.get, tuple)
    assert server.answer(dns.message.make_query("example.org", "A").to_wire(), "10.64.16.2") is None


async def test_one_instance_cannot_take_all_questions_that_are_passed_on() -> None:
    passed: list[str] = []

    def forwarders() -> tuple[str, ...]:
        passed.append("")
        return ()

    server = NameServer(directory(), "127.0.0.1", {}.get, forwarders, port=0)
    await server.start()
    wire = dns.message.make_query("example.org", "A").to_wire()
    for _ in range(2):  # what has ended counts no more
        passed.clear()
        for _ in range(PENDING_OF_ONE_MAX + 9):
            server.take(wire, ("10.64.16.2", 5353))
        server.take(wire, ("10.64.16.9", 5353))
        for _ in range(5):
            await asyncio.sleep(0)
        assert len(passed) == PENDING_OF_ONE_MAX + 1
    await server.close()


def test_the_cells_vxlan_is_taken_from_the_sites_nodes_only() -> None:
    known = of_nodes(E1, others(E1), 77)
    assert known["endpoints"] == [E2.endpoint]
    assert known["vxlans"] == ["77"]
    assert of_nodes(E1, others(E1))["vxlans"] == []


def test_an_instance_with_an_address_of_another_nodes_prefix_is_not_believed() -> None:
    private = Private(ipaddress.IPv4Network(E1.prefix))
    stolen = Member(id="x", project="shop", owner="web", node="w1", address="10.64.32.9", ready=True)
    own = Member(id="y", project="shop", owner="web", node="w1", address="10.64.16.9", ready=True)
    good = member("z", "web", W1, 9)
    assert len(list(private.see(others(E1), (stolen, own, good)))) == 1
    assert private.projects() == {good.address: "shop"}


def test_what_could_not_be_written_of_other_nodes_instances_is_made_up_for_the_next_time() -> None:
    private = Private(ipaddress.IPv4Network(E1.prefix))
    first = [member(f"i{n}", "web", W1, 2 + n) for n in range(200)] + [member(f"j{n}", "web", E2, 2 + n) for n in range(200)]
    first += [member(f"k{n}", "web", W2, 2 + n) for n in range(200)]
    later = [member("i0", "web", W1, 2, project="other"), *first[1:550]]

    def sizes(change: tuple[list[Elements], list[Elements]]) -> tuple[list[int], list[int]]:
        deleted, added = ([len(keys) for _, keys in part] for part in change)
        return deleted, added

    assert sizes(next(private.see(others(E1), first))) == ([], [500, 500])  # which fails
    assert private.projects() == {}
    assert [sizes(change) for change in private.see(others(E1), first)] == [([], [500, 500]), ([], [100, 100])]
    assert len(private.projects()) == 600
    changes = private.see(others(E1), later)
    assert sizes(next(changes)) == ([51, 51], [])
    assert sizes(next(changes)) == ([], [1, 1])  # and this one fails
    assert len(private.projects()) == 549
    assert [sizes(change) for change in private.see(others(E1), later)] == [([], [1, 1])]
    assert list(private.see(others(E1), later)) == []
    assert private.projects()[first[0].address] == "other"


@given(st.binary(max_size=64))
def test_no_datagram_breaks_the_prober(data: bytes) -> None:
    probe.read(data, "10.64.0.1")


@given(st.integers(0, 2**64 - 1), st.lists(st.sampled_from([one.prefix for one in ALL.values()]), max_size=4))
def test_a_probes_answer_says_what_was_put_into_it(sequence: int, cannot: list[str]) -> None:
    assert probe.read(probe.question(sequence), "10.64.0.1") == sequence
    answer = probe.read(probe.reply(sequence, cannot), "10.64.0.1")
    assert isinstance(answer, probe.Answer)
    assert (answer.sequence, answer.cannot) == (sequence, cannot)


CIDRS = st.builds(
    lambda address, length: str(ipaddress.IPv4Network((address & ~((1 << (32 - length)) - 1), length))),
    st.integers(0x0A000000, 0x0A0000FF),
    st.integers(24, 32),
)
ALLOWS = st.builds(
    lambda cidr, ports, protocol: Allow(cidr=cidr, ports=tuple(ports), protocol=protocol),
    CIDRS,
    st.lists(st.integers(1, 9), max_size=3),
    st.sampled_from([None, PortProtocol.TCP, PortProtocol.UDP]),
)


@given(st.lists(ALLOWS, max_size=5), st.integers(0, 255), st.integers(1, 12), st.sampled_from(["tcp", "udp"]))
def test_elements_let_through_what_some_rule_does_once_and_nothing_else(
    allows: list[Allow], last: int, port: int, protocol: str
) -> None:
    ruled = Ruled("10.64.16.2", "shop", NetworkRules(egress=tuple(allows)))
    elements = elements_of([ruled], {}, {})["permitted"]
    address = ipaddress.IPv4Address(f"10.0.0.{last}")

    def matches(element: str) -> bool:
        source, network, proto, ports = element.split(" . ")
        first, _, end = ports.partition("-")
        inside = address in ipaddress.IPv4Network(network)
        return source == "10.64.16.2" and inside and proto == protocol and int(first) <= port <= int(end or first)

    wanted = any(
        address in ipaddress.IPv4Network(allow.cidr or "")
        and (not allow.ports or port in allow.ports)
        and allow.protocol in (None, protocol)
        for allow in allows
    )
    assert sum(matches(element) for element in elements) == int(wanted)


def test_a_rule_for_an_app_means_its_instances_and_for_a_name_what_was_learned() -> None:
    rules = NetworkRules(ingress=(Allow(app="web"),), egress=(Allow(host="example.org", ports=(443,), protocol=PortProtocol.TCP),))
    found = elements_of(
        [Ruled("10.64.16.2", "shop", rules)],
        {("shop", "web"): ["10.64.32.9"], ("spy", "web"): ["10.64.32.10"]},
        {("10.64.16.2", "example.org"): ["192.0.2.8"]},
    )
    assert found["admitted"] == [f"10.64.16.2 . 10.64.32.9/32 . {protocol} . 0-65535" for protocol in ("tcp", "udp")]
    assert found["permitted"] == ["10.64.16.2 . 192.0.2.8/32 . tcp . 443"]


@pytest.mark.parametrize(
    ("rules", "field"),
    [
        (NetworkRules(egress=(Allow(),)), "network.egress[0]"),
        (NetworkRules(egress=(Allow(app="a", cidr="192.0.2.0/24"),)), "network.egress[0]"),
        (NetworkRules(ingress=(Allow(host="example.org"),)), "network.ingress[0].host"),
        (NetworkRules(ingress=(Allow(cidr="192.0.2.1/24"),)), "network.ingress[0].cidr"),
    ],
)
def test_rules_that_say_nothing_or_too_much_are_refused_by_name(rules: NetworkRules, field: str) -> None:
    with pytest.raises(Invalid) as refused:
        check_network(rules)
    assert refused.value.field == field
