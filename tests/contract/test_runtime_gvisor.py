"""What a gVisor sandbox is on the node, and where it differs from a container."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import uuid
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from runtime_world import LIMITS, World, make_layer, real_world

from atoll.model.errors import Exhausted, Invalid, RuntimeFailed, Unsupported
from atoll.model.ports.runtime import Limits
from atoll.runtimes.gvisor import GvisorRuntime

pytestmark = pytest.mark.system


@pytest.fixture(scope="module")
def layer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_layer(tmp_path_factory.mktemp("image"))


@pytest.fixture
async def world(layer: Path, tmp_path: Path) -> AsyncIterator[World]:
    world = real_world("gvisor", tmp_path, layer)
    yield world
    await world.close()


@pytest.fixture
def netns() -> Iterator[Path]:
    name = f"atoll-test-{uuid.uuid4().hex[:8]}"
    subprocess.run(["ip", "netns", "add", name], check=True)
    for command in (
        f"-n {name} link add eth0 type veth peer name outer",
        f"-n {name} link set lo up",
        f"-n {name} link set outer up",
        f"-n {name} link set eth0 up",
        f"-n {name} address add 10.98.7.2/32 dev eth0",
        f"-n {name} route add 169.254.1.1 dev eth0 scope link",
        f"-n {name} route add default via 169.254.1.1 dev eth0",
        f"-n {name} address add fd00:98::7:2/128 dev eth0 nodad",
        f"-n {name} neighbour add fe80::1 lladdr 02:61:74:00:ff:fe dev eth0",
        f"-n {name} route add fd00:98::/48 via fe80::1 dev eth0",
    ):
        subprocess.run(["ip", *command.split()], check=True)
    yield Path("/run/netns") / name
    subprocess.run(["ip", "netns", "delete", name], check=True)


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """A disk of 16 MiB."""
    path = tmp_path / "small"
    path.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "none", str(path)], check=True)
    yield path
    subprocess.run(["umount", str(path)], check=True)


async def test_the_sandbox_is_nobody_under_a_filter_and_its_processes_are_unknown_to_the_node(world: World) -> None:
    pid = await world.launch("a", "run")
    text = Path(f"/proc/{pid}/status").read_text()
    assert "Uid:\t65534\t65534" in text
    assert "Seccomp:\t2" in text
    assert "NoNewPrivs:\t1" in text
    assert Path(f"/proc/{pid}/ns/user").readlink() != Path("/proc/self/ns/user").readlink()
    assert sorted(Path(f"/proc/{pid}/root").iterdir()) != sorted(Path("/").iterdir())
    _, out = await world.shell("a", "grep CapEff /proc/self/status; cat /proc/version")
    assert out.startswith("CapEff:\t00000000a80405fb")  # Docker's set without raw sockets
    assert os.uname().release not in out


async def test_the_node_s_kernel_is_not_reached(world: World) -> None:
    _, out, _ = await world.run(
        "a",
        "sh",
        "-c",
        "for p in /proc/keys /proc/kcore /proc/sysrq-trigger /proc/timer_list /sys/kernel/uevent_helper /dev/mem /dev/kvm;"
        " do test -e $p && head -c 1 $p > /dev/null 2>&1 && echo reached $p; done;"
        " mkdir /tmp/m; mount -t tmpfs x /tmp/m 2>/dev/null && echo mounted; echo end",
    )
    assert out == "end\n"


async def test_its_own_network_stack_has_the_address_after_every_start(world: World, netns: Path) -> None:
    for run in range(3):
        script = "cat /proc/net/dev | grep -c eth0; grep -c 0101FEA9 /proc/net/route; grep '^fd.* eth0' /proc/net/if_inet6"
        script += " | cut -c 1-32"
        six = "fd000098000000000000000000070002"
        assert await world.run(f"a{run}", "sh", "-c", script, netns=netns) == (0, f"1\n2\n{six}\n", "")
        await world.runtime.delete(f"a{run}")
    routes = await asyncio.create_subprocess_exec("ip", "-n", netns.name, "-6", "route", stdout=asyncio.subprocess.PIPE)
    assert b"fd00:98::/48 via fe80::1 dev eth0" in (await routes.communicate())[0]


async def test_its_low_ports_are_free_and_another_namespace_s_are_not_its_own(world: World, netns: Path) -> None:
    await world.launch("web", "sh", "-c", "while :; do echo hello | nc -l -p 80; done", netns=netns)
    await asyncio.sleep(world.settle_s)
    assert (await world.shell("web", "nc -w 2 127.0.0.1 80 < /dev/null"))[1] == "hello\n"
    with socket.create_server(("127.0.0.1", 0)) as server:
        assert "refused" in (await world.shell("web", f"nc -w 1 127.0.0.1 {server.getsockname()[1]} < /dev/null"))[1]


async def test_a_network_namespace_that_is_not_there_is_named(world: World) -> None:
    with pytest.raises(RuntimeFailed, match="/run/netns/gone"):
        await world.runtime.create(world.box("a", "run", netns=Path("/run/netns/gone")))


async def test_too_little_memory_for_the_sandbox_itself_is_refused(world: World) -> None:
    small = Limits(cpu_milli=1000, memory_bytes=16 << 20, disk_bytes=LIMITS.disk_bytes, pids=64)
    with pytest.raises(Invalid, match="48 MiB") as raised:
        await world.runtime.create(world.box("a", "run", limits=small))
    assert raised.value.field == "resources.memory"


async def test_memory_beyond_the_limit_ends_something_inside_and_never_the_node(world: World) -> None:
    await world.launch("a", "sh", "-c", "exec dd if=/dev/zero of=/dev/null bs=200M count=1")
    end = await asyncio.wait_for(world.runtime.wait("a"), 20)
    assert end.code != 0
    assert end.oom


async def test_a_signal_to_what_is_paused_arrives_when_it_goes_on(world: World) -> None:
    await world.launch("a", "graceful")
    await asyncio.sleep(world.settle_s)
    await world.runtime.pause("a")
    await world.runtime.signal("a", "SIGTERM")
    await world.runtime.resume("a")
    assert (await asyncio.wait_for(world.runtime.wait("a"), 10)).code == 0


async def _stands_still(world: World, id: str) -> bool:
    """Return whether a command is refused or waits, as it does where the sandbox is paused."""
    try:
        await asyncio.wait_for(world.shell(id, "exit 3"), 1.0)
    except (RuntimeFailed, TimeoutError):
        return True
    return False


async def test_what_an_earlier_agent_paused_stands_still_after_its_snapshot(world: World) -> None:
    await world.launch("a", "run")
    await world.runtime.pause("a")
    await world.reopen()
    await world.runtime.recover()
    await world.runtime.snapshot("a", world.directory / "snapshot")
    assert await _stands_still(world, "a")
    await world.runtime.resume("a")
    assert (await world.shell("a", "exit 3"))[0] == 3


async def test_a_snapshot_for_which_there_is_no_room_is_refused_and_the_sandbox_goes_on(world: World, small: Path) -> None:
    await world.launch("a", "run")
    await world.shell("a", "dd if=/dev/urandom of=/dev/shm/much bs=1M count=24 2> /dev/null; echo kept > /dev/shm/mark")
    with pytest.raises(Exhausted, match="disk has 16 MiB left") as raised:
        await world.runtime.snapshot("a", small / "snapshot")
    assert raised.value.mend
    assert list(small.iterdir()) == []
    assert (await world.shell("a", "cat /dev/shm/mark"))[1] == "kept\n"


async def test_a_terminal_takes_input(world: World) -> None:
    await world.launch("a", "run")
    execution = await world.runtime.exec("a", ["sh", "-c", "read x; echo got $x; exit 9"], tty=True)
    await execution.write(b"this\n")
    seen = b""
    while b"got this" not in seen:
        part = await asyncio.wait_for(execution.read(), 10)
        assert part is not None
        seen += part[1]
    assert await asyncio.wait_for(execution.wait(), 10) == 9
    await execution.close()


def test_user_namespaces_are_refused_with_the_runtimes_that_have_them(tmp_path: Path) -> None:
    with pytest.raises(Unsupported) as raised:
        GvisorRuntime(tmp_path, userns=True)
    assert "runc" in (raised.value.mend or "")
