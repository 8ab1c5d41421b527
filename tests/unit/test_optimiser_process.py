"""The process that answers questions about layouts: as exact as here, and nobody waits for it for ever."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys

import numpy as np
import pytest

from atoll.control.optimiser import ProcessOptimiser
from atoll.model.errors import Unavailable
from atoll.scheduling.layout import Question
from atoll.scheduling.optimiser import decode_question, encode_question, solve


def question(count: int = 3) -> Question:
    return Question(
        sites=("a", "b", "c"),
        latency_ms=np.array([[1.0, 50.0, 90.0], [50.0, 1.0, 120.0]]),
        demand=np.array([0.7, 0.3]),
        room=np.array([5, 5, 5], dtype=np.int64),
        count=count,
        current=np.array([0, 0, 2], dtype=np.int64),
        site_cost=np.zeros(3),
        latency_ms_max=float("inf"),
        move_cost=1.0,
    )


def test_a_question_comes_back_as_it_was_written() -> None:
    before = question()
    after = decode_question(encode_question(before))
    for field in before.__struct_fields__:
        assert np.array_equal(getattr(after, field), getattr(before, field)), field


async def test_the_process_answers_as_exactly_as_here_is_started_again_after_it_has_died_and_rests() -> None:
    optimiser = ProcessOptimiser()
    try:
        first = await optimiser.solve(question())
        assert first == solve(question())
        before = optimiser.pid
        assert before is not None
        os.kill(before, signal.SIGKILL)
        with contextlib.suppress(Unavailable):
            await optimiser.solve(question(2))  # it may die under the question
        assert (await optimiser.solve(question(2))).wanted == solve(question(2)).wanted
        assert optimiser.pid not in (None, before)
    finally:
        await optimiser.rest()
    assert optimiser.pid is None


async def test_who_asks_is_answered_in_time_whatever_becomes_of_the_process() -> None:
    optimiser = ProcessOptimiser(answer_s=0.0)
    with pytest.raises(Unavailable, match="does not answer"):
        await optimiser.solve(question())
    assert optimiser.pid is None


def test_a_leader_never_loads_the_compiler() -> None:
    code = "import sys, atoll.control.controllers, atoll.entry.server; sys.exit('numba' in sys.modules)"

    async def run() -> int:
        process = await asyncio.create_subprocess_exec(sys.executable, "-c", code)
        return await process.wait()

    assert asyncio.run(run()) == 0
