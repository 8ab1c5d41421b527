"""How many nodes may be given up, and how fast. Pure.

One rack that dies is replaced at once. When a fifth of the cell falls silent together, the likeliest cause is not a fifth of the
machines; and to start everything again on the rest would break that, too. Then nothing is given up until so many are heard
again, an operator says go on, or `HOLD_S` have passed.
"""

from __future__ import annotations

from msgspec import Struct
from msgspec.structs import replace

SHARE_MAX = 0.2
"""Of the nodes that were there: more silent than this at a time, and more than `NODES_MIN`, and the brake is on."""
NODES_MIN = 2
RECENT_S = 600.0
"""A node that was given up longer ago counts neither as there nor as silent: it is simply gone."""
DOUBTED_S = 3.0
"""A node counts as silent for the brake this long after its last sign, though it is believed only later: of many that fell silent
together, the first must not be given up before the others are counted."""
HOLD_S = 600.0
"""So long the brake stays on by itself."""
RATE_SHARE = 0.02
"""Nodes given up a second, as a share of all; at least one."""
BURST_SHARE = 0.05
"""Nodes given up at once; at least `BURST_MIN`."""
BURST_MIN = 3


class Brake(Struct, frozen=True, kw_only=True):
    """Times are monotonic seconds of the process that leads."""

    on_since: float | None = None
    overruled: bool = False
    """It has been on, and an operator or time let go: it does not come on again before all this is over."""
    tokens: float = BURST_MIN
    filled_at: float = 0.0


def limit_of(nodes: int) -> int:
    """Return how many may be silent at a time before the brake comes on."""
    return max(NODES_MIN, int(nodes * SHARE_MAX))


def look(brake: Brake, *, silent: int, nodes: int, released: bool, now: float) -> Brake:
    """Return the brake after a look at the cell: `silent` of `nodes` do not answer. `released`: an operator said go on."""
    burst = max(float(BURST_MIN), nodes * BURST_SHARE)
    rate = max(1.0, nodes * RATE_SHARE)
    filled = min(burst, brake.tokens + max(0.0, now - brake.filled_at) * rate)
    brake = replace(brake, tokens=filled, filled_at=now)
    if silent <= limit_of(nodes):
        return replace(brake, on_since=None, overruled=False)
    if brake.overruled:
        return brake
    if brake.on_since is None:
        brake = replace(brake, on_since=now)
    if released or (brake.on_since is not None and now - brake.on_since >= HOLD_S):
        return replace(brake, on_since=None, overruled=True)
    return brake


def take(brake: Brake) -> tuple[Brake, bool]:
    """Return whether one more node may be given up now, and the brake after it."""
    if brake.on_since is not None or brake.tokens < 1.0:
        return brake, False
    return replace(brake, tokens=brake.tokens - 1.0), True
