"""Room that is kept for somebody, as an explanation shows it: what is booked for heads of the queue, and what is reserved."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np

from atoll.model.devices import MILLI
from atoll.model.views import KeptFor, KeptRoom
from atoll.scheduling.bookings import Booking
from atoll.scheduling.demand import Demand
from atoll.scheduling.groups import project_of_group
from atoll.scheduling.interface import Reason, View
from atoll.scheduling.ledger import SOME_DAY
from atoll.scheduling.reserved import Kept
from atoll.scheduling.rules import Backfill, ReservedNodes
from atoll.scheduling.snapshot import Ints

KEPT_MAX = 20
"""Rooms that an explanation shows: its own first, then those that keep it out of most nodes."""
NAMED_MAX = 20
"""Nodes and instances that are named of one."""
_NONE: Ints = np.zeros(0, dtype=np.int64)


def kept_rooms(
    view: View, group: str, demand: Demand, turned: Mapping[str, tuple[Ints, Reason]], own: Iterable[Booking] = ()
) -> tuple[KeptRoom, ...]:
    """Return what is kept for `group` (`own`, and reserved for its project), and what of others it was `turned` away from."""
    failed, _ = turned.get(Backfill.name, (_NONE, None))
    found = [_waiting(booking, own=True) for booking in own]
    for kept in view.bookings.holders(failed, demand, view.ends_at):
        found.append(_waiting(kept.booking, turns_away=int(np.isin(failed, kept.rows).sum())))
    failed, _ = turned.get(ReservedNodes.name, (_NONE, None))
    for held in ReservedNodes().holders(view, group, failed):
        found.append(_reserved(view, held, turns_away=int(np.isin(failed, held.rows).sum())))
    project = project_of_group(group)
    found += [_reserved(view, held, own=True) for held in view.reserved.kept if held.reservation.spec.project == project]
    return tuple(sorted(found, key=lambda room: (not room.own, -room.turns_away, room.name, room.instances)))[:KEPT_MAX]


def _waiting(booking: Booking, *, own: bool = False, turns_away: int = 0) -> KeptRoom:
    demand = booking.demand
    return KeptRoom(
        why=KeptFor.WAITING,
        project=booking.ids[0].split("/", 1)[0],
        instances=tuple(id.rsplit("/", 1)[-1] for id in booking.ids[:NAMED_MAX]),
        count=len(booking.ids),
        nodes=tuple(sorted(booking.nodes)[:NAMED_MAX]),
        node_count=len(booking.nodes),
        cpu_milli=demand.cpu_milli,
        memory_bytes=demand.memory_bytes,
        gpu_milli=demand.gpu_milli,
        start=booking.starts.at if booking.starts.at < SOME_DAY else None,
        own=own,
        turns_away=turns_away,
    )


def _reserved(view: View, held: Kept, *, own: bool = False, turns_away: int = 0) -> KeptRoom:
    spec = held.reservation.spec
    names = sorted(view.nodes.names[row] for row in held.rows.tolist())
    return KeptRoom(
        why=KeptFor.RESERVED,
        project=spec.project,
        name=spec.name,
        count=len(names),
        nodes=tuple(names[:NAMED_MAX]),
        node_count=len(names),
        cpu_milli=spec.cpu.milli if spec.cpu is not None else 0,
        memory_bytes=int(spec.memory) if spec.memory is not None else 0,
        gpu_milli=MILLI * (spec.gpu or 0),
        start=held.reservation.start,
        end=spec.end,
        own=own,
        turns_away=turns_away,
    )
