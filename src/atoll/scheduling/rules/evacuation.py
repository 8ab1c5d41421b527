"""A node that instances are to leave takes nothing new: one that is drained, or whose maintenance is near or under way.

Before a window begins, what is sure to be gone by then may still come.
"""

from __future__ import annotations

import numpy as np

from atoll.model.evacuation import Evacuation, in_words
from atoll.scheduling.demand import Demand
from atoll.scheduling.interface import Reason, View
from atoll.scheduling.rules.interface import Still
from atoll.scheduling.snapshot import Bools, Ints

NAMES_MAX = 5
"""Nodes that a reason names."""


class Evacuations(Still):
    name = "evacuation"

    def wants(self, view: View, group: str, demand: Demand) -> bool:
        return bool(view.nodes.evacuations)

    def passes(self, view: View, group: str, demand: Demand) -> Bools:
        mask = np.ones(view.size, dtype=np.bool_)
        for name, evacuation in view.nodes.evacuations.items():
            row = view.nodes.row_of(name)
            if row is not None and not _gone_by_then(evacuation, view.ends_at):
                mask[row] = False
        return mask

    def explain(self, view: View, group: str, demand: Demand, failed: Ints) -> Reason:
        names = sorted(view.nodes.names[row] for row in failed.tolist())
        found = [view.nodes.evacuations[name] for name in names if name in view.nodes.evacuations]
        windows = [each for each in found if each.end is not None]
        drained = len(found) - len(windows)
        parts = [f"being drained ({drained})" if windows else "being drained"] if drained else []
        mends = ["undrain a node: atoll nodes undrain NODE"] if drained else []
        if windows:
            until = min(each.end or 0.0 for each in windows)
            parts.append(f"in maintenance until {in_words(until)}" + (f" ({len(windows)})" if drained else ""))
            mends.append("wait until it is over, give a job a deadline that ends before it, or: atoll maintenance remove NAME")
        where = ", ".join(names[:NAMES_MAX]) + (f" and {len(names) - NAMES_MAX} more" if len(names) > NAMES_MAX else "")
        return Reason(f"{' and '.join(parts)}: {where}", "; ".join(mends))


def _gone_by_then(evacuation: Evacuation, ends_at: float | None) -> bool:
    """Whether what ends at `ends_at` at the latest is gone when the window begins; a drain has no such moment."""
    if evacuation.start is None or evacuation.deadline < evacuation.start:
        return False
    return ends_at is not None and ends_at <= evacuation.start
