"""How many of an app must stay ready, whoever wants some of them away. The one place that says so.

Everything that takes an instance away though it works asks here: rollouts, drains, maintenance, sick GPUs, preemption, moves. All
of them count what is ready now, so that what one has taken is missing for all, and no two spend the same budget.
Not among them: a smaller wish (fewer replicas, deletion), an operator's stop of one instance, and what is forced when a deadline
is over.
"""

from __future__ import annotations

from atoll.model.spec import AppSpec, amount_of


def least_ready(spec: AppSpec, wanted: int) -> int:
    """Return how many of `wanted` stay ready, whatever is done for others' sake.

    Without `[disruption]` as many may be away as in a rollout, and one where that is none.
    """
    rule = spec.disruption
    if rule is None:
        return max(0, wanted - max(1, spec.rollout.max_unavailable))
    if rule.min_ready is not None:
        return min(wanted, amount_of(rule.min_ready, wanted))
    return max(0, wanted - amount_of(rule.max_unavailable or 0, wanted))


def least_in_rollout(spec: AppSpec, wanted: int) -> int:
    """Return how many stay ready while a release replaces another: by `rollout.max_unavailable`, and `[disruption]` if given."""
    least = max(0, wanted - spec.rollout.max_unavailable)
    return least if spec.disruption is None else max(least, least_ready(spec, wanted))


def least_in_move(spec: AppSpec, wanted: int, *, no_room: bool) -> int:
    """Return how many stay ready while instances leave their nodes for others.

    Where `rollout.max_surge` lets another be made before, the last one that serves never goes first, and without a `[disruption]`
    of the app's own none goes before another serves in its place; `no_room` says that those others find no place: then what the
    budget allows goes, for the room of one may be what the other waits for.
    """
    if spec.rollout.max_surge == 0:
        return least_in_rollout(spec, wanted)
    if spec.disruption is None and not no_room:
        return least_in_rollout(spec, wanted)
    return max(least_ready(spec, wanted), min(1, wanted))


def may_go(spec: AppSpec, wanted: int, ready: int) -> int:
    """Return how many more may be taken away now, `ready` of them being ready; below 0 where too many are missing already."""
    return ready - least_ready(spec, wanted)
