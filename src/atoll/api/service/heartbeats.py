"""Signs of life of nodes: in memory only, for the node controller, for `usage`, for people."""

from __future__ import annotations

from collections.abc import Mapping

from atoll.model.errors import TooLarge
from atoll.model.ports.clock import Clock
from atoll.model.records import Heartbeat

USAGES_MAX = 10_000
"""Instances in one heartbeat."""


class Heartbeats:
    """The latest heartbeat of every node; how many nodes there are bounds it."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._latest: dict[str, Heartbeat] = {}
        self._seen: dict[str, float] = {}

    def note(self, heartbeat: Heartbeat) -> None:
        """Raises TooLarge."""
        if len(heartbeat.usage) > USAGES_MAX:
            raise TooLarge(f"usage: {len(heartbeat.usage)} instances in one heartbeat; at most {USAGES_MAX}", field="usage")
        self._latest[heartbeat.node] = heartbeat
        self._seen[heartbeat.node] = self._clock.monotonic()

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

    def forget(self, node: str) -> None:
        self._latest.pop(node, None)
        self._seen.pop(node, None)
