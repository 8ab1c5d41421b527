"""What a server that waits keeps ready, so that one that begins to lead has nothing to load and goes on with what changed last."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

from control_cell import Cell, node, run_virtual
from msgspec import structs

from atoll.control.controllers import run_control
from atoll.control.heir import RECENT_S, RETRY_S, Heir, Joins
from atoll.control.loop import LATER_PER_WAKE
from atoll.model import codec, keys
from atoll.model.ports.store import Put, Revision
from atoll.model.records import Instance, NodeHealth, NodeLiveness, OwnerKind, Status
from atoll.model.spec import AppSpec, Resources
from atoll.model.states import Desired, Phase
from atoll.model.units import Bytes, Cores
from atoll.store.cache import DELTAS_MAX, Deltas, State

WEB = AppSpec(name="web", image="x", resources=Resources(cpu=Cores(0.1), memory=Bytes(1 << 20)))


def web(name: str) -> AppSpec:
    return structs.replace(WEB, name=name)


def joined(joins: Joins) -> dict[str, Any]:
    """Return all that is known, in a form that can be compared."""
    world, snapshot = joins.world, joins.placement.snapshot
    rows = {name: snapshot.row_of(name) for name in sorted(snapshot.nodes)}
    return {
        "owned": {owner: sorted(held) for owner, held in sorted(world.owned.items())},
        "on_node": {name: sorted(held) for name, held in sorted(world.on_node.items()) if held},
        "draining": sorted(world.draining),
        "ids": sorted(world.ids),
        "lost": sorted(world.lost_since),
        "nodes": snapshot.nodes,
        "used": {name: snapshot.used[:, row].tolist() for name, row in rows.items()},
        "standing": {name: int(snapshot.standing[row]) for name, row in rows.items() if row is not None},
        "allocated": {key: snapshot.allocated(key) for key in sorted(joins.world.state.records(Instance))},
        "due": joins.placement.due(1e12),
        "revision": world.revision,
    }


@contextlib.asynccontextmanager
async def waiting(cell: Cell) -> AsyncIterator[Heir]:
    """A second server of the cell, which waits."""
    async with State(cell.store, cell.kinds) as state, Heir(state, cell.clock) as heir:
        yield heir


def test_who_waits_knows_whatever_has_changed_as_one_does_who_starts_from_the_cache() -> None:
    async def main() -> None:
        async with Cell() as cell, waiting(cell) as heir:
            cell.lead()
            cell.agents()
            for name in ("n1", "n2", "n3"):
                await cell.add_node(name)
            await asyncio.sleep(1.0)
            app = await cell.deploy(WEB, replicas=6)
            await cell.deploy(web("other"), replicas=3)
            await cell.until(lambda: cell.ready() == 9)
            await cell.change(app, replicas=2)
            await cell.put(keys.node("n3"), node("n3", cpu=8000))
            await cell.put(keys.node_liveness("n2"), NodeLiveness(name="n2", health=NodeHealth.LOST, since=cell.clock.now()))
            await cell.until(lambda: cell.ready() == 5)
            cell.stop_leading()
            await asyncio.sleep(1.0)
            # Nobody leads, and one is deployed that nothing is known of but by its record.
            await cell.deploy(web("late"), replicas=1)
            late = Instance(
                id="late-a", project="default", owner_kind=OwnerKind.APP, owner="late", release=1, generation=1, created_at=1.0
            )
            await cell.put(keys.instance("default", "late-a"), late)
            await asyncio.sleep(1.0)
            taken = await heir.take(await cell.store.revision())
            afresh = Joins(taken.world.state, cell.clock)
            afresh.rebuild()
            assert joined(taken) == joined(afresh)
            assert "late-a" in taken.world.ids
            assert set(taken.world.later) == set(afresh.world.later)

    run_virtual(main())


def test_what_changed_last_is_decided_about_first_and_what_changed_long_ago_comes_with_the_rest() -> None:
    async def main() -> None:
        async with Cell() as cell, waiting(cell) as heir:
            await cell.deploy(web("long-ago"))
            await asyncio.sleep(RECENT_S + 1.0)
            await cell.deploy(web("before"))
            await asyncio.sleep(1.0)
            await cell.deploy(web("last"))
            await asyncio.sleep(1.0)
            joins = await heir.take(await cell.store.revision())
            assert list(joins.world.dirty) == [(OwnerKind.APP, "default/last"), (OwnerKind.APP, "default/before")]
            assert len(joins.world.later) == 3

    run_virtual(main())


def test_who_has_taken_over_hears_of_all_that_changes_from_then_on_and_of_nothing_twice() -> None:
    async def main() -> None:
        async with Cell() as cell, waiting(cell) as heir:
            await cell.add_node("n1")
            for turn in range(3):
                joins = await heir.take(await cell.store.revision())
                heard: list[str] = []
                joins.told = lambda deltas, heard=heard: heard.extend(delta.key for delta in deltas.deltas)  # type: ignore[misc]
                following = asyncio.ensure_future(joins.follow())
                await cell.add_node(f"new{turn}")
                await asyncio.sleep(1.0)
                assert heard == [f"new{turn}"]
                following.cancel()
                # It leads no more, and waits again.
                heir.begin()

    run_virtual(main())


def test_a_copy_is_of_now_and_changing_it_changes_nothing_whoever_keeps_what_it_is_of() -> None:
    async def main() -> None:
        async with Cell() as cell, waiting(cell) as heir:
            assert heir.copy() is None, "there is nothing yet"
            await cell.add_node("n1")
            await asyncio.sleep(1.0)
            for number in range(2, 5):
                revision = await cell.store.put(keys.node(f"n{number}"), codec.encode(node(f"n{number}")))
                await heir.joins.world.state.reach(revision)
                copied = heir.copy()
                assert copied is not None
                assert len(copied) == number
                copied.remove_node("n1")
                if number == 3:
                    await heir.take(revision)
            assert "n1" in heir.joins.placement.snapshot.nodes

    run_virtual(main())


def test_one_that_fell_behind_the_cache_starts_afresh() -> None:
    async def main() -> None:
        async with Cell() as cell, waiting(cell) as heir:
            await cell.add_node("n1")
            await asyncio.sleep(1.0)
            state = cell.state
            # All in one go, so that nobody has a turn: more than the cache keeps for those who are behind.
            for number in range(DELTAS_MAX + DELTAS_MAX // 2):
                await cell.store.put(keys.node("n2"), codec.encode(node("n2", cpu=1000 + number)))
            await state.reach(await cell.store.revision())
            joins = await heir.take(await cell.store.revision())
            assert joins.placement.snapshot.nodes["n2"].capacity.cpu_milli == 1000 + DELTAS_MAX + DELTAS_MAX // 2 - 1
            assert joins.world.revision == joins.world.state.revision

    run_virtual(main())


def test_one_that_tripped_is_in_no_dry_run_and_is_taken_only_once_it_is_whole_again() -> None:
    async def main() -> None:
        async with Cell() as cell, waiting(cell) as heir:
            await cell.add_node("n1")
            await asyncio.sleep(1.0)
            told = heir.joins.told

            def trip(deltas: Deltas) -> None:
                raise KeyError("a record that breaks it")

            heir.joins.told = trip
            for name in ("n2", "n3"):
                revision = await cell.store.put(keys.node(name), codec.encode(node(name)))
                await heir.joins.world.state.reach(revision)
                assert heir.copy() is None, "neither in the dry run that trips nor in the next"
            await asyncio.sleep(RETRY_S / 2)
            taking = asyncio.ensure_future(heir.take(await cell.store.revision()))
            await asyncio.sleep(RETRY_S / 4)
            assert not taking.done()
            heir.joins.told = told
            taken = await taking
            afresh = Joins(taken.world.state, cell.clock)
            afresh.rebuild()
            assert taken.whole
            assert joined(taken) == joined(afresh)

    run_virtual(main())


def test_who_failed_to_take_over_keeps_ready_afresh() -> None:
    class Failing(Heir):
        taken: Joins | None = None

        async def take(self, at: Revision) -> Joins:
            self.taken = await super().take(at)
            raise KeyError("a record that breaks it")

    async def main() -> None:
        async with Cell() as cell:
            await cell.add_node("n1")
            heir = Failing(cell.state, cell.clock)
            cell.keep(asyncio.ensure_future(run_control(cell.store, cell.state, cell.clock, cell.chance(1), {}, heir=heir)))
            await cell.until(lambda: heir.taken is not None)
            await asyncio.sleep(0.1)
            assert heir.joins is not heir.taken
            assert heir.joins.whole

    run_virtual(main())


def test_a_server_that_takes_over_makes_nothing_anew_and_goes_on_with_what_waits() -> None:
    async def main() -> None:
        async with Cell() as cell:
            cell.agents()
            for name in ("n1", "n2"):
                await cell.add_node(name)
            first = cell.lead("one")
            await asyncio.sleep(1.0)
            second = Cell()
            second.store = cell.store
            second.state = State(cell.store, cell.kinds)
            second.last_seen, second.heartbeats = cell.last_seen, cell.heartbeats
            second.clock = cell.clock
            await second.state.start()
            await cell.deploy(WEB, replicas=4)
            await cell.until(lambda: cell.ready() == 4)
            cell.keep(second.lead("two"))
            await asyncio.sleep(1.0)
            before = {instance.id for instance in cell.instances()}
            first.cancel()
            await asyncio.sleep(0)
            await cell.deploy(web("after"), replicas=1)
            await cell.until(lambda: cell.ready() == 5)
            await asyncio.sleep(30.0)
            assert before < {instance.id for instance in cell.instances()}
            assert len(cell.instances()) == 5
            await second.state.close()

    run_virtual(main())


def test_in_a_large_cell_an_app_that_is_deployed_while_all_are_looked_at_does_not_wait_for_the_others() -> None:
    count = 3 * LATER_PER_WAKE

    async def main() -> None:
        async with Cell() as cell:
            for name in ("n1", "n2", "n3", "n4"):
                await cell.add_node(name, cpu=4_000_000, memory=1 << 50)
            puts: list[Put] = []
            for number in range(30):
                spec, each = web(f"app{number}"), count // 30
                await cell.deploy(spec, replicas=each)
                for index in range(each):
                    one = Instance(
                        id=f"{spec.name}-{index}", project="default", owner_kind=OwnerKind.APP, owner=spec.name, release=1,
                        generation=1, node=f"n{index % 4 + 1}", created_at=1.0, desired=Desired.RUN,
                    )  # fmt: skip
                    said = Status(instance=one.id, project="default", node=one.node or "", phase=Phase.RUNNING, ready=True)
                    puts += [Put(keys.instance("default", one.id), codec.encode(one))]
                    puts += [Put(keys.status("default", one.id), codec.encode(said))]
            for at in range(0, len(puts), 4_000):
                await cell.store.txn([], puts[at : at + 4_000])
            await cell.state.reach(await cell.store.revision())
            await asyncio.sleep(0)
            began = Revision(int(cell.state.revision))
            cell.lead()
            await cell.deploy(web("urgent"), replicas=1)
            written: list[str] = []
            async for deltas in cell.state.changes(Revision(began + 1)):
                written += [delta.key for delta in deltas.deltas if delta.kind.__name__ in ("AppStatus", "Instance")]
                if any("urgent" in key for key in written):
                    break
            # Without its turn before them it would have come last, after the statuses of all thirty.
            assert len(set(written)) < 25, written

    run_virtual(main())
