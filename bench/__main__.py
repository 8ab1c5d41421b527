"""`python -m bench --list`, `python -m bench NAME [--json] [OPTIONS]`. Exits 0 when it ran, whatever holds."""

from __future__ import annotations

import argparse
import importlib
import sys

BENCHES = {
    "start": ("create request → process running → first byte, beside bare runc and podman", "1 min"),
    "schedule": ("placements/s planned, committed and observed; plan latency at 100,000 nodes", "4 min"),
    "packing": ("GPUs allocated by each packing policy on openb lists, both tie-breaks, against FGD", "3 min"),
    "placement": ("latency of global placement beside the integer optimum by HiGHS", "1 min"),
    "runtimes": (
        "start by each runtime beside its own tool, time to the first command, copies of snapshots, a burst of 100",
        "6 min",
    ),
    "sandboxes": ("a sandbox taken out of a template's pool beside one that is made, each to its first command", "4 min"),
    "workers": ("a worker's start to its first answer, beside workerd alone and runc's containers", "1 min"),
    "standby": ("from a scale-up to ready: a parked instance that is woken beside a cold start", "3 min"),
    "ingress": (
        "requests/s at 1, 1,000 and 10,000 routes beside a lean Envoy, HAProxy, nginx; changes; failed requests under load",
        "5 min",
    ),
    "certificates": ("memory, changes and handshakes with 10,000 certificates, beside a filter chain for each hostname", "8 min"),
    "wake": (
        "first request of an app that sleeps, less its start; errors in cycles of sleeping and waking",
        "3 min",
    ),
    "autoscale": (
        "cold starts against idle cost on a day of Azure Functions: fixed windows, Knative, hybrid histogram, ours",
        "1 min",
    ),
    "gpu": ("GPUs in sandboxes beside a bare process, discovery, walls, MIG packing; without a GPU the fake's contract", "2 min"),
    "weights": ("start with 500 MB of weights: on the node, fetched ahead, fetched first", "3 min"),
    "detection": (
        "death of a node → replacement committed at 100 and 5,000 nodes, false alarms in an hour, cost",
        "6 min",
    ),
    "scale": ("a cell of 5,000 nodes and 100,000 instances over etcd: API latency, processor, memory, take-over", "9 min"),
    "failover": ("leading server killed → next plan committed; leading member of etcd killed under writes", "3 min"),
    "network": (
        "slots, links, machines' cards and tunnels beside the same made by hand; throughput, packets, processor time",
        "6 min",
    ),
    "store": ("puts/s, put → watch and failover of memory, SQLite, etcd with one member and with three", "1 min"),
    "api": ("API reads/s and durable writes/s, idle memory and processor use", "1 min"),
}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("name", nargs="?", choices=sorted(BENCHES))
    parser.add_argument("--list", action="store_true", help="name the benchmarks with their usual run time")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    arguments, rest = parser.parse_known_args()
    if arguments.list or arguments.name is None:
        for name, (what, time) in BENCHES.items():
            print(f"{name:<12} {time:<8} {what}")
        return 0
    report = importlib.import_module(f"bench.{arguments.name}").run(rest)
    report.print(as_json=arguments.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
