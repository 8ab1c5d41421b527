"""`atoll projects quota`: what a project may have and what its instances hold, by the API of a cell and by the command line."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace
from test_cli_draining import call

from atoll.api.service import KINDS, Service
from atoll.api.service.access import SYSTEM
from atoll.api.service.quotas import INSTANCES_PER_TURN
from atoll.model import codec, keys, stored
from atoll.model.devices import GpuDevice
from atoll.model.errors import NotFound, StaleRevision
from atoll.model.ports.clock import SystemClock
from atoll.model.records import Capacity, Instance, Job, Node, OwnerKind, Project
from atoll.model.spec import AppSpec, Gpu, JobSpec, Quota, Resources, RuntimeName, Scale
from atoll.model.units import Bytes, Cores
from atoll.model.views import QuotaUse
from atoll.sdk.fake import FakeApi
from atoll.sdk.transport import Answer
from atoll.sim.loop import run_virtual
from atoll.sim.replay_cell import Cell
from atoll.sim.replay_fleet import RUN, Fleet
from atoll.store.cache import State
from atoll.store.memory import MemoryStore

GIB = 1 << 30
SIZE = Resources(cpu=Cores(0.5), memory=Bytes(GIB), gpu=Gpu(count=0.25))


def machine() -> Node:
    gpu = GpuDevice(id="g0", model="T4", memory_bytes=16 * GIB)
    capacity = Capacity(cpu_milli=8000, memory_bytes=16 * GIB, disk_bytes=1 << 40, gpus=(gpu,))
    return Node(name="n1", capacity=capacity, runtimes=(RuntimeName.RUNC,))


def test_what_a_project_holds_is_counted_as_the_scheduler_counts_and_what_waits_for_it_is_told() -> None:
    chance = random.Random(1)

    async def main() -> None:
        async with Cell(chance) as cell:
            service = cell.service
            loop = asyncio.get_running_loop()

            def ends_at(after_s: float, node: str, instance: str) -> None:
                loop.call_later(after_s, lambda: fleet.end(node, instance))

            fleet = Fleet([machine()], service.control_plane, cell.detection, cell.clock, ends_at)
            await fleet.start()
            await service.projects.put("shop")
            await service.projects.set_quota("shop", Quota(memory=Bytes(3 * GIB)))
            with pytest.raises(NotFound):
                await service.quotas.get("nobody")
            for project in ("shop", "default"):
                app = AppSpec(
                    name="web", project=project, image="x", resources=SIZE, scale=Scale(replicas=4 if project == "shop" else 1)
                )
                await service.apps.put(SYSTEM, app)
            await asyncio.sleep(5)
            view = await service.quotas.get("shop")
            assert view.used == QuotaUse(cpu_milli=1500, memory_bytes=3 * GIB, gpu_milli=750, instances=3)
            assert (view.quota, view.waiting) == (Quota(memory=Bytes(3 * GIB)), 1)
            assert (await service.quotas.get("default")).used.instances == 1
            await service.projects.set_quota("shop", Quota())
            await asyncio.sleep(5)
            view = await service.quotas.get("shop")
            # The device of the one node is full: that is not the quota's doing.
            assert (view.quota, view.used.instances, view.waiting) == (None, 3, 0)
            await service.jobs.create(SYSTEM, JobSpec(name="sum", project="shop", image="x", command=(RUN, "3")))
            await asyncio.sleep(2)
            assert (await service.quotas.get("shop")).used.instances == 4
            await asyncio.sleep(5)
            assert len([key for key in cell.state.records(Instance) if key.startswith("shop/sum")]) == 1
            assert (await service.quotas.get("shop")).used.instances == 3, "what has ended is kept with its job, and holds nothing"
            await service.apps.delete("shop", "web")
            await asyncio.sleep(5)
            assert (await service.quotas.get("shop")).used == QuotaUse()
            await fleet.close()

    run_virtual(main, chance)


@pytest.fixture
def api() -> FakeApi:
    made = FakeApi()
    made.put("projects", "shop", Project(name="shop", created_at=1.0))
    return made


def test_limits_are_set_one_by_one_shown_and_taken_away(api: FakeApi, tmp_path: Path) -> None:
    assert call(api, tmp_path, "projects", "quota", "shop", "--cpu", "16", "--memory", "64GiB").exit_code == 0
    done = call(api, tmp_path, "projects", "quota", "shop", "--gpu", "2", "--instances", "0", "--requests", "50", "--weight", "3")
    assert done.exit_code == 0
    rows = {line.split()[0]: line.split()[1:] for line in done.stdout.splitlines()[1:]}
    assert rows["cpu"][:2] == ["0", "16"]
    assert rows["memory"][:2] == ["0B", "64.0GiB"]
    assert rows["gpu"][:2] == ["0", "2"]
    assert rows["instances"][:2] == ["0", "0"]
    assert rows["requests/s"][:2] == ["–", "50"]
    wanted = Quota(cpu=Cores(16), memory=Bytes(64 * GIB), gpu=2, instances=0, requests_per_s=50, weight=3)
    assert api.get("projects", "shop")[0].quota == wanted
    listed = call(api, tmp_path, "projects", "list").stdout
    assert "cpu 16, memory 64.0GiB, gpu 2, instances 0, requests 50/s, weight 3" in listed
    call(api, tmp_path, "projects", "quota", "shop", "--cpu", "none", "--memory", "none", "--gpu", "none", "--instances", "none")
    assert api.get("projects", "shop")[0].quota == Quota(requests_per_s=50, weight=3)


class Rivals(FakeApi):
    """Someone else changes another limit before each of the first `times` changes arrives."""

    times = 1

    async def request(self, method: str, path: str, **more: Any) -> Answer:
        if method == "PUT" and path.endswith("/quota") and self.times:
            self.times -= 1
            project = self.get("projects", "shop")[0]
            quota = project.quota or Quota()
            self.put("projects", "shop", replace(project, quota=replace(quota, instances=(quota.instances or 0) + 1)))
        return await super().request(method, path, **more)


def test_of_two_who_change_two_limits_at_the_same_time_neither_loses_theirs(tmp_path: Path) -> None:
    api = Rivals()
    api.put("projects", "shop", Project(name="shop", created_at=1.0, quota=Quota(weight=3)))
    assert call(api, tmp_path, "projects", "quota", "shop", "--cpu", "16").exit_code == 0
    assert api.get("projects", "shop")[0].quota == Quota(cpu=Cores(16), instances=1, weight=3)
    api.times = 1_000
    done = call(api, tmp_path, "projects", "quota", "shop", "--cpu", "8")
    assert done.exit_code != 0
    assert "has changed since" in done.stderr
    assert api.times > 900, "it gives up"
    assert api.get("projects", "shop")[0].quota.cpu == Cores(16)


async def test_while_very_many_instances_are_counted_others_have_their_turns() -> None:
    clock = SystemClock()
    store = MemoryStore(clock)
    many = 3 * INSTANCES_PER_TURN + 1
    job = Job(project="default", name="sum", spec=JobSpec(name="sum", image="x", resources=SIZE), created_at=1.0)
    await store.put(keys.job("default", "sum"), stored.encode(job))
    for number in range(many):
        one = Instance(id=f"i{number}", project="default", owner="sum", owner_kind=OwnerKind.JOB, node="n1", created_at=1.0)
        await store.put(keys.instance("default", one.id), codec.encode(one))
    turns = 0

    async def others() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    async with State(store, KINDS) as state, Service(store, state, clock, random.Random(1), bytes(32)) as service:
        beside = asyncio.create_task(others())
        view = await service.quotas.get("default")
        counted = turns
        beside.cancel()
    await store.close()
    assert counted >= 3
    assert (view.used.instances, view.used.cpu_milli) == (many, 500 * many)


def test_a_quota_is_changed_only_as_it_was_read() -> None:
    chance = random.Random(1)

    async def main() -> None:
        async with Cell(chance) as cell:
            projects, quotas = cell.service.projects, cell.service.quotas
            await projects.put("shop")
            for project in ("shop", "default"):
                read = await quotas.get(project)
                await projects.put("other")
                await projects.set_quota(project, Quota(instances=3), if_match=read.revision)
                with pytest.raises(StaleRevision, match=f"the quota of project '{project}'"):
                    await projects.set_quota(project, Quota(gpu=1), if_match=read.revision)
                assert (await quotas.get(project)).quota == Quota(instances=3)
                await projects.set_quota(project, Quota(gpu=1), if_match=(await quotas.get(project)).revision)
                await projects.set_quota(project, Quota(gpu=2))
                assert (await quotas.get(project)).quota == Quota(gpu=2), "without a condition as ever"

    run_virtual(main, chance)


def test_json_has_what_is_used_and_what_may_be(api: FakeApi, tmp_path: Path) -> None:
    done = call(api, tmp_path, "projects", "quota", "shop", "--instances", "5", "--json")
    assert '"instances": 5' in done.stdout
    assert '"used"' in done.stdout


@pytest.mark.parametrize(
    ("options", "word"),
    [
        (("--cpu", "many"), "--cpu: 'many' is not a number"),
        (("--cpu", "-1"), "--cpu"),
        (("--cpu", "nan"), "--cpu"),
        (("--memory", "lots"), "--memory: 'lots' is not a size"),
        (("--instances", "1.5"), "--instances"),
        (("--weight", "0"), "weight"),
    ],
)
def test_a_limit_that_is_none_is_refused_and_changes_nothing(
    api: FakeApi, tmp_path: Path, options: tuple[str, ...], word: str
) -> None:
    done = call(api, tmp_path, "projects", "quota", "shop", *options)
    assert done.exit_code == 2
    assert word in done.stderr
    assert api.get("projects", "shop")[0].quota is None
