"""What happens to an instance: how it starts again, and how it stops."""

from __future__ import annotations

import enum
from typing import Annotated

from msgspec import Meta

from atoll.model.errors import Invalid
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
    signal: Annotated[str, Meta(pattern=r"^SIG[A-Z0-9+]{1,10}$(?!\n)", description="a signal's name, such as 'SIGTERM'")] = (
        "SIGTERM"
    )
    grace: Seconds = default(Seconds(10))
    """From the signal to SIGKILL."""


class LostReplace(enum.StrEnum):
    """When an instance whose node is lost is replaced."""

    AT_ONCE = "at-once"
    WAIT = "wait"
    """After `wait`, should the node not have come back."""
    NEVER = "never"
    """It waits for its node, for as long as that takes."""


class Lost(SpecRecord, frozen=True, kw_only=True):
    """What becomes of an instance whose node does not answer any more."""

    replace: LostReplace | None = None
    """Left out: at once; but an app that writes to its node's volumes waits for it, and a job without `retries` for `wait`."""
    wait: Seconds = default(Seconds(60))
    stop_after_disconnect: Seconds | None = None
    """For what must never run twice: its node stops it once it has not been heard for so long, and it is replaced only when that
    is over for certain."""


DISCONNECT_MIN_S = 5.0


def check_lost(lost: Lost) -> None:
    """Raise Invalid for what the types alone do not rule out."""
    limit = lost.stop_after_disconnect
    if limit is not None and limit < DISCONNECT_MIN_S:
        where = "lost.stop_after_disconnect"
        raise Invalid(
            f"{where}: {limit:g} s is less than it takes to tell a silent network from a slow one",
            field=where,
            mend=f"write {DISCONNECT_MIN_S:g} s or more, or leave it out",
        )
