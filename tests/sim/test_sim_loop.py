"""The virtual event loop: time jumps, order repeats, nothing hangs."""

from __future__ import annotations

import asyncio
import random

import pytest

from atoll.sim.clock import EPOCH, VirtualClock
from atoll.sim.loop import Deadlock, Livelock, run_virtual


def test_timers_fire_in_order_and_take_no_real_time() -> None:
    fired: list[tuple[float, str]] = []

    async def sleeper(name: str, span_s: float) -> None:
        await asyncio.sleep(span_s)
        fired.append((asyncio.get_running_loop().time(), name))

    async def main() -> None:
        await asyncio.gather(sleeper("day", 86_400), sleeper("hour", 3_600), sleeper("second", 1))

    run_virtual(main, random.Random(1), shuffle=1.0)
    assert fired == [(1, "second"), (3_600, "hour"), (86_400, "day")]


def test_the_clock_follows_the_loop() -> None:
    async def main() -> tuple[float, float]:
        clock = VirtualClock(asyncio.get_running_loop(), skew_s=0.25)
        await asyncio.sleep(7.5)
        return clock.monotonic(), clock.now()

    assert run_virtual(main, random.Random(1)) == (7.5, EPOCH + 7.75)


def test_deadlines_hold_in_virtual_time() -> None:
    async def main() -> float:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(5):
                await asyncio.sleep(3600)
        return asyncio.get_running_loop().time()

    assert run_virtual(main, random.Random(1)) == 5


def order_of(seed: int, shuffle: float) -> list[int]:
    ran: list[int] = []

    async def step(number: int) -> None:
        for _ in range(3):
            await asyncio.sleep(0)
            ran.append(number)

    async def main() -> None:
        async with asyncio.TaskGroup() as group:
            for number in range(10):
                group.create_task(step(number))

    run_virtual(main, random.Random(seed), shuffle=shuffle)
    return ran


def test_the_seed_chooses_the_order_and_repeats_it() -> None:
    assert order_of(1, 1.0) == order_of(1, 1.0)
    assert order_of(1, 1.0) != order_of(2, 1.0)
    assert order_of(1, 0.0) == order_of(2, 0.0) == [*range(10)] * 3


def test_sets_of_tasks_are_iterated_in_one_order() -> None:
    def names() -> list[str]:
        async def main() -> list[str]:
            tasks = {asyncio.create_task(asyncio.sleep(1), name=str(number)) for number in range(50)}
            return [task.get_name() for task in tasks]

        return run_virtual(main, random.Random(1))

    first = names()
    keep = [object() for _ in range(1000)]
    assert names() == first
    assert keep


def test_a_wait_that_nobody_could_end_is_told() -> None:
    async def main() -> None:
        await asyncio.Event().wait()

    with pytest.raises(Deadlock):
        run_virtual(main, random.Random(1))


def test_a_loop_that_never_lets_time_pass_is_told() -> None:
    async def main() -> None:
        while True:  # noqa: ASYNC110 - that is what is to be caught
            await asyncio.sleep(0)

    with pytest.raises(Livelock):
        run_virtual(main, random.Random(1))


def test_threads_are_done_at_once_and_errors_reach_the_caller() -> None:
    async def main() -> int:
        with pytest.raises(ZeroDivisionError):
            await asyncio.to_thread(lambda: 1 // 0)
        return await asyncio.to_thread(lambda: 5)

    assert run_virtual(main, random.Random(1)) == 5


def test_all_tasks_are_over_when_a_run_is() -> None:
    ended: list[str] = []

    async def forever() -> None:
        try:
            await asyncio.sleep(1e9)
        finally:
            await asyncio.sleep(1)
            ended.append("forever")

    async def main() -> None:
        left = asyncio.create_task(forever())
        await asyncio.sleep(0)
        assert not left.done()

    run_virtual(main, random.Random(1))
    assert ended == ["forever"]
