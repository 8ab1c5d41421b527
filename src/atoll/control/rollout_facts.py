"""What a rollout may depend on, and what it comes to."""

from __future__ import annotations

import math
from typing import Any

from msgspec import Struct

from atoll.control.analysis import Verdict
from atoll.model.records import Severity
from atoll.model.rollouts import RolloutOrder, RolloutStatus
from atoll.model.spec import Rollout


class RolloutFacts(Struct, frozen=True, kw_only=True):
    rules: Rollout
    release: int
    """Which should have all requests in the end."""
    order: RolloutOrder | None = None
    last: RolloutStatus | None = None
    served: int = 0
    """The release that had all requests when this rollout began; 0 for none."""
    kept: bool = True
    """Whether the spec of `served` is still held, so that one can go back."""
    wanted: int
    """Instances."""
    made: int = 0
    """Instances of `release` that there are, or that wait for their next try."""
    ready: int = 0
    """Of them those that last."""
    others: int = 0
    """Instances of other releases that are meant to run."""
    old_ready: int = 0
    """Instances of `served` that take requests."""
    progressed_at: float = 0.0
    """When the last instance became ready."""
    verdict: Verdict | None = None
    why: str = ""
    """Why instances of `release` are not ready."""


class Told(Struct, frozen=True):
    """An event of the app."""

    code: str
    message: str
    severity: Severity = Severity.INFO
    data: dict[str, Any] = {}


class Plan(Struct, frozen=True, kw_only=True):
    status: RolloutStatus | None = None
    release: int
    """Which instances should be of in the end: after a revert the old one."""
    new: int
    """How many of `release` there should be for now."""
    old: int = 0
    """How many of the release before are kept."""
    most: int
    """How many may be meant to run, of all releases."""
    failed: bool = False
    """It made no progress for too long, and stays as it is."""
    wake_at: float | None = None
    told: tuple[Told, ...] = ()
    progressed: bool = False
    """Its deadline counts from now."""


def order_of(facts: RolloutFacts) -> RolloutOrder | None:
    """Return what people ask of the rollout of this release."""
    return facts.order if facts.order is not None and facts.order.release == facts.release else None


def plan_of(facts: RolloutFacts, status: RolloutStatus | None, **more: Any) -> Plan:
    """Return the plan of a rollout that stands so: as in any that only replaces instances, but for what is given."""
    usual: dict[str, Any] = {"new": facts.wanted, "most": facts.wanted + facts.rules.max_surge}
    return Plan(**{"status": status, "release": status.serving if status is not None else facts.release, **usual, **more})


def canary_count(wanted: int, weight: int) -> int:
    """Return how many of `wanted` instances a share of `weight` percent of the requests needs."""
    return min(wanted, max(1, math.ceil(wanted * weight / 100)))


def share_left(facts: RolloutFacts, before: int | None) -> int | None:
    """Return what percent of the requests a release that was taken back keeps for now: as much as the old one has too few
    instances for. Never more than `before` (None: than its part of what serves); None for nothing.
    """
    enough = facts.wanted - facts.rules.max_unavailable
    if not facts.ready or not facts.wanted or facts.old_ready >= max(1, enough):
        return None
    missing = 100 - 100 * facts.old_ready // max(1, enough)
    part = before if before is not None else 100 * facts.ready // (facts.ready + facts.old_ready)
    return min(missing, part) or None
