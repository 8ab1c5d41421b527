"""Ports of nodes (`ports[].host`): one instance of a node has each, and none that is not its to have."""

from __future__ import annotations

from pathlib import Path

import pytest

from atoll.model.errors import Invalid
from atoll.model.records import Capacity, Node
from atoll.model.spec import AppSpec, Port, PortProtocol, RuntimeName, check_app, host_ports
from atoll.network.listening import taken_ports
from atoll.scheduling.demand import Pending, demand_of
from atoll.scheduling.plan import plan
from atoll.scheduling.snapshot import Snapshot

GIB = 1 << 30
DNS = (Port(name="dns", port=53, host=8053, protocol=PortProtocol.UDP),)


def node(name: str, taken: tuple[str, ...] = ()) -> Node:
    capacity = Capacity(cpu_milli=4000, memory_bytes=8 * GIB, disk_bytes=10 * GIB)
    return Node(name=name, capacity=capacity, runtimes=(RuntimeName.RUNC,), ports_taken=taken)


def ask(name: str, count: int, ports: tuple[Port, ...] = DNS) -> list[Pending]:
    demand = demand_of(AppSpec(name=name, image="x", ports=ports))
    return [Pending(id=f"{name}-{index}", group=f"app/p/{name}/1/1", demand=demand) for index in range(count)]


def test_no_two_instances_of_a_node_have_one_port_and_machines_keep_theirs() -> None:
    there = Snapshot()
    for made in (node("n0"), node("n1"), node("n2", ("udp/8053", "tcp/22"))):
        there.upsert_node(made)
    answer = plan(there, ask("dns", 3))
    assert sorted(placed.node for placed in answer.placed) == ["n0", "n1"]
    rejection = next(iter(answer.rejected.values()))
    assert rejection.code == "no-host-port"
    assert "3 whose port udp/8053 another instance has" in rejection.message
    assert "on which a program of the machine listens on udp/8053" in rejection.message
    # The same number over TCP is another port; another app does not get the one that is taken.
    other = plan(there, [*ask("dns", 2), *ask("other", 1), *ask("web", 3, (Port(port=80, host=8053),))])
    assert {placed.id for placed in other.placed} == {"dns-0", "dns-1", "web-0", "web-1", "web-2"}


def test_a_port_is_free_again_once_its_instance_is_gone_or_the_machine_says_so() -> None:
    there = Snapshot()
    there.upsert_node(node("n0"))
    first, second = ask("dns", 1)[0], ask("dns2", 1)
    there.allocate("a", "n0", first.group, first.demand)
    assert plan(there, second).placed == ()
    there.release("a")
    assert len(plan(there, second).placed) == 1
    there.upsert_node(node("n0", ("udp/8053",)))
    assert plan(there, second).placed == ()
    there.upsert_node(node("n0"))
    assert len(plan(there, second).placed) == 1


def test_one_port_of_the_node_is_given_to_one_port_of_the_spec() -> None:
    twice = (Port(name="a", port=80, host=8053), Port(name="b", port=81, host=8053))
    with pytest.raises(Invalid, match="ports: host 'tcp/8053' is given twice"):
        check_app(AppSpec(name="a", image="x", ports=twice))
    both = (Port(name="a", port=80, host=8053), Port(name="b", port=81, host=8053, protocol=PortProtocol.UDP))
    check_app(AppSpec(name="a", image="x", ports=both))
    assert host_ports(both) == ("tcp/8053", "udp/8053")


def test_taken_ports_are_those_that_strangers_can_reach(tmp_path: Path) -> None:
    head = "  sl  local_address rem_address   st\n"
    (tmp_path / "tcp").write_text(
        head
        + "   0: 00000000:0016 00000000:0000 0A 0\n"  # every address, port 22
        + "   1: 0100007F:0035 00000000:0000 0A 0\n"  # loopback
        + "   2: 0200000A:1F90 0300000A:1F91 01 0\n"  # a connection
    )
    (tmp_path / "tcp6").write_text(
        head + f"   0: {'0' * 32}:0050 {'0' * 32}:0000 0A 0\n" + f"   1: {'0' * 24}01000000:0051 {'0' * 32}:0000 0A 0\n"  # ::1
    )
    (tmp_path / "udp").write_text(head + "   0: 00000000:0035 00000000:0000 07 0\n" + "   1: 00000000:FDE8 00000000:0000 07 0\n")
    assert taken_ports(tmp_path) == ("tcp/22", "udp/53", "tcp/80")
