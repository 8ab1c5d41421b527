"""The states of an instance and the transitions that are legal."""

from __future__ import annotations

import enum


class Desired(enum.StrEnum):
    """What the control plane wants of an instance. It only ever moves forward."""

    RUN = "run"
    DRAIN = "drain"
    """Keep running, but take no new request: ingress lets active ones end."""
    STOP = "stop"


class Phase(enum.StrEnum):
    """What the node sees of an instance."""

    PENDING = "pending"
    """Not taken up by a node yet."""
    PREPARING = "preparing"
    """The image, network and root are being made ready."""
    STARTING = "starting"
    """Handed to the runtime."""
    RUNNING = "running"
    BACKOFF = "backoff"
    """Ended or failed to start; starts again after a delay."""
    STOPPING = "stopping"
    STOPPED = "stopped"
    """Ended because it was told to."""
    SUCCEEDED = "succeeded"
    """Ended by itself with exit status 0, and will not be restarted."""
    FAILED = "failed"
    """Ended or could not start, and will not be restarted."""
    LOST = "lost"
    """Its node is gone; the control plane, not the node, says so."""

    @property
    def final(self) -> bool:
        return self in FINAL

    @property
    def live(self) -> bool:
        """Whether a process may exist."""
        return self in (Phase.STARTING, Phase.RUNNING, Phase.STOPPING)


FINAL = frozenset({Phase.STOPPED, Phase.SUCCEEDED, Phase.FAILED, Phase.LOST})

TRANSITIONS: dict[Phase, frozenset[Phase]] = {
    Phase.PENDING: frozenset({Phase.PREPARING, Phase.STOPPED, Phase.FAILED, Phase.LOST}),
    Phase.PREPARING: frozenset({Phase.STARTING, Phase.BACKOFF, Phase.STOPPED, Phase.FAILED, Phase.LOST}),
    Phase.STARTING: frozenset(
        {Phase.RUNNING, Phase.BACKOFF, Phase.STOPPING, Phase.STOPPED, Phase.FAILED, Phase.SUCCEEDED, Phase.LOST}
    ),
    Phase.RUNNING: frozenset({Phase.BACKOFF, Phase.STOPPING, Phase.STOPPED, Phase.SUCCEEDED, Phase.FAILED, Phase.LOST}),
    Phase.BACKOFF: frozenset({Phase.PREPARING, Phase.STARTING, Phase.STOPPED, Phase.FAILED, Phase.LOST}),
    Phase.STOPPING: frozenset({Phase.STOPPED, Phase.LOST}),
    Phase.STOPPED: frozenset(),
    Phase.SUCCEEDED: frozenset(),
    Phase.FAILED: frozenset(),
    Phase.LOST: frozenset({Phase.RUNNING, Phase.STOPPING, Phase.STOPPED}),
}
"""From each phase, where it may go; staying is always legal."""


def legal(old: Phase, new: Phase) -> bool:
    """Return whether an instance may go from `old` to `new`."""
    return old is new or new in TRANSITIONS[old]


_ORDER = (Desired.RUN, Desired.DRAIN, Desired.STOP)


def advance(old: Desired, new: Desired) -> Desired:
    """Return the later of two wishes: an instance that was told to stop is never told to run again."""
    return max(old, new, key=_ORDER.index)
