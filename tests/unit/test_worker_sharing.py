"""Which workers share a process, on a virtual clock over processes that do as they are told; and what each has of its own."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from control_cell import run_virtual

from atoll.model import codec
from atoll.model.errors import Invalid, RuntimeFailed
from atoll.model.ports.runtime import Limits, WorkerCode
from atoll.model.records import Exit
from atoll.model.spec import AppSpec, check_app
from atoll.model.worker import Worker
from atoll.node.moves import describe_exit
from atoll.runtimes.workerd_config import Module, part_of, shared_configuration, variables
from atoll.runtimes.workerd_making import Processes
from atoll.runtimes.workerd_members import Member, Process, Unready, groups
from atoll.runtimes.workerd_output import Output, Pipes
from atoll.runtimes.workerd_sharer import Sharer, WorkerRecord, without
from atoll.runtimes.workerd_sharing import Sharing
from atoll.runtimes.workerd_sockets import Activity

KILLED = Exit(code=137, at=0.0, signal="SIGKILL")


class FakeProcess:
    """Runs until it is told to end, by `die` or `hang` or as a process is."""

    def __init__(self, number: int, members: Sequence[Member]) -> None:
        self.id, self.pid = f"shared.p.{number}", number
        self.members = frozenset(members)
        self.names = sorted(member.id for member in members)
        self.active: dict[str, Activity] = {}
        self.terminated = self.removed = False
        self._ended: asyncio.Future[Exit] = asyncio.get_running_loop().create_future()
        self._hung: asyncio.Future[frozenset[str]] = asyncio.get_running_loop().create_future()

    def die(self, exit: Exit = KILLED) -> None:
        if not self._ended.done():
            self._ended.set_result(exit)

    def hang(self, *suspects: str) -> None:
        self._hung.set_result(frozenset(suspects))

    async def ended(self) -> Exit:
        return await asyncio.shield(self._ended)

    async def hung(self) -> frozenset[str]:
        return await asyncio.shield(self._hung)

    async def activity(self) -> Mapping[Member, Activity]:
        return {member: self.active[member.id] for member in self.members if member.id in self.active}

    async def terminate(self) -> None:
        self.terminated = True
        self.die(Exit(code=0, at=0.0))

    async def remove(self) -> Exit | None:
        self.die()
        self.removed = True
        return self._ended.result()


class FakeMaking:
    """Makes processes in no time; `refuse` says what becomes of the next ones instead."""

    def __init__(self) -> None:
        self.made: list[FakeProcess] = []
        self.refuse: Callable[[set[str]], Unready | None] = lambda names: None

    async def make(self, members: Sequence[Member]) -> Process | Unready:
        await asyncio.sleep(0.05)
        found = self.refuse({member.id for member in members})
        if found is not None:
            return found
        self.made.append(FakeProcess(len(self.made) + 1, members))
        return self.made[-1]

    @property
    def running(self) -> list[list[str]]:
        return sorted(process.names for process in self.made if not process.removed and not process.terminated)


@asynccontextmanager
async def shared(*ids: str) -> AsyncIterator[tuple[Sharing, FakeMaking, dict[str, Member]]]:
    making = FakeMaking()
    sharing = Sharing(making)
    members = {id: member_of(id) for id in ids}
    for member in members.values():
        await sharing.enter(member)
    await asyncio.sleep(1)
    try:
        yield sharing, making, members
    finally:
        await sharing.close()


def member_of(id: str) -> Member:
    said: list[str] = []
    member = Member(id, said.append)
    member.said = said  # type: ignore[attr-defined]
    return member


def said(member: Member) -> str:
    return "\n".join(member.said)  # type: ignore[attr-defined]


def test_all_are_together_but_those_apart_and_no_process_has_too_many() -> None:
    async def main() -> None:
        members = [member_of(f"m{at}") for at in range(66)]
        found = groups(members, {"m3", "m7"})
        assert [len(group) for group in found] == [32, 32, 1, 1]
        assert {member.id for group in found[2:] for member in group} == {"m3", "m7"}
        assert set().union(*found) == set(members)

    run_virtual(main())


def test_who_comes_and_goes_leaves_one_process_with_those_who_are_there() -> None:
    async def main() -> None:
        async with shared("a", "b", "c") as (sharing, making, members):
            assert making.running == [["a", "b", "c"]]
            sharing.leave(members["b"])
            await asyncio.wait_for(members["b"].ended.wait(), 10)
            assert members["b"].exit is not None
            assert members["b"].exit.code == 0
            await asyncio.sleep(1)
            assert making.running == [["a", "c"]]

    run_virtual(main())


def test_a_process_lingers_while_its_connections_are_in_use_and_then_ends_in_good_order() -> None:
    async def main() -> None:
        async with shared("a") as (sharing, making, _):
            first = making.made[0]
            first.active = {"a": Activity(0.1, False)}
            await sharing.enter(member_of("b"))
            await asyncio.sleep(10)
            assert not first.terminated
            first.active = {"a": Activity(6.0, True)}
            await asyncio.sleep(10)
            assert not first.terminated
            first.active = {"a": Activity(6.0, False)}
            await asyncio.sleep(1)
            assert first.terminated
            assert first.removed

    run_virtual(main())


def test_what_is_in_use_for_ever_holds_a_process_for_a_bounded_time_and_few_of_them() -> None:
    async def main() -> None:
        async with shared("m0") as (sharing, making, _):
            for at in range(1, 8):
                making.made[-1].active = {"m0": Activity(0.0, True)}
                await sharing.enter(member_of(f"m{at}"))
            await asyncio.sleep(1)
            assert [process.terminated for process in making.made] == [True] * 3 + [False] * 5
            await asyncio.sleep(60)
            assert making.running == [[f"m{at}" for at in range(8)]]

    run_virtual(main())


def test_the_one_whose_request_hangs_ends_and_the_others_are_served_together_again() -> None:
    async def main() -> None:
        async with shared("a", "b", "c") as (sharing, making, members):
            making.made[-1].hang("b")
            exit = (await asyncio.wait_for(members["b"].ended.wait(), 10)) and members["b"].exit
            assert exit is not None
            assert "the process that it shares with 2 other workers" in describe_exit(exit)
            await asyncio.sleep(1)
            assert making.running == [["a", "c"]]
            assert "is served again" in said(members["a"])
            assert members["a"].exit is None
            await sharing.enter(member_of("b"))
            assert making.running == [["a", "c"], ["b"]]
            await asyncio.sleep(300)
            assert making.running == [["a", "b", "c"]]

    run_virtual(main())


def test_all_run_apart_when_nobody_knows_whose_fault_it_was_until_each_has_run_well_for_a_while() -> None:
    async def main() -> None:
        async with shared("a", "b", "c") as (_, making, members):
            making.made[-1].die(Exit(code=137, at=0.0, signal="SIGKILL", oom=True))
            await asyncio.sleep(1)
            assert making.running == [["a"], ["b"], ["c"]]
            assert "went over its memory limit" in said(members["a"])
            (guilty,) = [process for process in making.made if process.names == ["c"]]
            guilty.die(Exit(code=137, at=0.0, signal="SIGKILL", oom=True))
            await asyncio.wait_for(members["c"].ended.wait(), 10)
            assert members["c"].exit is not None
            assert members["c"].exit.oom
            await asyncio.sleep(90)
            assert making.running == [["a", "b"]]

    run_virtual(main())


def test_each_failure_of_its_own_keeps_a_worker_apart_for_longer() -> None:
    async def main() -> None:
        async with shared("a", "b") as (sharing, making, members):
            member = members["b"]
            for minutes in (2, 4, 8):
                making.made[-1].hang("b")
                await asyncio.wait_for(member.ended.wait(), 10)
                member = member_of("b")
                await sharing.enter(member)
                await asyncio.sleep(minutes * 60 - 10)
                assert making.running == [["a"], ["b"]]
                await asyncio.sleep(20)
                assert making.running == [["a", "b"]]

    run_virtual(main())


def test_one_that_does_not_load_ends_and_costs_the_others_nothing() -> None:
    async def main() -> None:
        async with shared("a") as (sharing, making, members):
            making.refuse = lambda names: Unready(9, Exit(code=1, at=0.0), frozenset({"bad"})) if "bad" in names else None
            bad = member_of("bad")
            assert (await sharing.enter(bad)).pid == 9
            assert bad.exit is not None
            assert bad.exit.code == 1
            assert not making.made[0].terminated
            assert sharing.process_of(members["a"]) is making.made[0]

    run_virtual(main())


def test_one_whose_modules_do_not_run_in_time_ends_in_words_and_is_not_set_apart_for_it() -> None:
    async def main() -> None:
        async with shared() as (sharing, making, _):
            late = Exit(code=137, at=0.0, signal="SIGKILL", why="its modules had not run within 30 s")
            making.refuse = lambda names: Unready(9, late, frozenset(), late=True)
            slow = member_of("slow")
            await sharing.enter(slow)
            assert slow.exit is not None
            assert describe_exit(slow.exit) == "its modules had not run within 30 s"
            making.refuse = lambda names: None
            await sharing.enter(member_of("a"))
            await sharing.enter(member_of("slow"))
            await asyncio.sleep(1)
            assert making.running == [["a", "slow"]]

    run_virtual(main())


def test_of_newcomers_that_fail_without_a_name_each_is_tried_apart() -> None:
    async def main() -> None:
        async with shared("a") as (sharing, making, _):
            making.refuse = lambda names: Unready(9, Exit(code=139, at=0.0), frozenset()) if "bad" in names else None
            bad, good = member_of("bad"), member_of("good")
            async with asyncio.TaskGroup() as group:
                group.create_task(sharing.enter(bad))
                group.create_task(sharing.enter(good))
            assert bad.exit is not None
            assert good.exit is None
            assert not making.made[0].terminated
            await asyncio.sleep(90)
            assert making.running == [["a", "good"]]

    run_virtual(main())


def test_where_no_process_can_be_made_the_start_fails_and_the_others_stay() -> None:
    async def main() -> None:
        async with shared("a") as (sharing, making, members):

            def full(names: set[str]) -> Unready | None:
                raise RuntimeFailed("the disk is full")

            making.refuse = full
            with pytest.raises(RuntimeFailed, match="disk is full"):
                await sharing.enter(member_of("b"))
            assert sharing.process_of(members["a"]) is making.made[0]
            making.refuse = lambda names: None
            await sharing.enter(member_of("c"))
            await asyncio.sleep(1)
            assert making.running == [["a", "c"]]

    run_virtual(main())


def test_one_that_is_killed_does_not_wait_for_what_the_others_were_asked() -> None:
    async def main() -> None:
        async with shared("a", "b") as (sharing, making, members):
            making.made[-1].active = {"a": Activity(0.0, True)}
            await asyncio.wait_for(sharing.cut(members["b"]), 2)
            assert members["b"].exit is not None
            assert members["b"].exit.signal == "SIGKILL"
            assert members["a"].exit is None
            await asyncio.wait_for(sharing.cut(members["a"]), 2)
            await sharing.end_empty()
            assert all(process.removed for process in making.made)

    run_virtual(main())


def test_a_process_that_hangs_while_it_lingers_is_killed_and_nobody_else_is_touched() -> None:
    async def main() -> None:
        async with shared("a") as (sharing, making, members):
            first = making.made[0]
            first.active = {"a": Activity(0.0, True)}
            await sharing.enter(member_of("b"))
            first.hang("a")
            await asyncio.sleep(1)
            assert first.removed
            assert not first.terminated
            assert members["a"].exit is None
            assert making.running == [["a", "b"]]

    run_virtual(main())


def test_the_kernel_s_order_of_sockets_is_followed() -> None:
    assert list(without({"a": 1, "b": 2, "c": 3}, "a")) == ["c", "b"]
    assert list(without({"a": 1, "b": 2, "c": 3}, "c")) == ["a", "b"]
    assert list(without({"a": 1}, "a")) == []


def code(project: str = "p", **worker: Any) -> WorkerCode:
    given = {"main": "src/index.js", "compatibility_date": "2026-11-01", "shared": True, **worker}
    return WorkerCode(worker=codec.convert(given, Worker), project=project, port=8080, alive_port=8081, bindings=("TOKEN",))


def test_each_part_of_a_shared_configuration_has_names_of_its_own() -> None:
    services = [{"binding": "B", "app": "other"}]
    modules = [Module("src/index.js"), Module("atoll-part-0.js")]
    parts = [part_of(code(services=services), modules, name=f"w-{at}", number=at) for at in range(2)]
    text = shared_configuration(parts, heap_mib=32)
    for name in ("w-0", "w-1"):
        assert f'embed "workers/{name}/src/index.js"' in text
        assert f'(name = "{name}/http", http = (forwardedProtoHeader = "x-forwarded-proto"), service = "{name}/main")' in text
        assert f'(name = "B", service = "{name}/service-B")' in text
        assert f'globalOutbound = "{name}/internet"' in text
        assert f'tails = [(name = "tail", props = (json = "\\"{name}\\""))]' in text
    assert text.count('(name = "atoll-part-0.js"') == 2, "a module of the worker's keeps its name, and ours gives way"
    assert [variables(part.code, (("TOKEN", "s"), ("PATH", "/bin")), part) for part in parts] == [
        (("ATOLL_B_0_TOKEN", "s"),),
        (("ATOLL_B_1_TOKEN", "s"),),
    ]
    assert '"--max-heap-size=32"' in text


def sharer(directory: Path, id: str, project: str) -> Sharer:
    for stream in ("out", "err"):
        os.mkfifo(directory / f"{id}.{stream}")
    record = WorkerRecord(
        id=id,
        serial="1",
        path=str(directory),
        code=code(project),
        env=(),
        limits=Limits(cpu_milli=100, memory_bytes=1, disk_bytes=1, pids=1),
        netns="/none",
        resolv_conf=None,
        stdout=str(directory / f"{id}.out"),
        stderr=str(directory / f"{id}.err"),
    )
    return Sharer(record, directory / f"{id}.order")


async def test_what_makes_processes_refuses_a_worker_of_another_project(tmp_path: Path) -> None:
    making = Processes(None, tmp_path, "p", 0, None)  # type: ignore[arg-type]  # it comes to nothing that needs a runtime
    own, strange = sharer(tmp_path, "a", "p"), sharer(tmp_path, "b", "q")
    with pytest.raises(AssertionError, match="another project than p"):
        await making.make([own, strange])
    for each in (own, strange):
        each.let_go()


async def test_lines_go_to_whom_they_are_of_and_what_is_nobody_s_goes_to_all(tmp_path: Path) -> None:
    pipes, ends = {}, {}
    for id in ("a", "b"):
        paths = [tmp_path / f"{id}.{stream}" for stream in ("out", "err")]
        for path in paths:
            os.mkfifo(path)
        pipes[id] = Pipes(*paths)
        ends[id] = [os.open(path, os.O_RDONLY | os.O_NONBLOCK) for path in paths]
    output = Output(tmp_path / "all", pipes)
    lines = [
        {"level": "log", "message": "\x01a\x01of a\nin two"},
        {"level": "warn", "message": "\x01b\x01of b \x01a\x01"},
        {"level": "log", "message": "forged \x01a\x01"},
        {"level": "error", "message": "service b/main: Uncaught SyntaxError: no"},
        {"level": "error", "message": "Uncaught exception: what the tail has said already"},
    ]
    with (tmp_path / "all").open("wb", buffering=0) as pipe:
        pipe.write("\n".join(json.dumps(line) for line in lines).encode() + b"\n#\n# Fatal: out of memory")
    output.close()
    assert os.read(ends["a"][0], 4096) == b"of a\nin two\n"
    assert (
        os.read(ends["a"][1], 4096)
        == b"shared process: forged \x01a\x01\nshared process: #\nshared process: # Fatal: out of memory\n"
    )
    assert os.read(ends["b"][1], 4096).startswith(b"of b \x01a\x01\nshared process: forged \x01a\x01\nUncaught SyntaxError: no\n")
    assert output.blamed == {"b"}
    for _ in range(40):
        pipes["a"].write("x" * 4000, error=False)
    os.read(ends["a"][0], 1 << 20)
    pipes["a"].write("after", error=False)
    assert b"lines were written too fast, and are lost\nafter\n" in os.read(ends["a"][0], 1 << 20)
    for id in pipes:
        pipes[id].close()
        for fd in ends[id]:
            os.close(fd)


@pytest.mark.parametrize(
    ("worker", "fields", "field"),
    [
        ({"kv": [{"binding": "KV"}]}, {}, "worker.shared"),
        ({"durable_objects": [{"binding": "C", "class_name": "C"}]}, {}, "worker.shared"),
        ({"egress": ["192.0.2.0/24"]}, {}, "worker.egress"),
        ({}, {"network": {"egress": []}}, "network.egress"),
        ({}, {"network": {"bandwidth": "1MiB"}}, "network.bandwidth"),
        ({}, {"network": {"packets": 1000}}, "network.packets"),
        ({}, {"resources": {"memory": "8MiB"}}, "resources.memory"),
    ],
)
def test_what_a_shared_worker_cannot_have_is_refused_by_its_field(
    worker: dict[str, Any], fields: dict[str, Any], field: str
) -> None:
    given = {"main": "index.js", "compatibility_date": "2026-11-01", "shared": True, **worker}
    with pytest.raises(Invalid) as raised:
        check_app(codec.convert({"name": "w", "worker": given, **fields}, AppSpec))
    assert raised.value.field == field
    assert raised.value.mend


def test_a_shared_worker_needs_little_memory_of_its_own() -> None:
    given = {"main": "index.js", "compatibility_date": "2026-11-01", "shared": True, "egress": []}
    check_app(codec.convert({"name": "w", "worker": given, "resources": {"memory": "16MiB"}}, AppSpec))
