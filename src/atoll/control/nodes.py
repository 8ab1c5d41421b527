"""Whether nodes answer, from when each was last heard of: ready → unreachable → lost, and back."""

from __future__ import annotations

from collections.abc import Mapping

from msgspec import Struct

from atoll.control.actions import Decision, WriteLiveness
from atoll.model.records import CELL_PROJECT, Node, NodeHealth, NodeLiveness, Severity
from atoll.model.units import format_seconds

UNREACHABLE_S = 15.0
"""Silence after which a node gets no new instance."""
LOST_S = 60.0
"""Silence after which its instances are replaced elsewhere."""
RETURN_S = 15.0
"""How long a node that was lost and answers again gets nothing new; above the usual grace of a stop."""


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
        health = _back(facts.liveness, decision) if heard_now and facts.liveness is not None else last
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
        NodeHealth.UNREACHABLE: f"has not been heard of for {format_seconds(silent)}; it gets nothing new"
        if last is NodeHealth.READY
        else "answers again; it gets nothing new until what was replaced elsewhere has stopped there",
        NodeHealth.LOST: f"has not been heard of for {format_seconds(silent)}; its instances are replaced elsewhere",
    }
    severity = Severity.INFO if health is NodeHealth.READY else Severity.WARNING
    name = facts.node.name
    decision.tell(CELL_PROJECT, f"node/{name}", f"node-{health}", f"node {name} {words[health]}", severity, node=name)


def _back(liveness: NodeLiveness, decision: Decision) -> NodeHealth:
    """Return the health of a node that answers: one that was lost gets nothing new for a while.

    What ran there has been replaced, and its records are gone, but its processes end only now. To place something new
    beside them would be more than the node has.
    """
    if liveness.health is NodeHealth.LOST:
        decision.wake(decision.now + RETURN_S)
        return NodeHealth.UNREACHABLE
    if liveness.health is NodeHealth.UNREACHABLE and 0 <= decision.now - liveness.since < RETURN_S:
        decision.wake(liveness.since + RETURN_S)
        return NodeHealth.UNREACHABLE
    return NodeHealth.READY


LastSeen = Mapping[str, float]
"""Node → when it was last heard of, on the monotonic clock. Owned by whoever takes heartbeats."""
