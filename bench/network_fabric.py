"""The part of `bench network` about tunnels: from an instance of one host to one of another, beside the same way without us.

The bare way has the same hops (namespace, veth, host, tunnel, host, veth, namespace) and nothing that looks at packets. What the
tunnel takes between the hosts themselves, without an instance at either end, stands beside it.
"""

from __future__ import annotations

import argparse
import contextlib
import shutil
import socket
import subprocess
import time
from functools import partial
from pathlib import Path

from atoll.model.fabric import VXLAN_PORT, WIREGUARD_PORT
from atoll.network import namespaces, wireguard
from atoll.network.tunnels import VXLAN_BYTES, WIREGUARD_BYTES
from bench.network_node import PROJECT
from bench.network_world import PORT, Net, call, cpu, interleaved, path_of, rate
from bench.report import Report, Result

NUMBER = 77
PREFIXES = ("10.200.0.0/20", "10.200.16.0/20")
WIRES = (("198.18.1.1", "198.18.1.2"), ("198.18.2.1", "198.18.2.2"))
BARE = ("203.0.113.2", "203.0.113.3")
MTU = 1500


def measure(report: Report, directory: Path, options: argparse.Namespace) -> None:
    """Both kinds of tunnels, one after the other."""
    for kind, overhead in (("VXLAN", VXLAN_BYTES), ("WireGuard", WIREGUARD_BYTES)):
        what = f"fabric: instance → instance over {kind}: TCP beside the bare tunnel"
        if kind == "WireGuard" and (shutil.which("wg") is None or shutil.which("wireguard-go") is None):
            report.add(Result(what, None, "Gbit/s", goal=">= 0.95", why="needs the packages wireguard-go and wireguard-tools"))
            continue
        with Net() as net:
            _measure(report, what, net, directory / kind, options, kind, MTU - overhead)


def _measure(report: Report, what: str, net: Net, directory: Path, options: argparse.Namespace, kind: str, mtu: int) -> None:
    ours, bare = (net.namespace("a"), net.namespace("b")), (net.namespace("c"), net.namespace("d"))
    for hosts, ends in ((ours, WIRES[0]), (bare, WIRES[1])):
        net.wire(hosts[0], f"{ends[0]}/24", hosts[1], f"{ends[1]}/24", names=("up0", "up0"))
    links = _ours(net, ours, directory, kind)
    insides = _bare(net, bare, kind, mtu)
    seconds = options.seconds
    net.serve(Path(links[1]["netns"]))
    net.serve(insides[1])
    net.serve(bare[1])
    _until_it_goes(Path(links[0]["netns"]), links[1]["address"])
    found = interleaved(
        options.rounds,
        {
            "ours": partial(net.measure, Path(links[0]["netns"]), links[1]["address"], seconds=seconds),
            "bare": partial(net.measure, insides[0], BARE[1], seconds=seconds),
            "hosts": partial(net.measure, bare[0], "192.0.2.2", seconds=seconds),
        },
    )
    one, other, alone = found["ours"], found["bare"], found["hosts"]
    report.add(Result(what, rate(one) / 1e9, "Gbit/s", rate(other) / 1e9, ">= 0.95"))
    if kind == "VXLAN":  # what a program of WireGuard's takes is not of either end
        report.add(Result(what.replace("TCP", "processor per Gbit"), cpu(one) * 1000, "ms", cpu(other) * 1000, "<= 1.05"))
    report.add(Result(f"{what}, host to host", rate(one) / 1e9, "Gbit/s", rate(alone) / 1e9))


def _ours(net: Net, hosts: tuple[str, str], directory: Path, kind: str) -> list[dict[str, str]]:
    """Have our network on both hosts, joined by the tunnel of that kind; return an instance of each."""
    nodes = [net.node(host, directory / str(at)) for at, host in enumerate(hosts)]
    links = []
    records = []
    for at, node in enumerate(nodes):
        node.ask("open", subnet=PREFIXES[at], prepared=0)
        links.append(node.ask("attach", id=f"i{at}"))
        site = "s" if kind == "VXLAN" else f"s{at}"
        records.append(
            {"name": f"n{at}", "site": site, "prefix": PREFIXES[at], "endpoint": WIRES[0][at], "public_key": node.ask("new_key")}
        )
    for at, node in enumerate(nodes):
        other = 1 - at
        member = {"id": f"i{other}", "project": PROJECT, "owner": "app", "node": f"n{other}", "ready": True}
        member["address"] = links[other]["address"]
        node.ask("join", own=records[at], others=[records[other]], members=[member], number=NUMBER)
    return links


def _bare(net: Net, hosts: tuple[str, str], kind: str, mtu: int) -> tuple[str, str]:
    """Join two hosts by a tunnel made by hand; return a namespace behind each. The hosts are 192.0.2.1 and 192.0.2.2 in it."""
    insides = (net.namespace("e"), net.namespace("f"))
    keys = [wireguard.new_key(0.0) for _ in hosts]
    for at, host in enumerate(hosts):
        other = 1 - at
        tunnel = f"bt{net.tag}{at}"  # a program of WireGuard's has a socket by this name, on the whole machine
        if kind == "VXLAN":
            made = ["ip", "-n", host, "link", "add", tunnel, "mtu", str(mtu), "type", "vxlan", "id", str(NUMBER), "nolearning"]
            call(*made, "local", WIRES[1][at], "remote", WIRES[1][other], "dstport", str(VXLAN_PORT))
        else:
            _wireguard(net, host, tunnel, keys[at], keys[other].public, WIRES[1][other], mtu)
        call("ip", "-n", host, "address", "add", f"192.0.2.{at + 1}/24", "dev", tunnel)
        call("ip", "-n", host, "link", "set", tunnel, "up")
        net.spur(host, insides[at], "spur0", BARE[at])
        call("ip", "-n", host, "route", "add", f"{BARE[other]}/32", "via", f"192.0.2.{other + 1}", "dev", tunnel)
        call("ip", "-n", insides[at], "route", "replace", "default", "via", "169.254.1.1", "dev", "eth0", "mtu", str(mtu))
    return insides


def _wireguard(net: Net, host: str, name: str, key: wireguard.Key, peer: str, endpoint: str, mtu: int) -> None:
    subprocess.run(
        ["nsenter", f"--net={path_of(host)}", "wireguard-go", name],
        check=True, timeout=30, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    net.after(lambda: call("ip", "-n", host, "link", "delete", name, check=False))
    lines = ["[Interface]", f"PrivateKey = {key.private}", f"ListenPort = {WIREGUARD_PORT}", "[Peer]", f"PublicKey = {peer}"]
    lines += [f"Endpoint = {endpoint}:{WIREGUARD_PORT}", "AllowedIPs = 0.0.0.0/0", ""]
    command = ["nsenter", f"--net={path_of(host)}", "wg", "setconf", name, "/dev/stdin"]
    subprocess.run(command, input="\n".join(lines), text=True, check=True, timeout=30)
    call("ip", "-n", host, "link", "set", name, "mtu", str(mtu))


def _until_it_goes(netns: Path, address: str) -> None:
    """Wait until the other end's server can be reached: tunnels come up when the first packet wants to go."""
    deadline = time.monotonic() + 20
    while True:
        with contextlib.closing(namespaces.run_inside(netns, socket.socket)) as client:
            client.settimeout(1)
            try:
                client.connect((address, PORT))
            except OSError:
                if time.monotonic() > deadline:
                    raise
                continue
        time.sleep(0.5)  # the server takes one at a time, and sees only then that this one is gone
        return
