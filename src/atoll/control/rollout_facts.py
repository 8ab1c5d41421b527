"""What a rollout may depend on, and what it comes to."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from msgspec import Struct
from msgspec.structs import replace

from atoll.control.analysis import Verdict
from atoll.control.shares import borne
from atoll.model.records import Severity
from atoll.model.rollouts import Leaving, RolloutOrder, RolloutStatus
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
    least: int | None = None
    """How many must be ready for all requests; None: by `rules` alone."""
    made: int = 0
    """Instances of `release` that there are, or that wait for their next try."""
    ready: int = 0
    """Of them those that last."""
    others: int = 0
    """Instances of other releases that are meant to run."""
    ready_of: Mapping[int, int] = {}
    """Release → its instances that take requests."""
    progressed_at: float = 0.0
    """When the last instance became ready."""
    verdict: Verdict | None = None
    why: str = ""
    """Why instances of `release` are not ready."""

    @property
    def enough(self) -> int:
        """How many ready instances all requests need."""
        return max(0, self.wanted - self.rules.max_unavailable) if self.least is None else self.least


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


def leaves(
    facts: RolloutFacts, stable: int, release: int, before: int | None, now: float, *, patience_s: float | None = None
) -> Leaving | None:
    """Return what `release`, which is on its way out, keeps of the requests at first: `before`, or its part of what serves, but no
    more than `stable` has too few instances for. None for nothing. It keeps some for `patience_s`, or the rollout's deadline.
    """
    there = facts.ready_of.get(release, 0)
    if before is None:
        before = 100 * there // max(1, there + facts.ready_of.get(stable, 0))
    until = now + (facts.rules.deadline if patience_s is None else patience_s)
    return still_leaves(facts, stable, Leaving(release=release, weight=before, until=until), now)


def still_leaves(facts: RolloutFacts, stable: int, leaving: Leaving | None, now: float, share: int = 100) -> Leaving | None:
    """Return what is left to it now of `share`, which is all but the wanted release's own: less with each instance of `stable` that
    is ready, never more; None for nothing.
    """
    if leaving is None or not facts.wanted or now >= leaving.until or not facts.ready_of.get(leaving.release):
        return None
    weight = min(share - borne(facts.ready_of.get(stable, 0), max(1, facts.enough)), leaving.weight)
    return replace(leaving, weight=weight) if weight > 0 else None
