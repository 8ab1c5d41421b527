"""What must leave its node, from when on, and until when it may take its time. Pure: from policies and a moment.

drain       asked for ───────────────── deadline ─── … ─── undrain
window      lead before it ─────────── its start ───────── its end
            budgets, replacements and jobs are waited for │ what is left goes all the same
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import UTC, datetime

from msgspec import Struct
from msgspec.structs import replace

from atoll.model.labels import described
from atoll.model.maintenance import Maintenance, Window, selects, window_at
from atoll.model.records import Node, NodePolicy


class Evacuation(Struct, frozen=True, kw_only=True):
    """Instances are to leave a node."""

    why: str
    """`it is being drained`, `maintenance fra-weekly`: in words, for people."""
    since: float
    deadline: float
    """From then on nothing is waited for any more."""
    leave_volumes: bool = False
    maintenance: str | None = None
    """The name of the window that wants it; None where an operator's drain alone does."""
    start: float | None = None
    """When the window begins."""
    end: float | None = None
    """When the window ends, and the node is used again."""


def labels_of(node: Node) -> dict[str, str]:
    """Return the labels of a node as it is `described`, with those that every node has."""
    return {**node.labels, "node": node.name, "site": node.site, "region": node.region, "arch": node.arch}


def in_force(maintenances: Iterable[Maintenance], now: float) -> list[tuple[Maintenance, Window]]:
    """Return the windows that concern their nodes at `now`: in their time of draining, or begun and not over. Soonest first."""
    found = []
    for maintenance in maintenances:
        window = window_at(maintenance.spec, now)
        if window is not None and window.drains <= now < window.end:
            found.append((maintenance, window))
    return sorted(found, key=lambda each: (each[1].start, each[0].spec.name))


def evacuation_of(node: Node, policy: NodePolicy | None, windows: Iterable[tuple[Maintenance, Window]]) -> Evacuation | None:
    """Return what makes instances leave the node, of its policy and of the windows that are in force; None for nothing.

    Of several the one that comes first to its end of patience says when that is.
    """
    found: Evacuation | None = None
    windows = list(windows)
    labels = labels_of(described(node, policy)) if windows else {}
    mine = [(each, window) for each, window in windows if selects(each.spec.nodes, labels)]
    for maintenance, window in mine:
        if found is None:
            found = Evacuation(
                why=f"maintenance {maintenance.spec.name} until {in_words(window.end)}",
                since=window.drains,
                deadline=window.start,
                leave_volumes=maintenance.spec.leave_volumes,
                maintenance=maintenance.spec.name,
                start=window.start,
                end=window.end,
            )
        else:
            consent = found.leave_volumes or maintenance.spec.leave_volumes
            found = replace(found, end=max(found.end or 0.0, window.end), leave_volumes=consent)
    drain = policy.drain if policy is not None else None
    if drain is None:
        return found
    if found is None:
        return Evacuation(why="it is being drained", since=drain.since, deadline=drain.deadline, leave_volumes=drain.leave_volumes)
    return replace(
        found,
        why=f"it is being drained, and {found.why}",
        since=min(found.since, drain.since),
        deadline=min(found.deadline, drain.deadline),
        leave_volumes=found.leave_volumes or drain.leave_volumes,
    )


def evacuations(
    nodes: Mapping[str, Node], policies: Mapping[str, NodePolicy], maintenances: Iterable[Maintenance], now: float
) -> dict[str, Evacuation]:
    """Return, of all nodes, those that instances are to leave at `now`. Costs nothing for nodes while no window is in force."""
    windows = in_force(maintenances, now)
    names = nodes.keys() if windows else [name for name, policy in policies.items() if policy.drain is not None and name in nodes]
    found = {}
    for name in names:
        evacuation = evacuation_of(nodes[name], policies.get(name), windows)
        if evacuation is not None:
            found[name] = evacuation
    return found


def in_words(at: float) -> str:
    """Return a moment as people write it: `2026-12-06 04:00 UTC`."""
    return datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%d %H:%M UTC")
