"""Few turns for many: no owner takes them all, and who gets none is told so in time."""

from __future__ import annotations

import asyncio

import pytest
from control_cell import run_virtual

from atoll.model.errors import Exhausted
from atoll.node.turns import Turns


class Taker:
    """Takes a turn, and holds it until told to leave."""

    def __init__(self, turns: Turns, owner: str) -> None:
        self.has = asyncio.Event()
        self._leaves = asyncio.Event()
        self.task = asyncio.create_task(self._run(turns, owner))

    async def _run(self, turns: Turns, owner: str) -> None:
        async with turns.take(owner, "copies", within_s=10):
            self.has.set()
            await self._leaves.wait()

    async def leave(self) -> None:
        self._leaves.set()
        await self.task


def test_one_owner_leaves_turns_for_others_and_who_waits_is_served_in_order() -> None:
    async def main() -> None:
        turns = Turns(4, 2)
        mine = [Taker(turns, "a") for _ in range(4)]
        other = Taker(turns, "b")
        await asyncio.sleep(1)
        assert [taker.has.is_set() for taker in (*mine, other)] == [True, True, False, False, True]
        await mine[1].leave()
        await asyncio.sleep(1)
        assert [taker.has.is_set() for taker in mine] == [True, True, True, False]
        for taker in (mine[0], mine[2], mine[3], other):
            await taker.leave()

    run_virtual(main())


@pytest.mark.parametrize(("owners", "asker", "words"), [("aa", "a", "project 'a' has 2 copies"), ("aabb", "c", "has 4 copies")])
def test_who_gets_no_turn_in_time_is_told_so_and_takes_none_later(owners: str, asker: str, words: str) -> None:
    async def main() -> None:
        turns = Turns(4, 2)
        holders = [Taker(turns, owner) for owner in owners]
        await asyncio.sleep(1)
        began = asyncio.get_running_loop().time()
        with pytest.raises(Exhausted, match=words) as refused:
            async with turns.take(asker, "copies", within_s=10):
                pytest.fail("there was no turn")
        assert asyncio.get_running_loop().time() - began == pytest.approx(10)
        assert refused.value.mend
        for holder in holders:
            await holder.leave()
        again = [Taker(turns, owner) for owner in "ccdd"]
        await asyncio.sleep(1)
        assert all(taker.has.is_set() for taker in again)
        for taker in again:
            await taker.leave()

    run_virtual(main())


def test_one_who_leaves_while_it_waits_or_just_as_it_is_served_keeps_nothing() -> None:
    async def main() -> None:
        turns = Turns(1, 1)
        holder, waits, next_one = Taker(turns, "a"), Taker(turns, "a"), Taker(turns, "a")
        await asyncio.sleep(1)
        holder._leaves.set()
        await asyncio.wait([holder.task])
        waits.task.cancel()
        await asyncio.sleep(1)
        assert waits.task.cancelled()
        assert next_one.has.is_set()
        await next_one.leave()

    run_virtual(main())
