"""Apps that sleep while nobody asks for them: whether each is to be awake now.

An app is awake when an ingress had a request for it in the last `idle_after`, or it was deployed or changed in that time, so that a
release that cannot start is seen at once. One that is awake stays so while anything is unknown: an ingress that has not been
heard may serve requests that nobody here knows of, and a new leader has heard nothing yet. With `idle = "predict"` its own past
says when it sleeps and wakes (`scheduling.forecast`), once there is one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Protocol

from msgspec import UNSET
from msgspec.structs import replace

from atoll.control.actions import Decision
from atoll.control.facts import AppFacts
from atoll.control.windows import floor_of
from atoll.model.ports.clock import Clock
from atoll.model.spec import Idle
from atoll.model.states import Desired
from atoll.model.traffic import Load
from atoll.scheduling.forecast import LINGER_S, Forecast, awake_at

FRESH_S = 15.0
"""An ingress of which nothing was heard for longer may have requests that are not known here."""
SLACK_S = 0.01


class Demand(Protocol):
    """What ingresses have requests for, as this server was told. Read live; times are on the monotonic clock."""

    changed: Callable[[str], None]
    """Called with an app (`project/name`) when a request waits for it."""

    @property
    def last(self) -> Mapping[str, float]:
        """App → when an ingress last had something to do for it."""
        ...

    @property
    def heard(self) -> Mapping[str, float]:
        """Ingress → when it last named all apps that it had something to do for."""
        ...

    @property
    def forecasts(self) -> Mapping[str, Forecast]:
        """App → its past, of apps that sleep by what is expected of them; an app that is not there has none yet."""
        ...

    @property
    def loads(self) -> Mapping[str, Mapping[str, Load]]:
        """Ingress → app → what it last said of its requests, of apps that scale by them."""
        ...


class NoDemand:
    """Nobody asks for anything, until somebody sets what is known."""

    def __init__(self) -> None:
        self.changed: Callable[[str], None] = lambda app: None
        self.last: dict[str, float] = {}
        self.heard: dict[str, float] = {}
        self.forecasts: dict[str, Forecast] = {}
        self.loads: dict[str, dict[str, Load]] = {}


class Sleeping:
    """One term's knowledge; times from before it are not known."""

    def __init__(self, demand: Demand, clock: Clock) -> None:
        self._demand = demand
        self._clock = clock
        self._began = clock.monotonic()

    def join(self, facts: AppFacts, decision: Decision) -> AppFacts:
        """Return `facts` with whether the app is to be awake, where it is one that sleeps; decide again when that may change."""
        app, scale = facts.app, facts.app.spec.scale
        if not app.sleeps or app.deleting or scale is UNSET:
            return facts
        floor = floor_of(scale, decision.now)
        if floor.until is not None:
            decision.wake(floor.until)
        if floor.least:
            return replace(facts, awake=True)
        now, key = self._clock.monotonic(), f"{app.project}/{app.name}"
        changed = now - (decision.now - decision.past(app.updated_at))
        forecast = self._demand.forecasts.get(key) if scale.idle is Idle.PREDICT else None
        idle_s = idle_for(
            now,
            asked=self._demand.last.get(key, -math.inf),
            changed=changed,
            began=self._began,
            heard=[self._demand.heard.get(ingress, -math.inf) for ingress in facts.ingresses],
            runs=any(seen.instance.desired is Desired.RUN for seen in facts.instances),
        )
        if forecast is not None and now - changed >= scale.idle_after and idle_s >= LINGER_S:
            awake, again = awake_at(forecast, decision.now, float(scale.idle_after))
            decision.wake(again + SLACK_S)
            return replace(facts, awake=awake, foreseen=True)
        stays_s = float(scale.idle_after) if forecast is None or now - changed < scale.idle_after else LINGER_S
        awake = idle_s < stays_s
        if awake:
            decision.wake(decision.now + stays_s - idle_s + SLACK_S)
        return replace(facts, awake=awake)


def idle_for(now: float, *, asked: float, changed: float, began: float, heard: list[float], runs: bool) -> float:
    """Return for how many seconds it is certain that nobody has asked for the app.

    `asked`, `changed`: when it was last asked for, and last deployed or changed; `began`: since when this leader leads;
    `heard`: when each ingress last said all; `runs`: whether it has an instance that may be at work. Pure.
    """
    last = max(asked, changed)
    if runs:
        last = max(last, began)
        if any(now - at > FRESH_S for at in heard):
            last = now
    return max(0.0, now - last)
