"""How long after its node was lost an instance is given up. Pure; spans only, so that no two clocks need agree.

The node counts from when it last spoke and was heard; the leader from when it wrote that the node is lost, which is later. What
the node has stopped by `stop_after_disconnect` has therefore ended when the leader's longer span is over.
"""

from __future__ import annotations

import math

from atoll.model.spec import JobSpec, Workload
from atoll.model.spec.lifecycle import LostReplace
from atoll.scheduling.demand import holds_volumes

STOP_MARGIN_S = 15.0
"""Beyond `stop_after_disconnect` and the grace: for a leader of before that was heard for as long as its lease (5 s), for the
node's own looking and killing (2 s), and for the rest."""
CLOCK_RATE = 1.001
"""By how much one clock may go faster than another."""


def patience_s(spec: Workload, *, leaving: bool) -> float:
    """Return the span from the loss of the node; infinite for what waits for it. What is `leaving` anyway is waited for only where
    it must not run twice."""
    lost = spec.lost
    stopped_s = 0.0
    if lost.stop_after_disconnect is not None:
        stopped_s = lost.stop_after_disconnect * CLOCK_RATE + spec.stop.grace + STOP_MARGIN_S
    if leaving:
        return stopped_s
    match replace_of(spec):
        case LostReplace.AT_ONCE:
            return stopped_s
        case LostReplace.WAIT:
            return max(stopped_s, lost.wait)
        case LostReplace.NEVER:
            return math.inf


def replace_of(spec: Workload) -> LostReplace:
    """Return the spec's policy, or the one that suits it where it has none."""
    if spec.lost.replace is not None:
        return spec.lost.replace
    if holds_volumes(spec):
        return LostReplace.NEVER
    if isinstance(spec, JobSpec) and spec.retries == 0:
        return LostReplace.WAIT
    return LostReplace.AT_ONCE
