"""What nodes count of the traffic between apps: from the kernel's words to what a person is shown."""

from __future__ import annotations

import json
import socket
import struct
from pathlib import Path

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from rich.text import Text

from atoll.api.service.heartbeats import Heartbeats
from atoll.cli.main import cli
from atoll.cli.net_flows import decided
from atoll.cli.session import Session
from atoll.model.errors import TooLarge
from atoll.model.fabric import Member, ReachStep, ReachView
from atoll.model.flows import FLOWS_MAX, Flow, Flows, Reason, Refusal
from atoll.model.ports.clock import SystemClock
from atoll.model.records import Heartbeat
from atoll.network.counted import REASONS, Counted, elements_of, flows_of, keys_of
from atoll.network.netlink import attribute
from atoll.network.policies import Policies
from atoll.sdk.fake import FakeApi

OWNERS = {"10.0.0.2": ("shop", "web"), "10.0.0.3": ("shop", "web"), "10.0.0.4": ("shop", "db"), "10.0.1.2": ("other", "db")}


def pair(source: str, target: str, packets: int = 1, total: int = 100) -> Counted:
    return Counted(socket.inet_aton(source) + socket.inet_aton(target), packets, total)


def refused(source: str, target: str, port: int, reason: Reason, packets: int = 1) -> Counted:
    key = struct.pack("!4s4sBxxxHxx", socket.inet_aton(source), socket.inet_aton(target), socket.IPPROTO_TCP, port)
    return Counted(key + struct.pack("=I", REASONS.index(reason) + 1), packets, 60 * packets)


def test_instances_of_an_app_are_one_and_addresses_of_nobody_are_left_out() -> None:
    found = flows_of(
        [pair("10.0.0.2", "10.0.0.4", 3, 300), pair("10.0.0.3", "10.0.0.4", 4, 400), pair("10.0.0.4", "10.9.9.9")],
        [pair("10.0.0.2", "10.0.0.4", 2)],
        [],
        OWNERS.get,
    )
    assert found == Flows(flows=(Flow(project="shop", source="web", target="db", bytes=700, packets=7, connections=2),))


def test_what_is_refused_says_why_and_names_no_app_of_another_project() -> None:
    found = flows_of(
        [],
        [],
        [refused("10.0.0.2", "10.0.0.4", 5432, Reason.INGRESS, 2), refused("10.0.0.2", "10.0.1.2", 80, Reason.PROJECT)],
        OWNERS.get,
    )
    assert found.refusals == (
        Refusal(project="shop", source="web", target="db", port=5432, reason=Reason.INGRESS, packets=2),
        Refusal(project="shop", source="web", address="10.0.1.2", port=80, reason=Reason.PROJECT, packets=1),
    )


def test_a_node_tells_of_the_busiest_pairs_and_says_that_there_are_more() -> None:
    owners = {f"10.1.0.{n}": ("p", f"a{n:03d}") for n in range(200)}
    pairs = [pair(f"10.1.0.{n}", "10.1.0.0", 1, n) for n in range(200)]
    found = flows_of(pairs, [], [], owners.get)
    assert [flow.source for flow in found.flows] == [f"a{n:03d}" for n in range(199, 199 - FLOWS_MAX, -1)]
    assert not found.complete


def test_the_kernels_elements_are_read_with_their_counters() -> None:
    def element(key: bytes, packets: int, total: int) -> bytes:
        counter = attribute(1, total.to_bytes(8, "big")) + attribute(2, packets.to_bytes(8, "big"))
        expression = attribute(1, b"counter\0") + attribute(2 | 0x8000, counter)
        return attribute(1 | 0x8000, attribute(1 | 0x8000, attribute(1, key)) + attribute(7 | 0x8000, expression))

    body = attribute(1, b"t\0") + attribute(3 | 0x8000, element(b"abcdefgh", 5, 700) + element(b"ijklmnop", 1, 2**40))
    assert list(elements_of(body)) == [Counted(b"abcdefgh", 5, 700), Counted(b"ijklmnop", 1, 2**40)]


def test_an_address_whose_holder_has_gone_or_is_another_now_is_to_be_forgotten() -> None:
    def member(address: str, project: str, owner: str = "web") -> Member:
        return Member(id="x", project=project, owner=owner, node="n", address=address)

    policies = Policies()
    policies.see([member("10.0.0.2", "shop"), member("10.0.0.3", "shop"), member("10.0.0.4", "shop"), member("10.0.0.5", "shop")])
    assert policies.left == set()
    policies.see([member("10.0.0.2", "shop"), member("10.0.0.3", "other"), member("10.0.0.4", "shop", "db")])
    assert policies.left == {"10.0.0.3", "10.0.0.4", "10.0.0.5"}


def test_what_is_forgotten_of_an_address_is_all_that_was_sent_from_it_or_to_it() -> None:
    of, to, other = (pair(*ends) for ends in (("10.0.0.2", "10.0.0.4"), ("10.0.0.4", "10.0.0.2"), ("10.0.0.3", "10.0.0.4")))
    gone = {socket.inet_aton("10.0.0.2")}
    assert keys_of([of, to, other], gone, 2) == [of.key, to.key]
    assert keys_of([of, to, other], gone, 1) == [of.key]
    turned = refused("10.0.0.3", "10.0.0.2", 80, Reason.PORT)
    assert keys_of([turned, refused("10.0.0.3", "10.0.0.4", 80, Reason.PORT)], gone, 2) == [turned.key]


@given(st.binary(max_size=200))
def test_whatever_bytes_come_reading_them_ends_without_an_error(body: bytes) -> None:
    for counted in elements_of(body):
        flows_of([counted], [counted], [counted], OWNERS.get)


def test_a_heartbeat_with_more_flows_than_allowed_is_refused() -> None:
    flows = tuple(Flow(project="p", source=f"a{n}", target="b") for n in range(FLOWS_MAX + 1))
    with pytest.raises(TooLarge):
        Heartbeats(SystemClock()).note(Heartbeat(node="n", at=1.0, flows=Flows(flows=flows)))


@pytest.fixture
def api() -> FakeApi:
    api = FakeApi()
    steps = (ReachStep(what="ingress", ok=False, detail="no ingress rule of db allows it", mend="add one"),)
    api.reach = ReachView(source="web-aaaaaa", target="db-bbbbbb", port=5432, protocol="tcp", ok=False, steps=steps)
    there, back = Flow(project="default", source="web", target="db"), Flow(project="default", source="db", target="web")
    refusal = Refusal(project="default", source="web", target="db", port=5432, reason=Reason.INGRESS, packets=2, node="n1")
    other = Refusal(project="default", source="web", target="db", port=80, reason=Reason.PORT, packets=9, node="n1")
    api.flows = [
        Flows(flows=(there, back), refusals=(refusal, other)),
        Flows(
            flows=(
                Flow(project="default", source="web", target="db", bytes=2048, packets=10, connections=3),
                Flow(project="default", source="db", target="web", bytes=50, packets=1),
            ),
            refusals=(
                Refusal(project="default", source="web", target="db", port=5432, reason=Reason.INGRESS, packets=7, node="n1"),
                other,
            ),
        ),
    ]
    return api


def run(api: FakeApi, tmp_path: Path, *arguments: str) -> tuple[int, str, str]:
    environment = {
        "ATOLL_API": "http://fake",
        "ATOLL_TOKEN": "t",
        "XDG_CONFIG_HOME": str(tmp_path),
        "NO_COLOR": "1",
        "COLUMNS": "200",
    }
    done = CliRunner().invoke(cli, arguments, obj=Session(dial=lambda _: api), env=environment, catch_exceptions=False)
    return done.exit_code, done.stdout, done.stderr


def test_trace_says_what_stops_it_and_shows_what_is_refused_meanwhile(api: FakeApi, tmp_path: Path) -> None:
    code, output, said = run(api, tmp_path, "net", "trace", "web", "db", "--port", "5432", "--for", "0.1", "--interval", "0.1")
    assert code == 1
    assert "ingress: no ingress rule of db allows it" in said
    assert "web → db, all ports: 10 packets, 2.0KiB, 3 begun; back: 1 packets" in output
    assert "REFUSED 5 on node n1: the target's ingress rules do not allow it" in output


def test_trace_shows_a_mend_with_its_brackets() -> None:
    stops = ReachStep(what="port", ok=False, detail="shop has [ports]", mend="add it to the [[ports]] of shop")
    view = ReachView(source="web-1", target="shop-1", protocol="tcp", port=9999, ok=False, steps=(stops,))
    shown = [Text.from_markup(line).plain for line in decided(view)]
    assert shown == ["✗ port: shop has [ports]", "→ add it to the [[ports]] of shop"]


def test_trace_of_an_instance_counts_what_is_of_its_app(api: FakeApi, tmp_path: Path) -> None:
    code, output, _ = run(
        api, tmp_path, "--json", "net", "trace", "web-aaaaaa", "db", "--port", "5432", "--for", "0.1", "--interval", "0.1"
    )
    found = json.loads(output)
    assert code == 1
    assert found["sent"] == {"packets": 10, "bytes": 2048, "connections": 3}
    assert found["refused"] == [{"reason": "ingress", "node": "n1", "packets": 5}]


def test_top_by_apps_shows_pairs_and_refusals(api: FakeApi, tmp_path: Path) -> None:
    code, output, _ = run(api, tmp_path, "net", "top", "--apps", "--interval", "0.1")
    assert code == 0
    assert "20.0KiB/s" in output
    assert "the target declares no such port" in output


def test_top_by_apps_without_any_says_that_counts_go_with_their_instances(tmp_path: Path) -> None:
    code, _, said = run(FakeApi(), tmp_path, "net", "top", "--apps", "--interval", "0.1")
    assert code == 0
    assert "no app has sent another anything in the last ten minutes" in said
    assert "of the instances that there are now" in said
