"""Agents' calls take turns: whoever comes in between does not wait for all of them."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from atoll.api.http.turns import PER_TURN, Turns, of_agent


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
    turns = Turns(served)  # type: ignore[arg-type]
    agents = [f"/v1/nodes/n{number}/statuses" for number in range(1_000)]
    tasks = calls(turns, *agents, "/v1/plan")
    await asyncio.gather(*tasks)
    assert served.begun.index("/v1/plan") <= PER_TURN
    served.begun.remove("/v1/plan")
    assert served.begun == agents


async def test_in_one_turn_of_the_loop_no_more_are_begun_than_are_allowed() -> None:
    served = Served()
    turns = Turns(served, per_turn=3)  # type: ignore[arg-type]
    tasks = calls(turns, *(f"/v1/nodes/n{number}/heartbeat" for number in range(20)))
    before = 0
    while before < 20:
        await asyncio.sleep(0)
        assert len(served.begun) - before <= 3
        before = len(served.begun)
    await asyncio.gather(*tasks)


async def test_one_that_is_broken_off_while_it_waits_takes_nobodys_turn() -> None:
    served = Served()
    turns = Turns(served, per_turn=1)  # type: ignore[arg-type]
    tasks = calls(turns, *(f"/v1/nodes/n{number}/heartbeat" for number in range(6)))
    await asyncio.sleep(0)
    for task in tasks[1:5]:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert served.begun == ["/v1/nodes/n0/heartbeat", "/v1/nodes/n5/heartbeat"]
    # And one that comes later goes on at once.
    await asyncio.gather(*calls(turns, "/v1/nodes/n7/heartbeat"))
    assert served.begun[-1] == "/v1/nodes/n7/heartbeat"
