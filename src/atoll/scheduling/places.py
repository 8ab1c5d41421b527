"""Places: the values of a label. Nodes with one value are in one place."""

from __future__ import annotations

import numpy as np

from atoll.scheduling.interface import View
from atoll.scheduling.snapshot import Bools, Ints


def domain_counts(view: View, label: str, by_row: Ints) -> Ints:
    """Return how many instances each value of `label` has; never empty."""
    column = view.nodes.label(label)
    there = column >= 0
    counts = np.bincount(column[there], weights=by_row[there], minlength=max(1, len(view.nodes.values(label))))
    return counts.astype(np.int64)


def at_places(view: View, label: str, good: Bools, absent: bool) -> Bools:
    """Return which rows have a value of `label` that is `good` (by its id); those without the label count as `absent`."""
    column = view.nodes.label(label)
    mask: Bools = np.where(column >= 0, good[column], absent)
    return mask
