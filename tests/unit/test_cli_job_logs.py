"""Logs that are followed: of a job every try and every index, however short, and then an end; each line once, whatever breaks."""

from __future__ import annotations

import asyncio
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
from control_cell import run_virtual
from msgspec.structs import replace

from atoll.cli.logs import print_logs
from atoll.cli.session import Session
from atoll.model import codec
from atoll.model.errors import AtollError, Unavailable
from atoll.model.ports.control_plane import Channel
from atoll.model.records import Exit, Instance, Job, JobPhase, JobStatus, OwnerKind, Status
from atoll.model.spec import JobSpec, RuntimeName
from atoll.model.states import Phase
from atoll.model.streams import Kind, LogLine, LogOptions
from atoll.sdk.client import Client
from atoll.sdk.fake import FakeApi
from atoll.sdk.fake_streams import FakeChannel, FakeNodeEnd

NAME = "sum"
STATUS = JobStatus(project="default", name=NAME, phase=JobPhase.RUNNING)
DEADLINE_S = 100.0


class Cell:
    """A job in an API in memory whose tries come and go as a test says."""

    def __init__(self, api: FakeApi | None = None) -> None:
        self.api = api or FakeApi()
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

    async def follow(self, name: str = NAME, tail: int | None = None) -> None:
        async with asyncio.timeout(DEADLINE_S):
            await print_logs(Session(dial=lambda _: self.api), Client(self.api), name, follow=True, tail=tail, prefix=False)

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


class Breaking(FakeApi):
    """The streams of an instance's log break behind so many of its lines, one after the other; the last says its end."""

    def __init__(self, *breaks: int | AtollError) -> None:
        super().__init__()
        self.breaks = list(breaks)
        self.asked: list[LogOptions] = []

    async def channel(self, path: str, **options: Any) -> Channel:
        asked = codec.decode(parse_qs(urlsplit(path).query)["options"][0].encode(), LogOptions)
        self.asked.append(asked)
        behind = self.breaks.pop(0) if self.breaks else None
        if isinstance(behind, AtollError):
            raise behind
        kept = next(iter(self.logs.values()))
        lines = [line for line in kept[:behind] if asked.since is None or line.at >= asked.since]

        async def run(node: FakeNodeEnd) -> None:
            for line in lines if asked.tail is None else lines[-asked.tail :]:
                await node.send(Kind.LOG, codec.encode(line))
            if behind is None:
                await node.send(Kind.END)

        return FakeChannel(run)


AWAY = Unavailable("node 'n1' has no connection")
LINES = [LogLine(at=at, stream="stdout", text=text) for at, text in ((1.0, "a"), (2.0, "b"), (2.0, "c"), (2.0, "d"), (3.0, "e"))]


@pytest.mark.parametrize("name", [NAME, "sum-1"])
def test_a_log_whose_stream_breaks_is_gone_on_with_and_no_line_comes_twice(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    cell = Cell(api := Breaking(3, AWAY, 4, 4))
    cell.attempt("sum-1", ended=False)
    api.logs["sum-1"] = LINES
    cell.end()
    run_virtual(cell.follow(name, tail=2))
    out, err = capsys.readouterr()
    assert out.splitlines() == ["b", "c", "d", "e"]
    assert [(one.since, one.tail) for one in api.asked] == [(None, 2), *[(2.0, None)] * 4]
    assert err.count("sum-1: ") == 3, "each time it breaks is told once"


def test_of_a_moment_of_which_only_the_last_lines_were_asked_for_the_others_do_not_come_after_a_break(
    capsys: pytest.CaptureFixture[str],
) -> None:
    cell = Cell(api := Breaking(10))
    cell.attempt("sum-1", ended=False)
    api.logs["sum-1"] = [LogLine(at=2.0, stream="stdout", text=f"l{n}") for n in range(12)]
    cell.end()
    run_virtual(cell.follow("sum-1", tail=3))
    assert capsys.readouterr().out.splitlines() == ["l7", "l8", "l9", "l10", "l11"]


def test_an_instance_that_cannot_be_read_says_so_at_once_and_one_that_went_away_after_a_while(
    capsys: pytest.CaptureFixture[str],
) -> None:
    cell = Cell(api := Breaking(AWAY))
    cell.attempt("sum-1", ended=False)
    with pytest.raises(ExceptionGroup) as caught:
        run_virtual(cell.follow("sum-1"))
    assert caught.group_contains(Unavailable)
    assert len(api.asked) == 1
    api.breaks = [1, *[AWAY] * 1_000]
    with pytest.raises(ExceptionGroup):
        run_virtual(cell.follow("sum-1"))
    assert 50 < len(api.asked) < 70
    assert capsys.readouterr().out == "said by sum-1\n"
