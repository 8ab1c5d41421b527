"""The part of `bench network` about links: what a slot costs, alone, in a burst and as the thousandth; what goes over one."""

from __future__ import annotations

import argparse
import contextlib
import socket
import time
from pathlib import Path

from atoll.network import namespaces
from bench.network_world import PORT, Net, Node, Sample, cpu, interleaved, path_of, rate
from bench.report import Report, Result, median, percentile

BURST = 32
BURSTS = 12
BARE, INSIDE = "192.0.2.2", "192.0.2.3"
TRIPS = 4000
"""Small datagrams there and back, in one run."""
WARM_UP = 5


def slots(report: Report, directory: Path, options: argparse.Namespace) -> None:
    """A start's own wait for its network, beside making all of it when it is wanted."""
    with Net() as net:
        ours, inline = net.node(net.namespace("p"), directory / "p"), net.node(net.namespace("i"), directory / "i")
        ours.ask("open", subnet="10.200.0.0/22", prepared=BURST)
        inline.ask("open", subnet="10.200.4.0/22", prepared=0)
        alone, made, script = [], [], []
        for number in range(options.samples + WARM_UP):
            ours.ask("settle", ready=BURST)
            times = (ours.ask("attach", id=f"s{number}")["ms"], inline.ask("attach", id=f"s{number}")["ms"])
            ours.ask("detach", ids=[f"s{number}"])
            inline.ask("detach", ids=[f"s{number}"])
            if number >= WARM_UP:
                alone.append(times[0])
                made.append(times[1])
        for number in range(10):
            script.append(inline.ask("by_hand", number=number))
        ours.ask("settle", ready=BURST)
        series = ours.ask("attach_in_turn", ids=[f"t{number}" for number in range(BURST)])
        ours.ask("detach", ids=[f"t{number}" for number in range(BURST)])
        inlined = inline.ask("attach_in_turn", ids=[f"t{number}" for number in range(BURST)])
        inline.ask("detach", ids=[f"t{number}" for number in range(BURST)])
        burst: list[float] = []
        for number in range(BURSTS):
            ids = [f"b{number}-{one}" for one in range(BURST)]
            ours.ask("settle", ready=BURST)
            burst += ours.ask("attach_at_once", ids=ids)
            ours.ask("detach", ids=ids)
    cold = "each after some ms in which the agent had nothing to do: most of it is cold caches"
    report.add(Result("slot: taken, p50, beside the same made inline by us", median(alone), "ms", median(made), "<= 0.05", cold))
    report.add(
        Result(
            f"slot: {BURST} taken one after the other, p50, beside the same inline",
            median(series),
            "ms",
            median(inlined),
            "<= 0.05",
        )
    )
    report.add(Result("slot: taken, p50, beside the same made by `ip` and `nft`", median(alone), "ms", median(script)))
    report.add(
        Result(
            f"slot: taken, p99 of {BURST} at once beside alone",
            percentile(burst, 99),
            "ms",
            percentile(alone, 99),
            "<= 2",
            "from the moment when all are asked for: one write, one transaction, and 20 µs of Python for each",
        )
    )
    report.add(Result("slot: taken, p50 of 32 at once", median(burst), "ms"))


def many(report: Report, directory: Path, options: argparse.Namespace) -> None:
    """The last of many slots beside the first, where there are no others: what it takes to make, and what a packet takes."""
    with Net() as net:
        crowd, lone = net.node(net.namespace("c"), directory / "c"), net.node(net.namespace("l"), directory / "l")
        crowd.ask("open", subnet="10.200.0.0/20", prepared=0)
        lone.ask("open", subnet="10.200.16.0/20", prepared=0)
        for number in range(options.slots - 1):
            crowd.ask("attach", id=f"c{number}")
        took: dict[str, list[float]] = {"crowd": [], "lone": []}
        for number in range(options.samples):
            for name, node in (("crowd", crowd), ("lone", lone)):
                took[name].append(node.ask("attach", id=f"x{number}")["ms"])
                node.ask("detach", ids=[f"x{number}"])
        ends = {name: node.ask("attach", id="last") for name, node in (("crowd", crowd), ("lone", lone))}
        nodes = {"crowd": crowd, "lone": lone}
        for name, end in ends.items():
            net.serve(Path(end["netns"]))
            net.measure(nodes[name].netns, end["address"], seconds=1)
        found = interleaved(
            options.rounds,
            {
                **{
                    f"tcp {name}": lambda n=name: net.measure(nodes[n].netns, ends[n]["address"], seconds=options.seconds)  # type: ignore[misc]
                    for name in ends
                },
                **{f"trip {name}": lambda n=name: _trips(nodes[n], ends[n]) for name in ends},  # type: ignore[misc]
            },
        )
    which = f"slot {options.slots:,} beside slot 1"
    report.add(Result(f"{which}: to make", median(took["crowd"]), "ms", median(took["lone"]), "<= 1.5"))
    trips = {name: median([1e6 / sample.per_second for sample in found[f"trip {name}"]]) for name in ends}
    report.add(Result(f"{which}: a small packet there and back", trips["crowd"], "µs", trips["lone"], "<= 1.5"))
    rates = {name: 1e9 / rate(found[f"tcp {name}"]) for name in ends}
    report.add(Result(f"{which}: a Gbit to it", rates["crowd"] * 1000, "ms", rates["lone"] * 1000, "<= 1.5"))


def _trips(node: Node, end: dict[str, str]) -> Sample:
    """Send a small datagram to the instance and wait for its answer, again and again: round trips per second."""

    def receiver() -> socket.socket:
        made = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        made.bind(("0.0.0.0", PORT))
        return made

    inside = namespaces.run_inside(Path(end["netns"]), receiver)
    outside = namespaces.run_inside(path_of(node.netns), lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
    with contextlib.closing(inside), contextlib.closing(outside):
        for one in (inside, outside):
            one.settimeout(5)
        outside.connect((end["address"], PORT))
        began = time.perf_counter()
        for _ in range(TRIPS):
            outside.send(b"x")
            inside.sendto(b"y", inside.recvfrom(8)[1])
            outside.recv(8)
        return Sample(TRIPS / (time.perf_counter() - began), 0.0)


def containers(report: Report, directory: Path, options: argparse.Namespace) -> None:
    """What goes between the node and an instance, and from instance to instance, beside bare links with nothing in between."""
    with Net() as net:
        host, bare = net.namespace("h"), net.namespace("b")
        node = net.node(host, directory / "h")
        node.ask("open", subnet="10.200.0.0/24", prepared=0)
        one, other = node.ask("attach", id="one"), node.ask("attach", id="other")
        inside, beside = net.namespace("x"), net.namespace("y")
        net.spur(bare, inside, "bare0", BARE)
        net.spur(bare, beside, "bare1", INSIDE)
        for netns in (Path(one["netns"]), inside):
            net.serve(netns)
        seconds = options.seconds
        ways = {
            "to, ours": lambda: net.measure(host, one["address"], seconds=seconds),
            "to, bare": lambda: net.measure(bare, BARE, seconds=seconds),
            "from, ours": lambda: net.measure(host, one["address"], seconds=seconds, reverse=True),
            "from, bare": lambda: net.measure(bare, BARE, seconds=seconds, reverse=True),
            "between, ours": lambda: net.measure(Path(other["netns"]), one["address"], seconds=seconds),
            "between, bare": lambda: net.measure(beside, BARE, seconds=seconds),
            "packets, ours": lambda: net.measure(host, one["address"], seconds=seconds, packets=True),
            "packets, bare": lambda: net.measure(bare, BARE, seconds=seconds, packets=True),
        }
        found = interleaved(options.rounds, ways)
    for key, what, goal in (
        ("to", "container, node → instance: TCP beside a bare veth", ">= 0.97"),
        ("from", "container, instance → node: TCP beside a bare veth", ">= 0.97"),
        ("between", "container, instance → instance of the node: TCP beside bare routed veths", None),
    ):
        ours, reference = found[f"{key}, ours"], found[f"{key}, bare"]
        report.add(Result(what, rate(ours) / 1e9, "Gbit/s", rate(reference) / 1e9, goal))
        what = what.replace("TCP", "processor per Gbit")
        report.add(Result(what, cpu(ours) * 1000, "ms", cpu(reference) * 1000, "<= 1.05" if goal else None))
    ours, reference = found["packets, ours"], found["packets, bare"]
    report.add(
        Result("container, node → instance: small UDP packets beside a bare veth", rate(ours) / 1e3, "k/s", rate(reference) / 1e3)
    )
