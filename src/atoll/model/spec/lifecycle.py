"""What happens to an instance: how it starts again, stops, and is replaced by a new release."""

from __future__ import annotations

import enum
from typing import Annotated

from msgspec import Meta

from atoll.model.names import SpecRecord
from atoll.model.spec.values import REPLICAS_MAX, default
from atoll.model.units import Seconds


class RestartPolicy(enum.StrEnum):
    ALWAYS = "always"
    ON_FAILURE = "on-failure"
    NEVER = "never"


class Restart(SpecRecord, frozen=True, kw_only=True):
    """What the node does when the process ends: wait `delay * factor**n`, at most `delay_max`, and start it again.

    After `reset` seconds of running, `n` is 0 again.
    """

    policy: RestartPolicy = RestartPolicy.ALWAYS
    delay: Seconds = default(Seconds(0.2))
    factor: Annotated[float, Meta(ge=1, le=10)] = 2.0
    delay_max: Seconds = default(Seconds(60))
    reset: Seconds = default(Seconds(60))


class Stop(SpecRecord, frozen=True, kw_only=True):
    signal: Annotated[str, Meta(pattern=r"^SIG[A-Z0-9+]{1,10}$(?!\n)")] = "SIGTERM"
    grace: Seconds = default(Seconds(10))
    """From the signal to SIGKILL."""


class Rollout(SpecRecord, frozen=True, kw_only=True):
    """How a new release replaces the old: never fewer than `replicas - max_unavailable` ready."""

    max_surge: Annotated[int, Meta(ge=0, le=REPLICAS_MAX)] = 1
    max_unavailable: Annotated[int, Meta(ge=0, le=REPLICAS_MAX)] = 0
    drain: Seconds = default(Seconds(30))
    """The longest wait for active requests before an instance is told to stop."""
    deadline: Seconds = default(Seconds(300))
    """Without progress for so long, the rollout has failed, and the old release keeps serving."""
