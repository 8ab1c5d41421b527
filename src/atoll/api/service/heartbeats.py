"""Signs of life of nodes: in memory only, for the node controller, for `usage`, for people."""

from __future__ import annotations

from collections.abc import Container, Mapping

import structlog

from atoll.api.service.node_reports import possible
from atoll.model.errors import TooLarge
from atoll.model.flows import FLOWS_MAX, REFUSALS_MAX
from atoll.model.ports.clock import Clock
from atoll.model.records import Heartbeat

USAGES_MAX = 10_000
"""Instances in one heartbeat."""
METRICS_MAX = 17
"""Metrics of one instance: those that a spec may name, and the one that it scales by."""
METRIC_CHARACTERS_MAX = 128
IMAGES_MAX = 256
"""Digests in one heartbeat."""
WORDS_MAX = 1_024
"""Characters of a digest, or of what a node says that it is fetching."""
REMOVED_S = 60.0
"""Silence after which a node that has no record is forgotten, with what it said last."""

log = structlog.get_logger()


class Heartbeats:
    """The latest heartbeat of every node; how many nodes there are bounds it, as removed ones are forgotten."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._latest: dict[str, Heartbeat] = {}
        self._seen: dict[str, float] = {}
        self._said: dict[str, float] = {}
        self._wrong: dict[str, dict[str, str]] = {}
        """Node → instance → the field of its use that could not be in the latest heartbeat."""

    def note(self, heartbeat: Heartbeat) -> None:
        """Take in a sign of life, and what it says; of an instance whose use cannot be the rest of what is said counts.

        Raises TooLarge, and Invalid for an amount of the node's own that cannot be: the node lives all the same, and its word
        before this one stays.
        """
        self._seen[heartbeat.node] = self._clock.monotonic()
        if len(heartbeat.usage) > USAGES_MAX:
            raise TooLarge(f"usage: {len(heartbeat.usage)} instances in one heartbeat; at most {USAGES_MAX}", field="usage")
        for usage in heartbeat.usage:
            if not usage.metrics:
                continue  # most instances say nothing of themselves, and there are very many
            if len(usage.metrics) > METRICS_MAX or any(len(name) > METRIC_CHARACTERS_MAX for name in usage.metrics):
                most = f"at most {METRICS_MAX}, with names of {METRIC_CHARACTERS_MAX} characters"
                raise TooLarge(f"usage: too many metrics of '{usage.instance[:60]}'; {most}", field="usage")
        if len(heartbeat.images) > IMAGES_MAX or any(len(words) > WORDS_MAX for words in (heartbeat.fetching, *heartbeat.images)):
            raise TooLarge(f"images: at most {IMAGES_MAX} in one heartbeat, of {WORDS_MAX} characters", field="images")
        flows = heartbeat.flows
        if flows is not None and (len(flows.flows) > FLOWS_MAX or len(flows.refusals) > REFUSALS_MAX or flows.begun or flows.over):
            raise TooLarge(f"flows: at most {FLOWS_MAX} and {REFUSALS_MAX} refusals in one heartbeat", field="flows")
        heartbeat, wrong = possible(heartbeat)
        for instance in wrong.keys() - self._wrong.get(heartbeat.node, {}).keys():
            log.warning("use that cannot be is left out", node=heartbeat.node, instance=instance, field=wrong[instance])
        if wrong:
            self._wrong[heartbeat.node] = wrong
        else:
            self._wrong.pop(heartbeat.node, None)
        self._latest[heartbeat.node] = heartbeat
        self._said[heartbeat.node] = self._seen[heartbeat.node]

    def touch(self, node: str) -> None:
        """A node that registers is alive."""
        self._seen[node] = self._clock.monotonic()

    def latest(self, node: str) -> Heartbeat | None:
        return self._latest.get(node)

    def all(self) -> Mapping[str, Heartbeat]:
        return self._latest

    def last_seen(self) -> Mapping[str, float]:
        """Return node → when its last sign came here, on this server's monotonic clock; a live view for the node controller."""
        return self._seen

    def last_said(self) -> Mapping[str, float]:
        """Return node → when `latest` came here, on the same clock: a sign of life may say nothing that counts. A live view."""
        return self._said

    def forget_removed(self, known: Container[str]) -> None:
        """Forget the nodes that are not `known` and say nothing any more; one that has registered only now may not be known yet."""
        horizon = self._clock.monotonic() - REMOVED_S
        for node in [node for node, seen in self._seen.items() if node not in known and seen < horizon]:
            for table in (self._latest, self._seen, self._said, self._wrong):
                table.pop(node, None)
