"""How a new release takes the place of the old one: all at once, bit by bit, or by shares of the requests."""

from __future__ import annotations

import enum
from typing import Annotated

from msgspec import Meta

from atoll.model.errors import Invalid
from atoll.model.names import SpecRecord
from atoll.model.spec.values import REPLICAS_MAX, default
from atoll.model.units import Seconds

STEPS_MAX = 20
INTERVAL_MIN_S = 1.0
"""The ingress says every second how many requests there were; a shorter interval of the analysis would often see none."""


class Strategy(enum.StrEnum):
    ROLLING = "rolling"
    """Instance by instance; requests go to all that are ready."""
    CANARY = "canary"
    """The new release gets a share of the requests, step by step."""
    BLUE_GREEN = "blue-green"
    """The new release is made whole beside the old one, and gets all requests at once."""


class CanaryStep(SpecRecord, frozen=True, kw_only=True):
    weight: Annotated[int, Meta(ge=1, le=99)]
    """Percent of the requests that go to the new release, however many instances it has."""
    pause: Seconds | None = None
    """How long the step lasts, from when the weight is in force; without it until a person resumes."""


class Analysis(SpecRecord, frozen=True, kw_only=True):
    """When the new release is too bad to go on with, by what the ingress counts of both releases at the same time."""

    error_rate_max: Annotated[float, Meta(ge=0, lt=1)] | None = None
    """The largest share of its requests that it may answer with 500 to 599."""
    latency_p99_max: Seconds | None = None
    """The time within which 99 of 100 of its requests must be answered."""
    requests_min: Annotated[int, Meta(ge=1, le=1_000_000)] = 100
    """Fewer requests to the new release say nothing: then is waited for more."""
    interval: Seconds = default(Seconds(10))
    failures_max: Annotated[int, Meta(ge=0, le=100)] = 2
    """So many bad intervals of a step are forgiven; one more ends the rollout."""


class Rollout(SpecRecord, frozen=True, kw_only=True):
    """How a new release replaces the old: never fewer than `replicas - max_unavailable` ready."""

    strategy: Strategy = Strategy.ROLLING
    max_surge: Annotated[int, Meta(ge=0, le=REPLICAS_MAX)] = 1
    max_unavailable: Annotated[int, Meta(ge=0, le=REPLICAS_MAX)] = 0
    drain: Seconds = default(Seconds(30))
    """The longest wait for active requests before an instance is told to stop."""
    deadline: Seconds = default(Seconds(300))
    """Without progress for so long, the rollout has failed, and the old release keeps serving."""
    steps: Annotated[tuple[CanaryStep, ...], Meta(max_length=STEPS_MAX)] = ()
    """Of a canary; after the last one the new release gets everything."""
    analysis: Analysis | None = None
    auto_revert: bool | None = None
    """Whether a failed rollout goes back to the last good release by itself; where absent, a canary and a blue-green one do."""
    promote_after: Seconds | None = None
    """Of a blue-green rollout: how long the new set is ready before it gets the requests; without it until a person promotes it."""
    keep_old: Seconds = default(Seconds(600))
    """Of a blue-green rollout: how long the old set is kept after the switch, to switch back at once."""

    @property
    def reverts(self) -> bool:
        """Whether a failed rollout goes back to the last good release by itself."""
        return self.strategy is not Strategy.ROLLING if self.auto_revert is None else self.auto_revert


def check_rollout(rollout: Rollout, *, served: bool) -> None:
    """Raise Invalid for rules that contradict themselves, naming the field; `served` says that the app has an `http` port."""
    if rollout.max_surge == 0 and rollout.max_unavailable == 0:
        raise Invalid("rollout.max_surge: 0 together with max_unavailable 0 could never progress", field="rollout.max_surge")
    canary, blue_green = rollout.strategy is Strategy.CANARY, rollout.strategy is Strategy.BLUE_GREEN
    if canary and not rollout.steps:
        mend = "e.g. steps = [{ weight = 5, pause = '60s' }, { weight = 50, pause = '5m' }]"
        raise Invalid("rollout.steps: missing; a canary needs one or more", field="rollout.steps", mend=mend)
    if canary and rollout.max_surge == 0:
        mend = "set max_surge = 1 or more; with as many as replicas the old set stays whole until the end"
        raise Invalid("rollout.max_surge: 0 leaves no room for a canary beside the old set", field="rollout.max_surge", mend=mend)
    if rollout.steps and not canary:
        raise Invalid(
            f"rollout.steps: a '{rollout.strategy}' rollout has none", field="rollout.steps", mend="set strategy = 'canary'"
        )
    for index in range(1, len(rollout.steps)):
        if rollout.steps[index].weight < rollout.steps[index - 1].weight:
            field = f"rollout.steps[{index}].weight"
            raise Invalid(f"{field}: below that of the step before", field=field, mend="let weights rise from step to step")
    if rollout.promote_after is not None and not blue_green:
        mend = "set strategy = 'blue-green'; a canary has pauses in its steps"
        raise Invalid("rollout.promote_after: only of a blue-green rollout", field="rollout.promote_after", mend=mend)
    if not served and (canary or blue_green or rollout.analysis is not None):
        field = "rollout.analysis" if rollout.strategy is Strategy.ROLLING else "rollout.strategy"
        mend = "add a port with protocol = 'http', or use strategy = 'rolling' without analysis"
        raise Invalid(f"{field}: there are no requests to look at without an http port", field=field, mend=mend)
    if (analysis := rollout.analysis) is not None:
        if analysis.error_rate_max is None and analysis.latency_p99_max is None:
            mend = "set error_rate_max, latency_p99_max or both"
            raise Invalid("rollout.analysis: it says nothing of what is too bad", field="rollout.analysis", mend=mend)
        if analysis.interval < INTERVAL_MIN_S:
            raise Invalid(f"rollout.analysis.interval: must be at least {INTERVAL_MIN_S:g} s", field="rollout.analysis.interval")
