"""What an instance's network costs: a slot beside making one inline, and what goes over links, machines' cards and tunnels beside
the same way built by hand without us. Everything in namespaces of its own on this machine; both ways in turn in one run."""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from bench import network_fabric, network_links, network_machines
from bench.network_world import CONGESTION, SMALL_BYTES
from bench.report import Report, Result

PARTS: dict[str, Callable[[Report, Path, argparse.Namespace], None]] = {
    "slots": network_links.slots,
    "many": network_links.many,
    "containers": network_links.containers,
    "machines": network_machines.measure,
    "fabric": network_fabric.measure,
}


def run(arguments: Sequence[str]) -> Report:
    parser = argparse.ArgumentParser(prog="python -m bench network")
    parser.add_argument("--rounds", type=int, default=5, help="of each way, in turn; figures are medians")
    parser.add_argument("--seconds", type=int, default=2, help="of each run of iperf3, 1 or more")
    parser.add_argument("--samples", type=int, default=60, help="of slots that are taken alone")
    parser.add_argument("--slots", type=int, default=1000, help="that exist when the last one is looked at")
    parser.add_argument("--only", action="append", choices=sorted(PARTS), help="only this part; may be repeated")
    options = parser.parse_args(arguments)
    report = Report("network")
    if os.geteuid() != 0 or shutil.which("iperf3") is None:
        why = "needs root" if os.geteuid() != 0 else "needs the package iperf3"
        report.add(Result("network", None, "", why=why))
        return report
    loads = [os.getloadavg()[0]]
    for name, part in PARTS.items():
        if options.only is None or name in options.only:
            with tempfile.TemporaryDirectory(prefix="bench-net-") as directory:
                try:
                    part(report, Path(directory), options)
                except (RuntimeError, OSError) as error:  # the other parts' figures are worth having
                    report.add(Result(f"{name}: broke off", None, "", why=str(error)))
            print(f"bench network: {name} done", file=sys.stderr, flush=True)
            loads.append(os.getloadavg()[0])
    report.notes.append(f"{options.rounds} runs of {options.seconds} s of each way, in turn; medians; TCP with {CONGESTION}")
    fast = "as fast as the sender can (to a guest: 1.25 times what the bare tap takes)"
    report.notes.append(f"packets: UDP of {SMALL_BYTES} bytes, {fast}, those that arrived")
    report.notes.append(
        "processor: of the processes at both ends and what the kernel does for packets in their name, per Gbit that arrived"
    )
    report.notes.append(f"load of the machine (1 min), before and after each part: {', '.join(f'{load:.1f}' for load in loads)}")
    report.notes.append(f"median load {statistics.median(loads):.1f}")
    return report
