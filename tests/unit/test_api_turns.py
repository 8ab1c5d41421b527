"""Agents' calls take turns: whoever comes in between does not wait for all of them."""

from __future__ import annotations

import asyncio
from itertools import pairwise
from typing import Any

import pytest

from atoll.api.http.turns import PER_TURN, PER_TURN_MAX, Turns, of_agent


@pytest.mark.parametrize(
    ("method", "path", "expected"),
    [
        ("PUT", "/v1/nodes/n1", True),
        ("GET", "/v1/nodes/n1", False),
        ("POST", "/v1/nodes/n1/heartbeat", True),
        ("GET", "/v1/nodes/n1/beats", True),
        ("GET", "/v1/nodes/n1/assignments", True),
        ("POST", "/v1/nodes/n1/statuses", True),
        ("", "/v1/nodes/n1/tunnel", True),
        ("", "/v1/nodes/n1/streams/abc", False),
        ("GET", "/v1/nodes/n1/instances/i/secrets", False),
        ("POST", "/v1/nodes/n1/cordon", False),
        ("GET", "/v1/nodes", False),
        ("PUT", "/v1/nodes/", False),
        ("PUT", "/v1/projects/p/apps/heartbeat", False),
    ],
)
def test_what_agents_ask_for_by_themselves_takes_turns_and_nothing_else(method: str, path: str, expected: bool) -> None:
    assert of_agent(method, path) is expected


class Served:
    """An application that notes what was begun."""

    def __init__(self) -> None:
        self.begun: list[str] = []

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.begun.append(scope["path"])


def calls(turns: Turns, *paths: str) -> list[asyncio.Task[None]]:
    async def one(path: str) -> None:
        await turns({"type": "http", "method": "POST", "path": path}, None, None)  # type: ignore[typeddict-item, arg-type]

    return [asyncio.create_task(one(path)) for path in paths]


async def test_one_who_comes_after_a_thousand_agents_waits_for_few_of_them_and_all_come_in_order() -> None:
    served = Served()
    turns = Turns(served, most=PER_TURN)  # type: ignore[arg-type]
    agents = [f"/v1/nodes/n{number}/statuses" for number in range(1_000)]
    tasks = calls(turns, *agents, "/v1/plan")
    await asyncio.gather(*tasks)
    assert served.begun.index("/v1/plan") <= PER_TURN
    served.begun.remove("/v1/plan")
    assert served.begun == agents


async def test_in_one_turn_of_the_loop_no_more_are_begun_than_are_allowed() -> None:
    served = Served()
    turns = Turns(served, least=3, most=3)  # type: ignore[arg-type]
    tasks = calls(turns, *(f"/v1/nodes/n{number}/heartbeat" for number in range(20)))
    before = 0
    while before < 20:
        await asyncio.sleep(0)
        assert len(served.begun) - before <= 3
        before = len(served.begun)
    await asyncio.gather(*tasks)


async def test_one_that_is_broken_off_while_it_waits_takes_nobodys_turn() -> None:
    served = Served()
    turns = Turns(served, least=1, most=1)  # type: ignore[arg-type]
    tasks = calls(turns, *(f"/v1/nodes/n{number}/heartbeat" for number in range(6)))
    await asyncio.sleep(0)
    for task in tasks[1:5]:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert served.begun == ["/v1/nodes/n0/heartbeat", "/v1/nodes/n5/heartbeat"]
    # And one that comes later goes on at once.
    await asyncio.gather(*calls(turns, "/v1/nodes/n7/heartbeat"))
    assert served.begun[-1] == "/v1/nodes/n7/heartbeat"


class SlowLoop(asyncio.SelectorEventLoop):
    """Of which each turn takes as long as it is told, by its own clock."""

    turn_s = 0.0
    passed_s = 0.0

    def time(self) -> float:
        return self.passed_s

    def _run_once(self) -> None:
        self.passed_s += self.turn_s
        super()._run_once()  # type: ignore[misc]


@pytest.mark.parametrize(
    ("turn_s", "least", "most"), [(0.0, PER_TURN, PER_TURN), (0.04, 39, 40), (1.0, PER_TURN_MAX, PER_TURN_MAX)]
)
def test_where_turns_take_long_for_other_reasons_agents_get_half_of_them(turn_s: float, least: int, most: int) -> None:
    async def main() -> list[int]:
        served = Served()
        turns = Turns(served)  # type: ignore[arg-type]
        tasks = calls(turns, *(f"/v1/nodes/n{number}/heartbeat" for number in range(1_000)))
        begun = [0]
        while begun[-1] < 1_000:
            await asyncio.sleep(0)
            begun.append(len(served.begun))
        await asyncio.gather(*tasks)
        return [after - before for before, after in pairwise(begun)]

    loop = SlowLoop()
    loop.turn_s = turn_s
    try:
        each = loop.run_until_complete(main())
    finally:
        loop.close()
    assert least <= max(each) <= most
    assert sum(count >= least for count in each) >= 1_000 // most - 2


def test_for_a_moment_after_a_leaders_death_one_begins_in_a_turn_and_then_as_many_as_before() -> None:
    async def main() -> tuple[list[int], list[float]]:
        served = Served()
        turns = Turns(served)  # type: ignore[arg-type]
        tasks = calls(turns, *(f"/v1/nodes/n{number}/heartbeat" for number in range(200)))
        turns.hold(1.0)
        begun, at = [0], [0.0]
        while begun[-1] < 200:
            await asyncio.sleep(0)
            begun.append(len(served.begun))
            at.append(asyncio.get_running_loop().time())
        await asyncio.gather(*tasks)
        return [after - before for before, after in pairwise(begun)], at[1:]

    loop = SlowLoop()
    loop.turn_s = 0.02
    try:
        each, at = loop.run_until_complete(main())
    finally:
        loop.close()
    assert max(count for count, when in zip(each, at, strict=True) if when < 1.0) == 1
    assert max(each) == 20
