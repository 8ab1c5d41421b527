"""The log of a job that is followed: every try and every index, however short, and then an end."""

from __future__ import annotations

import asyncio

import pytest
from msgspec.structs import replace

from atoll.cli.logs import print_logs
from atoll.cli.session import Session
from atoll.model.records import Exit, Instance, Job, JobPhase, JobStatus, OwnerKind, Status
from atoll.model.spec import JobSpec, RuntimeName
from atoll.model.states import Phase
from atoll.model.streams import LogLine
from atoll.sdk.client import Client
from atoll.sdk.fake import FakeApi

NAME = "sum"
STATUS = JobStatus(project="default", name=NAME, phase=JobPhase.RUNNING)
DEADLINE_S = 5.0


class Cell:
    """A job in an API in memory whose tries come and go as a test says."""

    def __init__(self) -> None:
        self.api = FakeApi()
        spec = JobSpec(name=NAME, image="x", retries=3)
        self.api.put("jobs", f"default/{NAME}", Job(project="default", name=NAME, spec=spec, created_at=1.0))
        self.api.put("job-statuses", f"default/{NAME}", STATUS)

    def attempt(self, id: str, *, ended: bool) -> None:
        self.api.logs[id] = [LogLine(at=1.0, stream="stdout", text=f"said by {id}")]
        instance = Instance(id=id, project="default", owner_kind=OwnerKind.JOB, owner=NAME, node="n1", created_at=1.0)
        self.api.put("instances", f"default/{id}", replace(instance, runtime=RuntimeName.RUNC))
        status = Status(instance=id, project="default", node="n1", phase=Phase.RUNNING, started_at=2.0)
        if ended:
            status = replace(status, phase=Phase.FAILED, exit=Exit(code=1, at=3.0))
        self.api.put("statuses", f"default/{id}", status)

    def end(self) -> None:
        self.api.put("job-statuses", f"default/{NAME}", replace(STATUS, phase=JobPhase.FAILED, failures={0: 4}))

    async def follow(self) -> None:
        async with asyncio.timeout(DEADLINE_S):
            await print_logs(Session(dial=lambda _: self.api), Client(self.api), NAME, follow=True, prefix=False)

    async def watched(self) -> None:
        while not self.api.watchers:  # noqa: ASYNC110 - the watch is opened within a few turns of the loop
            await asyncio.sleep(0)


async def test_tries_that_come_later_and_end_at_once_are_shown(capsys: pytest.CaptureFixture[str]) -> None:
    cell = Cell()
    cell.attempt("sum-1", ended=False)
    following = asyncio.ensure_future(cell.follow())
    await cell.watched()
    cell.attempt("sum-2", ended=True)
    cell.attempt("sum-3", ended=True)
    cell.end()
    await following
    assert sorted(capsys.readouterr().out.splitlines()) == ["said by sum-1", "said by sum-2", "said by sum-3"]


async def test_a_job_followed_before_its_first_instance_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    cell = Cell()
    following = asyncio.ensure_future(cell.follow())
    await cell.watched()
    cell.attempt("sum-1", ended=True)
    cell.end()
    await following
    assert capsys.readouterr().out == "said by sum-1\n"


async def test_following_a_job_that_has_ended_ends(capsys: pytest.CaptureFixture[str]) -> None:
    cell = Cell()
    cell.attempt("sum-1", ended=True)
    cell.end()
    await cell.follow()
    assert capsys.readouterr().out == "said by sum-1\n"
