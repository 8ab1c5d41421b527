"""Whether nodes answer, from when each was last heard of: ready → unreachable → lost, and back at its first word."""

from __future__ import annotations

from collections.abc import Mapping

from msgspec import Struct

from atoll.control.actions import Decision, WriteLiveness
from atoll.model.records import Node, NodeHealth, NodeLiveness, Severity
from atoll.model.units import format_seconds

UNREACHABLE_S = 15.0
"""Silence after which a node gets no new instance."""
LOST_S = 60.0
"""Silence after which its instances are replaced elsewhere."""
CELL_PROJECT = "default"
"""Where events about nodes are kept."""


class NodeFacts(Struct, frozen=True, kw_only=True):
    """`heard` and `watched_since` are on the monotonic clock of this process."""

    node: Node
    liveness: NodeLiveness | None
    heard: float | None
    watched_since: float
    """Since when this process has led and known the node: silence before it says nothing."""


def decide_node(facts: NodeFacts, monotonic: float, decision: Decision) -> None:
    """Write the node's health if it has changed, and say when it may change next."""
    last = facts.liveness.health if facts.liveness else NodeHealth.READY
    silent = monotonic - max(facts.watched_since, facts.heard if facts.heard is not None else facts.watched_since)
    heard_now = facts.heard is not None and facts.heard >= facts.watched_since
    if silent < UNREACHABLE_S:
        # A node that nobody here has heard of yet stays what it was: a new leader knows no better.
        health = NodeHealth.READY if heard_now or facts.liveness is None else last
    elif silent < LOST_S:
        health = last if last is NodeHealth.LOST else NodeHealth.UNREACHABLE
    else:
        health = NodeHealth.LOST
    if silent < LOST_S:
        limit = UNREACHABLE_S if silent < UNREACHABLE_S else LOST_S
        decision.wake(decision.now + (limit - silent))
    if health is last:
        return
    decision.do(WriteLiveness(NodeLiveness(name=facts.node.name, health=health, since=decision.now)))
    words = {
        NodeHealth.READY: "answers again",
        NodeHealth.UNREACHABLE: f"has not been heard of for {format_seconds(silent)}; it gets nothing new",
        NodeHealth.LOST: f"has not been heard of for {format_seconds(silent)}; its instances are replaced elsewhere",
    }
    severity = Severity.INFO if health is NodeHealth.READY else Severity.WARNING
    name = facts.node.name
    decision.tell(CELL_PROJECT, f"node/{name}", f"node-{health}", f"node {name} {words[health]}", severity, node=name)


LastSeen = Mapping[str, float]
"""Node → when it was last heard of, on the monotonic clock. Owned by whoever takes heartbeats."""
