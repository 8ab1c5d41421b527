"""What is said when a lost node comes back and there are more instances than wanted: which stay, which go, and why."""

from __future__ import annotations

from collections.abc import Sequence

from atoll.control.actions import Decision, Seen
from atoll.model.records import App

NAMED_MAX = 5
"""Instances that are named; the others are counted."""


def reconciled(app: App, kept: Sequence[Seen], stopped: Sequence[Seen], decision: Decision) -> str:
    """Tell it as an event, and return the reason for those that stop; empty where no node has come back.

    The best are kept: of the wanted release, placed, ready, and of these the oldest.
    """
    nodes = sorted({seen.instance.node or "" for seen in (*kept, *stopped) if seen.returned})
    if not nodes:
        return ""
    back = f"{'node' if len(nodes) == 1 else 'nodes'} {', '.join(nodes)} {'is' if len(nodes) == 1 else 'are'} back"
    text = f"{back}; kept {_names(kept)}: ready before others, then the oldest; stopped {_names(stopped)}"
    subject = f"app/{app.name}"
    decision.tell(app.project, subject, "reconciled", text, kept=_ids(kept), stopped=_ids(stopped), nodes=nodes[:NAMED_MAX])
    return f"{back}, and {_names(kept)} {'serves' if len(kept) == 1 else 'serve'} already" if kept else back


def _ids(instances: Sequence[Seen]) -> list[str]:
    return [seen.instance.id for seen in instances[:NAMED_MAX]]


def _names(instances: Sequence[Seen]) -> str:
    names = ", ".join(f"{seen.instance.id} ({'ready' if seen.ready else 'not ready'})" for seen in instances[:NAMED_MAX])
    more = len(instances) - NAMED_MAX
    return f"{names} and {more} more" if more > 0 else names or "none"
