"""Volumes that show an image, from the spec to the instance's mounts, on fakes."""

from __future__ import annotations

import asyncio
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any

import pytest
from faked_agent import running_agent

from atoll.cli import spec_file
from atoll.images.fake import SHOWN, FakeImages
from atoll.model.errors import ImageError, Invalid
from atoll.model.ports.clock import SystemClock
from atoll.model.ports.runtime import Mount
from atoll.model.records import Assignment, Instance, OwnerKind
from atoll.model.spec import AppSpec, Restart, RuntimeName, Volume, check_app
from atoll.model.states import Phase
from atoll.model.units import Seconds
from atoll.network.fake import FakeNetwork
from atoll.node.agent import Agent
from atoll.node.fake import FakeControlPlane
from atoll.node.record import SqliteRecord
from atoll.runtimes.fake import FakeHost
from atoll.scheduling.demand import demand_of

WEIGHTS = "registry.example/weights:1"


class Node:
    """One machine with one agent at a time; its record is a file, so that a killed agent's successor reads it."""

    def __init__(self, data: Path) -> None:
        self.data = data
        self.control = FakeControlPlane()
        self.host = FakeHost()
        self.images = FakeImages()
        self.network = FakeNetwork()

    def agent(self) -> AbstractAsyncContextManager[Agent]:
        return running_agent(
            self.control,
            self.host,
            self.data,
            SystemClock(),
            images=self.images,
            network=self.network,
            record=SqliteRecord(self.data / "record.db"),
        )

    def app(self, id: str, *, release: int = 1, image: str = WEIGHTS) -> str:
        volumes = (Volume(name="weights", path="/models", image=image), Volume(name="data", path="/data"))
        spec = AppSpec(name="web", image="registry.example/web:1", volumes=volumes, restart=Restart(delay=Seconds(0.01)))
        instance = Instance(
            id=id,
            project="default",
            owner_kind=OwnerKind.APP,
            owner="web",
            node="n1",
            runtime=RuntimeName.RUNC,
            created_at=1.0,
            release=release,
        )
        self.control.assign(Assignment(instance=instance, workload=spec, revision=0))
        return id

    async def runs(self, *ids: str) -> None:
        for id in ids:
            await self.control.until(lambda c, id=id: id in c.statuses and c.statuses[id].phase is Phase.RUNNING)  # type: ignore[misc]

    def mounts(self, id: str) -> dict[str, Mount]:
        return {mount.target: mount for mount in self.host.processes[id].box.mounts}


@pytest.fixture
def node(tmp_path: Path) -> Node:
    return Node(tmp_path / "agent")


async def test_all_instances_of_a_node_see_the_image_s_files_at_one_place_read_only_after_one_pull(node: Node) -> None:
    async with node.agent():
        node.app("web-1")
        node.app("web-2")
        await node.runs("web-1", "web-2")
        first, second = node.mounts("web-1")["/models"], node.mounts("web-2")["/models"]
    assert first == second
    assert first.read_only
    assert first.source == await node.images.tree(await node.images.ensure(WEIGHTS))
    assert node.images.pulls.count(WEIGHTS) == 1
    assert not node.mounts("web-1")["/data"].read_only
    assert [path.name for path in (node.data / "volumes/default/web").iterdir()] == ["data"]


async def test_a_restart_and_a_further_instance_of_the_release_keep_the_image_a_new_release_looks_the_tag_up(node: Node) -> None:
    async with node.agent() as agent:
        node.app("web-1")
        await node.runs("web-1")
        old = node.mounts("web-1")["/models"]
        node.images.add(WEIGHTS, content="new")
        node.host.crash("web-1")
        await node.control.until(lambda c: c.statuses["web-1"].restarts == 1 and c.statuses["web-1"].phase is Phase.RUNNING)
        node.app("web-2")
        node.app("web-3", release=2)
        await node.runs("web-2", "web-3")
        assert node.mounts("web-1")["/models"] == node.mounts("web-2")["/models"] == old
        assert node.mounts("web-3")["/models"] != old
        assert len(agent.runners["web-3"].digests) == 2


async def test_what_is_shown_is_kept_until_its_last_instance_is_gone_and_a_killed_agent_s_successor_knows_it(node: Node) -> None:
    async with node.agent():
        node.app("web-1")
        await node.runs("web-1")
    weights = await node.images.find(WEIGHTS)
    assert weights is not None
    async with node.agent() as agent:
        await node.control.until(lambda c: "adopted" in c.codes("web-1"))
        assert weights.digest in agent.runners["web-1"].digests
        await node.images.collect(sorted(agent.runners["web-1"].digests))
        assert await node.images.find(WEIGHTS) == weights
        node.control.remove("web-1")
        await asyncio.wait_for(_empty(agent), 5)
        await node.images.collect(sorted(set().union(*(runner.digests for runner in agent.runners.values()))))
        assert await node.images.find(WEIGHTS) is None


async def _empty(agent: Agent) -> None:
    while agent.runners:  # noqa: ASYNC110 - what is waited for has no event
        await asyncio.sleep(0.001)


async def test_an_image_that_cannot_be_had_is_a_failure_that_names_the_volume_s_field(node: Node) -> None:
    node.images.fail(WEIGHTS, ImageError("no such image", mend="push it"))
    async with node.agent():
        node.app("web-1")
        await node.control.until(lambda c: "prepare-failed" in c.codes("web-1"))
        message = next(event.message for event in node.control.events if event.code == "prepare-failed")
        assert message == "volumes[0].image: no such image (push it)"
        await node.runs("web-1")


def app(*volumes: dict[str, Any]) -> AppSpec:
    spec = AppSpec(name="web", image="x", volumes=tuple(Volume(**volume) for volume in volumes))
    check_app(spec)
    return spec


IMAGE = {"name": "weights", "path": "/models", "image": WEIGHTS}


def test_volumes_that_show_an_image_bind_an_app_to_no_node() -> None:
    assert not demand_of(app(IMAGE)).pinned
    assert demand_of(app(IMAGE, {"name": "data", "path": "/data"})).pinned


@pytest.mark.parametrize(
    ("volumes", "field"),
    [
        ([{**IMAGE, "read_only": False}], "volumes[0].read_only"),
        ([IMAGE, {"name": "cache", "path": "/models/cache"}], "volumes[1].path"),
        ([{"name": "data", "path": "/models/"}, IMAGE], "volumes[0].path"),
        ([IMAGE, {**IMAGE, "name": "more"}], "volumes"),
    ],
)
def test_an_image_s_files_are_not_written_to_nor_covered_and_the_error_names_the_field(
    volumes: list[dict[str, Any]], field: str
) -> None:
    with pytest.raises(Invalid) as caught:
        app(*volumes)
    assert caught.value.field == field


def test_what_a_volume_leaves_out_of_read_only_is_stored_as_what_it_means() -> None:
    volumes = app(IMAGE, {"name": "data", "path": "/data"}, {"name": "old", "path": "/old", "read_only": True}).volumes
    assert [volume.read_only for volume in volumes] == [True, False, True]


def test_a_reference_that_no_registry_can_have_is_refused_before_it_is_sent() -> None:
    data = {"name": "web", "image": "registry.example/web:1", "volumes": [{**IMAGE, "image": "Registry/Weights:1"}]}
    with pytest.raises(Invalid, match="is not a repository name") as caught:
        spec_file.parse(data, AppSpec, None)
    assert (caught.value.field, caught.value.mend) == ("volumes[0].image", "names are in lower case")


async def test_a_volume_is_shown_before_it_is_here_and_an_app_s_own_image_is_not(node: Node) -> None:
    for reference in (WEIGHTS, "registry.example/web:1"):
        node.images.show_early(reference)
    async with node.agent():
        node.app("web-1")
        await node.runs("web-1")
    assert node.mounts("web-1")["/models"].source.is_relative_to(SHOWN)
    assert node.images.pulls == ["registry.example/web:1"]


async def test_pieces_of_a_volume_that_do_not_come_are_an_event_of_the_node(node: Node) -> None:
    node.images.show_early(WEIGHTS)
    async with node.agent():
        node.app("web-1")
        await node.runs("web-1")
        node.images.trouble(WEIGHTS, "registry away does not answer")
        await node.control.until(lambda c: any(event.code == "volume-not-fetched" for event in c.events))
    (event,) = (event for event in node.control.events if event.code == "volume-not-fetched")
    assert event.subject == "node/n1"
    assert WEIGHTS in event.message
    assert "registry away does not answer" in event.message
