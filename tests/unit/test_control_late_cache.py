"""The leader's cache is late: nothing is decided from what it has missed, and nothing is begun anew for it."""

from __future__ import annotations

import asyncio

from control_cell import Cell, run_virtual
from late_store import Late

from atoll.control.loop import REACH_S
from atoll.model import keys
from atoll.model.records import AppPhase, Instance
from atoll.model.spec import AppSpec, Port
from atoll.store.cache import State

WEB = AppSpec(name="web", image="x", ports=(Port(port=80),))


def test_while_what_was_written_is_not_seen_nothing_else_is_and_then_it_goes_on() -> None:
    async def main() -> None:
        cell = Cell()
        cell.store = store = Late(cell.clock)
        cell.state = State(store, cell.kinds)
        async with cell:
            for name in ("n1", "n2"):
                await cell.add_node(name)
            cell.agents()
            cell.lead()
            await asyncio.sleep(1)
            await cell.deploy(WEB, replicas=4)
            while not (await store.range(keys.INSTANCES)).items:  # noqa: ASYNC110 - the leader has written, and not heard of it
                await asyncio.sleep(0)
            store.flows.clear()
            await asyncio.sleep(0.5)
            written = await store.revision()
            await asyncio.sleep(4 * REACH_S)
            assert await store.revision() == written, "what it decides now would be decided blindly"
            store.flows.set()
            await cell.until(lambda: (status := cell.app_status()) and status.phase is AppPhase.RUNNING and status.ready == 4)
            assert len(cell.state.records(Instance)) == 4

    run_virtual(main())
