"""The usher as its runtime has it: who starts a command when it answers, is late, is gone, or never was one."""

from __future__ import annotations

import asyncio
import os
import signal
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest

from atoll.model.errors import CommandNotFound, DeadlineExceeded, RuntimeFailed, Unavailable
from atoll.model.ports.images import Image, ImageConfig
from atoll.model.records import Assignment, Instance, OwnerKind
from atoll.model.spec import AppSpec, JobSpec
from atoll.node.compose import compose
from atoll.runtimes.exec_tool import ExecFiles
from atoll.runtimes.native import guest_path
from atoll.runtimes.oci import process
from atoll.runtimes.oci_box import NETNS
from atoll.runtimes.oci_launch import Place
from atoll.runtimes.users import User
from atoll.runtimes.usher import LOSSES_MAX, Attendance, Usher, bring_usher
from atoll.runtimes.vm.channel import STREAMS_MAX
from atoll.runtimes.vm.config import process_words
from atoll.runtimes.vm.execution import GuestExecution

OWN = User(os.getuid(), os.getgid())
LATE_S = 0.3


class PlainTool:
    """Starts what it is given among the node's own processes, as a runtime's tool does it in an instance."""

    hands_on = False

    def encode(self, process: dict[str, Any]) -> bytes:
        self._argv = process["args"]
        return msgspec.json.encode(process)

    def command(self, files: ExecFiles) -> list[str]:
        return ["/bin/sh", "-c", 'exec 5<&0; "$@" <&5 5<&- & echo $! >"$0"', str(files.pid), *self._argv]


@pytest.fixture
def place() -> Iterator[Place]:
    with tempfile.TemporaryDirectory(dir="/tmp") as directory:
        own = process(("run",), (("PATH", "/usr/bin:/bin"),), "/", OWN)
        config = {"process": own, "root": {"path": "/"}, "annotations": {NETNS: "-"}}
        Path(directory, "config.json").write_bytes(msgspec.json.encode(config))
        yield Place(Path(directory), PlainTool(), None)


@asynccontextmanager
async def usher_in(place: Place, **deadlines: float) -> AsyncIterator[Usher]:
    usher = await bring_usher(place, str(guest_path()), **deadlines)
    yield usher
    await usher.end()


def words(*argv: str) -> bytes:
    return process_words(process(argv, (("PATH", "/usr/bin:/bin"),), "/", OWN), make_directory=False)


async def said(execution: GuestExecution | None) -> str:
    assert execution is not None
    parts = []
    while (part := await asyncio.wait_for(execution.read(), 20)) is not None:
        parts.append(part[1])
    await execution.close()
    return b"".join(parts).decode()


async def pid_of(usher: Usher) -> int:
    return int(await said(await usher.run(words("sh", "-c", "echo $PPID"), "sh", None)))


def runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize(
    ("workload", "attended"),
    [
        (JobSpec(name="try", image="x", sandbox=True), True),
        (JobSpec(name="sum", image="x"), False),
        (AppSpec(name="web", image="x"), False),
    ],
)
def test_sandboxes_are_attended_and_nothing_else_is(workload: AppSpec | JobSpec, attended: bool, tmp_path: Path) -> None:
    kind = OwnerKind.JOB if isinstance(workload, JobSpec) else OwnerKind.APP
    instance = Instance(id="i-1", project="default", owner_kind=kind, owner=workload.name, created_at=0.0, node="n")
    box = compose(
        Assignment(instance=instance, workload=workload, revision=1),
        node="n",
        directory=tmp_path,
        image=Image(reference="x", digest="sha256:0", config=ImageConfig(entrypoint=("run",)), layers=()),
        link=None,
        secrets={},
        mounts=(),
        stdout=tmp_path / "out",
        stderr=tmp_path / "err",
    )
    assert box.attended is attended


async def test_a_command_that_is_not_there_is_named_and_the_usher_stays(place: Place) -> None:
    async with usher_in(place) as usher:
        with pytest.raises(CommandNotFound, match="missing"):
            await usher.run(words("missing"), "missing", None)
        assert await said(await usher.run(words("echo", "here"), "echo", None)) == "here\n"


async def test_it_ends_when_it_is_let_go_and_its_commands_with_it(place: Place) -> None:
    async with usher_in(place) as usher:
        pid = await pid_of(usher)
        beside = await usher.run(words("sleep", "1000"), "sleep", None)
        assert beside is not None
        await usher.end()
        assert await asyncio.wait_for(beside.wait(), 20) == 137
        assert not runs(pid)
        assert list((place.directory / "exec").iterdir()) == []


async def test_one_that_was_stopped_is_ended_and_the_next_command_has_another(place: Place) -> None:
    attendance = Attendance()

    async def bring() -> Usher:
        return await bring_usher(place, str(guest_path()), answer_s=LATE_S)

    first = int(await said(await attendance.run(bring, words("sh", "-c", "echo $PPID"), "sh", None)))
    os.kill(first, signal.SIGSTOP)
    with pytest.raises(DeadlineExceeded):
        await attendance.run(bring, words("echo", "late"), "echo", None)
    patient = await attendance.run(lambda: bring_usher(place, str(guest_path())), words("sh", "-c", "echo $PPID"), "sh", None)
    assert int(await said(patient)) != first
    await attendance.end()
    for _ in range(200):
        if not runs(first):
            break
        await asyncio.sleep(0.05)
    else:
        pytest.fail("the one that was stopped lives")


async def test_where_none_can_be_brought_the_tool_does_it_and_few_tries_are_made(place: Place) -> None:
    tries = 0

    async def bring() -> Usher:
        nonlocal tries
        tries += 1
        raise RuntimeFailed("no room")

    attendance = Attendance()
    for _ in range(2 * LOSSES_MAX):
        assert await attendance.run(bring, words("true"), "true", None) is None
    assert tries == LOSSES_MAX


async def test_what_does_not_greet_is_no_usher_and_is_ended(place: Place) -> None:
    with pytest.raises(DeadlineExceeded):
        await bring_usher(place, "/usr/bin/yes", greeting_s=LATE_S)
    assert list((place.directory / "exec").iterdir()) == []
    with pytest.raises(Unavailable):
        await bring_usher(place, "/no/such/usher", greeting_s=LATE_S)


async def test_what_is_beyond_its_bound_is_left_to_the_tool(place: Place) -> None:
    async with usher_in(place) as usher:
        busy = [await usher.run(words("cat"), "cat", None) for _ in range(STREAMS_MAX)]
        assert None not in busy
        assert await usher.run(words("true"), "true", None) is None


async def test_what_no_frame_can_hold_is_left_to_the_tool(place: Place) -> None:
    async with usher_in(place) as usher:
        assert await usher.run(words("true", *["x" * 100_000] * 11), "true", None) is None
        assert await said(await usher.run(words("echo", "here"), "echo", None)) == "here\n"


async def test_one_that_stopped_reading_is_ended_within_its_deadline(place: Place) -> None:
    async with usher_in(place, answer_s=LATE_S) as usher:
        pid = await pid_of(usher)
        os.kill(pid, signal.SIGSTOP)
        began = asyncio.get_running_loop().time()
        with pytest.raises(DeadlineExceeded):  # more than its pipe holds
            await usher.run(words("true", *["x" * 100_000] * 9), "true", None)
        assert asyncio.get_running_loop().time() - began < LATE_S + 1.5
        assert usher.lost
