"""Processes that workers share, without one: their sockets in the kernel's order, their records, what a failed start leaves."""

from __future__ import annotations

import asyncio
import os
import socket
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from control_cell import run_virtual

from atoll.model import codec
from atoll.model.errors import AtollError, NotFound, RuntimeFailed
from atoll.model.ports.images import Image, ImageConfig
from atoll.model.ports.runtime import Box, Limits, Started, WorkerCode
from atoll.model.records import Exit, Usage
from atoll.model.worker import MODULES, Worker
from atoll.runtimes.workerd_making import Processes, ProcessRecord, read_record
from atoll.runtimes.workerd_members import Process, Unready
from atoll.runtimes.workerd_output import Output
from atoll.runtimes.workerd_process import WATCH_S, WorkerProcess
from atoll.runtimes.workerd_shared import SharedWorkers
from atoll.runtimes.workerd_sharer import Sharer, WorkerRecord, write_record
from atoll.runtimes.workerd_sharing import Sharing
from atoll.runtimes.workerd_sockets import BACKLOG, Listening, name_of, watch_socket

CODE = WorkerCode(
    worker=codec.convert({"main": "index.js", "compatibility_date": "2026-11-01", "shared": True}, Worker),
    project="p",
    port=8080,
    alive_port=8081,
)
NOBODY = 1 << 30
"""A process that there is not."""
LIMITS = Limits(cpu_milli=100, memory_bytes=32 << 20, disk_bytes=1, pids=1)


class Port:
    """Sockets at one port of this machine's own, in place of those in a worker's network; `made` is called after each."""

    def __init__(self) -> None:
        self.port = 0
        self.made: Callable[[], None] = lambda: None

    def listen(self, netns: Path, port: int, alive_port: int | None) -> Listening:
        with socket.socket() as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            listener.bind(("127.0.0.1", self.port))
            listener.listen()
            self.port = listener.getsockname()[1]
            found = Listening(listener.detach(), None, 0)
        self.made()
        return found

    def lets_in(self, sockets: Listening) -> bool:
        """Return whether one who comes now comes to these."""
        with socket.socket(fileno=os.dup(sockets.http)) as listener, socket.create_connection(("127.0.0.1", self.port), 10):
            listener.settimeout(2)
            try:
                listener.accept()[0].close()
            except TimeoutError:
                return False
            return True


def make_sharer(directory: Path, id: str, port: Port) -> Sharer:
    for stream in ("out", "err"):
        os.mkfifo(directory / f"{id}.{stream}")
    record = WorkerRecord(
        id=id,
        serial="1",
        path=str(directory),
        code=CODE,
        env=(),
        limits=LIMITS,
        netns="/none",
        resolv_conf=None,
        stdout=str(directory / f"{id}.out"),
        stderr=str(directory / f"{id}.err"),
    )
    return Sharer(record, directory / f"{id}.order", listen=port.listen)


async def test_a_process_that_ends_while_sockets_are_made_for_another_leads_nobody_astray(tmp_path: Path) -> None:
    port = Port()
    sharer = make_sharer(tmp_path, "w", port)
    first = sharer.offer("first")
    sharer.lead("first")
    second = sharer.offer("second")
    sharer.lead("second")
    assert port.lets_in(second)
    ending = threading.Thread(target=sharer.take_back, args=("first",))

    def end() -> None:
        ending.start()
        ending.join(0.2)  # one that did not wait for the whole of `offer` would be through

    port.made = end
    third = sharer.offer("third")
    ending.join()
    assert not sharer.has("first")
    assert first is not second
    assert port.lets_in(second)
    sharer.lead("third")
    assert port.lets_in(third)
    sharer.let_go()


async def test_the_sockets_of_a_process_that_ended_while_its_successor_was_made_are_closed(tmp_path: Path) -> None:
    port = Port()
    sharer = make_sharer(tmp_path, "w", port)
    first = sharer.offer("first")
    sharer.lead("first")
    second = sharer.offer("second")
    sharer.take_back("first")
    assert sharer.has("first"), "who comes now waits there"
    sharer.lead("second")
    assert not sharer.has("first")
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(first.http)
    assert port.lets_in(second)
    sharer.let_go()


def test_a_record_is_replaced_as_a_whole(tmp_path: Path) -> None:
    path = tmp_path / "shared.p.0.json"
    before, after = (ProcessRecord(id="shared.p.0", workers=(("a", "1", 2),), ready=ready) for ready in (False, True))
    write_record(path, before)
    with path.open("rb") as reader:
        write_record(path, after)
        assert codec.decode(reader.read(), ProcessRecord) == before, "who reads it meanwhile has all of the one before"
    assert read_record(path) == after
    assert [each.name for each in tmp_path.iterdir()] == [path.name]
    assert path.stat().st_mode & 0o777 == 0o600


async def test_a_worker_is_recorded_before_anything_of_it_is_made(tmp_path: Path) -> None:
    recorded, home = tmp_path / "shared/workers/w.json", tmp_path / "w"
    seen: list[bool] = []

    class Layers(tuple[Path, ...]):
        def __len__(self) -> int:
            seen.append(recorded.exists() and codec.decode(recorded.read_bytes(), dict)["id"] == "w")
            raise OSError(5, "the disk is broken")

    box = Box(
        id="w",
        directory=home,
        image=Image(reference="x", digest="sha256:1", config=ImageConfig(), layers=Layers()),
        argv=(),
        env=(),
        workdir="/",
        user="",
        hostname="w",
        limits=LIMITS,
        worker=CODE,
        netns=Path("/proc/self/ns/net"),
        stdout=tmp_path / "out",
        stderr=tmp_path / "err",
    )
    workers = SharedWorkers(None, tmp_path / "shared", None)  # type: ignore[arg-type]  # it comes to nothing that needs a runtime
    with pytest.raises(AtollError, match="the disk is broken"):
        await workers.create(box)
    assert seen == [True]
    assert not recorded.exists()
    assert not home.exists()


async def test_what_an_earlier_agent_had_not_written_to_its_end_is_removed(tmp_path: Path) -> None:
    workers = SharedWorkers(None, tmp_path, None)  # type: ignore[arg-type]  # no process was found
    for directory in ("workers", "processes"):
        (tmp_path / directory).mkdir()
        (tmp_path / directory / "a.json.next").write_bytes(b"{")
    assert await workers.recover([]) == []
    assert not [*tmp_path.glob("*/*")]


class FakeBoxes:
    """Starts nothing. A process of theirs has had processor time at this rate."""

    def __init__(self, cpu_us_per_s: int = 0) -> None:
        self.cpu_us_per_s = cpu_us_per_s

    async def begin_process(self, box: Box, configuration: str, handed: Sequence[int]) -> Started:
        raise RuntimeFailed("no process can be started")

    async def wait(self, id: str) -> Exit:
        raise NotFound(f"no instance {id}")

    async def signal(self, id: str, name: str) -> None:
        raise NotFound(f"no instance {id}")

    async def kill(self, id: str) -> None:
        raise NotFound(f"no instance {id}")

    async def delete(self, id: str) -> None:
        pass

    async def usage(self, id: str) -> Usage:
        raise NotFound(f"no instance {id}")

    async def parent(self, id: str) -> int:
        raise NotFound(f"no instance {id}")

    async def cpu_us(self, id: str) -> int:
        return int(asyncio.get_running_loop().time() * self.cpu_us_per_s)


def no_record(processes: Path) -> None:
    processes.rmdir()


def no_pipe(processes: Path) -> None:
    (processes / "shared.p.0.out").symlink_to(processes / "nowhere")


def no_modules(processes: Path) -> None:
    """There are none in any case."""


@pytest.mark.parametrize("break_it", [no_record, no_pipe, no_modules])
async def test_a_start_that_fails_says_so_and_leaves_no_socket(break_it: Callable[[Path], None], tmp_path: Path) -> None:
    processes = tmp_path / "processes"
    processes.mkdir()
    break_it(processes)
    sharing = Sharing(Processes(FakeBoxes(), processes, "p", 0, None))
    sharer = make_sharer(tmp_path, "w", Port())
    before = {*Path("/proc/self/fd").iterdir()}
    with pytest.raises(RuntimeFailed):
        await asyncio.wait_for(sharing.enter(sharer), 30)
    await sharing.close()
    assert {*Path("/proc/self/fd").iterdir()} <= before
    assert not processes.exists() or not [*processes.iterdir()]
    assert sharer.exit is not None
    sharer.let_go()


class SilentBoxes(FakeBoxes):
    """Starts processes that run nothing until they are killed."""

    def __init__(self) -> None:
        super().__init__()
        self._killed = asyncio.Event()
        self._control = -1

    async def begin_process(self, box: Box, configuration: str, handed: Sequence[int]) -> Started:
        self._control = os.dup(handed[-1])
        return Started(NOBODY, 0.0)

    async def wait(self, id: str) -> Exit:
        await self._killed.wait()
        return Exit(code=137, at=0.0, signal="SIGKILL")

    async def kill(self, id: str) -> None:
        self._killed.set()
        os.close(self._control)


def test_a_process_whose_modules_do_not_run_in_time_says_so(tmp_path: Path) -> None:
    async def main() -> Process | Unready:
        asyncio.get_running_loop().set_default_executor(AtOnce())
        (tmp_path / "processes").mkdir()
        (tmp_path / "root" / MODULES[1:]).mkdir(parents=True)
        (tmp_path / "root" / MODULES[1:] / "index.js").touch()
        sharer = make_sharer(tmp_path, "w", Port())
        try:
            return await Processes(SilentBoxes(), tmp_path / "processes", "p", 0, None).make([sharer])
        finally:
            sharer.let_go()

    found = run_virtual(main())
    assert isinstance(found, Unready)
    assert found.late
    assert found.exit.why == "its modules had not run within 30 s"


class AtOnce(ThreadPoolExecutor):
    """No thread: the virtual clock would not wait for one."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_result(fn(*args, **kwargs))
        return future


def found_hung(directory: Path, cpu_us_per_s: int, within_s: float) -> bool:
    """Return whether a process that lets nobody in is found to hang within this time."""

    async def main() -> bool:
        asyncio.get_running_loop().set_default_executor(AtOnce())
        watch, output = watch_socket(), Output(directory / "out", {})
        process = WorkerProcess(FakeBoxes(cpu_us_per_s), "shared.p.0", NOBODY, {}, output, name_of(watch), directory / "record")
        try:
            async with asyncio.timeout(within_s):
                return await process.hung() == frozenset()
        except TimeoutError:
            return False
        finally:
            output.close()
            os.close(watch)

    return run_virtual(main())


def test_a_silent_process_is_found_to_hang_however_small_its_quota_is(tmp_path: Path) -> None:
    assert found_hung(tmp_path, 500_000, 5)
    assert found_hung(tmp_path, 10_000, 10), "10 ms a second is all that cpu = 0.01 gives"


def test_a_silent_process_without_processor_time_waits_for_the_node_but_not_for_ever(tmp_path: Path) -> None:
    assert not found_hung(tmp_path, 0, BACKLOG)
    assert found_hung(tmp_path, 0, 2 * WATCH_S * (BACKLOG + 10))
