"""`POST /v1/plan` and `GET …/explain` over a memory store: what they answer, and that they change nothing."""

from __future__ import annotations

import random
import threading
from collections.abc import AsyncIterator

import pytest

from atoll.api.service import KINDS, SYSTEM, Service
from atoll.api.service.planning import QUICK_MAX
from atoll.control.heir import Heir
from atoll.control.world import KINDS as CONTROL_KINDS
from atoll.model import codec, keys
from atoll.model.errors import Invalid, NotFound
from atoll.model.ports.store import Revision
from atoll.model.records import AppPhase, AppStatus, Capacity, Instance, Node, NodePolicy, OwnerKind, Status
from atoll.model.spec import AppSpec, Constraint, JobSpec, Operator, Placement, Port, Quota, Resources, RuntimeName, Scale
from atoll.model.states import Phase
from atoll.model.units import Bytes
from atoll.scheduling.snapshot import Ints, Snapshot
from atoll.store.cache import State
from atoll.store.memory import MemoryStore

GIB = 1 << 30


class StillClock:
    def now(self) -> float:
        return 1_000_000.0

    def monotonic(self) -> float:
        return 1_000_000.0


@pytest.fixture(params=["from the cache", "from what the scheduler knows"])
async def service(request: pytest.FixtureRequest) -> AsyncIterator[Service]:
    store = MemoryStore(StillClock())
    seeded = random.Random(1)
    async with (
        State(store, {**KINDS, **CONTROL_KINDS}) as state,
        Heir(state, StillClock()) as heir,
        Service(store, state, StillClock(), seeded, bytes(32), "localhost", entropy=seeded.randbytes) as made,
    ):
        if request.param == "from what the scheduler knows":
            made.planning.live = heir.copy
            await heir.take(Revision(0))
        for name in ("n1", "n2", "n3"):
            capacity = Capacity(cpu_milli=4000, memory_bytes=4 * GIB, disk_bytes=100 * GIB)
            await put(made, keys.node(name), Node(name=name, capacity=capacity, runtimes=(RuntimeName.RUNC,)))
        await put(made, keys.node_policy("n3"), NodePolicy(name="n3", cordoned=True))
        yield made
    await store.close()


async def put(service: Service, key: str, record: object) -> None:
    await service.context.reach(await service.context.store.put(key, codec.encode(record)))


def spec(memory: int = GIB, replicas: int = 3, **more: object) -> AppSpec:
    size = Resources(memory=Bytes(memory))
    return AppSpec(name="web", image="x/y:1", ports=(Port(port=80),), resources=size, scale=Scale(replicas=replicas), **more)  # type: ignore[arg-type]


async def instance(service: Service, id: str, node: str | None) -> None:
    record = Instance(
        id=id, project="default", owner_kind=OwnerKind.APP, owner="web", release=1, generation=1, node=node, created_at=1.0
    )
    await put(service, keys.instance("default", id), record)


async def test_a_plan_says_where_all_would_go_and_writes_nothing(service: Service) -> None:
    before = await service.context.store.revision()
    view = await service.planning.plan(spec())
    assert view.placed == {"n1": 2, "n2": 1}
    assert (view.instances, view.unplaced, view.rejection) == (3, 0, None)
    assert [candidate.node for candidate in view.explanation.candidates] == ["n1", "n2"]
    assert view.explanation.candidates[0].room == 4
    assert set(view.explanation.candidates[0].scores) == {"spread", "packing"}
    assert view.explanation.failed == {"standing": 1}
    assert await service.context.store.revision() == before


async def test_a_plan_counts_what_runs_and_says_what_would_make_it_fit(service: Service) -> None:
    await service.apps.put(SYSTEM, spec(3 * GIB, 2))
    await instance(service, "a", "n1")
    view = await service.planning.plan(spec(3 * GIB, 2))
    assert view.placed == {"n2": 1}
    assert view.unplaced == 1
    assert view.rejection is not None
    assert view.rejection.failed == {"standing": 1, "memory": 2}
    assert view.rejection.mend == "needs 2.0GiB more memory on the best node, n1"
    ended = Status(instance="a", project="default", node="n1", phase=Phase.STOPPED)
    await put(service, keys.status("default", "a"), ended)
    assert (await service.planning.plan(spec(3 * GIB, 2))).unplaced == 0


async def test_a_jobs_plan_is_for_as_many_as_run_at_a_time(service: Service) -> None:
    view = await service.planning.plan(JobSpec(name="work", image="x/y:1", completions=100, parallelism=5))
    assert view.instances == 5


async def test_an_instance_is_explained_as_if_it_were_not_there(service: Service) -> None:
    await service.apps.put(SYSTEM, spec(3 * GIB, 2))
    await instance(service, "a", "n1")
    await instance(service, "b", None)
    there = (await service.planning.explain("default", "a")).explanation
    assert [candidate.node for candidate in there.candidates] == ["n1", "n2"]
    waiting = (await service.planning.explain("default", "b")).explanation
    assert [candidate.node for candidate in waiting.candidates] == ["n2"]
    assert waiting.failed == {"standing": 1, "memory": 1}


async def test_what_its_quota_holds_back_is_explained_so_though_nodes_would_take_it(service: Service) -> None:
    await service.projects.set_quota("default", Quota(instances=1))
    await service.apps.put(SYSTEM, spec(GIB, 2))
    await instance(service, "a", "n1")
    await instance(service, "b", None)
    waiting = (await service.planning.explain("default", "b")).explanation
    assert waiting.feasible == 2
    assert waiting.rejection is not None
    assert waiting.rejection.code == "over-quota"
    assert "'default' has 0 of its quota of instances left" in waiting.rejection.message
    assert (await service.planning.explain("default", "a")).explanation.rejection is None


async def test_what_is_not_there_or_makes_no_sense_is_refused(service: Service) -> None:
    with pytest.raises(NotFound):
        await service.planning.explain("default", "gone")
    with pytest.raises(NotFound):
        await service.planning.plan(AppSpec(name="web", image="x", project="nowhere"))
    bad = Placement(constraints=(Constraint(label="a", operator=Operator.REGEXP, value="("),))
    with pytest.raises(Invalid) as error:
        await service.planning.plan(spec(placement=bad))
    assert error.value.field == "placement.constraints[0].value"


async def test_a_quota_is_set_by_name_and_taken_away_by_an_empty_one(service: Service) -> None:
    project = await service.projects.set_quota("default", Quota(instances=1))
    assert project.quota == Quota(instances=1)
    view = await service.planning.plan(spec())
    assert (view.unplaced, view.rejection.code if view.rejection else "") == (2, "over-quota")
    assert (await service.projects.put("default")).quota == Quota(instances=1), "making it again leaves its quota"
    assert (await service.projects.set_quota("default", Quota())).quota is None
    assert (await service.planning.plan(spec())).unplaced == 0
    with pytest.raises(NotFound):
        await service.projects.set_quota("nowhere", Quota())


async def test_defrag_proposes_within_an_apps_budget_and_not_onto_cordoned_nodes(service: Service) -> None:
    await service.apps.put(SYSTEM, spec(GIB, 2))
    for id, node in (("a", "n1"), ("b", "n2")):
        await instance(service, id, node)
        running = Status(instance=id, project="default", node=node, phase=Phase.RUNNING, ready=True)
        await put(service, keys.status("default", id), running)
    assert (await service.planning.defrag()).steps == (), "none of it is ready as far as anyone has said"
    status = AppStatus(project="default", name="web", phase=AppPhase.RUNNING, release=1, ready=2)
    await put(service, keys.app_status("default", "web"), status)
    await put(service, keys.instance("default", "w"), waiting_instance())
    before = await service.context.store.revision()
    view = await service.planning.defrag()
    [step] = view.steps
    assert [(move.instance, move.node, move.to) for move in step.moves] == [("a", "n1", "n2")]
    assert (view.waiting, view.fit_now, view.fit_then) == (1, 1, 1)
    assert await service.context.store.revision() == before


def waiting_instance() -> Instance:
    return Instance(
        id="w", project="default", owner_kind=OwnerKind.APP, owner="web", release=1, generation=1, node=None, created_at=2.0
    )


class Noting(Snapshot):
    """Notes in which threads it is asked."""

    def __init__(self) -> None:
        super().__init__()
        self.threads: set[int] = set()

    def ranks(self) -> Ints:
        self.threads.add(threading.get_ident())
        return super().ranks()


async def test_a_small_dry_run_on_a_copy_takes_no_thread_and_one_that_may_take_long_does(service: Service) -> None:
    made: list[Noting] = []

    def live(last: Snapshot | None) -> Snapshot:
        made.append(Noting())
        made[-1].upsert_node(
            Node(
                name="n1",
                capacity=Capacity(cpu_milli=1 << 40, memory_bytes=1 << 60, disk_bytes=1 << 60),
                runtimes=(RuntimeName.RUNC,),
            )
        )
        return made[-1]

    service.planning.live = live
    await service.planning.plan(spec(replicas=QUICK_MAX))
    assert made[-1].threads == {threading.get_ident()}
    await service.planning.plan(spec(replicas=QUICK_MAX + 1))
    assert threading.get_ident() not in made[-1].threads
    assert made[-1].threads
