"""How many instances an app should have that scales by what it is said to have to do. Pure.

    needed = the most of: ceil(sum of a signal over the ready instances / its target)

It is the rule of Kubernetes' HorizontalPodAutoscaler for several metrics with average values as their targets, with that one's
defaults for tolerance, missing readings and steps upwards (kubernetes.io/docs/concepts/workloads/autoscaling/
horizontal-pod-autoscale): more are wanted at once, in steps; fewer only when fewer were enough for the whole of `scale.down`.
What requests ask for (`pressure`) has windows of its own, and comes beside it: the larger of both counts.
"""

from __future__ import annotations

import math

from msgspec import Struct
from msgspec.structs import replace

TOLERANCE = 0.1
"""A signal this near to its target, as a share of it, changes nothing."""
STEP_S = 15.0
"""In so long a time at most twice as many instances come to be wanted, or `STEP_COUNT` more where that is more."""
STEP_FACTOR = 2
STEP_COUNT = 4
ROUNDING = 1e-9
"""What a division may be above a whole number and still count as it."""
VALUE_MAX = 1e300


class Signal(Struct, frozen=True, kw_only=True):
    """One thing that says how much there is to do, and how much of it each instance is to have."""

    name: str
    target: float
    """Above 0."""
    ready: int
    """Those that could give a reading. Who starts, or waits for a place, has nothing to say yet."""
    readings: tuple[float, ...]
    """Of those that gave one; what is below 0 counts as 0."""

    @property
    def value(self) -> float:
        return math.fsum(min(max(0.0, reading), VALUE_MAX) for reading in self.readings)


class Cause(Struct, frozen=True, kw_only=True):
    """Why a number is wanted."""

    text: str
    name: str = ""
    value: float = 0.0
    target: float = 0.0


class Need(Struct, frozen=True, kw_only=True):
    """How many are needed by one way to see it."""

    count: int
    cause: Cause


BOUNDS = Cause(text="its bounds have changed")


class ScaleFacts(Struct, frozen=True, kw_only=True):
    """`current` is how many have been wanted so far; all three of at least 1, and `least` at most `most`."""

    least: int
    least_cause: Cause = BOUNDS
    most: int
    current: int
    down_s: float
    signals: tuple[Signal, ...] = ()
    pressed: Need | None = None
    """What requests ask for; it has been averaged already."""


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
    cause: Cause = BOUNDS


def decide_scale(facts: ScaleFacts, memory: Memory, now: float) -> Choice:
    """Return how many instances are wanted at `now` (monotonic seconds), from `facts.least` to `facts.most`."""
    need = _needed(facts)
    needed = min(facts.most, max(facts.least, need.count))
    memory = _remember(facts, memory, needed, now)
    wanted, cause = facts.current, need.cause
    if needed > facts.current:
        if now - memory.step_at >= STEP_S:
            memory = replace(memory, step_at=now, step_from=facts.current)
        wanted = max(wanted, min(needed, max(STEP_FACTOR * memory.step_from, memory.step_from + STEP_COUNT)))
    else:
        wanted = min(wanted, max(count for _, count in memory.needed))
    pressed = facts.pressed
    if pressed is not None and (pressed.count >= wanted or not facts.signals):
        wanted, cause = max(wanted if facts.signals else 0, pressed.count), pressed.cause
    if wanted < facts.least:
        wanted, cause = facts.least, facts.least_cause
    wanted = min(facts.most, wanted)
    return Choice(wanted=wanted, before=facts.current, memory=memory, cause=cause)


def _needed(facts: ScaleFacts) -> Need:
    """Return what the signals ask for; without any, the least will do."""
    needs = [Need(count=_instances(signal, facts), cause=_cause(signal)) for signal in facts.signals]
    return max(needs, key=lambda need: need.count, default=Need(count=facts.least, cause=BOUNDS))


def _instances(signal: Signal, facts: ScaleFacts) -> int:
    """Return how many would do, without bounds. A ready one without a reading counts as idle where more would be wanted, and as
    exactly busy enough where fewer would, so that what nobody knows never moves the number."""
    if not signal.readings:
        return facts.current
    value, at_target = signal.value, signal.target * facts.current
    if value > at_target * (1 + TOLERANCE):
        return instances_for(value / signal.target, facts.most)
    missing = max(0, signal.ready - len(signal.readings))
    if value + missing * signal.target < at_target * (1 - TOLERANCE):
        return instances_for(value / signal.target, facts.most) + missing
    return facts.current


def instances_for(share: float, most: int) -> int:
    """Return how many whole instances `share` takes, at most `most`."""
    return most if share >= most else math.ceil(share - ROUNDING)


def _remember(facts: ScaleFacts, memory: Memory, needed: int, now: float) -> Memory:
    """Add what is needed now, and forget what is over `down_s` ago. A window begins with what was wanted at its beginning."""
    past = memory.needed or ((now, facts.current),)
    kept = [(at, count) for at, count in past if now - at < facts.down_s and count > needed]
    return replace(memory, needed=(*kept, (now, needed)))


def _cause(signal: Signal) -> Cause:
    if not signal.readings:
        return BOUNDS
    who = "1 instance" if len(signal.readings) == 1 else f"{len(signal.readings)} instances"
    text = f"{signal.name} is {signal.value:g} over {who}, target {signal.target:g} each"
    return Cause(text=text, name=signal.name, value=signal.value, target=signal.target)
