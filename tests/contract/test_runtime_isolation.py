"""What a real container may not do, what it may use, and what it leaves behind: nothing."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
import uuid
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from runtime_world import LIMITS, REAL, World, make_layer, real_world

from atoll.model.errors import Exhausted, ImageError, Invalid, RuntimeFailed, Unsupported
from atoll.model.ports.runtime import Found, Limits, Mount
from atoll.runtimes.box_record import BoxRecord
from atoll.runtimes.mounts import MNT_DETACH, mounts_below, unmount
from atoll.runtimes.oci import CAPABILITIES
from atoll.runtimes.oci_box import OciBoxes
from atoll.runtimes.oci_runtime import OciRuntime
from atoll.runtimes.rootfs import remove_root
from atoll.runtimes.runc import RuncRuntime

pytestmark = pytest.mark.system

DOCKER_CAPABILITIES = 0xA80425FB


@pytest.fixture(scope="module")
def layer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_layer(tmp_path_factory.mktemp("image"))


on_the_node_s_kernel = pytest.mark.parametrize("world", [name for name in REAL if name != "gvisor"], indirect=True)
"""For what is different where the node's kernel does not run the processes; test_runtime_gvisor.py has its counterparts."""


@pytest.fixture(params=[*REAL])
async def world(request: pytest.FixtureRequest, layer: Path, tmp_path: Path) -> AsyncIterator[World]:
    world = real_world(request.param, tmp_path, layer)
    yield world
    await world.close()


def limits(**changes: int) -> Limits:
    return Limits(**({name: getattr(LIMITS, name) for name in LIMITS.__struct_fields__} | changes))


async def sh(world: World, script: str, **changes: object) -> tuple[int, str, str]:
    return await world.run("a", "sh", "-c", script, **changes)


@on_the_node_s_kernel
async def test_root_inside_is_nobody_outside(world: World) -> None:
    pid = await world.launch("a", "run")
    status = dict(line.split(":\t", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines() if ":\t" in line)
    assert int(status["Uid"].split()[0]) >= 0x70000000
    assert (await world.shell("a", "id -u"))[1] == "0\n"


@on_the_node_s_kernel
async def test_two_instances_share_no_user_id(world: World) -> None:
    owners = {Path(f"/proc/{await world.launch(id, 'run')}").stat().st_uid for id in ("a", "b", "c")}
    assert len(owners) == 3


@on_the_node_s_kernel
async def test_capabilities_seccomp_and_no_new_privileges_are_docker_s(world: World) -> None:
    pid = await world.launch("a", "run")
    text = Path(f"/proc/{pid}/status").read_text()
    for name in ("CapEff", "CapPrm", "CapBnd"):
        assert f"{name}:\t{DOCKER_CAPABILITIES:016x}" in text
    assert "CapAmb:\t0000000000000000" in text
    assert "Seccomp:\t2" in text
    assert "NoNewPrivs:\t1" in text
    assert len(CAPABILITIES) == DOCKER_CAPABILITIES.bit_count()
    inside = (await world.shell("a", "grep -E 'CapEff|Seccomp:|NoNewPrivs' /proc/self/status"))[1]
    assert f"{DOCKER_CAPABILITIES:016x}" in inside
    assert "Seccomp:\t2" in inside
    assert "NoNewPrivs:\t1" in inside


async def test_another_user_has_no_capability(world: World) -> None:
    _, out, _ = await sh(world, "id -u; id -g; id -G; echo $HOME; grep CapEff /proc/self/status", user="app")
    assert out == "1234\n1235\n1235 2000\n/srv\nCapEff:\t0000000000000000\n"


async def test_a_user_that_the_image_lacks_is_named(world: World) -> None:
    with pytest.raises(ImageError, match="nobody-here"):
        await world.runtime.create(world.box("a", "run", user="nobody-here"))
    assert not (world.directory / "instances/a").exists()


async def test_files_belong_inside_to_whom_the_image_says(world: World) -> None:
    _, out, _ = await sh(world, "stat -c %u:%g /srv/owned /bin/busybox; echo more >> /srv/owned; stat -c %u:%g /srv/owned")
    assert out == "1234:1235\n0:0\n1234:1235\n"


@on_the_node_s_kernel
async def test_kernel_paths_are_hidden_or_read_only(world: World) -> None:
    code, out, _ = await sh(
        world,
        "wc -c < /proc/keys; wc -c < /proc/timer_list; ls /sys/firmware | wc -l; "
        "for p in /proc/sys/kernel/hostname /proc/sysrq-trigger /sys/kernel/uevent_helper; do"
        " (echo x > $p) 2>/dev/null && echo wrote $p; done; mount -o remount,rw /proc/sys 2>/dev/null && echo remounted; exit 0",
    )
    assert (code, out) == (0, "0\n0\n0\n")


async def test_dangerous_calls_are_refused(world: World) -> None:
    _, out, _ = await sh(
        world,
        "mkdir /tmp/m; mount -t tmpfs x /tmp/m 2>/dev/null && echo mounted; umount /proc 2>/dev/null && echo unmounted;"
        " dd if=/dev/mem count=1 2>/dev/null && echo memory; (: > /dev/sda) 2>/dev/null && test -b /dev/sda && echo disk; echo end",
    )
    assert out == "end\n"


@on_the_node_s_kernel
async def test_only_its_own_processes_and_names_are_seen(world: World) -> None:
    _, out, _ = await sh(world, "ps | wc -l; cat /etc/hostname; grep -c host-a /etc/hosts; ls /sys/class/net")
    lines = out.split("\n")
    assert int(lines[0]) <= 5
    assert lines[1:4] == ["host-a", "1", "lo"]


@pytest.fixture
def netns() -> Iterator[Path]:
    name = f"atoll-test-{uuid.uuid4().hex[:8]}"
    if shutil.which("ip") is None:
        pytest.skip("needs iproute2")
    subprocess.run(["ip", "netns", "add", name], check=True)
    subprocess.run(["ip", "-n", name, "link", "add", "inner", "type", "veth", "peer", "name", "outer"], check=True)
    subprocess.run(["ip", "-n", name, "link", "set", "lo", "up"], check=True)
    yield Path("/run/netns") / name
    subprocess.run(["ip", "netns", "delete", name], check=True)


@on_the_node_s_kernel
async def test_a_given_network_namespace_is_used_and_its_low_ports_are_free(world: World, netns: Path) -> None:
    _, out, _ = await sh(world, "ls /sys/class/net; cat /proc/net/dev | grep -c inner", netns=netns)
    assert out == "inner\nlo\nouter\n1\n"
    await world.launch("web", "sh", "-c", "sleep 1000 | nc -l -p 80", netns=netns, user="app")
    await world.launch("client", "run", netns=netns)
    assert (await world.shell("client", "sleep 0.2; echo hello | nc -w 1 127.0.0.1 80"))[0] == 0
    await world.output_until("web", "hello")
    assert (await world.shell("client", "echo 1 > /proc/sys/net/ipv4/ip_forward"))[0] != 0


@on_the_node_s_kernel
async def test_a_network_namespace_that_is_not_there_is_named(world: World) -> None:
    with pytest.raises(RuntimeFailed, match="/run/netns/gone"):
        await world.runtime.create(world.box("a", "run", netns=Path("/run/netns/gone")))
    assert _traces(world, "a") == []


@on_the_node_s_kernel
async def test_memory_beyond_the_limit_ends_it_and_is_told(world: World) -> None:
    await world.launch("a", "sh", "-c", "exec dd if=/dev/zero of=/dev/null bs=200M count=1", limits=limits(memory_bytes=32 << 20))
    end = await asyncio.wait_for(world.runtime.wait("a"), 20)
    assert (end.code, end.signal, end.oom) == (137, "SIGKILL", True)
    await world.reopen()
    (found,) = await world.runtime.recover()
    assert found.exit == end


async def test_a_fork_bomb_stays_inside(world: World) -> None:
    await world.launch("a", "sh", "-c", "for i in $(seq 100); do sleep 100 & done; wait", limits=limits(pids=20))
    await asyncio.sleep(0.5)
    assert (await world.runtime.usage("a")).pids <= 20 + getattr(world.runtime, "threads_beside", 0)


@on_the_node_s_kernel
async def test_one_process_may_be_the_limit(world: World) -> None:
    # The limit stands when `start` returns; the loop outlasts that.
    script = "i=0; while [ $i -lt 200000 ]; do i=$((i+1)); done; sleep 0.01; echo forked"
    await world.launch("a", "sh", "-c", script, limits=limits(pids=1))
    end = await asyncio.wait_for(world.runtime.wait("a"), 20)
    assert end.code != 0
    assert "fork" in world.output("a", "stderr")
    assert world.output("a") == ""


async def test_a_disk_bomb_gets_enospc_and_the_node_is_unharmed(world: World) -> None:
    before = os.statvfs(world.directory).f_bavail * os.statvfs(world.directory).f_frsize
    code, out, err = await sh(
        world, "dd if=/dev/zero of=/tmp/big bs=1M count=100; echo after; echo x > /dev/shm/still; cat /dev/shm/still", user=""
    )
    assert "No space left" in err
    assert out == "after\nx\n"
    assert code == 0
    after = os.statvfs(world.directory).f_bavail * os.statvfs(world.directory).f_frsize
    assert before - after < LIMITS.disk_bytes * 2
    used = (await world.runtime.usage("a")).disk_bytes
    assert 50 << 20 < used <= LIMITS.disk_bytes


async def test_processor_time_is_bounded(world: World) -> None:
    await world.launch("a", "sh", "-c", "while :; do :; done", limits=limits(cpu_milli=200))
    await world.runtime.usage("a")
    await asyncio.sleep(1.0)
    assert 20 <= (await world.runtime.usage("a")).cpu_milli <= 300  # a busy node may give it less than its limit


async def test_open_files_have_a_limit(world: World) -> None:
    _, out, _ = await sh(world, "ulimit -n; ulimit -Hn; ulimit -c")
    soft, hard, core = (int(line) for line in out.split())
    assert soft <= 1024
    assert hard >= soft
    assert core == 0


async def test_a_read_only_root_is_read_only(world: World) -> None:
    code, out, _ = await sh(
        world, "(echo x > /file) 2>/dev/null && echo wrote; echo x > /dev/shm/f && echo shm", read_only_root=True
    )
    assert (code, out) == (0, "shm\n")


async def test_one_instance_s_writes_are_not_seen_by_another(world: World, layer: Path) -> None:
    await world.run("a", "sh", "-c", "echo mine > /tmp/private; rm /srv/owned")
    assert (await world.run("b", "sh", "-c", "ls /tmp; cat /srv/owned"))[1] == "app's\n"
    assert (layer / "srv/owned").exists()


async def test_a_volume_keeps_its_files_and_their_owners(world: World) -> None:
    volume = world.directory / "volume"
    volume.mkdir()
    mounts = (Mount(source=volume, target="/data"),)
    await world.run("a", "sh", "-c", "echo kept > /data/file; chmod 600 /data/file", mounts=mounts)
    assert (volume / "file").read_text() == "kept\n"
    assert (volume / "file").stat().st_uid == 0
    code, out, _ = await world.run("b", "sh", "-c", "cat /data/file; stat -c %u /data/file", mounts=mounts)
    assert (code, out) == (0, "kept\n0\n")
    read_only = (Mount(source=volume, target="/data", read_only=True),)
    code, out, _ = await world.run("c", "sh", "-c", "(echo x > /data/new) 2>/dev/null || echo refused", mounts=read_only)
    assert (code, out) == (0, "refused\n")
    missing = (Mount(source=world.directory / "gone", target="/data"),)
    with pytest.raises(RuntimeFailed, match="gone"):
        await world.runtime.create(world.box("d", "run", mounts=missing))


async def test_the_environment_and_directory_are_as_given(world: World) -> None:
    _, out, _ = await sh(
        world, "pwd; echo $GREETING; echo $HOME; cat /etc/resolv.conf", workdir="/srv/deep", resolv_conf=_resolver(world)
    )
    assert out == "/srv/deep\nhello\n/root\nnameserver 192.0.2.1\n"


def _resolver(world: World) -> Path:
    path = world.directory / "resolv.conf"
    path.write_text("nameserver 192.0.2.1\n")
    return path


async def test_the_log_devices_can_be_opened_by_name(world: World) -> None:
    for user in ("", "app"):
        code, out, err = await world.run(f"u{user}", "sh", "-c", "echo out > /dev/stdout; echo err > /dev/stderr", user=user)
        assert (code, out, err) == (0, "out\n", "err\n")


async def test_a_process_that_outruns_its_reader_waits_and_loses_nothing(world: World) -> None:
    await world.launch("a", "sh", "-c", "i=0; while [ $i -lt 20000 ]; do echo line$i; i=$((i+1)); done")
    await asyncio.sleep(0.3)
    seen = await world.output_until("a", "line19999\n")
    assert seen.count("\n") == 20_000


async def test_odd_commands_are_refused_with_their_cause(world: World) -> None:
    for argv in ((), ("",), ("sh", "nul\0")):
        with pytest.raises(Invalid):
            await world.runtime.create(world.box(f"n{len(argv)}{len(argv[0]) if argv else 0}", *argv))
    with pytest.raises(Invalid):
        await world.runtime.create(world.box("x", "run", id="../x"))
    await world.runtime.create(world.box("dir", "/tmp"))
    with pytest.raises(RuntimeFailed, match="/tmp"):
        await world.runtime.start("dir")
    await world.runtime.create(world.box("noexec", "/etc/passwd"))
    with pytest.raises(RuntimeFailed, match=r"(?i)permission denied"):
        await world.runtime.start("noexec")


async def test_a_layer_that_is_gone_is_an_image_error_and_leaves_nothing(world: World) -> None:
    box = world.box("a", "run")
    image = type(box.image)(reference="x", digest="d", config=box.image.config, layers=(world.directory / "gone",))
    with pytest.raises(ImageError, match="gone"):
        await world.runtime.create(world.box("b", "run", image=image))
    assert _traces(world, "b") == []


async def test_an_image_of_many_layers_mounts(world: World, layer: Path) -> None:
    layers = [layer]
    for at in range(100):
        path = world.directory / "layers" / f"a-rather-long-name-for-a-layer-{at}"
        path.mkdir(parents=True)
        (path / f"file{at}").touch()
        layers.append(path)
    box = world.box("x", "run")
    image = type(box.image)(reference="x", digest="d", config=box.image.config, layers=tuple(layers))
    assert (await world.run("a", "sh", "-c", "ls / | grep -c file", image=image))[1] == "100\n"


@on_the_node_s_kernel
async def test_exec_has_a_terminal_that_resizes(world: World) -> None:
    await world.launch("a", "run")
    execution = await world.runtime.exec("a", ["sh", "-c", "stty size; read x; stty size; exit 9"], tty=True, rows=33, columns=99)
    assert await _until(execution, b"33 99") == 1
    await execution.resize(44, 111)
    await execution.write(b"\n")
    assert await _until(execution, b"44 111") == 1
    assert await asyncio.wait_for(execution.wait(), 10) == 9
    assert await asyncio.wait_for(execution.read(), 10) is None
    await execution.close()


async def test_a_terminal_belongs_to_whoever_runs_in_it(world: World) -> None:
    await world.launch("a", "run")
    execution = await world.runtime.exec("a", ["sh", "-c", "echo to the terminal > /dev/tty; id -u"], tty=True, user="app")
    assert await _until(execution, b"1234") == 1
    await execution.close()


async def _until(execution: object, text: bytes) -> int:
    seen = b""
    while text not in seen:
        part = await asyncio.wait_for(execution.read(), 10)  # type: ignore[attr-defined]
        assert part is not None, seen
        seen += part[1]
    return 1


async def test_exec_takes_user_directory_and_environment(world: World) -> None:
    await world.launch("a", "run")
    _, out = await world.shell("a", "id -u; pwd; echo $MORE $GREETING $HOME", user="app", workdir="/srv", env=[("MORE", "x")])
    assert out == "1234\n/srv\nx hello /srv\n"


async def test_exec_moves_much_data_both_ways_without_loss(world: World) -> None:
    await world.launch("a", "run")
    execution = await world.runtime.exec("a", ["cat"])
    data = os.urandom(1 << 20)

    async def feed() -> None:
        await execution.write(data)
        await execution.close_stdin()

    feeding = asyncio.create_task(feed())
    back = b""
    while (part := await execution.read()) is not None:
        assert len(part[1]) <= 64 << 10
        back += part[1]
    await feeding
    assert back == data
    await execution.close()


async def test_a_child_that_keeps_the_pipes_does_not_hold_an_exec(world: World) -> None:
    await world.launch("a", "run")
    started = time.monotonic()
    code, out = await world.shell("a", "sleep 100 & echo done")
    assert (code, out) == (0, "done\n")
    assert time.monotonic() - started < 5


async def test_delete_leaves_no_trace(world: World) -> None:
    loops_before = _loops(world)
    pid = await world.launch("a", "sh", "-c", "sleep 1000 & sleep 1000 & wait")
    await world.runtime.exec("a", ["sleep", "100"])
    assert _traces(world, "a")
    await world.runtime.delete("a")
    assert _traces(world, "a") == []
    assert not Path(f"/proc/{pid}").exists()
    await world.runtime.close()
    assert _loops(world) == loops_before
    assert list(mounts_below(world.directory)) == []


async def test_closing_at_any_moment_leaves_no_spare_disk(world: World) -> None:
    for step in range(12):
        await world.reopen()
        await world.runtime.recover()
        await asyncio.sleep(0.05 + 0.001 * step)
    await world.runtime.close()
    assert _loops(world) == []


def _loops(world: World) -> list[str]:
    backing = (path / "loop/backing_file" for path in Path("/sys/block").glob("loop*"))
    return [path.read_text().strip() for path in backing if path.exists() and str(world.directory) in path.read_text()]


def _traces(world: World, id: str) -> list[str]:
    found = [str(path) for path in Path("/sys/fs/cgroup").glob(f"*/{world.cgroup[1:]}/{id}")]
    found += [str(path) for path in Path(f"/sys/fs/cgroup{world.cgroup}").glob(id)]
    found += [str(path) for path in Path("/run/atoll").glob(f"*/{id}/root") if str(world.directory) in _mount_options(path)]
    found += [str(path) for path in world.directory.glob(f"runtime/*/{id}*")]
    found += [str(path) for path in (world.directory / "instances").glob(id)]
    return found


def _mount_options(path: Path) -> str:
    lines = Path("/proc/self/mountinfo").read_text().splitlines()
    return next((line for line in lines if line.split()[4] == str(path)), "")


_AGENT = """
    import asyncio, sys, os
    from pathlib import Path
    sys.path.insert(0, {tests!r})
    from runtime_world import real_world

    async def main():
        directory = Path({directory!r})
        world = real_world({name!r}, directory, Path({layer!r}), {cgroup!r})
        await world.launch("stays", "graceful")
        await world.launch("ends", "exit", "42", "0.5")
        await world.launch("talks", "sh", "-c", "while :; do echo tick; sleep 0.05; done")
        await world.runtime.create(world.box("made", "exit", "1"))
        execution = await world.runtime.exec("stays", ["sleep", "12345"])
        await world.runtime.create(world.box("starting", "run"))
        starting = asyncio.create_task(world.runtime.start("starting"))
        await asyncio.sleep(0.005)
        print("ready", flush=True)
        await asyncio.sleep(1000)
    asyncio.run(main())
"""


async def test_after_kill_9_of_the_agent_all_is_adopted_and_nothing_leaks(world: World, layer: Path) -> None:
    names = {"tests": str(Path(__file__).parent), "directory": str(world.directory), "layer": str(layer), "cgroup": world.cgroup}
    names["name"] = str(world.runtime.name)
    script = textwrap.dedent(_AGENT).format(**names)
    agent = await asyncio.create_subprocess_exec(sys.executable, "-c", script, stdout=subprocess.PIPE)
    assert agent.stdout is not None
    assert await agent.stdout.readline() == b"ready\n"
    agent.kill()
    await agent.wait()
    await asyncio.sleep(0.8)

    found = {entry.id: entry for entry in await world.runtime.recover()}
    assert set(found) == {"stays", "ends", "talks", "made", "starting"}
    assert found["ends"].exit is not None
    assert found["ends"].exit.code == 42
    assert found["made"].pid is None
    assert found["made"].exit is None
    assert found["stays"].pid is not None
    assert "sleep 12345" not in (await world.shell("stays", "ps"))[1]  # the exec ended with its agent
    reader = os.open(world.directory / "talks.stdout", os.O_RDONLY | os.O_NONBLOCK)
    assert b"tick" in await _first_bytes(reader)
    os.close(reader)
    assert found["starting"].pid is not None
    await world.runtime.signal("stays", "SIGTERM")
    assert (await asyncio.wait_for(world.runtime.wait("stays"), 10)).code == 0
    for id in found:
        await world.runtime.delete(id)
        assert _traces(world, id) == []
    await world.runtime.close()
    assert _loops(world) == []


_HANGING = """
    import asyncio, sys
    from pathlib import Path
    sys.path.insert(0, {tests!r})
    from runtime_world import REAL, real_world

    async def main():
        directory = Path({directory!r})
        world = real_world({name!r}, directory, Path({layer!r}), {cgroup!r})
        await world.launch("stays", "run")
        world.make = lambda: REAL[{name!r}](directory / "runtime", cgroup=world.cgroup, binary={tool!r})
        await (await world.reopen()).recover()
        for id in ("stuck0", "stuck1"):
            await world.runtime.create(world.box(id, "run"))
        starts = [asyncio.create_task(world.runtime.start(id)) for id in ("stuck0", "stuck1")]
        while not Path({hung!r}).exists() or len(Path({hung!r}).read_text().split()) < 2:
            await asyncio.sleep(0.02)
        print("ready", flush=True)
        await asyncio.wait(starts)
    asyncio.run(main())
"""


async def test_starts_that_hang_when_the_agent_is_killed_keep_the_next_one_from_nothing(world: World, layer: Path) -> None:
    name = world.runtime.name
    settle = type("Impatient", (REAL[name],), {"settle_s": 0.3})
    world.make = lambda: settle(world.directory / "runtime", cgroup=world.cgroup)
    await world.reopen()
    tool, hung = world.directory / "tool", world.directory / "hung"
    tool.write_text(f"#!/bin/sh\nsleep 1000 & echo $! >> {hung}; wait\n")
    tool.chmod(0o755)
    names = {"tests": str(Path(__file__).parent), "directory": str(world.directory), "layer": str(layer), "cgroup": world.cgroup}
    script = textwrap.dedent(_HANGING).format(**names, name=str(name), tool=str(tool), hung=str(hung))
    agent = await asyncio.create_subprocess_exec(sys.executable, "-c", script, stdout=subprocess.PIPE)
    assert agent.stdout is not None
    assert await agent.stdout.readline() == b"ready\n"
    agent.kill()
    await agent.wait()

    found = {entry.id: entry for entry in await world.runtime.recover()}
    assert {id: (entry.pid is not None, entry.exit) for id, entry in found.items()} == {
        "stays": (True, None),
        "stuck0": (False, None),
        "stuck1": (False, None),
    }
    for pid in hung.read_text().split():
        assert not Path(f"/proc/{pid}/cmdline").exists() or not Path(f"/proc/{pid}/cmdline").read_text()  # at most a zombie
    assert (await world.runtime.start("stuck0")).pid > 0
    for id in found:
        await world.runtime.delete(id)
        assert _traces(world, id) == []


async def test_one_box_that_cannot_be_adopted_keeps_no_other_from_it(world: World) -> None:
    await world.launch("bad", "run")
    pid = await world.launch("good", "run")

    async def adopt(self: OciRuntime, boxes: OciBoxes, record: BoxRecord) -> Found:
        if record.id == "bad":
            raise RuntimeFailed("its plan cannot be read")
        return await kind._adopt(self, boxes, record)

    kind = REAL[world.runtime.name]
    careless = type("Careless", (kind,), {"_adopt": adopt})
    world.make = lambda: careless(world.directory / "runtime", cgroup=world.cgroup)
    await world.reopen()
    assert list(await world.runtime.recover()) == [Found("bad", None, None), Found("good", pid, None)]
    assert (await world.shell("good", "exit 4"))[0] == 4
    await world.runtime.delete("bad")
    assert _traces(world, "bad") == []


async def _first_bytes(reader: int) -> bytes:
    async with asyncio.timeout(20):
        while True:
            with contextlib.suppress(BlockingIOError):
                if found := os.read(reader, 1 << 16):
                    return found
            await asyncio.sleep(0.05)


async def test_a_killed_shim_is_survived(world: World) -> None:
    pid = await world.launch("a", "graceful")
    shim = int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1])
    assert Path(f"/proc/{shim}/comm").read_text() == "atoll-shim\n"
    assert int(Path(f"/proc/{shim}/statm").read_text().split()[1]) * 4096 < 1 << 20
    os.kill(shim, signal.SIGKILL)
    await asyncio.sleep(0.1)
    assert Path(f"/proc/{pid}").exists()
    await world.runtime.kill("a")
    assert (await asyncio.wait_for(world.runtime.wait("a"), 10)).code == 255
    await world.runtime.delete("a")
    assert _traces(world, "a") == []


async def test_a_shim_killed_while_no_agent_was_there_is_told_as_an_unknown_end(world: World) -> None:
    pid = await world.launch("a", "graceful")
    shim = int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1])
    await world.runtime.close()
    os.kill(shim, signal.SIGKILL)
    await asyncio.sleep(0.1)
    await world.reopen()
    (found,) = await world.runtime.recover()
    assert found.pid is None
    assert found.exit is not None
    assert found.exit.code == 255
    assert not Path(f"/proc/{pid}").exists() or Path(f"/proc/{pid}/stat").read_text().split()[2] == "Z"


async def test_a_cancelled_exec_leaves_no_command(world: World) -> None:
    await world.launch("a", "run")
    for step in range(8):
        task = asyncio.create_task(world.runtime.exec("a", ["sleep", "54321"]))
        await asyncio.sleep(0.006 * step)
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await (await task).close()
    async with asyncio.timeout(20):
        while "54321" in (await world.shell("a", "sleep 0.1; ps"))[1]:
            pass
    assert list((world.directory / "instances/a/exec").iterdir()) == []


async def test_a_cancelled_call_leaves_nothing_half_made(world: World) -> None:
    for call in range(6):
        id = f"c{call}"
        task = asyncio.create_task(world.launch(id, "run"))
        await asyncio.sleep(0.004 * call)
        if task.cancel():  # a quick runtime may have been through
            with pytest.raises(asyncio.CancelledError):
                await task
        await world.runtime.delete(id)
        assert _traces(world, id) == []


async def test_after_a_restart_of_the_machine_what_ran_has_ended(world: World) -> None:
    await world.launch("ran", "run")
    await world.runtime.create(world.box("made", "run"))
    await world.runtime.kill("ran")
    await world.runtime.wait("ran")
    await world.runtime.close()
    for id in ("ran", "made"):
        (world.directory / f"instances/{id}/exit").unlink(missing_ok=True)
        record = world.directory / f"runtime/boxes/{id}.json"
        record.write_text(json.dumps(json.loads(record.read_text()) | {"boot_id": "another"}))
    for point in [*Path("/run/atoll").glob("*/ran/root"), *Path("/run/atoll").glob("*/made/root")]:
        if str(world.directory) in _mount_options(point):
            unmount(point, MNT_DETACH)
    for point in mounts_below(world.directory):
        unmount(point, MNT_DETACH)
    await world.reopen()
    found = {entry.id: entry for entry in await world.runtime.recover()}
    assert found["ran"].exit is not None
    assert found["ran"].exit.code == 137
    assert (found["made"].pid, found["made"].exit) == (None, None)
    for id in found:
        await world.runtime.delete(id)
        assert _traces(world, id) == []


@on_the_node_s_kernel
async def test_without_user_namespaces_all_else_holds(world: World, netns: Path) -> None:
    name = world.runtime.name
    await world.runtime.close()
    world.make = lambda: REAL[name](world.directory / "runtime", cgroup=world.cgroup, userns=False)
    await world.reopen()
    pid = await world.launch("a", "run", netns=netns)
    assert Path(f"/proc/{pid}").stat().st_uid == 0
    text = Path(f"/proc/{pid}/status").read_text()
    assert f"CapEff:\t{DOCKER_CAPABILITIES:016x}" in text
    assert "Seccomp:\t2" in text
    assert (await world.shell("a", "stat -c %u /srv/owned; ls /sys/class/net"))[1] == "1234\ninner\nlo\nouter\n"
    code, _, err = await world.run("b", "dd", "if=/dev/zero", "of=/tmp/big", "bs=1M", "count=100")
    assert code != 0
    assert "No space left" in err


@on_the_node_s_kernel
async def test_too_little_memory_to_start_is_said(world: World) -> None:
    await world.runtime.create(world.box("a", "run", limits=limits(memory_bytes=64 << 10)))
    with pytest.raises(RuntimeFailed) as raised:
        await world.runtime.start("a")
    assert "memory" in (raised.value.mend or ""), str(raised.value)


async def test_a_machine_that_cannot_run_it_is_told_why(world: World) -> None:
    with pytest.raises(Unsupported, match="runc-of-another-name") as raised:
        await RuncRuntime(world.directory / "r2", binary="runc-of-another-name").probe()
    assert raised.value.mend
    old = world.directory / "old-runc"
    old.write_text("#!/bin/sh\necho runc version 1.0.0~rc93\n")
    old.chmod(0o755)
    with pytest.raises(Unsupported, match="too old"):
        await RuncRuntime(world.directory / "r2", binary=str(old)).probe()
    script = "from atoll.runtimes.runc import probe_runc; import os; os.setuid(65534)"
    script += "\ntry: probe_runc()\nexcept Exception as e: print(e, e.mend)"
    told = await asyncio.create_subprocess_exec(sys.executable, "-c", script, stdout=subprocess.PIPE)
    assert "root" in (await told.communicate())[0].decode()


async def test_a_damaged_record_is_removed_with_what_it_spoke_of(world: World) -> None:
    await world.launch("a", "run")
    await world.runtime.close()
    (world.directory / "runtime/boxes/a.json").write_text("{broken")
    await world.reopen()
    assert list(await world.runtime.recover()) == []
    assert [trace for trace in _traces(world, "a") if "instances" not in trace] == []
    assert _loops(world) == []
    remove_root(world.directory / "instances")  # which the agent does with what it does not know


async def test_a_disk_that_the_node_has_not_is_refused(world: World) -> None:
    with pytest.raises((Exhausted, RuntimeFailed)):
        await world.runtime.create(world.box("a", "run", limits=limits(disk_bytes=1 << 62)))
    assert _traces(world, "a") == []


async def test_no_one_else_on_the_node_sees_an_instance_s_files(world: World) -> None:
    await world.launch("a", "run")
    root = next(path for path in Path("/run/atoll").glob("*/a/root") if str(world.directory) in _mount_options(path))
    assert {"nosuid", "nodev"} <= set(_mount_options(root).split()[5].split(","))
    reader = await asyncio.create_subprocess_exec("cat", str(root / "etc/passwd"), user=65534, group=65534, extra_groups=[])
    assert await reader.wait() != 0


async def test_the_configuration_is_for_root_s_eyes_only(world: World) -> None:
    await world.runtime.create(world.box("a", "run", env=(("TOKEN", "s3cret"),)))
    path = world.directory / "instances/a/config.json"
    assert "TOKEN=s3cret" in json.loads(path.read_text())["process"]["env"]
    assert path.stat().st_mode & 0o077 == 0
    assert "s3cret" not in (world.directory / "runtime/boxes/a.json").read_text()
