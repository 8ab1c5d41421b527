"""What happens to an instance: how it starts again, and how it stops."""

from __future__ import annotations

import enum
from typing import Annotated

from msgspec import Meta

from atoll.model.names import SpecRecord
from atoll.model.spec.values import default
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
