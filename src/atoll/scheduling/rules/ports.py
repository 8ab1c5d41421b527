"""Ports of the node: each goes to one instance, and never to one where a program of the machine has it."""

from __future__ import annotations

import numpy as np

from atoll.scheduling.demand import Demand
from atoll.scheduling.interface import Reason, View
from atoll.scheduling.rules.interface import Still
from atoll.scheduling.snapshot import Bools, Ints


class HostPorts(Still):
    name = "host-port"

    def wants(self, view: View, group: str, demand: Demand) -> bool:
        return bool(demand.host_ports)

    def passes(self, view: View, group: str, demand: Demand) -> Bools:
        mask: Bools = self.room(view, group, demand) > 0
        return mask

    def room(self, view: View, group: str, demand: Demand) -> Ints:
        room = np.ones(view.size, dtype=np.int64)
        for port in demand.host_ports:
            room[list(view.rows_with_port(port))] = 0
            room[_of_machines(view, port)] = 0
        return room

    def explain(self, view: View, group: str, demand: Demand, failed: Ints) -> Reason:
        there = set(failed.tolist())
        by_instances = [port for port in demand.host_ports if there & view.rows_with_port(port)]
        by_machines = [port for port in demand.host_ports if there.intersection(_of_machines(view, port))]
        parts, mends = [], []
        if by_instances:
            parts.append(f"whose port {', '.join(by_instances)} another instance has")
            mends.append("add a node, lower scale.replicas, or set rollout.max_surge = 0 and max_unavailable = 1")
        if by_machines:
            parts.append(f"on which a program of the machine listens on {', '.join(by_machines)}")
            mends.append("choose another ports.host, or stop that program and restart the agent")
        return Reason(" or ".join(parts), "; ".join(mends))


def _of_machines(view: View, port: str) -> list[int]:
    return [row for name in view.nodes.machines_with_port(port) if (row := view.nodes.row_of(name)) is not None]
