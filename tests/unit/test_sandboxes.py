"""Sandboxes over the agent on fakes: standing still, snapshots kept by content, going on from one; and what a spec may say."""

from __future__ import annotations

import asyncio
import os
import random
from pathlib import Path

import pytest
from test_node_streams import ask, control

from atoll.model import codec
from atoll.model.errors import Invalid, NotFound
from atoll.model.ports.control_plane import StreamKind, StreamRequest
from atoll.model.records import Assignment, Instance, OwnerKind
from atoll.model.spec import JobSpec, RuntimeName, check_job
from atoll.model.states import Phase
from atoll.model.streams import ErrorBody, Held, Kind, SnapshotView, unpack
from atoll.node.fake import FakeControlPlane
from atoll.node.snapshots import SNAPSHOTS_MAX, Snapshots
from atoll.sdk.sandboxes import from_snapshot

__all__ = ["control"]


async def hold(control: FakeControlPlane, kind: str) -> Held:
    channel = control.request(StreamRequest(f"{kind}-{random.random()}", kind, "web-1", {}))
    async with asyncio.timeout(5):
        message = await channel.receive()
    await channel.close()
    assert message is not None
    answer, payload = unpack(message)
    assert answer is Kind.DATA, payload
    return codec.decode(payload, Held)


async def test_a_paused_instance_takes_no_command_until_it_goes_on(control: FakeControlPlane) -> None:
    assert (await hold(control, StreamKind.PAUSE)).paused
    assert (await hold(control, StreamKind.PAUSE)).paused  # safe to repeat
    ((kind, payload),) = await ask(control, StreamKind.EXEC, argv=["echo"])
    assert (kind, codec.decode(payload, ErrorBody).code) == (Kind.ERROR, "conflict")
    assert not (await hold(control, StreamKind.RESUME)).paused
    assert not (await hold(control, StreamKind.RESUME)).paused
    assert (await ask(control, StreamKind.EXEC, argv=["exit", "3"]))[-1] == (Kind.EXIT, b"3")


async def test_a_sandbox_goes_on_from_a_snapshot_of_its_node_and_not_from_one_that_is_gone(
    control: FakeControlPlane, tmp_path: Path
) -> None:
    snapshot = (await hold(control, StreamKind.SNAPSHOT)).snapshot
    assert isinstance(snapshot, SnapshotView)
    assert (snapshot.node, snapshot.runtime) == ("n1", RuntimeName.RUNC)
    assert [path.name for path in (tmp_path / "snapshots/default").iterdir()] == [snapshot.digest.removeprefix("sha256:")]
    gone = "sha256:" + "0" * 64
    for name, digest in (("twin", snapshot.digest), ("lost", gone)):
        spec = JobSpec(name=name, image="web", sandbox=True, snapshot=digest)
        instance = Instance(
            id=f"{name}-1", project="default", owner_kind=OwnerKind.JOB, owner=name, runtime=RuntimeName.RUNC, created_at=1.0
        )
        control.assign(Assignment(instance=instance, workload=spec, revision=2))
    await control.until(lambda c: "twin-1" in c.statuses and c.statuses["twin-1"].phase is Phase.RUNNING)
    await control.until(lambda c: "lost-1" in c.statuses and c.statuses["lost-1"].phase is Phase.FAILED)
    assert "no snapshot" in control.statuses["lost-1"].message
    assert (await ask(control, StreamKind.EXEC, "twin-1", argv=["exit", "4"]))[-1] == (Kind.EXIT, b"4")


def test_snapshots_are_kept_by_content_and_the_longest_unused_goes(tmp_path: Path) -> None:
    kept = Snapshots(tmp_path)
    digests = [f"sha256:{at:064x}" for at in range(SNAPSHOTS_MAX + 1)]

    def keep(at: int) -> None:
        written = kept.place("p", "box-1")
        written.mkdir()
        (written / "state").write_text(str(at))
        kept.keep("p", digests[at], written)
        os.utime(tmp_path / "p" / f"{at:064x}", (at, at))

    for at in range(SNAPSHOTS_MAX):
        keep(at)
    keep(1)  # the same once more
    assert len(list((tmp_path / "p").iterdir())) == SNAPSHOTS_MAX
    assert kept.find("p", digests[0])  # used: now 1 is the oldest
    keep(SNAPSHOTS_MAX)
    with pytest.raises(NotFound, match="no snapshot"):
        kept.find("p", digests[1])
    assert kept.find("p", digests[0])
    with pytest.raises(NotFound):
        kept.find("other", digests[0])  # another project's


async def test_snapshots_of_a_project_are_listed_by_its_node_and_removed_by_hand(control: FakeControlPlane, tmp_path: Path) -> None:
    snapshot = (await hold(control, StreamKind.SNAPSHOT)).snapshot
    assert snapshot is not None

    async def listed(project: str) -> list[SnapshotView]:
        ((kind, payload),) = await node(control, StreamKind.SNAPSHOTS, project=project)
        assert kind is Kind.DATA, payload
        return codec.decode(payload, list[SnapshotView])

    (view,) = await listed("default")
    assert (view.digest, view.of, view.node, view.taken_at) == (snapshot.digest, "web", "n1", snapshot.taken_at)
    assert await listed("other") == []
    for project, digest, code in (
        ("other", snapshot.digest, "not-found"),
        ("default", "sha256:../../../record.db", "invalid"),
        ("default", "sha256:" + "0" * 64, "not-found"),
    ):
        ((kind, payload),) = await node(control, StreamKind.SNAPSHOT_REMOVE, project=project, digest=digest)
        assert (kind, codec.decode(payload, ErrorBody).code) == (Kind.ERROR, code)
    assert await node(control, StreamKind.SNAPSHOT_REMOVE, project="default", digest=snapshot.digest) == [(Kind.END, b"")]
    assert await listed("default") == []
    assert list((tmp_path / "snapshots/default").iterdir()) == []


async def node(control: FakeControlPlane, kind: str, **options: str) -> list[tuple[Kind, bytes]]:
    """Ask the node itself, and hang up when it has answered."""
    channel = control.request(StreamRequest(f"{kind}-{random.random()}", kind, "", dict(options)))
    async with asyncio.timeout(5):
        message = await channel.receive()
    await channel.close()
    return [unpack(message)] if message is not None else []


@pytest.mark.parametrize(
    ("spec", "field"),
    [
        (JobSpec(name="x", image="i", snapshot="sha256:" + "0" * 64), "snapshot"),
        (JobSpec(name="x", image="i", sandbox=True, completions=2), "sandbox"),
        (JobSpec(name="x", image="i", sandbox=True, retries=1), "sandbox"),
        (JobSpec(name="x", image="i", sandbox=True, schedule="* * * * *"), "sandbox"),
    ],
)
def test_a_sandbox_that_is_none_is_refused_by_its_field(spec: JobSpec, field: str) -> None:
    with pytest.raises(Invalid) as raised:
        check_job(spec)
    assert raised.value.field == field


def test_what_goes_on_from_a_snapshot_is_bound_to_its_node_alone() -> None:
    spec = from_snapshot(JobSpec(name="x", image="i"), "sha256:" + "1" * 64, "n1")
    again = from_snapshot(spec, "sha256:" + "2" * 64, "n2")
    assert [(rule.label, rule.value) for rule in again.placement.constraints] == [("node", "n2")]
    check_job(again)
