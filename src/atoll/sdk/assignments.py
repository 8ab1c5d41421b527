"""Batches of assignments, read one assignment at a time where one of them is not understood.

A server of the next version may assign an instance whose spec uses what this version does not know. That one is kept as the node
has it, if it does, and told; the others are taken.
"""

from __future__ import annotations

import msgspec
import structlog
from msgspec.structs import replace

from atoll.model import codec
from atoll.model.errors import Invalid
from atoll.model.ports.control_plane import AssignmentBatch, Unread
from atoll.model.records import Assignment
from atoll.model.states import Desired

WHY_CHARS_MAX = 300
log = structlog.get_logger()


class _Named(msgspec.Struct, frozen=True):
    """What must be readable of an instance, or a node could not tell which of its own it is not to remove."""

    id: str
    project: str
    desired: str = Desired.RUN


class _Outline(msgspec.Struct, frozen=True):
    instance: _Named


def read_assignments(line: bytes) -> AssignmentBatch:
    """Return the batch in a line of the stream. Raises Invalid for one of which more than some assignments is not understood."""
    try:
        return codec.decode_known(line, AssignmentBatch)
    except Invalid as error:
        refused = error
    try:
        value = msgspec.json.decode(line)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        raise refused from None
    if not isinstance(value, dict) or not isinstance(value.get("put"), list):
        raise refused
    batch = codec.convert_known({**value, "put": []}, AssignmentBatch)
    put, kept, unread = [], dict(batch.kept), []
    for one in value["put"]:
        try:
            put.append(codec.convert_known(one, Assignment))
        except Invalid as error:
            named = codec.convert_known(one, _Outline).instance
            log.error("an assignment is not understood and is left as it is here", instance=named.id, cause=error.message)
            kept[named.id] = Desired(named.desired) if named.desired in set(Desired) else Desired.RUN
            unread.append(Unread(named.project, named.id, error.message[:WHY_CHARS_MAX]))
    return replace(batch, put=tuple(put), kept=kept, unread=tuple(unread))
