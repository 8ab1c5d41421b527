"""Templates: a pool that is kept full, taken from by many at once, and gone when its template goes."""

from __future__ import annotations

import asyncio
import itertools
import random
from contextlib import AsyncExitStack
from typing import Any

import pytest
from control_cell import Cell, fails, healthy, run_virtual
from msgspec.structs import replace
from test_control_decide import NOW, of, seen

from atoll.api.service import KINDS, SYSTEM, RequestKey, Service
from atoll.control.actions import Create, Decision, Remove, Seen, Update, WriteJobStatus
from atoll.control.jobs import JobFacts, decide_job
from atoll.control.pools import REFILL_S
from atoll.model.errors import Conflict, Invalid, NotFound
from atoll.model.evacuation import Evacuation
from atoll.model.records import Instance, Job, JobPhase, JobStatus, OwnerKind
from atoll.model.spec import JobSpec, check_job
from atoll.model.states import Desired, Phase
from atoll.model.units import Seconds
from atoll.model.views import TakeRequest
from atoll.store.cache import State

SPEC = JobSpec(name="tools", image="registry.test/tools:1", sandbox=True, pool=3, deadline=Seconds(3600), env={"A": "1", "B": "1"})


def ready(id: str, phase: Phase | None = Phase.RUNNING, **more: Any) -> Seen:
    return seen(id, phase, kind=OwnerKind.JOB, standby=True, **more)


def decide(*instances: Seen, status: JobStatus | None = None, release: int = 0, now: float = NOW, **spec: Any) -> Decision:
    job = Job(project="p", name="tools", spec=replace(SPEC, **spec), created_at=NOW - 9000, release=release)
    suffixes = itertools.count()
    made = Decision(now, lambda: f"{next(suffixes):06}")
    decide_job(JobFacts(job=job, revision=3, status=status, instances=instances), made)
    return made


def decide_later(*instances: Seen, **options: Any) -> Decision:
    """Decide as `decide`, and again once what is missing is due."""
    (written,) = of(WriteJobStatus, decide(*instances, **options).actions)
    return decide(*instances, status=written.status, now=NOW + REFILL_S, **options)


def told_to_go(made: Decision) -> list[str]:
    return [update.instance.id for update in of(Update, made.actions) if update.instance.desired is Desired.STOP]


def test_a_pool_is_filled_with_what_stands_by_and_no_further() -> None:
    made = decide_later(ready("a"))
    assert [(c.instance.standby, c.instance.owner) for c in of(Create, made.actions)] == [(True, "tools")] * 2
    assert of(Create, decide(ready("a"), ready("b"), ready("c")).actions) == []
    assert len(told_to_go(decide(ready("a"), ready("b"), ready("c"), pool=1))) == 2


def test_what_is_made_of_an_older_spec_or_stands_on_a_lost_node_is_replaced() -> None:
    made = decide(ready("a"), ready("b"), replace_release(ready("c"), 1), release=1)
    assert sorted(told_to_go(made)) == ["a", "b"]
    made = decide_later(ready("a"), ready("b"), replace_release(ready("c"), 1), release=1)
    assert [c.instance.release for c in of(Create, made.actions)] == [1, 1]
    made = decide(ready("a"), ready("b"), ready("c", lost_at=NOW - 1))
    assert [r.instance.id for r in of(Remove, made.actions)] == ["c"]
    assert len(of(Create, decide_later(ready("a"), ready("b"), ready("c", lost_at=NOW - 1)).actions)) == 1


def test_what_waits_on_a_node_that_is_to_be_empty_goes_at_once_and_others_are_made_elsewhere() -> None:
    drained = Evacuation(why="it is being drained", since=NOW - 1, deadline=NOW + 3600)
    made = decide(ready("a"), ready("b"), replace(ready("c"), evacuation=drained))
    assert told_to_go(made) == ["c"]
    assert len(of(Create, decide_later(ready("a"), ready("b"), replace(ready("c"), evacuation=drained)).actions)) == 1


def test_while_one_can_be_taken_the_next_is_made_a_moment_later_and_else_at_once() -> None:
    made = decide(ready("a"), ready("b"))
    (written,) = of(WriteJobStatus, made.actions)
    assert (of(Create, made.actions), written.status.retry_at, made.wake_at) == ([], {0: NOW + REFILL_S}, NOW + REFILL_S)
    assert len(of(Create, decide(status=written.status).actions)) == 3  # the others were taken, too
    assert len(of(Create, decide(ready("a", Phase.STARTING), status=written.status).actions)) == 2
    (after,) = of(WriteJobStatus, decide(ready("a"), ready("b"), status=written.status, now=NOW + REFILL_S).actions)
    assert after.status.retry_at == {}


@pytest.mark.parametrize("failures", [{}, {0: 1}])
def test_what_is_missing_is_made_though_the_date_was_set_back_while_it_waited(failures: dict[int, int]) -> None:
    status = JobStatus(project="p", name="tools", phase=JobPhase.RUNNING, failures=failures, retry_at={0: NOW + REFILL_S})
    assert of(Create, decide(ready("a"), ready("b"), status=status).actions) == []
    assert len(of(Create, decide(ready("a"), ready("b"), status=status, now=NOW - 3600).actions)) == 1


def replace_release(what: Seen, release: int) -> Seen:
    return replace(what, instance=replace(what.instance, release=release))


def test_what_fails_is_made_again_with_growing_delays_and_says_why() -> None:
    broken = [ready(id, Phase.FAILED, status={"ready": False, "message": "no such image"}) for id in "abc"]
    made = decide(*broken)
    (written,) = of(WriteJobStatus, made.actions)
    assert (of(Create, made.actions), written.status.message) == ([], "no such image")
    assert len(of(Remove, made.actions)) == 3
    again = decide(broken[0], status=written.status, now=NOW + 2)
    (later,) = of(WriteJobStatus, again.actions)
    assert later.status.retry_at[0] - (NOW + 2) == 2 * (written.status.retry_at[0] - NOW)
    made = decide(status=later.status, now=NOW + 5)
    assert len(of(Create, made.actions)) == 3
    steady = [ready(id, status={"ready_at": NOW - 100}) for id in "abc"]
    (after,) = of(WriteJobStatus, decide(*steady, status=later.status, now=NOW + 60).actions)
    assert (after.status.failures, after.status.message, after.status.phase) == ({}, "", JobPhase.RUNNING)


class Servers:
    """A leader with scripted agents, and two servers over the same store."""

    def __init__(self, cell: Cell, services: list[Service]) -> None:
        self.cell = cell
        self.services = services

    def pool(self) -> list[Instance]:
        return [each for each in self.cell.instances() if each.standby and each.owner == "tools"]

    def full(self, count: int) -> bool:
        statuses = [self.cell.status(each) for each in self.pool() if each.desired is Desired.RUN]
        return len(statuses) == count and all(status is not None and status.ready for status in statuses)

    def of(self, job: str) -> list[Instance]:
        return [each for each in self.cell.instances() if each.owner == job]


async def start(stack: AsyncExitStack) -> Servers:
    cell = await stack.enter_async_context(Cell())
    services = []
    for seed in range(2):
        state = await stack.enter_async_context(State(cell.store, KINDS))
        chance = random.Random(seed)
        service = Service(cell.store, state, cell.clock, chance, bytes(range(32)), "localhost", entropy=chance.randbytes)
        services.append(await stack.enter_async_context(service))
    cell.lead()
    cell.agents()
    for name in ("n1", "n2"):
        await cell.add_node(name, cpu=64_000, memory=64 << 30)
    return Servers(cell, services)


def test_of_many_that_take_at_once_at_two_servers_none_gets_anothers_and_the_pool_is_filled_again() -> None:
    async def story() -> None:
        async with AsyncExitStack() as stack:
            servers = await start(stack)
            cell, (one, two) = servers.cell, servers.services
            await one.jobs.put(SYSTEM, replace(SPEC, pool=8))
            await cell.until(lambda: servers.full(8))
            names = [f"box-{at}" for at in range(24)]
            takes = [
                (one if at % 2 else two).pools.take("default", "tools", TakeRequest(name=name)) for at, name in enumerate(names)
            ]
            views = await asyncio.gather(*takes)
            taken = [view.instance for view in views if view.instance]
            assert len(taken) == len(set(taken)) == 8, "all that were ready were given away, each once"
            await cell.until(lambda: servers.full(8) and all(len(servers.of(name)) == 1 for name in names))
            for view in views:
                (instance,) = servers.of(view.job.name)
                assert view.instance in ("", instance.id)
                assert not instance.standby
                status = cell.status(instance)
                assert status is not None
                assert status.phase is Phase.RUNNING
            assert not set(taken) & {each.id for each in servers.pool()}
            assert all((status := cell.job_status(name)) and status.phase is JobPhase.RUNNING for name in names)

    run_virtual(story())


@pytest.mark.parametrize("seed", range(5))
def test_whatever_happens_meanwhile_an_instance_is_one_jobs_and_every_job_has_one(seed: int) -> None:
    async def story() -> None:
        async with AsyncExitStack() as stack:
            servers = await start(stack)
            cell, chance = servers.cell, random.Random(seed)
            await servers.services[0].jobs.put(SYSTEM, replace(SPEC, pool=4))
            owners: dict[str, str] = {}

            def look() -> None:
                for each in cell.instances():
                    if not each.standby and owners.setdefault(each.id, each.owner) != each.owner:
                        raise AssertionError(f"{each.id} was {owners[each.id]}'s and is {each.owner}'s")

            cell.watchers.append(look)
            names = []
            for at in range(40):
                service = chance.choice(servers.services)
                match chance.randrange(8):
                    case 0:
                        await service.jobs.put(SYSTEM, replace(SPEC, pool=chance.randrange(6)))
                    case 1:
                        await service.jobs.put(SYSTEM, replace(SPEC, pool=4, env={"A": str(chance.randrange(3))}))
                    case 2:
                        cell.stop_leading()
                        cell.lead(f"server-{at}")
                    case 3:
                        await asyncio.sleep(chance.random())
                    case _:
                        wishes = [TakeRequest(name=f"box-{at}-{each}") for each in range(chance.randrange(1, 5))]
                        takes = (chance.choice(servers.services).pools.take("default", "tools", wish) for wish in wishes)
                        names += [view.job.name for view in await asyncio.gather(*takes)]
            await servers.services[0].jobs.put(SYSTEM, replace(SPEC, pool=2))
            await cell.until(lambda: servers.full(2) and all(len(servers.of(name)) == 1 for name in names), within_s=600)
            assert len({servers.of(name)[0].id for name in names}) == len(names)

    run_virtual(story())


def test_who_it_is_is_said_when_it_is_taken() -> None:
    async def story() -> None:
        async with AsyncExitStack() as stack:
            servers = await start(stack)
            cell, (service, _) = servers.cell, servers.services
            await service.jobs.put(SYSTEM, SPEC)
            await cell.until(lambda: servers.full(3))
            await asyncio.sleep(5000)  # longer than its time limit, which begins when it is taken
            wish = TakeRequest(name="mine", env={"B": "2"}, idle_limit=Seconds(60))
            key = RequestKey(caller="c", key="k", fingerprint="f")
            view = await service.pools.take("default", "tools", wish, request=key)
            assert (await service.pools.take("default", "tools", wish, request=key)).instance == view.instance
            (instance,) = servers.of("mine")
            assert service.pools.variables(instance) == {
                "ATOLL_JOB": "mine", "ATOLL_INDEX": "0", "ATOLL_ATTEMPT": "0", "A": "1", "B": "2",
            }  # fmt: skip
            assert service.pools.variables(servers.pool()[0]) == {}
            spec = view.job.spec
            assert (spec.deadline, spec.idle_limit, spec.pool, view.job.template) == (3600, 60, None, "tools")
            await cell.until(lambda: cell.job_status("mine"))
            await asyncio.sleep(3500)
            assert cell.job_status("mine").phase is JobPhase.RUNNING  # type: ignore[union-attr]
            await asyncio.sleep(200)
            status = cell.job_status("mine")
            assert status is not None
            assert status.phase is JobPhase.FAILED
            assert "deadline" in status.message

    run_virtual(story())


def test_when_the_template_goes_its_pool_goes_and_what_was_taken_stays() -> None:
    async def story() -> None:
        async with AsyncExitStack() as stack:
            servers = await start(stack)
            cell, (service, other) = servers.cell, servers.services
            await service.jobs.put(SYSTEM, SPEC)
            await cell.until(lambda: servers.full(3))
            view = await service.pools.take("default", "tools", TakeRequest(name="mine"))
            with pytest.raises(Conflict, match="template"):
                await service.jobs.cancel("default", "tools")
            await service.jobs.delete("default", "tools")
            await cell.until(lambda: not servers.of("tools"))
            (instance,) = servers.of("mine")
            assert (instance.id, instance.desired) == (view.instance, Desired.RUN)
            with pytest.raises(NotFound, match="no template"):
                await other.pools.take("default", "tools", TakeRequest(name="late"))

    run_virtual(story())


def test_a_name_that_is_taken_and_one_that_is_none_are_refused() -> None:
    async def story() -> None:
        async with AsyncExitStack() as stack:
            servers = await start(stack)
            service = servers.services[0]
            await service.jobs.put(SYSTEM, SPEC)
            await servers.cell.until(lambda: servers.full(3))
            await service.pools.take("default", "tools", TakeRequest(name="mine"))
            for name in ("mine", "tools"):
                with pytest.raises(Conflict, match="there already"):
                    await service.pools.take("default", "tools", TakeRequest(name=name))
            with pytest.raises(NotFound, match="no template"):
                await service.pools.take("default", "mine", TakeRequest(name="x"))
            with pytest.raises(Conflict, match="no schedule"):
                await service.jobs.put(SYSTEM, replace(SPEC, pool=None, sandbox=False, deadline=None, schedule="@daily"))

    run_virtual(story())


def test_nobody_works_in_what_waits_in_a_pool() -> None:
    async def story() -> None:
        async with AsyncExitStack() as stack:
            servers = await start(stack)
            service = servers.services[0]
            await service.jobs.put(SYSTEM, SPEC)
            await servers.cell.until(lambda: servers.full(3))
            with pytest.raises(Conflict, match="waits in the pool of template 'tools'"):
                service.instances.running("default", servers.pool()[0].id)
            view = await service.pools.take("default", "tools", TakeRequest(name="mine"))
            assert service.instances.running("default", view.instance).owner == "mine"

    run_virtual(story())


def test_a_template_that_cannot_run_makes_no_hot_loop() -> None:
    async def story() -> None:
        async with AsyncExitStack() as stack:
            servers = await start(stack)
            cell, (service, _) = servers.cell, servers.services
            cell.script = fails
            await service.jobs.put(SYSTEM, SPEC)
            made: set[str] = set()
            cell.watchers.append(lambda: made.update(each.id for each in cell.instances()))
            await asyncio.sleep(600)
            assert len(made) <= 3 * 20
            status = cell.job_status("tools")
            assert status is not None
            assert "3" in status.message
            cell.script = healthy
            await asyncio.sleep(300)
            assert servers.full(3)
            status = cell.job_status("tools")
            assert status is not None
            assert (status.failures, status.message) == ({}, "")

    run_virtual(story())


@pytest.mark.parametrize(
    ("spec", "field"),
    [
        (JobSpec(name="x", image="i", pool=1), "pool"),
        (JobSpec(name="x", image="i", idle_limit=Seconds(9)), "idle_limit"),
        (JobSpec(name="x", image="i", sandbox=True, idle_limit=Seconds(0.5)), "idle_limit"),
    ],
)
def test_a_template_that_is_none_is_refused_by_its_field(spec: JobSpec, field: str) -> None:
    with pytest.raises(Invalid) as raised:
        check_job(spec)
    assert raised.value.field == field
