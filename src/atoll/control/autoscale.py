"""How many instances an app should have that scales by a metric of its own. Pure.

    needed = ceil(sum of the metric over the ready instances / target)

It is the rule of Kubernetes' HorizontalPodAutoscaler for a metric with an average value as its target, with that one's defaults for
tolerance, missing readings and steps upwards (kubernetes.io/docs/concepts/workloads/autoscaling/horizontal-pod-autoscale): more are
wanted at once, in steps; fewer only when fewer were enough for the whole of `scale.down`.
"""

from __future__ import annotations

import math

from msgspec import Struct
from msgspec.structs import replace

TOLERANCE = 0.1
"""A metric this near to its target, as a share of it, changes nothing."""
STEP_S = 15.0
"""In so long a time at most twice as many instances come to be wanted, or `STEP_COUNT` more where that is more."""
STEP_FACTOR = 2
STEP_COUNT = 4
ROUNDING = 1e-9
"""What a division may be above a whole number and still count as it."""


class ScaleFacts(Struct, frozen=True, kw_only=True):
    """`current` is how many have been wanted so far; all three of at least 1, and `least` at most `most`."""

    least: int
    most: int
    current: int
    target: float
    """Above 0."""
    down_s: float
    ready: int
    """Instances that serve. Those that start, or wait for a place, have nothing to say yet."""
    readings: tuple[float, ...]
    """Of the ready instances that gave one; what is below 0 counts as 0."""


class Memory(Struct, frozen=True, kw_only=True):
    """What earlier decisions leave to later ones, with times on one monotonic clock.

    It is lost with the leader: then nothing is taken away for `down_s`, and a step upwards may begin early.
    """

    needed: tuple[tuple[float, int], ...] = ()
    """(when, how many), oldest first, each more than those after it: no other can be the most of a window that ends later."""
    step_at: float = -math.inf
    """When the last step upwards began, and from how many."""
    step_from: int = 0


class Choice(Struct, frozen=True, kw_only=True):
    wanted: int
    before: int
    memory: Memory
    value: float
    """The metric, summed up."""
    readings: int
    """Instances that gave it."""


def decide_scale(facts: ScaleFacts, memory: Memory, now: float) -> Choice:
    """Return how many instances are wanted at `now` (monotonic seconds), from `facts.least` to `facts.most`."""
    value = math.fsum(min(max(0.0, reading), 1e300) for reading in facts.readings)
    needed = min(facts.most, max(facts.least, _needed(facts, value)))
    memory = _remember(facts, memory, needed, now)
    wanted = facts.current
    if needed > facts.current:
        if now - memory.step_at >= STEP_S:
            memory = replace(memory, step_at=now, step_from=facts.current)
        wanted = max(wanted, min(needed, max(STEP_FACTOR * memory.step_from, memory.step_from + STEP_COUNT)))
    else:
        wanted = min(wanted, max(count for _, count in memory.needed))
    wanted = min(facts.most, max(facts.least, wanted))
    return Choice(wanted=wanted, before=facts.current, memory=memory, value=value, readings=len(facts.readings))


def _needed(facts: ScaleFacts, value: float) -> int:
    """Return how many would do, without bounds. A ready one without a reading counts as idle where more would be wanted, and as
    exactly busy enough where fewer would, so that what nobody knows never moves the number."""
    if not facts.readings:
        return facts.current
    at_target = facts.target * facts.current
    if value > at_target * (1 + TOLERANCE):
        return _instances_for(value, facts)
    missing = max(0, facts.ready - len(facts.readings))
    if value + missing * facts.target < at_target * (1 - TOLERANCE):
        return _instances_for(value, facts) + missing
    return facts.current


def _instances_for(value: float, facts: ScaleFacts) -> int:
    share = value / facts.target
    return facts.most if share >= facts.most else math.ceil(share - ROUNDING)


def _remember(facts: ScaleFacts, memory: Memory, needed: int, now: float) -> Memory:
    """Add what is needed now, and forget what is over `down_s` ago. A window begins with what was wanted at its beginning."""
    past = memory.needed or ((now, facts.current),)
    kept = [(at, count) for at, count in past if now - at < facts.down_s and count > needed]
    return replace(memory, needed=(*kept, (now, needed)))


def why(choice: Choice, metric: str, target: float) -> str:
    """Return the reason of a change in words."""
    if not choice.readings:
        return "its bounds have changed"
    who = "1 instance" if choice.readings == 1 else f"{choice.readings} instances"
    return f"{metric} is {choice.value:g} over {who}, target {target:g} each"
