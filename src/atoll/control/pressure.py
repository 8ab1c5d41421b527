"""How many instances requests ask for: averages over a stable window, and over a short one where many come at once. Pure.

The rule, its windows and its numbers are those of Knative's pod autoscaler (knative.dev/docs/serving/autoscaling,
`pkg/autoscaler/scaling/autoscaler.go` of knative/serving): as many as bring the average of the stable window to the target. Where
the panic window, a tenth of it, asks for twice what is ready, its average counts too, and nothing is taken away until it has not
done so for a whole stable window. At most half of what is ready goes in one decision.
"""

from __future__ import annotations

from msgspec import Struct
from msgspec.structs import replace

from atoll.control.autoscale import Cause, Need, instances_for

PANIC_SHARE = 0.1
"""The panic window, as a share of the stable one."""
PANIC_THRESHOLD = 2.0
"""Panic begins where so many times what is ready is asked for."""
DOWN_FACTOR = 2
"""What is ready falls to no less than this part of it in one decision."""
DECIDE_S = 2.0
"""Decisions that take away are at least so far apart; ingresses report as often."""


class Pressure(Struct, frozen=True, kw_only=True):
    """One thing that requests are measured by, over all ingresses."""

    name: str
    """In words: `requests under way`."""
    target: float
    """Above 0: what each instance is to have."""
    stable: float
    """Mean over the stable window."""
    panic: float


class PressureFacts(Struct, frozen=True, kw_only=True):
    current: int
    """How many have been wanted so far."""
    most: int
    ready: int
    stable_s: float
    pressures: tuple[Pressure, ...]
    known: bool
    """Whether every ingress has been heard of for a whole stable window; else nothing is taken away."""


class PressureMemory(Struct, frozen=True, kw_only=True):
    """What earlier decisions leave to later ones; times are monotonic. It is lost with the leader, and panic with it."""

    panic_at: float | None = None
    """When so much was asked for last, while there is panic."""
    most: int = 0
    """The most that was wanted in this panic."""
    lowered_at: float = float("-inf")


def decide_pressure(facts: PressureFacts, memory: PressureMemory, now: float) -> tuple[Need, PressureMemory]:
    """Return how many are needed at `now` (monotonic seconds), and what to remember."""
    ready = max(1, facts.ready)
    stable, heaviest = _asked(facts, [each.stable / each.target for each in facts.pressures])
    panic, urgent = _asked(facts, [each.panic / each.target for each in facts.pressures])
    if panic / ready >= PANIC_THRESHOLD:
        memory = replace(memory, panic_at=now)
    elif memory.panic_at is not None and now - memory.panic_at > facts.stable_s:
        memory = replace(memory, panic_at=None, most=0)
    cause = _cause(heaviest, facts.stable_s, panic=False)
    count = stable
    if memory.panic_at is not None:
        if panic > stable:
            count, cause = panic, _cause(urgent, facts.stable_s * PANIC_SHARE, panic=True)
        count = max(count, memory.most, facts.current)
        memory = replace(memory, most=count)
    if count < facts.current:
        if not facts.known or now - memory.lowered_at < DECIDE_S:
            count = facts.current
        else:
            count = max(count, min(facts.current, ready // DOWN_FACTOR))
            if count < facts.current:
                memory = replace(memory, lowered_at=now)
    return Need(count=count, cause=cause), memory


def _asked(facts: PressureFacts, shares: list[float]) -> tuple[int, Pressure | None]:
    if not shares:
        return 0, None
    most = max(range(len(shares)), key=shares.__getitem__)
    return instances_for(shares[most], facts.most), facts.pressures[most]


def _cause(pressure: Pressure | None, window_s: float, *, panic: bool) -> Cause:
    if pressure is None:
        return Cause(text="nothing is known of its requests")
    value = pressure.panic if panic else pressure.stable
    text = f"{value:.3g} {pressure.name} on average over {window_s:g} s, target {pressure.target:g} each"
    return Cause(text=text, name=pressure.name, value=round(value, 3), target=pressure.target)
