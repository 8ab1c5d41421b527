"""Why an instance does not fit, and why it went where it went."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from msgspec.structs import replace

from atoll.model.evacuation import in_words
from atoll.model.records import Rejection
from atoll.model.views import Candidate, Explanation
from atoll.scheduling.bookings import Booking
from atoll.scheduling.demand import Demand
from atoll.scheduling.filters import FILTERS, LIMITS
from atoll.scheduling.gpu.words import wall_in_words
from atoll.scheduling.groups import owner_of_group
from atoll.scheduling.interface import Filter, Limit, Reason, View
from atoll.scheduling.kept import kept_rooms
from atoll.scheduling.ledger import SOME_DAY
from atoll.scheduling.near import by_row, latency_by_site, wants_users
from atoll.scheduling.placing import allowed
from atoll.scheduling.ranking import STEPS, Ranking
from atoll.scheduling.rules import RULES
from atoll.scheduling.scores import DOMAIN_SCORE, GROUP_SCORES, SCORES
from atoll.scheduling.snapshot import Bools, Ints, Snapshot

CANDIDATES_MAX = 10
NAMES_MAX = 5
"""Nodes that a reason names."""


def turned_away(view: View, group: str, demand: Demand) -> dict[str, tuple[Ints, Reason]]:
    """Return filter → the rows that it turned away of those that the filters before it let pass, and why."""
    left = np.flatnonzero(view.nodes.present[: view.size])
    answer: dict[str, tuple[Ints, Reason]] = {}

    def turn(rule: Filter | Limit, passes: Bools) -> Ints:
        failed = left[~passes]
        if len(failed):
            answer[rule.name] = (failed, rule.explain(view, demand, failed))
        return left[passes]

    for rule in FILTERS:
        if rule.wants(demand):
            left = turn(rule, rule.passes(view, demand)[left])
    for limit in LIMITS:
        if limit.wants(demand):
            left = turn(limit, limit.room(view, demand)[left] > 0)
    for about in RULES:
        if about.wants(view, group, demand):
            passes = about.passes(view, group, demand)[left]
            failed, left = left[~passes], left[passes]
            if len(failed):
                answer[about.name] = (failed, about.explain(view, group, demand, failed))
    return answer


def reject(view: View, group: str, demand: Demand) -> Rejection:
    """Return why no node takes the demand now.

    The code is that of the last filter that turned nodes away: those came closest, so that its mend is the shortest way.
    """
    total = int(view.nodes.present[: view.size].sum())
    if not total:
        return Rejection(code="no-nodes", message="there is no node yet", mend="start an agent: atoll up, or atoll agent")
    turned = turned_away(view, group, demand)
    last = next(reversed(turned), None)
    if total == 1:
        message = "the only node does not fit: " + "".join(reason.message for _, reason in turned.values())
    else:
        message = f"none of {total} nodes fits: " + "; ".join(f"{len(rows)} {reason.message}" for rows, reason in turned.values())
    return Rejection(
        code=f"no-{last}" if last else "no-fit",
        message=message,
        mend=turned[last][1].mend if last else "",
        failed={name: len(rows) for name, (rows, _) in turned.items()},
    )


def booked(rejection: Rejection, booking: Booking, *, first: bool = True) -> Rejection:
    """Return the reason why a head of the queue waits, with what is booked for it; the `first` one says it in full."""
    nodes = sorted(booking.nodes)
    names = ", ".join(nodes[:NAMES_MAX]) + (f" and {len(nodes) - NAMES_MAX} more" if len(nodes) > NAMES_MAX else "")
    at = booking.starts.at
    when = f"free at {in_words(at)} at the latest" if at < SOME_DAY else "free when what runs there ends, nobody knows when"
    message = f"{rejection.message}; booked for it: room on {names}, {when}"
    return replace(rejection, message=message, booked=booking.written() if first else None)


def explain(
    snapshot: Snapshot,
    group: str,
    demand: Demand,
    limit: int = CANDIDATES_MAX,
    *,
    before: Iterable[Booking] = (),
    own: Iterable[Booking] = (),
    ends_at: float | None = None,
) -> Explanation:
    """Return what `plan` would find for one instance of `group` with this demand, that has ended by `ends_at` (`Pending`).

    `before` is what is booked for those before it in the queue, `own` what is booked for itself.
    """
    view = View(snapshot)
    view.ends_at = ends_at
    for booking in before:
        view.book(booking)
    mask, room, _ = allowed(view, group, demand)
    rows = np.flatnonzero(mask)
    turned = turned_away(view, group, demand)
    failed = {name: len(away) for name, (away, _) in turned.items()}
    ranking = Ranking(view, group, demand, room)
    counts, zero = view.counts(group), np.zeros(len(rows), dtype=np.int64)
    columns = {
        score.name: np.rint(score.score(view, demand, counts, rows, zero) * STEPS) * score.weight / STEPS
        for score in SCORES
        if score.wants(view, demand)
    }
    columns.update(
        (wish.name, np.rint(wish.score(view, group, demand)[rows] * STEPS) * wish.weight / STEPS)
        for wish in GROUP_SCORES
        if wish.wants(demand)
    )
    label = DOMAIN_SCORE.label(demand)
    if label is not None:
        domains = ranking.domains(label)
        columns[domains.name] = np.array([domains.score(domain) / STEPS for domain in domains.of[rows].tolist()])
    latency = latency_by_site(view, group, demand)
    ms = by_row(view, latency)[rows] if latency is not None else np.full(len(rows), np.inf)
    layout = snapshot.whereabouts.layouts.get(owner_of_group(group)) if wants_users(demand) else None
    total = sum(columns.values(), np.zeros(len(rows)))
    order = np.lexsort((snapshot.ranks()[rows], -total))[:limit]
    # `+ 0.0` makes 0 of what a wish that is turned round leaves as -0.
    candidates = tuple(
        Candidate(
            node=snapshot.names[rows[place]],
            total=float(total[place]) + 0.0,
            scores={name: float(values[place]) + 0.0 for name, values in columns.items()},
            room=int(room[rows[place]]),
            gpus=(view.devices.preview(int(rows[place]), demand.gpu) or ()) if demand.gpu is not None else (),
            site=snapshot.nodes[snapshot.names[rows[place]]].site,
            latency_ms=round(float(ms[place]), 3) if np.isfinite(ms[place]) else None,
        )
        for place in order.tolist()
    )
    return Explanation(
        candidates=candidates,
        feasible=len(rows),
        nodes=len(snapshot),
        failed=failed,
        rejection=None if len(rows) else reject(view, group, demand),
        wall=wall_in_words(demand.gpu) if demand.gpu is not None else "",
        layout=dict(sorted(layout.wanted.items())) if layout is not None else {},
        layout_ms=layout.latency_ms if layout is not None and layout.latency_ms else None,
        kept=kept_rooms(view, group, demand, turned, own),
        unserved=layout.unserved if layout is not None else 0.0,
    )
