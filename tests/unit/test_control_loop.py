"""The leader's loop on a store in memory with scripted agents, in virtual time."""

from __future__ import annotations

import asyncio
import random
from itertools import pairwise
from typing import Any

import pytest
from control_cell import START, Cell, LoopClock, crash_loops, fails, healthy, run_virtual, succeeds
from msgspec import structs

from atoll.control.controllers import run_control
from atoll.control.leader import LEASE_S
from atoll.model import codec, keys
from atoll.model.errors import OutcomeUnknown, TooLarge, Unavailable
from atoll.model.ports.store import Put
from atoll.model.records import (
    App,
    AppPhase,
    AppStatus,
    Drained,
    Event,
    Instance,
    Job,
    JobPhase,
    JobStatus,
    NodeHealth,
    NodeLiveness,
    NodePolicy,
    Release,
    RouteClaim,
    Status,
)
from atoll.model.spec import AppSpec, JobSpec, Placement, Port, Resources, Rollout
from atoll.model.states import Desired, Phase
from atoll.model.units import Bytes, Cores, Seconds
from atoll.store.cache import State
from atoll.store.memory import MemoryStore

WEB = AppSpec(name="web", image="x", ports=(Port(port=80),), rollout=Rollout(deadline=Seconds(60), drain=Seconds(20)))


def big(memory: int, **more: Any) -> AppSpec:
    resources = Resources(cpu=Cores(0.1), memory=Bytes(memory))
    return AppSpec(name="web", image="x", resources=resources, **more)


def running(cell: Cell, name: str = "web") -> bool:
    status = cell.app_status(name)
    app = cell.state.get(App, f"default/{name}")
    return bool(
        status and app and status.phase is AppPhase.RUNNING and status.updated == app.record.replicas == len(cell.instances())
    )


async def start(cell: Cell, *nodes: str) -> None:
    for name in nodes or ("n1", "n2"):
        await cell.add_node(name)
    cell.agents()
    cell.lead()
    await asyncio.sleep(1)


def test_a_new_app_costs_one_transaction_until_all_its_instances_have_nodes() -> None:
    async def main() -> None:
        async with Cell() as cell:
            await start(cell)
            before = await cell.store.revision()
            await cell.deploy(WEB, replicas=2)
            await cell.until(cell.instances)
            assert cell.state.revision == before + 3, "release, app, and one of control's"
            assert sorted(i.node or "" for i in cell.instances()) == ["n1", "n2"]
            await cell.until(lambda: running(cell))
            assert cell.ready() == 2
            assert cell.codes()[:4] == ["instances-created", "app-deployed", "instance-placed", "instance-placed"]
            assert cell.codes()[-1] == "rollout-finished"

    run_virtual(main())


def test_a_quiet_cell_writes_nothing() -> None:
    async def main() -> None:
        async with Cell() as cell:
            await start(cell)
            await cell.deploy(WEB, replicas=3)
            await cell.until(lambda: running(cell))
            await cell.quiet(5)
            assert await cell.quiet(300) == 0

    run_virtual(main())


def test_a_new_release_serves_before_the_old_one_leaves_and_drains_before_it_stops() -> None:
    async def main() -> None:
        async with Cell() as cell:
            await start(cell)
            await cell.add_ingress()
            app = await cell.deploy(WEB, replicas=3)
            await cell.until(lambda: running(cell))
            least, seen = 3, set[str]()

            def watch() -> None:
                nonlocal least
                least = min(least, cell.ready())
                for instance in cell.instances():
                    if instance.desired is not Desired.RUN:
                        seen.add(f"{instance.desired} {instance.id}")

            cell.watchers.append(watch)
            old = {i.id for i in cell.instances()}
            await cell.deploy(WEB, release=2, replicas=3)
            await cell.until(lambda: running(cell) and not old & {i.id for i in cell.instances()})
            assert least == 3
            assert {i.release for i in cell.instances()} == {2}
            assert seen == {f"drain {id}" for id in old} | {f"stop {id}" for id in old}
            assert not cell.state.records(Drained)
            assert len(cell.state.records(Status)) == 3
            status = cell.app_status()
            assert status is not None
            assert status.served_release == 2
            await cell.change(structs.replace(app, release=2), generation=2)
            await cell.until(lambda: running(cell) and {i.generation for i in cell.instances()} == {2})
            assert least == 3

    run_virtual(main())


def test_an_ingress_that_never_answers_holds_a_drain_no_longer_than_its_time() -> None:
    async def main() -> None:
        async with Cell() as cell:
            await start(cell)
            await cell.add_ingress("gone")
            cell.silent.add("gone")
            app = await cell.deploy(WEB, replicas=1)
            await cell.until(lambda: running(cell))
            began = cell.clock.now()
            await cell.change(app, replicas=0)
            await cell.until(lambda: not cell.instances())
            assert 20 <= cell.clock.now() - began < 21

    run_virtual(main())


def test_an_app_without_http_goes_straight_to_stop() -> None:
    async def main() -> None:
        async with Cell() as cell:
            await start(cell)
            await cell.add_ingress()
            app = await cell.deploy(AppSpec(name="web", image="x"), replicas=2)
            await cell.until(lambda: running(cell))
            await cell.change(app, replicas=1)
            await cell.until(lambda: running(cell))
            assert "draining" not in cell.codes()
            assert cell.codes().count("stopped") == 1

    run_virtual(main())


def test_a_release_that_crashes_fails_with_the_reason_and_does_not_storm() -> None:
    async def main() -> None:
        async with Cell() as cell:
            await start(cell)
            await cell.add_ingress()
            await cell.deploy(WEB, replicas=3)
            await cell.until(lambda: running(cell))
            old = {i.id for i in cell.instances()}
            cell.script = crash_loops
            before = await cell.store.revision()
            await cell.deploy(WEB, release=2, replicas=3)
            await cell.until(lambda: (s := cell.app_status()) and s.phase is AppPhase.FAILED)
            status = cell.app_status()
            assert status is not None
            assert "exited with status 1" in status.message
            assert status.served_release == 1
            assert {i.id for i in cell.instances() if (s := cell.status(i)) and s.ready} >= old
            assert await cell.store.revision() - before < 60
            assert cell.codes()[-1] == "rollout-failed"
            cell.script = healthy
            await cell.deploy(WEB, release=3, replicas=3)
            await cell.until(lambda: running(cell) and {i.release for i in cell.instances()} == {3})

    run_virtual(main())


def test_what_fails_for_good_is_replaced_with_a_growing_delay() -> None:
    async def main() -> None:
        async with Cell() as cell:
            await start(cell)
            cell.script = fails
            await cell.deploy(WEB, replicas=1)
            made = []
            for _ in range(6):
                known = {i.id for i in cell.instances()} if made else set()
                await cell.until(lambda known=known: {i.id for i in cell.instances()} - known, 200)
                made.append(cell.instances()[0].created_at)
            gaps = [later - earlier for earlier, later in pairwise(made)]
            assert all(1.5 < later / earlier < 2.5 for earlier, later in pairwise(gaps)), gaps

    run_virtual(main())


@pytest.mark.parametrize("ingress", [True, False])
def test_a_deleted_app_leaves_nothing_behind(ingress: bool) -> None:
    async def main() -> None:
        async with Cell() as cell:
            await start(cell)
            if ingress:
                await cell.add_ingress()
            app = await cell.deploy(WEB, replicas=3)
            other = await cell.deploy(AppSpec(name="web2", image="x"), replicas=1)
            await cell.put(keys.route("web.localhost", "/"), RouteClaim(project="default", app="web"))
            await cell.put(keys.route("web2.localhost", "/"), RouteClaim(project="default", app="web2"))
            await cell.until(lambda: cell.ready() == 4)
            await cell.change(app, deleting=True)
            await cell.until(lambda: cell.state.get(App, "default/web") is None)
            await asyncio.sleep(5)
            assert [i.owner for i in cell.instances()] == ["web2"]
            for kind in (App, AppStatus, Release, Status, RouteClaim):
                assert len(cell.state.records(kind)) == 1, kind
            assert not cell.state.records(Drained)
            assert cell.state.get(App, f"default/{other.name}") is not None

    run_virtual(main())


def test_instances_of_a_lost_node_are_replaced_elsewhere() -> None:
    async def main() -> None:
        async with Cell() as cell:
            await start(cell)
            await cell.deploy(WEB, replicas=4)
            await cell.until(lambda: running(cell))
            cell.silent.add("n1")
            died = cell.clock.now()
            await cell.until(lambda: health(cell, "n1") is NodeHealth.UNREACHABLE)
            assert 13 < cell.clock.now() - died < 18
            assert cell.ready() == 4, "it may well serve on"
            await cell.until(lambda: health(cell, "n1") is NodeHealth.LOST)
            assert 58 < cell.clock.now() - died < 63
            await cell.until(lambda: running(cell) and {i.node for i in cell.instances()} == {"n2"})
            cell.silent.clear()
            await cell.until(lambda: health(cell, "n1") is NodeHealth.READY)
            assert [c for c in cell.codes() if c.startswith("node-")] == [
                "node-unreachable",
                "node-lost",
                "node-unreachable",
                "node-ready",
            ]

    run_virtual(main())


def health(cell: Cell, name: str) -> NodeHealth | None:
    held = cell.state.get(NodeLiveness, name)
    return held.record.health if held else None


def test_a_lost_node_that_comes_back_keeps_its_instances_when_there_was_no_other_place() -> None:
    async def main() -> None:
        async with Cell() as cell:
            await start(cell, "only")
            await cell.deploy(WEB, replicas=2)
            await cell.until(lambda: running(cell))
            before = {i.id for i in cell.instances()}
            cell.silent.add("only")
            await cell.until(lambda: health(cell, "only") is NodeHealth.LOST)
            await asyncio.sleep(30)
            cell.silent.clear()
            await cell.until(lambda: running(cell))
            assert {i.id for i in cell.instances()} == before

    run_virtual(main())


def test_a_new_leader_gives_nodes_time_to_report() -> None:
    async def main() -> None:
        async with Cell() as cell:
            await cell.add_node("n1")
            await cell.add_node("n2")
            await asyncio.sleep(1000)
            cell.lead()
            await asyncio.sleep(10)
            cell.last_seen["n1"] = cell.clock.monotonic()
            await asyncio.sleep(7)
            assert health(cell, "n1") is None
            assert health(cell, "n2") is NodeHealth.UNREACHABLE

    run_virtual(main())


def test_what_does_not_fit_says_why_and_is_placed_when_room_comes() -> None:
    async def main() -> None:
        async with Cell() as cell:
            await cell.add_node("n1", memory=1 << 30)
            cell.agents()
            cell.lead()
            app = await cell.deploy(big(512 << 20), replicas=3)
            await cell.until(lambda: cell.ready() == 2)
            (waiting,) = [i for i in cell.instances() if i.node is None]
            assert waiting.rejection is not None
            assert waiting.rejection.code == "no-memory"
            assert waiting.rejection.failed == {"memory": 1}
            assert waiting.rejection.mend == "needs 512.0MiB more memory on the best node, n1"
            status = cell.app_status()
            assert status is not None
            assert "with too little memory free" in status.message
            await cell.quiet(5)
            assert await cell.quiet(60) <= 2, "a rejection is not written again and again"
            await cell.add_node("n2")
            await cell.until(lambda: running(cell))
            assert app.name == "web"

    run_virtual(main())


def test_what_does_not_fit_is_placed_when_room_comes_though_the_date_was_set_back_an_hour_before() -> None:
    class SetClock(LoopClock):
        ahead_s = 3600.0

        def now(self) -> float:
            return super().now() + self.ahead_s

    async def main() -> None:
        async with Cell() as cell:
            cell.clock = clock = SetClock()
            await start(cell, "n1")
            await cell.deploy(big(6 << 30), replicas=2)
            await cell.until(lambda: cell.ready() == 1)
            # Room comes that is too little: what waits is planned once more, by the wrong date.
            await cell.add_node("n2", memory=1 << 30)
            await cell.quiet(2)
            assert [i.node for i in cell.instances() if i.node is None] == [None]
            clock.ahead_s = 0.0
            await cell.quiet(2)
            await cell.add_node("n3")
            await cell.quiet(10)
            assert sorted(i.node or "" for i in cell.instances()) == ["n1", "n3"]

    run_virtual(main())


def test_a_cordoned_node_gets_nothing_new() -> None:
    async def main() -> None:
        async with Cell() as cell:
            await start(cell)
            await cell.put(keys.node_policy("n1"), NodePolicy(name="n1", cordoned=True))
            await cell.deploy(WEB, replicas=3)
            await cell.until(lambda: running(cell))
            assert {i.node for i in cell.instances()} == {"n2"}

    run_virtual(main())


def test_the_api_stops_an_instance_and_it_is_replaced() -> None:
    async def main() -> None:
        async with Cell() as cell:
            await start(cell)
            await cell.add_ingress()
            await cell.deploy(WEB, replicas=2)
            await cell.until(lambda: running(cell))
            victim = cell.instances()[0]
            drained = structs.replace(victim, desired=Desired.DRAIN, reason="by hand")
            await cell.put(keys.instance("default", victim.id), drained)
            await cell.until(lambda: running(cell) and victim.id not in {i.id for i in cell.instances()})

    run_virtual(main())


def test_an_old_leader_writes_nothing_once_another_leads() -> None:
    async def main() -> None:
        async with Cell() as cell:
            await start(cell)
            held = await cell.store.get(keys.LEADER)
            assert held is not None
            # The old one is paused while its lease runs out, and another takes over.
            await cell.store.lease_revoke(held.lease)
            await cell.store.put(keys.LEADER, b"other")
            await cell.deploy(WEB, replicas=2)
            await asyncio.sleep(30)
            assert cell.instances() == []
            await cell.store.delete(keys.LEADER)
            await cell.until(lambda: running(cell))

    run_virtual(main())


def test_the_next_server_takes_over_when_the_leader_dies() -> None:
    async def main() -> None:
        async with Cell() as cell:
            await cell.add_node("n1")
            cell.agents()
            lease = await cell.store.lease_grant(LEASE_S)
            await cell.store.txn([], [Put(keys.LEADER, b"dead", lease.id)])
            cell.lead("second")
            await cell.deploy(WEB, replicas=1)
            began = cell.clock.now()
            await cell.until(lambda: running(cell))
            assert LEASE_S - 1 < cell.clock.now() - began < LEASE_S + 2

    run_virtual(main())


def test_a_server_that_starts_again_leads_at_once() -> None:
    async def main() -> None:
        async with Cell() as cell:
            await cell.add_node("n1")
            cell.agents()
            lease = await cell.store.lease_grant(LEASE_S)
            await cell.store.txn([], [Put(keys.LEADER, b"me", lease.id)])
            cell.lead("me")
            await cell.deploy(WEB, replicas=1)
            await cell.until(lambda: running(cell), 1.5)

    run_virtual(main())


class Faulty(MemoryStore):
    """Every `every`th transaction of the leader fails: before it is made, or with an unknown outcome; or the leader dies at it."""

    every = 0
    count = 0
    kill: asyncio.Task[None] | None = None

    async def txn(self, *rest: Any, **named: Any) -> Any:
        if not any(compare.key == keys.LEADER and compare.expected for compare in rest[0]):
            return await super().txn(*rest, **named)
        self.count += 1
        turn = self.count % self.every if self.every else 1
        if turn == 0 and self.kill is not None:
            self.kill.cancel()
            await asyncio.sleep(0)
        elif turn == 0 and self.count % 2:
            raise Unavailable("injected")
        result = await super().txn(*rest, **named)
        if turn == 0 and self.kill is None:
            raise OutcomeUnknown("injected")
        return result


@pytest.mark.parametrize("every", [2, 3, 5, 7])
@pytest.mark.parametrize("kill", [True, False])
def test_deploy_replace_and_delete_survive_failing_writes_and_dying_leaders(every: int, kill: bool) -> None:
    async def main() -> None:
        cell = Cell()
        cell.store = store = Faulty(cell.clock)
        cell.state = State(store, cell.kinds)
        async with cell:
            await start(cell)
            await cell.add_ingress()
            store.every = every

            async def kill_leaders() -> None:
                number = 0
                while True:
                    number += 1
                    chance = cell.chance(number)
                    store.kill = asyncio.ensure_future(
                        run_control(store, cell.state, cell.clock, chance, cell.last_seen, identity="server")
                    )
                    try:
                        await asyncio.gather(store.kill, return_exceptions=True)
                    finally:
                        store.kill.cancel()

            if kill:
                cell.stop_leading()
                cell.keep(asyncio.ensure_future(kill_leaders()))
            app = await cell.deploy(WEB, replicas=3)
            await cell.until(lambda: running(cell), 3000)
            await cell.deploy(WEB, release=2, replicas=3)
            await cell.until(lambda: running(cell) and {i.release for i in cell.instances()} == {2}, 3000)
            assert len(cell.instances()) == 3
            await cell.change(structs.replace(app, release=2), deleting=True)
            await cell.until(lambda: not cell.state.records(App) and not cell.instances(), 3000)
            await asyncio.sleep(120)
            for kind in (AppStatus, Release, Status, Drained):
                assert not cell.state.records(kind), kind

    run_virtual(main())


def test_a_job_runs_every_index_once_and_no_more_at_a_time_than_asked() -> None:
    async def main() -> None:
        async with Cell() as cell:
            await start(cell)
            cell.script = succeeds
            most = 0

            def watch() -> None:
                nonlocal most
                live = [i for i in cell.instances() if not ((s := cell.status(i)) and s.phase.final)]
                most = max(most, len(live))

            cell.watchers.append(watch)
            await cell.submit(JobSpec(name="work", image="x", completions=7, parallelism=3, keep=Seconds(50)))
            await cell.until(lambda: (s := cell.job_status()) and s.phase is JobPhase.SUCCEEDED)
            status = cell.job_status()
            assert status is not None
            assert status.succeeded == tuple(range(7))
            assert status.active == 0
            assert status.finished_at is not None
            assert most == 3
            assert sorted(i.index for i in cell.instances()) == list(range(7)), "their logs live with their records"
            await cell.until(lambda: not cell.state.records(Job), 60)
            assert cell.clock.now() >= status.finished_at + 50
            assert not cell.instances()
            assert not cell.state.records(JobStatus)
            assert not cell.state.records(Status)

    run_virtual(main())


def test_a_failing_index_is_tried_again_with_a_growing_delay_and_then_fails_the_job() -> None:
    async def main() -> None:
        async with Cell() as cell:
            await start(cell)
            cell.script = fails
            await cell.submit(JobSpec(name="work", image="x", completions=2, parallelism=1, retries=3))
            await cell.until(lambda: (s := cell.job_status()) and s.phase is JobPhase.FAILED)
            status = cell.job_status()
            assert status is not None
            assert status.failures == {0: 4, 1: 3} or status.failures[0] == 4
            assert status.message.endswith("exited with status 3 (after 4 tries)")
            at = sorted(held.record.at for held in cell.state.records(Event).values() if held.record.code == "try-failed")
            assert at[-1] - at[0] >= 1 + 2 + 4

    run_virtual(main())


def test_a_job_over_its_deadline_or_cancelled_is_stopped() -> None:
    async def main() -> None:
        async with Cell() as cell:
            await start(cell)
            cell.script = healthy
            await cell.submit(JobSpec(name="slow", image="x", deadline=Seconds(5)))
            job = await cell.submit(JobSpec(name="work", image="x"))
            await cell.until(lambda: (s := cell.job_status()) and s.phase is JobPhase.RUNNING)
            await cell.put(keys.job("default", "work"), structs.replace(job, cancelled=True))
            await cell.until(lambda: (s := cell.job_status()) and s.phase is JobPhase.CANCELLED and s.active == 0)
            await cell.until(lambda: (s := cell.job_status("slow")) and s.phase is JobPhase.FAILED and s.active == 0)
            status = cell.job_status("slow")
            assert status is not None
            assert status.message == "not done within its deadline of 5.0s"
            assert {s.phase for i in cell.instances() if (s := cell.status(i))} == {Phase.STOPPED}
            assert await cell.quiet(60) == 0

    run_virtual(main())


def test_instances_of_a_job_that_is_gone_are_stopped_and_removed() -> None:
    async def main() -> None:
        async with Cell() as cell:
            await start(cell)
            await cell.submit(JobSpec(name="work", image="x", completions=2, parallelism=2))
            await cell.until(lambda: cell.ready() == 2)
            await cell.store.delete(keys.job("default", "work"))
            await cell.until(lambda: not cell.instances())
            await asyncio.sleep(60)
            assert not cell.state.records(JobStatus)

    run_virtual(main())


def test_a_damaged_app_or_node_ends_nothing_that_runs() -> None:
    async def main() -> None:
        async with Cell() as cell:
            await start(cell)
            await cell.deploy(WEB, replicas=2)
            await cell.until(lambda: running(cell))
            before = cell.instances()
            whole = await cell.store.get(keys.app("default", "web"))
            assert whole is not None
            await cell.store.put(keys.app("default", "web"), b"damaged")
            await cell.store.put(keys.node("n1"), b"damaged")
            await cell.report(before[0], restarts=1)
            await asyncio.sleep(400)
            assert cell.instances() == before
            await cell.store.put(keys.app("default", "web"), whole.value)
            await asyncio.sleep(30)
            assert cell.instances() == before

    run_virtual(main())


def test_orphans_and_old_events_are_collected() -> None:
    async def main() -> None:
        async with Cell() as cell:
            await cell.put(keys.status("default", "web-gone"), status_of("web-gone"))
            await cell.put(keys.drained("web-gone", "g"), Drained(instance="web-gone", ingress="g", at=0))
            for number in range(1100):
                at = START - number
                event = Event(id=f"{number:06d}", at=at, project="default", subject="app/x", code="c", message="")
                await cell.store.put(keys.event("default", event.id), codec.encode(event))
            old = Event(id="old", at=START - 400_000, project="quiet", subject="app/x", code="c", message="")
            await cell.put(keys.event("quiet", "old"), old)
            ahead = Event(id="ahead", at=START + 1e9, project="quiet", subject="node/n1", code="c", message="its clock was wrong")
            await cell.put(keys.event("quiet", "ahead"), ahead)
            await start(cell)
            await asyncio.sleep(100)
            assert not cell.state.records(Status)
            assert not cell.state.records(Drained)
            left = [held.record.id for held in cell.state.records(Event).values()]
            assert sorted(left) == [f"{number:06d}" for number in range(1000)]

    def status_of(id: str) -> Status:
        return Status(instance=id, project="default", node="n1", phase=Phase.RUNNING)

    run_virtual(main())


def test_old_releases_go_but_for_those_in_use() -> None:
    async def main() -> None:
        async with Cell() as cell:
            await start(cell)
            app = await cell.deploy(WEB, replicas=1)
            await cell.until(lambda: running(cell))
            for number in range(2, 71):
                release = Release(project="default", app="web", number=number, spec=WEB, created_at=0.0)
                await cell.put(keys.release("default", "web", number), release)
            await asyncio.sleep(40)
            numbers = sorted(held.record.number for held in cell.state.records(Release).values())
            assert numbers == [1, *range(21, 71)]
            assert app.release == 1

    run_virtual(main())


def test_many_instances_are_made_and_placed_in_few_transactions() -> None:
    async def main() -> None:
        async with Cell() as cell:
            for number in range(20):
                await cell.add_node(f"n{number}", cpu=64_000, memory=1 << 40)
            cell.lead()
            await asyncio.sleep(1)
            before = await cell.store.revision()
            spec = AppSpec(name="web", image="x", placement=Placement())
            await cell.deploy(spec, replicas=5000)
            await cell.until(lambda: len(cell.instances()) == 5000)
            assert {sum(i.node == f"n{n}" for i in cell.instances()) for n in range(20)} == {250}
            assert await cell.store.revision() - before < 8

    run_virtual(main())


def test_one_record_that_the_store_refuses_does_not_stop_the_others() -> None:
    class Refusing(MemoryStore):
        async def txn(self, *rest: Any, **named: Any) -> Any:
            if any(op.key.startswith("instances/default/bad-") for op in rest[1]):
                raise TooLarge("injected")
            return await super().txn(*rest, **named)

    async def main() -> None:
        cell = Cell()
        cell.store = Refusing(cell.clock)
        cell.state = State(cell.store, cell.kinds)
        async with cell:
            for name in ("n1", "n2"):
                await cell.add_node(name)
            await cell.deploy(AppSpec(name="bad", image="x"), replicas=1)
            await cell.deploy(WEB, replicas=2)
            await start(cell)
            await cell.until(lambda: cell.ready() == 2)
            assert {i.owner for i in cell.instances()} == {"web"}

    run_virtual(main())


def test_a_change_that_comes_in_between_is_seen_and_decided_about_again() -> None:
    class Racing(MemoryStore):
        """Before the leader changes an instance, somebody else does."""

        raced: set[str] = set()

        async def txn(self, *rest: Any, **named: Any) -> Any:
            for op in rest[1] if any(compare.key == keys.LEADER for compare in rest[0]) else ():
                if isinstance(op, Put) and op.key.startswith(keys.INSTANCES) and op.key not in self.raced:
                    self.raced.add(op.key)
                    held = await self.get(op.key)
                    if held is not None:
                        other = structs.replace(codec.decode(held.value, Instance), reason="changed meanwhile")
                        await super().txn([], [Put(op.key, codec.encode(other))])
            return await super().txn(*rest, **named)

    async def main() -> None:
        cell = Cell()
        cell.store = store = Racing(cell.clock)
        cell.state = State(store, cell.kinds)
        async with cell:
            await cell.add_ingress()
            cell.lead()
            await cell.deploy(WEB, replicas=3)
            await cell.until(cell.instances)
            store.raced.clear()
            cell.agents()
            await cell.add_node("n1")
            await cell.until(lambda: running(cell))
            store.raced.clear()
            await cell.deploy(WEB, release=2, replicas=3)
            await cell.until(lambda: running(cell) and {i.release for i in cell.instances()} == {2})
            assert len(store.raced) >= 3

    run_virtual(main())


def test_a_fault_in_deciding_about_one_app_does_not_stop_the_others() -> None:
    class Faulty(random.Random):
        """Fails at its first use, in place of something that nobody foresaw."""

        used = False

        def getrandbits(self, bits: int) -> int:
            if not self.used:
                self.used = True
                raise RuntimeError("injected")
            return super().getrandbits(bits)

    async def main() -> None:
        async with Cell() as cell:
            await cell.add_node("n1")
            await cell.deploy(WEB, replicas=1)
            await cell.deploy(AppSpec(name="other", image="x"), replicas=1)
            cell.agents()
            cell.lead(chance=Faulty(1))
            await asyncio.sleep(1)
            assert len(cell.instances()) == 1
            await cell.until(lambda: cell.ready() == 2, 10)

    run_virtual(main())


def test_ids_are_unique_in_the_cell_though_two_projects_use_one_name() -> None:
    async def main() -> None:
        async with Cell() as cell:
            await start(cell)
            await cell.deploy(WEB, replicas=2)
            app = App(project="other", name="web", spec=WEB, release=1, replicas=2, created_at=0.0, updated_at=cell.clock.now())
            await cell.put(keys.app("other", "web"), app)
            await cell.until(lambda: cell.ready() == 4)
            assert len({i.id for i in cell.instances()}) == 4
            assert {type(i) for i in cell.instances()} == {Instance}

    run_virtual(main())
