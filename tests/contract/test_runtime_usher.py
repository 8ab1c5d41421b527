"""Commands that an usher starts: all that is promised of those that a tool starts, and what is the usher's own."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import struct
import subprocess
import sys
import termios
import textwrap
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from msgspec.structs import replace
from probing import INSIDE, PROBE, build_probe, check_findings, read_findings
from runtime_world import LIMITS, REAL, World, make_layer, real_world
from test_runtime import (  # noqa: F401 - the same promises, held here in instances with an usher
    test_a_signal_ends_an_exec,
    test_an_exec_ends_with_its_instance,
    test_closing_an_exec_kills_it,
    test_exec_gives_output_and_exit_status,
    test_exec_of_a_command_that_does_not_exist_is_named,
    test_exec_takes_input_until_its_end,
    test_the_next_agent_adopts_what_runs,
)
from test_runtime_isolation import (  # noqa: F401 - likewise
    test_a_cancelled_exec_leaves_no_command,
    test_a_child_that_keeps_the_pipes_does_not_hold_an_exec,
    test_a_terminal_belongs_to_whoever_runs_in_it,
    test_delete_leaves_no_trace,
    test_exec_has_a_terminal_that_resizes,
    test_exec_moves_much_data_both_ways_without_loss,
    test_exec_takes_user_directory_and_environment,
)

from atoll.model.errors import RuntimeFailed
from atoll.runtimes.cgroup import Cgroups
from atoll.runtimes.usher import ANSWER_S_MAX, LOSSES_MAX

pytestmark = pytest.mark.system

BY_TOOL = "0"
"""The parent of a command that a tool has started, as it is seen inside: none."""
KINDS = ("runc", "lxc", "gvisor")
"""An usher comes to crun's instances exactly as to runc's."""
on_the_node_s_kernel = pytest.mark.parametrize("world", [name for name in KINDS if name != "gvisor"], indirect=True)


@pytest.fixture(scope="module")
def layer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    layer = make_layer(tmp_path_factory.mktemp("image"))
    build_probe(layer / "bin")
    return layer


@pytest.fixture(params=KINDS)
async def world(request: pytest.FixtureRequest, layer: Path, tmp_path: Path) -> AsyncIterator[World]:
    world = real_world(request.param, tmp_path, layer)
    world.attended = True
    yield world
    await world.close()


async def usher_of(world: World, id: str) -> str:
    """Return the id of the process that starts commands in the instance, as it is seen inside: BY_TOOL where none does."""
    return (await world.shell(id, "echo $PPID"))[1].strip()


def waiting_in_pipes() -> set[str]:
    """Return the pipes that this process writes to and in which something has not been read."""
    found = set()
    for path in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):
            pipe, descriptor = str(path.readlink()), int(path.name)
            if pipe.startswith("pipe:") and fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE == os.O_WRONLY:
                (waiting,) = struct.unpack("=i", fcntl.ioctl(descriptor, termios.FIONREAD, bytes(4)))
                if waiting:
                    found.add(pipe)
    return found


@pytest.mark.parametrize("world", REAL, indirect=True)
async def test_one_usher_starts_every_command_of_the_instance_s_own_user(world: World) -> None:
    await world.launch("a", "run")
    usher = await usher_of(world, "a")
    assert usher != BY_TOOL
    assert await usher_of(world, "a") == usher
    assert (await world.shell("a", "echo $PPID; id -u", user="app"))[1] == f"{BY_TOOL}\n1234\n"


async def test_one_that_is_no_sandbox_has_no_usher(world: World) -> None:
    await world.launch("a", "run", attended=False)
    assert await usher_of(world, "a") == BY_TOOL


async def test_many_commands_run_at_once_by_one_usher(world: World) -> None:
    await world.launch("a", "run", limits=replace(LIMITS, pids=1024))  # gVisor's own threads count
    answers = await asyncio.gather(*(world.shell("a", f"sleep 0.1; echo $PPID; exit {at}") for at in range(10)))
    assert [code for code, _ in answers] == list(range(10))
    assert len({text for _, text in answers}) == 1


@pytest.mark.parametrize(("user", "who"), [("", (0, 0, ())), ("app", (1234, 1235, (2000,)))])
async def test_what_an_usher_starts_sees_and_reaches_nothing_of_the_node(
    world: World, user: str, who: tuple[int, int, tuple[int, ...]]
) -> None:
    await world.launch("probe", "run", user=user)
    assert await usher_of(world, "probe") != BY_TOOL
    code, out = await world.shell("probe", f"exec {PROBE[0]}", env=INSIDE)
    assert code == 0
    kernel = "gvisor" if world.runtime.name == "gvisor" else "node"
    check_findings(read_findings(out), kernel=kernel, hostname="host-probe", user=who)


@on_the_node_s_kernel
async def test_an_usher_holds_no_descriptor_of_the_node_s_and_no_more_rights_than_a_command(world: World) -> None:
    await world.launch("a", "run")
    _, own = await world.shell("a", "cat /proc/self/status")
    (usher,) = _ushers(world, "a")
    held = {str(path.readlink()).partition(":")[0] for path in (usher / "fd").iterdir()}
    assert held == {"pipe", "/dev/null", "anon_inode"}
    names = ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb", "NoNewPrivs", "Seccomp", "Seccomp_filters")
    rights, commands = _fields((usher / "status").read_text()), _fields(own)
    assert [rights[name] for name in names] == [commands[name] for name in names]
    assert int(rights["Uid"].split()[0]) >= 0x70000000
    for kind in ("pid", "mnt", "net", "ipc", "uts", "cgroup", "user"):
        assert (usher / "ns" / kind).readlink() != Path("/proc/self/ns", kind).readlink()


@on_the_node_s_kernel
async def test_nobody_inside_looks_into_the_usher(world: World) -> None:
    await world.launch("a", "run")
    usher = await usher_of(world, "a")
    for name in ("exe", "mem", "environ", "fd/0"):
        code, words = await world.shell("a", f"cat /proc/{usher}/{name} 2>&1")
        assert code != 0, name
        assert "ermission denied" in words, name


async def test_an_usher_that_is_killed_from_inside_is_replaced_a_few_times_and_then_the_tool_does_it(world: World) -> None:
    await world.launch("a", "run")
    for _ in range(LOSSES_MAX):
        usher = await usher_of(world, "a")
        assert usher != BY_TOOL
        execution = await world.runtime.exec("a", ["sh", "-c", f"read line; kill -9 {usher}; sleep 54321"])
        await execution.write(b"go\n")
        assert await asyncio.wait_for(execution.wait(), 20) == 137
        await execution.close()
    assert await usher_of(world, "a") == BY_TOOL
    assert (await world.shell("a", "exit 4"))[0] == 4
    assert "read line" not in (await world.shell("a", "ps"))[1]  # what it had started ended with it


async def test_a_command_that_was_asked_for_in_vain_is_not_started_again(world: World) -> None:
    await world.launch("a", "run")
    usher = await usher_of(world, "a")
    await world.shell("a", f"kill -STOP {usher}", user="root")
    before = waiting_in_pipes()
    asked = asyncio.create_task(world.shell("a", "echo ran >> /data/ran"))
    async with asyncio.timeout(ANSWER_S_MAX):
        while not waiting_in_pipes() - before:  # noqa: ASYNC110 - the kernel tells nobody that it was asked
            await asyncio.sleep(0.01)
    await world.shell("a", f"kill -KILL {usher}", user="root")
    with pytest.raises(RuntimeFailed, match="may have run"):
        await asked
    assert (await world.shell("a", "cat /data/ran"))[0] == 1


async def test_the_usher_and_its_commands_end_with_the_agent(world: World, layer: Path) -> None:
    names = {"tests": str(Path(__file__).parent), "directory": str(world.directory), "layer": str(layer), "cgroup": world.cgroup}
    script = textwrap.dedent(_AGENT).format(**names, name=str(world.runtime.name))
    agent = await asyncio.create_subprocess_exec(sys.executable, "-c", script, stdout=subprocess.PIPE)
    assert agent.stdout is not None
    assert await agent.stdout.readline() == b"ready\n"
    agent.kill()
    await agent.wait()
    await world.runtime.recover()
    for _ in range(100):
        _, processes = await world.shell("a", "ps")
        if "12345" not in processes and processes.count(" serve") == 1:
            break
        await asyncio.sleep(0.1)
    else:
        pytest.fail(f"not ended: {processes}")
    assert await usher_of(world, "a") != BY_TOOL  # the next agent has its own


_AGENT = """
    import asyncio, sys
    from pathlib import Path
    sys.path.insert(0, {tests!r})
    from runtime_world import real_world

    async def main():
        world = real_world({name!r}, Path({directory!r}), Path({layer!r}), {cgroup!r})
        await world.launch("a", "run", attended=True)
        await world.runtime.exec("a", ["sleep", "12345"])
        print("ready", flush=True)
        await asyncio.sleep(1000)
    asyncio.run(main())
"""


@pytest.mark.parametrize("world", ["gvisor"], indirect=True)
async def test_a_sandbox_with_an_usher_is_written_down_and_goes_on_with_another(world: World) -> None:
    await world.launch("a", "run")
    assert await usher_of(world, "a") != BY_TOOL
    await world.runtime.snapshot("a", world.directory / "snapshot")
    assert await usher_of(world, "a") != BY_TOOL
    await world.runtime.restore(world.box("b", "run"), world.directory / "snapshot")
    assert await usher_of(world, "b") != BY_TOOL


def _ushers(world: World, id: str) -> list[Path]:
    group = Cgroups.detect().group(f"{world.cgroup}/{id}")
    pids = {pid for path in group.directories for pid in _lines(path / "cgroup.procs")}
    return [Path("/proc", pid) for pid in pids if Path("/proc", pid, "cmdline").read_bytes().endswith(b"\0serve\0")]


def _lines(path: Path) -> list[str]:
    return path.read_text().split() if path.exists() else []


def _fields(status: str) -> dict[str, str]:
    return {name: value.strip() for name, _, value in (line.partition(":") for line in status.splitlines())}
