"""What a node that is cut off stops by itself, because it must not run twice. Pure."""

from __future__ import annotations

from collections.abc import Iterable

from atoll.model.states import Desired
from atoll.node.runner import Runner

CONTACT_LOOK_S = 0.5
"""How often one looks; part of the margin that the leader leaves (`control/patience.py`)."""


def overdue(runners: Iterable[Runner], cut_off_s: float) -> list[tuple[Runner, float]]:
    """Return what is to be stopped now, each with its limit: what may run without contact for a shorter time than there was none.

    An agent that does not know when there was contact last (after a restart of the machine, say) has none until there is: what
    it finds of such work ends, and is made anew by the leader, here or elsewhere.
    """
    found = []
    for runner in runners:
        limit = runner.assignment.workload.lost.stop_after_disconnect
        wanted = runner.state.desired is not Desired.STOP and not runner.state.phase.final
        if limit is not None and wanted and cut_off_s >= limit:
            found.append((runner, float(limit)))
    return found
