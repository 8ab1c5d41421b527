"""Whether nodes answer: ready → unreachable → lost, and back.

A node that beats is given up when the detection believes that it is silent, some four seconds after its last sign, if the brake
allows. One that does not (an older agent, a network without datagrams) is judged by its heartbeats over HTTP, slowly; and so are
all while more beats come than are taken, though a beat that gets through is a sign of life, too.
"""

from __future__ import annotations

from collections.abc import Mapping

from msgspec import Struct

from atoll.control.actions import Decision, WriteLiveness
from atoll.control.detection.decide import Standing
from atoll.model.records import CELL_PROJECT, Node, NodeHealth, NodeLiveness, Severity
from atoll.model.units import format_seconds

UNREACHABLE_S = 15.0
"""Silence after which a node gets no new instance, where only heartbeats say that it lives."""
LOST_S = 60.0
"""Silence after which its instances are replaced elsewhere; the same."""
RETURN_S = 15.0
"""How long a node that was lost and answers again gets nothing new; above the usual grace of a stop."""


class NodeFacts(Struct, frozen=True, kw_only=True):
    """`heard` and `watched_since` are on the monotonic clock of this process."""

    node: Node
    liveness: NodeLiveness | None
    heard: float | None
    watched_since: float
    """Since when this process has led and known the node: silence before it says nothing."""
    standing: Standing | None = None
    """What the detection says; None where it says nothing: it has not beaten since this process started, or beats are overrun."""
    silence_s: float | None = None
    """The same for how long no beat of it has been heard."""

    @property
    def last(self) -> NodeHealth:
        return self.liveness.health if self.liveness else NodeHealth.READY

    def silent_s(self, monotonic: float) -> float:
        if self.standing is not None:
            return self.silence_s or 0.0
        over_http = monotonic - max(self.watched_since, self.heard if self.heard is not None else self.watched_since)
        return over_http if self.silence_s is None else min(over_http, self.silence_s)

    @property
    def heard_now(self) -> bool:
        return self.standing is not None or (self.heard is not None and self.heard >= self.watched_since)


def is_silent(facts: NodeFacts, monotonic: float) -> bool:
    """Whether a node does not answer, as far as anyone can tell by now."""
    return facts.standing is Standing.SILENT or facts.silent_s(monotonic) >= UNREACHABLE_S


def is_to_be_lost(facts: NodeFacts, monotonic: float) -> bool:
    """Whether a node that is not lost yet is to be given up, if the brake allows."""
    if facts.last is NodeHealth.LOST:
        return False
    return _is_gone(facts, monotonic)


def _is_gone(facts: NodeFacts, monotonic: float) -> bool:
    """Only what the detection believes counts of a node that it knows: long silence may be our own, or a bad path."""
    return facts.standing is Standing.SILENT or (facts.standing is None and facts.silent_s(monotonic) >= LOST_S)


def decide_node(facts: NodeFacts, monotonic: float, decision: Decision, *, may_lose: bool = True) -> None:
    """Write the node's health if it has changed, and say when it may change next. Without `may_lose` it is not given up now."""
    last = facts.last
    silent = facts.silent_s(monotonic)
    if is_to_be_lost(facts, monotonic):
        health = NodeHealth.LOST if may_lose else NodeHealth.UNREACHABLE
    elif _is_gone(facts, monotonic):
        health = NodeHealth.LOST
    elif silent < UNREACHABLE_S:
        # A node that nobody here has heard of yet stays what it was: a new leader knows no better.
        health = _back(facts.liveness, decision) if facts.heard_now and facts.liveness is not None else last
    else:
        health = last if last is NodeHealth.LOST else NodeHealth.UNREACHABLE
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
