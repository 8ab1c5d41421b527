"""How much of an app may be away for everyone else's sake."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta

from atoll.model.errors import Invalid
from atoll.model.names import SpecRecord
from atoll.model.spec.values import REPLICAS_MAX

Amount = (
    Annotated[int, Meta(ge=0, le=REPLICAS_MAX)]
    | Annotated[str, Meta(pattern=r"^(100|[0-9]{1,2})%$(?!\n)", description="a number, or a share such as '25%'")]
)
"""A number of instances, or a percentage of those that are wanted."""


class Disruption(SpecRecord, frozen=True, kw_only=True):
    """How many of the app may be away for others' sake: drains, maintenance, preemption, moves, sick GPUs and rollouts, all
    together. One of the two is given; percentages are rounded up."""

    max_unavailable: Amount | None = None
    min_ready: Amount | None = None


def amount_of(amount: int | str, wanted: int) -> int:
    """Return an `Amount` as a number of instances, where `wanted` are wanted."""
    return amount if isinstance(amount, int) else -(-wanted * int(amount[:-1]) // 100)


def check_disruption(rule: Disruption, *, surge: int, replicas: int | None) -> None:
    """Raise Invalid for a budget that contradicts itself, or with which nothing could ever be replaced."""
    if (rule.max_unavailable is None) == (rule.min_ready is None):
        what = "neither is given" if rule.min_ready is None else "both are given"
        raise Invalid(
            f"disruption.max_unavailable, disruption.min_ready: {what}",
            field="disruption.max_unavailable",
            mend="give one of them, or leave [disruption] out",
        )
    if surge:
        return
    field = "disruption.max_unavailable" if rule.min_ready is None else "disruption.min_ready"
    if rule.max_unavailable is not None:
        none_may_go = amount_of(rule.max_unavailable, 100) == 0
    else:
        least = rule.min_ready or 0
        none_may_go = least == "100%" or (bool(replicas) and amount_of(least, replicas or 1) >= (replicas or 1))
    if none_may_go:
        raise Invalid(
            f"{field}: nothing may be away, and rollout.max_surge is 0: no rollout and no drain could ever progress",
            field=field,
            mend="set rollout.max_surge to 1 or more, or allow one to be away",
        )
