"""Rare paths that a long enough run must have been on, or it proves little.

A mark costs production nothing: the simulator's own parts make some, and the others are read off what the code says anyway, its
events (`event: CODE`) and its log (`log: WORDS`), which the simulator listens to.
"""

from __future__ import annotations

from collections.abc import Mapping

SEEDS_ENOUGH = 300
"""So many seeds must have met every mark that is not `RARE`."""
SEEDS_MANY = 3000
"""So many seeds must have met those, too."""
RARE = (
    "log: a decision came too late and is made again",
    "store: divergent tail thrown away",
    "store: tail lost",
)
"""Met by less than one seed in a hundred, so that 300 may miss them."""

EXPECTED = (
    "agent killed while preparing",
    "agent killed while running",
    "agent killed while stopping",
    "came to rest",
    "came to rest again",
    "chaos: agent-crash",
    "chaos: agent-pause",
    "chaos: clock-jump",
    "chaos: disk-full",
    "chaos: gpu-silent",
    "chaos: gpu-vanish",
    "chaos: machine-restart",
    "chaos: member-crash",
    "chaos: member-cut",
    "chaos: member-pause",
    "chaos: one-way",
    "chaos: partition",
    "chaos: process-crash",
    "chaos: record-lost",
    "chaos: server-crash",
    "chaos: server-cut",
    "chaos: server-pause",
    "chaos: site-cut",
    "chaos: stall",
    "event: adopted",
    "event: draining",
    "event: gpu-broken",
    "event: gpu-replaced",
    "event: gpu-silent",
    "event: gpu-vanished",
    "event: lost",
    "event: node-drained",
    "event: node-evacuated",
    "event: node-lost",
    "event: node-ready",
    "event: out-of-memory",
    "event: parked",
    "event: promoted",
    "event: rejected",
    "event: rollout-failed",
    "event: rollout-promoted",
    "event: rollout-reverted",
    "event: rollout-step",
    "event: rollout-switched",
    "event: run-made",
    "event: unhealthy",
    "event: woken",
    "history: a stale write was refused",
    "history: operations checked",
    "leader: rival's term",
    "leader: term",
    "line: another server is asked",
    "line: no answer",
    "line: reply lost",
    "line: request repeated",
    "log: a report came late",
    "log: a wake could not be written; all is decided again",
    "log: not recorded",
    "log: the cache fell behind the store's history and lists again",
    "log: the lease could not be kept alive",
    "log: the lease has expired",
    "net: a connection is silent",
    "record: disk full",
    "record: newest writes lost",
    "store: another member is asked",
    "store: disk full",
    "store: follower killed",
    "store: leader killed",
    "store: new leader",
    "store: nobody can lead",
    "store: outcome unknown",
    "store: outcome unknown, the leader has changed",
    "user: acknowledged after retries",
    "watch: late",
)


def expected(seeds: int) -> tuple[str, ...]:
    """Return the marks that a run of so many seeds must meet."""
    return EXPECTED + RARE if seeds >= SEEDS_MANY else EXPECTED


def missing(met: Mapping[str, int], seeds: int) -> list[str]:
    """Return those of them that were not met."""
    return [mark for mark in expected(seeds) if not met.get(mark)]
