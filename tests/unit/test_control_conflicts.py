"""What could not be written because something had changed is decided again at once, and ever later when that goes on."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from control_cell import Cell, LoopClock, run_virtual

from atoll.control.quarrels import AGAIN_MAX_S, AGAIN_MIN_S, Quarrels
from atoll.control.world import KINDS
from atoll.model import keys
from atoll.model.ports.store import Compare, Op, Put, TxnResult
from atoll.model.spec import AppSpec, JobSpec, Placement
from atoll.store.cache import State
from atoll.store.memory import MemoryStore


class Quarrelsome(MemoryStore):
    """Refuses to give `victim`'s instances a node, `times` times, as if someone were always faster."""

    def __init__(self, victim: str, times: int) -> None:
        super().__init__(LoopClock())
        self.prefix = keys.INSTANCES + f"default/{victim}-"
        self.left = times
        self.refused: list[float] = []

    async def txn(self, compare: Sequence[Compare], then: Sequence[Op], otherwise: Sequence[Op] = ()) -> TxnResult:
        if self.left and any(isinstance(op, Put) and op.key.startswith(self.prefix) and b'"node":' in op.value for op in then):
            others = any(not op.key.startswith((self.prefix, keys.EVENTS)) for op in then)
            if not others:
                self.left -= 1
                self.refused.append(asyncio.get_running_loop().time())
            return TxnResult(succeeded=False, revision=await self.revision())
        return await super().txn(compare, then, otherwise)


def cell_on(store: Quarrelsome) -> Cell:
    cell = Cell()
    cell.store = store
    cell.state = State(store, KINDS)
    return cell


def nodes_of(cell: Cell, name: str) -> list[str | None]:
    return [instance.node for instance in cell.instances() if instance.owner == name]


def test_the_first_conflict_is_decided_again_at_once_and_a_quarrel_ever_later() -> None:
    quarrels = Quarrels()
    delays = [quarrels.delay_s("a") for _ in range(40)]
    assert delays[:4] == [0.0, AGAIN_MIN_S, 2 * AGAIN_MIN_S, 4 * AGAIN_MIN_S]
    assert delays == sorted(delays)
    assert delays[-1] == AGAIN_MAX_S
    assert quarrels.delay_s("b") == 0.0
    quarrels.settled(["a", "c"])
    assert quarrels.delay_s("a") == 0.0
    assert quarrels.delay_s("b") == AGAIN_MIN_S


def test_a_part_of_a_plan_that_is_refused_once_costs_no_time() -> None:
    async def main() -> None:
        store = Quarrelsome("web", 1)
        async with cell_on(store) as cell:
            cell.lead()
            await cell.deploy(AppSpec(name="web", image="x"))
            await cell.until(lambda: nodes_of(cell, "web") == [None])
            await cell.add_node("n1")
            await cell.until(lambda: nodes_of(cell, "web") == ["n1"])
            assert len(store.refused) == 1
            assert asyncio.get_running_loop().time() - store.refused[0] < AGAIN_MIN_S

    run_virtual(main())


def test_a_quarrel_without_end_is_no_hot_loop_and_holds_up_nobody_else() -> None:
    async def main() -> None:
        store = Quarrelsome("web", 1_000_000)
        async with cell_on(store) as cell:
            cell.agents()
            cell.lead()
            await cell.deploy(AppSpec(name="web", image="x"))
            await cell.until(lambda: nodes_of(cell, "web") == [None])
            await cell.add_node("n1")
            await asyncio.sleep(30)
            assert 5 <= len(store.refused) <= 20
            began = asyncio.get_running_loop().time()
            await cell.deploy(AppSpec(name="other", image="x"))
            await cell.until(lambda: nodes_of(cell, "other") == ["n1"])
            assert asyncio.get_running_loop().time() - began < 0.1
            store.left = 0
            await cell.until(lambda: nodes_of(cell, "web") == ["n1"], 2 * AGAIN_MAX_S)

    run_virtual(main())


def test_a_gang_that_was_refused_is_written_as_a_whole_later() -> None:
    async def main() -> None:
        store = Quarrelsome("train", 3)
        async with cell_on(store) as cell:
            cell.lead()
            await cell.add_node("n1")
            seen: set[int] = set()
            cell.watchers.append(lambda: seen.add(sum(node is not None for node in nodes_of(cell, "train"))))
            cell.agents()
            await cell.submit(JobSpec(name="train", image="x", completions=5, parallelism=5, placement=Placement(gang=True)))
            await cell.until(lambda: nodes_of(cell, "train") == ["n1"] * 5)
            assert len(store.refused) == 3
            assert seen <= {0, 5}

    run_virtual(main())
