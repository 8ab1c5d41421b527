"""The exact way to answer a `layout.Question`, and the process that does so: `python -m atoll.scheduling.optimiser`.

The solver's kernels are compiled at first use, which takes a processor some 20 s, and memory: nobody who leads may wait for that.
A question is one frame on stdin (a length of 4 bytes, then msgpack), its layout one on stdout. It ends with its stdin.
"""

from __future__ import annotations

import os
import sys
from typing import BinaryIO

import msgspec
import numpy as np
from msgspec import Struct

from atoll.scheduling.geography import Floats
from atoll.scheduling.layout import Question, layout_of
from atoll.scheduling.snapshot import Ints
from atoll.scheduling.whereabouts import Layout

FRAME_BYTES_MAX = 64 << 20
"""2,000 places by 2,000 sites are half of that."""
NICE = 10


class _Wire(Struct, frozen=True, kw_only=True):
    """A question with its arrays as bytes, row by row."""

    sites: tuple[str, ...]
    latency_ms: bytes
    demand: bytes
    room: bytes
    count: int
    current: bytes
    site_cost: bytes
    latency_ms_max: float
    move_cost: float


def solve(question: Question) -> Layout:
    """Return where the replicas should be, beginning from where they are: what does not gain its cost is not moved.

    The same question gives the same answer. Raises Invalid for arrays that do not fit each other.
    """
    from atoll.scheduling.world import Problem, choose  # it imports the compiler

    problem = Problem(
        latency_ms=question.latency_ms,
        demand=question.demand,
        room=question.room,
        count=question.count,
        replica_capacity=question.replica_capacity,
        site_cost=question.site_cost,
        latency_ms_max=question.latency_ms_max,
        move_cost=question.move_cost,
    )
    choice = choose(problem, question.current if question.current.any() else None)
    return layout_of(question, choice.replicas.tolist(), choice.flow)


def encode_question(question: Question) -> bytes:
    """Return the question as a frame's content."""
    wire = _Wire(
        sites=question.sites,
        latency_ms=_bytes(question.latency_ms),
        demand=_bytes(question.demand),
        room=question.room.astype("<i8").tobytes(),
        count=question.count,
        current=question.current.astype("<i8").tobytes(),
        site_cost=_bytes(question.site_cost),
        latency_ms_max=question.latency_ms_max,
        move_cost=question.move_cost,
    )
    return msgspec.msgpack.encode(wire)


def decode_question(data: bytes) -> Question:
    """Return the question that `encode_question` has written. Raises msgspec.DecodeError, ValueError."""
    wire = msgspec.msgpack.decode(data, type=_Wire)
    demand = _floats(wire.demand)
    return Question(
        sites=wire.sites,
        latency_ms=_floats(wire.latency_ms).reshape(len(demand), len(wire.sites)),
        demand=demand,
        room=_ints(wire.room),
        count=wire.count,
        current=_ints(wire.current),
        site_cost=_floats(wire.site_cost),
        latency_ms_max=wire.latency_ms_max,
        move_cost=wire.move_cost,
    )


def decode_layout(data: bytes) -> Layout:
    """Return what the process has answered. Raises msgspec.DecodeError."""
    return msgspec.msgpack.decode(data, type=Layout)


def read_frame(source: BinaryIO) -> bytes | None:
    """Return the next frame's content; None at the end. Raises ValueError for one that is cut off or too large."""
    head = source.read(4)
    if not head:
        return None
    length = int.from_bytes(head, "big")
    if len(head) < 4 or length > FRAME_BYTES_MAX:
        raise ValueError(f"a frame of {length} bytes is not taken")
    data = source.read(length)
    if len(data) < length:
        raise ValueError("a frame was cut off")
    return data


def framed(data: bytes) -> bytes:
    return len(data).to_bytes(4, "big") + data


def main() -> None:
    """Answer questions until stdin ends."""
    os.nice(NICE)
    while (data := read_frame(sys.stdin.buffer)) is not None:
        sys.stdout.buffer.write(framed(msgspec.msgpack.encode(solve(decode_question(data)))))
        sys.stdout.buffer.flush()


def _bytes(array: Floats) -> bytes:
    return np.ascontiguousarray(array, dtype="<f8").tobytes()


def _floats(data: bytes) -> Floats:
    return np.frombuffer(data, dtype="<f8").astype(np.float64)


def _ints(data: bytes) -> Ints:
    return np.frombuffer(data, dtype="<i8").astype(np.int64)


if __name__ == "__main__":
    main()
