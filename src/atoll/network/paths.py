"""Which nodes can be reached, and through whom those that cannot: decided from probes alone, so that it needs no control plane."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from msgspec import Struct

from atoll.model.fabric import FabricNode
from atoll.network.tunnels import kind_of

LOST_S = 1.6
"""Without an answer for so long a node cannot be reached directly."""
STEADY = 4
"""Answers in a row until a node that could not be reached counts as reachable again, so that a bad wire does not flap."""


class _Heard(Struct):
    at: float
    reached: bool = True
    streak: int = 0
    cannot: frozenset[str] = frozenset()
    """Prefixes that the other cannot reach directly."""
    round_trip_s: float | None = None


class Paths:
    """What probes said. Times are those of one monotonic clock."""

    def __init__(self, own: FabricNode) -> None:
        self.own = own
        self._heard: dict[str, _Heard] = {}

    def knows(self, nodes: Mapping[str, FabricNode], now: float) -> None:
        """Take in which nodes there are; a new one counts as reachable until it had time to answer."""
        for name in self._heard.keys() - nodes.keys():
            del self._heard[name]
        for name, node in nodes.items():
            if kind_of(self.own, node) is not None:
                self._heard.setdefault(name, _Heard(at=now))

    def heard(self, name: str, now: float, cannot: Iterable[str] = (), round_trip_s: float | None = None) -> None:
        """Take in an answer, with the prefixes that its sender cannot reach."""
        heard = self._heard.get(name)
        if heard is None:
            return
        heard.streak = heard.streak + 1 if now - heard.at < LOST_S else 1
        heard.at, heard.cannot, heard.round_trip_s = now, frozenset(cannot), round_trip_s
        if not heard.reached and heard.streak >= STEADY:
            heard.reached = True

    def look(self, now: float) -> bool:
        """Notice who has fallen silent; return whether anything is different now."""
        changed = False
        for heard in self._heard.values():
            if heard.reached and now - heard.at > LOST_S:
                heard.reached, heard.streak, changed = False, 0, True
        return changed

    def reaches(self, name: str) -> bool:
        heard = self._heard.get(name)
        return heard is not None and heard.reached

    def round_trip_s(self, name: str) -> float | None:
        heard = self._heard.get(name)
        return heard.round_trip_s if heard is not None and heard.reached else None

    def cannot(self, nodes: Mapping[str, FabricNode]) -> list[str]:
        """Return the prefixes that this node cannot reach directly, for others to know."""
        return sorted(node.prefix for name, node in nodes.items() if not self.reaches(name))

    def via(self, nodes: Mapping[str, FabricNode]) -> dict[str, str]:
        """Return node → the one through which it is reached, for those that are not reached directly.

        Both ends choose alike, as they rank the same candidates in the same order: first those of either's site, then by name.
        WireGuard takes a packet only from whom it would send the answer to.
        """
        found = {}
        for name, node in nodes.items():
            if self.reaches(name):
                continue
            sites = {(self.own.site, self.own.region), (node.site, node.region)}
            candidates = [
                ((other.site, other.region) not in sites, other_name)
                for other_name, other in nodes.items()
                if other_name != name and self.reaches(other_name) and node.prefix not in self._heard[other_name].cannot
            ]
            if candidates:
                found[name] = min(candidates)[1]
        return found

    def away(self, nodes: Mapping[str, FabricNode]) -> frozenset[str]:
        """Return the nodes that are reached neither directly nor through another."""
        via = self.via(nodes)
        return frozenset(name for name in nodes if not self.reaches(name) and name not in via)
