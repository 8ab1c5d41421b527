"""Nodes, or room on each of them, that are kept for one project for a time."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta, Struct

from atoll.model.errors import Invalid
from atoll.model.maintenance import check_selector
from atoll.model.names import Name, SpecRecord
from atoll.model.units import Bytes, Cores

RESERVATIONS_MAX = 200
"""Reservations in one cell."""
LENGTH_MAX_S = 366 * 86_400.0


class ReservationSpec(SpecRecord, frozen=True, kw_only=True):
    """Others get nothing on the reserved nodes (or of the room reserved on each) that will not have ended when it begins."""

    name: Name
    project: Name
    nodes: Annotated[str, Meta(min_length=1, max_length=1024)]
    """Which: `label=value` or `label!=value`, with commas between those that must all hold. `node`, `site`, `region` and `arch` are
    labels of every node; `*` is all."""
    count: Annotated[int, Meta(ge=1, le=1_000_000)] | None = None
    """So many of these, the first by name of those that are there; all of them where absent."""
    cpu: Cores | None = None
    """Of each node. Where cpu, memory and gpu are all absent, whole nodes are reserved."""
    memory: Bytes | None = None
    gpu: Annotated[int, Meta(ge=1, le=1_000)] | None = None
    """Whole devices of each node."""
    start: float | None = None
    """Seconds since the epoch; when it was made where absent."""
    end: float
    note: Annotated[str, Meta(max_length=500)] = ""

    @property
    def whole(self) -> bool:
        """Whether whole nodes are reserved."""
        return self.cpu is None and self.memory is None and self.gpu is None


class Reservation(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A reservation; `spec.start` is always given. Writer: API."""

    spec: ReservationSpec
    created_at: float
    by: str = ""

    @property
    def start(self) -> float:
        return self.spec.start if self.spec.start is not None else self.created_at


def check_reservation(spec: ReservationSpec) -> None:
    """Raise Invalid, naming the field, for what contradicts itself."""
    check_selector(spec.nodes)
    if spec.start is not None and not spec.start < spec.end <= spec.start + LENGTH_MAX_S:
        raise Invalid("end: must be after start, by 366 days at most", field="end", mend="give a later end, or leave start out")
