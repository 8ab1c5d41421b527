"""Nodes that are taken out of use on purpose: a drain that an operator has asked for, and windows of maintenance.

Both are policies in the store. What follows from them at a moment is a pure function of them and of that moment
(`model.evacuation`), so nobody has to be there when a window begins or ends.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

from msgspec import Meta, Struct

from atoll.model.cron import ZONE_CHARS_MAX, check_cron, tick_after, tick_before
from atoll.model.errors import Invalid
from atoll.model.names import Name, SpecRecord
from atoll.model.spec.values import default
from atoll.model.units import Seconds

DRAIN_DEADLINE_S = 3_600.0
"""How long a drain waits for budgets, replacements and jobs where nothing else is said."""
LENGTH_MAX_S = 14 * 86_400.0
SELECTOR_TERMS_MAX = 16
OPERATORS = frozenset("<>=!")
"""Stand in no label, and begin no value, of a selector."""
MAINTENANCES_MAX = 200
"""Windows in one cell."""


class Drain(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """An operator wants everything off a node. Part of its `NodePolicy`; the leader works it off."""

    since: float
    deadline: float
    """When what is still there is told to go all the same, but for what is kept by its volumes."""
    leave_volumes: bool = False
    """Apps that write to host-local volumes go too, and begin with empty ones elsewhere; the data stays on the node."""
    instances: int = 0
    """How many there were."""
    by: str = ""


class MaintenanceSpec(SpecRecord, frozen=True, kw_only=True):
    """A window of maintenance: once (`start`), or again and again (`every`)."""

    name: Name
    nodes: Annotated[str, Meta(min_length=1, max_length=1024)]
    """Which: `label=value` or `label!=value`, with commas between those that must all hold. `node`, `site`, `region` and
    `arch` are labels of every node; `*` is all."""
    start: float | None = None
    """Seconds since the epoch."""
    every: Annotated[str, Meta(max_length=200)] | None = None
    """A cron expression."""
    timezone: Annotated[str, Meta(max_length=ZONE_CHARS_MAX)] = "UTC"
    length: Seconds
    lead: Seconds = default(Seconds(1800))
    """How long before it begins the nodes are drained, and get nothing new that would not end before."""
    leave_volumes: bool = False
    note: Annotated[str, Meta(max_length=500)] = ""


class Maintenance(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A window of maintenance. Writer: API."""

    spec: MaintenanceSpec
    created_at: float
    by: str = ""


class Window(Struct, frozen=True, kw_only=True):
    """One time that maintenance takes place: nodes are drained from `drains`, out of use from `start`, and used again at `end`."""

    drains: float
    start: float
    end: float


def check_maintenance(spec: MaintenanceSpec) -> None:
    """Raise Invalid, naming the field, for what contradicts itself."""
    check_selector(spec.nodes)
    if (spec.start is None) == (spec.every is None):
        what = "neither is given" if spec.start is None else "both are given"
        mend = "give start for one window, or every for one that comes again"
        raise Invalid(f"start, every: {what}", field="start", mend=mend)
    if not 0 < spec.length <= LENGTH_MAX_S:
        raise Invalid("length: must be above 0, and at most 14 days", field="length", mend="write for example '2h'")
    if spec.every is not None:
        check_cron(spec.every, spec.timezone, field="every")


def terms(selector: str) -> tuple[tuple[str, bool, str], ...]:
    """Return the selector as (label, whether it must be equal, value). Raises Invalid."""
    if selector.strip() == "*":
        return ()
    found = []
    for term in selector.split(","):
        label, unequal, value = term.partition("!=")
        if not unequal:
            label, _, value = term.partition("=")
        if not label.strip() or not value.strip():
            mend = "write for example 'site=fra', 'site=fra,arch!=arm64', 'node=n1', or '*' for every node"
            raise Invalid(f"nodes: {term[:60]!r} is no rule on a label", field="nodes", mend=mend)
        found.append((label.strip(), not unequal, value.strip()))
    if len(found) > SELECTOR_TERMS_MAX:
        raise Invalid(f"nodes: more than {SELECTOR_TERMS_MAX} rules", field="nodes")
    return tuple(found)


def check_selector(selector: str) -> None:
    """Raise Invalid for a selector that is none, or that asks for more than `=` and `!=`, as `arch>=3` does.

    For what comes in: `terms` goes on to read what is kept.
    """
    for label, equal, value in terms(selector):
        if OPERATORS & set(label) or value[0] in OPERATORS:
            rule = f"{label}{'=' if equal else '!='}{value}"
            mend = "rules are LABEL=VALUE or LABEL!=VALUE, for example 'rack=a7,arch!=arm64'"
            raise Invalid(f"nodes: {rule[:60]!r} is no rule on a label", field="nodes", mend=mend)


def selects(selector: str, labels: Mapping[str, str]) -> bool:
    """Return whether a node with these labels (see `evacuation.labels_of`) is meant."""
    return all((labels.get(label) == value) is equal for label, equal, value in terms(selector))


def window_at(spec: MaintenanceSpec, now: float) -> Window | None:
    """Return the window that is in force at `now`, its time of draining included, or else the next; None when all are over."""
    if spec.start is not None:
        return _window(spec, spec.start) if now < spec.start + spec.length else None
    if spec.every is None:
        return None
    last = tick_before(spec.every, spec.timezone, now)
    if last is not None and now < last + spec.length:
        return _window(spec, last)
    following = tick_after(spec.every, spec.timezone, now)
    return _window(spec, following) if following is not None else None


def _window(spec: MaintenanceSpec, start: float) -> Window:
    return Window(drains=start - spec.lead, start=start, end=start + spec.length)
