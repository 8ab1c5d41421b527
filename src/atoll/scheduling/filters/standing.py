"""Nodes that take nothing new: cordoned by an operator, unreachable or lost."""

from __future__ import annotations

from atoll.scheduling.demand import Demand
from atoll.scheduling.interface import Reason, View
from atoll.scheduling.snapshot import Bools, Ints, Standing

_WORDS = {
    Standing.CORDONED: ("cordoned", "uncordon a node: atoll nodes uncordon NODE"),
    Standing.UNREACHABLE: ("unreachable", "see why its agent does not report"),
    Standing.LOST: ("lost", "start its agent again, or add a node"),
}


class Standings:
    name = "standing"

    def wants(self, demand: Demand) -> bool:
        return True

    def passes(self, view: View, demand: Demand) -> Bools:
        mask: Bools = view.nodes.standing[: view.size] == Standing.OPEN
        return mask

    def explain(self, view: View, demand: Demand, failed: Ints) -> Reason:
        standings = view.nodes.standing[failed]
        parts, mends = [], []
        for standing, (word, mend) in _WORDS.items():
            count = int((standings == standing).sum())
            if count:
                parts.append(word if count == len(failed) else f"{word} ({count})")
                mends.append(mend)
        return Reason(", ".join(parts), "; ".join(mends))
