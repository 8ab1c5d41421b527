"""What every runtime promises to the agent, held by the fake and by every real one alike."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from runtime_world import EVERY, World, make_layer, real_world
from vmm_world import STAND_INS, stand_in_world

from atoll.model.errors import AtollError, CommandNotFound, Conflict, Invalid, NotFound, RuntimeFailed, Unsupported
from atoll.model.ports.runtime import Feature
from atoll.model.spec import RUNTIMES_BY_ISOLATION, Isolation
from atoll.runtimes.fake import FakeHost, FakeRuntime


@pytest.fixture(scope="module")
def layer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_layer(tmp_path_factory.mktemp("image"))


@pytest.fixture(params=["fake", *(pytest.param(name, marks=pytest.mark.system) for name in (*EVERY, *STAND_INS))])
async def world(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[World]:
    if request.param == "fake":
        host = FakeHost()
        world = World(tmp_path, lambda: FakeRuntime(host))
    elif request.param in STAND_INS:
        world = stand_in_world(request.param, tmp_path, request.getfixturevalue("layer"))
    else:
        world = real_world(request.param, tmp_path, request.getfixturevalue("layer"))
    yield world
    await world.close()


async def test_it_says_its_version(world: World) -> None:
    assert await world.runtime.probe()


async def test_a_process_runs_and_its_exit_status_is_reported(world: World) -> None:
    pid = await world.launch("a", "exit", "3", "0.1")
    assert pid > 1
    end = await world.runtime.wait("a")
    assert (end.code, end.signal, end.oom) == (3, None, False)
    assert await world.runtime.wait("a") == end


async def test_a_process_that_ends_at_once_is_not_missed(world: World) -> None:
    for at in range(world.many // 3):
        await world.launch(f"quick{at}", "exit", "5")
        assert (await asyncio.wait_for(world.runtime.wait(f"quick{at}"), 10)).code == 5


async def test_output_comes_through_the_fifo(world: World) -> None:
    code, out, _ = await world.run("a", "echo", "one", "two")
    assert (code, out) == (0, "one two\n")


async def test_a_stop_signal_ends_a_process_that_heeds_it(world: World) -> None:
    await world.launch("a", "graceful")
    await asyncio.sleep(world.settle_s)
    await world.runtime.signal("a", "SIGTERM")
    assert (await asyncio.wait_for(world.runtime.wait("a"), 10)).code == 0


async def test_a_process_that_ignores_the_stop_signal_is_killed(world: World) -> None:
    await world.launch("a", "stubborn")
    await asyncio.sleep(world.settle_s)
    await world.runtime.signal("a", "SIGTERM")
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(world.runtime.wait("a"), 0.2)
    await world.runtime.kill("a")
    end = await asyncio.wait_for(world.runtime.wait("a"), 10)
    assert (end.code, end.signal, end.oom) == (137, "SIGKILL", False)


async def test_signals_to_what_has_ended_are_no_error(world: World) -> None:
    await world.run("a", "exit", "0")
    await world.runtime.signal("a", "SIGTERM")
    await world.runtime.kill("a")


async def test_an_unknown_signal_is_refused_by_name(world: World) -> None:
    await world.launch("a", "run")
    with pytest.raises(Invalid, match="SIGNOPE"):
        await world.runtime.signal("a", "SIGNOPE")


async def test_a_command_that_does_not_exist_is_named(world: World) -> None:
    await world.runtime.create(world.box("a", "missing"))
    with pytest.raises(RuntimeFailed, match="missing") as raised:
        await world.runtime.start("a")
    assert raised.value.mend
    with pytest.raises(RuntimeFailed, match="missing"):  # it is as `create` left it
        await world.runtime.start("a")


async def test_an_instance_is_made_and_started_once(world: World) -> None:
    await world.launch("a", "run")
    with pytest.raises(Conflict):
        await world.runtime.start("a")
    with pytest.raises(Conflict):
        await world.runtime.create(world.box("b", "run", id="a"))
    await world.runtime.signal("a", "SIGKILL")
    await world.runtime.wait("a")
    with pytest.raises(Conflict):
        await world.runtime.start("a")


async def test_what_is_not_known_is_not_found(world: World) -> None:
    for call in (world.runtime.start, world.runtime.wait, world.runtime.kill, world.runtime.pause, world.runtime.usage):
        with pytest.raises(NotFound):
            await call("nobody")
    await world.runtime.delete("nobody")


async def test_what_was_not_started_cannot_be_waited_for(world: World) -> None:
    await world.runtime.create(world.box("a", "run"))
    with pytest.raises(Conflict):
        await world.runtime.wait("a")
    with pytest.raises(AtollError):
        await world.runtime.exec("a", ["true"])


async def test_exec_gives_output_and_exit_status(world: World) -> None:
    await world.launch("a", "run")
    execution = await world.runtime.exec("a", ["echo", "from", "beside"])
    assert await execution.read() == (1, b"from beside\n")
    assert await execution.read() is None
    assert await execution.wait() == 0
    await execution.close()
    assert (await world.shell("a", "exit 7"))[0] == 7


async def test_exec_takes_input_until_its_end(world: World) -> None:
    await world.launch("a", "run")
    execution = await world.runtime.exec("a", ["cat"])
    await execution.write(b"in and out")
    assert await execution.read() == (1, b"in and out")
    await execution.close_stdin()
    assert await execution.read() is None
    assert await execution.wait() == 0
    await execution.write(b"dropped")
    await execution.close()


async def test_exec_of_a_command_that_does_not_exist_is_named(world: World) -> None:
    await world.launch("a", "run")
    with pytest.raises(CommandNotFound, match="missing"):
        await world.runtime.exec("a", ["missing"])


async def test_a_signal_ends_an_exec(world: World) -> None:
    await world.launch("a", "run")
    execution = await world.runtime.exec("a", ["sleep", "100"])
    await execution.signal("SIGTERM")
    assert await asyncio.wait_for(execution.wait(), 10) == 143
    await execution.close()


async def test_closing_an_exec_kills_it(world: World) -> None:
    await world.launch("a", "run")
    execution = await world.runtime.exec("a", ["sleep", "100"])
    await execution.close()
    assert await asyncio.wait_for(execution.wait(), 10) == 137
    await execution.close()


async def test_an_exec_ends_with_its_instance(world: World) -> None:
    await world.launch("a", "run")
    execution = await world.runtime.exec("a", ["sleep", "100"])
    await world.runtime.kill("a")
    assert await asyncio.wait_for(execution.wait(), 10) == 137
    await execution.close()


async def test_a_paused_instance_stands_still_and_goes_on(world: World) -> None:
    await world.launch("a", "graceful")
    await asyncio.sleep(world.settle_s)
    await world.runtime.pause("a")
    await world.runtime.signal("a", "SIGTERM")
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(world.runtime.wait("a"), 0.3)
    await world.runtime.resume("a")
    assert (await asyncio.wait_for(world.runtime.wait("a"), 10)).code == 0


async def test_a_paused_instance_can_be_killed(world: World) -> None:
    await world.launch("a", "run")
    await world.runtime.pause("a")
    await world.runtime.kill("a")
    assert (await asyncio.wait_for(world.runtime.wait("a"), 10)).code == 137


async def test_usage_is_told(world: World) -> None:
    await world.launch("a", "run")
    usage = await world.runtime.usage("a")
    assert usage.instance == "a"
    assert usage.memory_bytes > 0
    assert usage.pids >= 1


async def test_files_go_in_and_out_by_the_root(world: World) -> None:
    await world.launch("a", "run")
    assert (await world.runtime.copier("a") is not None) == (world.runtime.name in RUNTIMES_BY_ISOLATION[Isolation.VM])
    if await world.runtime.copier("a") is not None or Feature.FILES not in world.runtime.features:
        with pytest.raises(Unsupported) as raised:
            await world.runtime.root("a")
        assert raised.value.mend
        return
    root = await world.runtime.root("a")
    try:
        os.close(os.open("note", os.O_CREAT | os.O_WRONLY, dir_fd=root))
        assert Path(f"/proc/self/fd/{root}/note").exists()
    finally:
        os.close(root)


async def test_delete_ends_what_runs_and_is_safe_to_repeat(world: World) -> None:
    await world.launch("a", "stubborn")
    waiting = asyncio.create_task(world.runtime.wait("a"))
    await asyncio.sleep(0)
    await world.runtime.delete("a")
    assert (await asyncio.wait_for(waiting, 10)).code == 137
    await world.runtime.delete("a")
    assert not (world.directory / "instances/a").exists()
    with pytest.raises(NotFound):
        await world.runtime.wait("a")


async def test_what_was_deleted_can_be_made_again(world: World) -> None:
    for at in range(2):
        await world.runtime.create(world.box(f"a{at}", "exit", str(at), id="a"))
        await world.runtime.start("a")
        assert (await world.runtime.wait("a")).code == at
        await world.runtime.delete("a")


async def test_the_next_agent_adopts_what_runs(world: World) -> None:
    pid = await world.launch("a", "graceful")
    await world.reopen()
    with pytest.raises(NotFound):
        await world.runtime.wait("a")
    assert [(found.id, found.pid, found.exit) for found in await world.runtime.recover()] == [("a", pid, None)]
    assert (await world.runtime.usage("a")).pids >= 1
    assert (await world.shell("a", "exit 4"))[0] == 4
    await world.runtime.signal("a", "SIGTERM")
    assert (await asyncio.wait_for(world.runtime.wait("a"), 10)).code == 0


async def test_an_exit_that_nobody_saw_is_told_to_the_next_agent(world: World) -> None:
    await world.launch("a", "exit", "6", "0.2")
    await world.runtime.close()
    await asyncio.sleep(0.5 + 2 * world.settle_s)
    await world.reopen()
    (found,) = await world.runtime.recover()
    assert (found.id, found.pid) == ("a", None)
    assert found.exit is not None
    assert found.exit.code == 6
    assert await world.runtime.wait("a") == found.exit


async def test_what_was_made_but_not_started_is_found_and_can_start(world: World) -> None:
    await world.runtime.create(world.box("a", "exit", "2"))
    await world.reopen()
    (found,) = await world.runtime.recover()
    assert (found.id, found.pid, found.exit) == ("a", None, None)
    await world.runtime.start("a")
    assert (await world.runtime.wait("a")).code == 2


async def test_many_instances_live_side_by_side(world: World) -> None:
    async def live(at: int) -> int:
        await world.launch(f"n{at}", "exit", str(at))
        code = (await world.runtime.wait(f"n{at}")).code
        await world.runtime.delete(f"n{at}")
        return code

    assert await asyncio.gather(*(live(at) for at in range(world.many))) == list(range(world.many))
