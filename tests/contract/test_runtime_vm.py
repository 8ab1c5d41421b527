"""What an instance in a virtual machine may not do, may use, and leaves behind. Most is tried in one machine: a boot takes long."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import io
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import textwrap
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from probing import INSIDE, build_probe, check_findings, read_findings
from runtime_world import LIMITS, MACHINES, World, make_layer, real_world

from atoll.model.errors import AtollError, ImageError, Invalid, RuntimeFailed, Unsupported
from atoll.model.fabric import new_ula
from atoll.model.ports.devices import DeviceNode, Edits
from atoll.model.ports.network import Link
from atoll.model.ports.runtime import Limits, Mount
from atoll.model.spec import Port
from atoll.network.links import LinkNetwork
from atoll.network.outward import Outward
from atoll.network.sysctls import no_ipv6
from atoll.runtimes.mounts import mounts_below
from atoll.runtimes.qemu import QemuRuntime
from atoll.runtimes.vm.qmp import command as qmp

pytestmark = [pytest.mark.system, pytest.mark.asyncio(loop_scope="module")]


def limits(**changes: int) -> Limits:
    return Limits(**({name: getattr(LIMITS, name) for name in LIMITS.__struct_fields__} | changes))


@pytest.fixture(scope="module", params=[*MACHINES])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def layer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_layer(tmp_path_factory.mktemp("image"))


class LeadsOut(Outward):
    """A node that reaches the world by IPv6, so that guests are led there."""

    def find(self) -> str:
        return "2001:db8::1"


class Shared:
    """A machine that runs during all tests of the module, on a network of the node's own kind."""

    def __init__(self, world: World, link: Link, pid: int) -> None:
        self.world, self.link, self.pid = world, link, pid

    async def sh(self, script: str, **options: Any) -> tuple[int, str]:
        return await self.world.shell("shared", script, **options)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shared(kind: str, layer: Path, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Shared]:
    directory = tmp_path_factory.mktemp("shared")
    world = real_world(kind, directory, layer)
    # A subnet of this process's own: other test runs may be on this machine.
    subnet, ula = f"10.93.{os.getpid() % 256}.0/24", "" if no_ipv6() else new_ula(os.urandom(5))
    network = LinkNetwork(subnet, directory / "network", prepared=1, resolver_sources=(), ula=ula, outward=LeadsOut())
    try:
        link = await network.attach("shared", project="p", ports=[Port(name="http", port=8080)])
        pid = await world.launch("shared", "run", netns=link.netns, mounts=_volumes(world))
        yield Shared(world, link, pid)
    finally:
        await world.close()
        await network.detach("shared")
        await network.close()


def _volumes(world: World) -> tuple[Mount, ...]:
    """Return one to write to, and inside of it one that is an image's: read-only. None where the kind takes none."""
    if not world.runtime.takes_volumes:  # type: ignore[attr-defined]
        return ()
    own, image = world.directory / "own", world.directory / "volume-image"
    for path in (own, image):
        path.mkdir()
    (image / "file").write_text("image\n")
    return Mount(source=image, target="/data/in/ner", read_only=True), Mount(source=own, target="/data")


@pytest_asyncio.fixture(loop_scope="module")
async def world(kind: str, layer: Path, tmp_path: Path) -> AsyncIterator[World]:
    world = real_world(kind, tmp_path, layer)
    yield world
    await world.close()


async def test_it_has_a_kernel_of_its_own_and_sees_no_process_but_its_own(shared: Shared) -> None:
    _, out = await shared.sh(
        "cat /proc/version; ps | wc -l; cat /etc/hostname; hostname 2>/dev/null; grep -c host-shared /etc/hosts"
    )
    assert Path("/proc/version").read_text() not in out
    lines = out.splitlines()
    assert int(lines[1]) <= 6  # a line of titles, the first process, the shell and its children
    assert lines[2:] == ["host-shared", "1"] or lines[2:] == ["host-shared", "host-shared", "1"]


async def test_nothing_of_the_node_is_seen_or_reached(shared: Shared, tmp_path: Path) -> None:
    copier = await shared.world.runtime.copier("shared")
    assert copier is not None
    packed = io.BytesIO()
    with tarfile.open(mode="w", fileobj=packed) as archive:
        archive.add(build_probe(tmp_path), "probe")
    packed.seek(0)
    await asyncio.to_thread(copier.unpack, "/srv", packed)
    for user, who in (("", (0, 0, ())), ("app", (1234, 1235, (2000,)))):
        code, out = await shared.sh("/srv/probe", env=INSIDE, user=user)
        assert code == 0, out
        check_findings(read_findings(out), kernel="guest", hostname="host-shared", user=who)


async def test_root_has_docker_s_capabilities_and_another_user_none(shared: Shared) -> None:
    _, out = await shared.sh("grep -E 'CapEff|CapBnd|NoNewPrivs' /proc/self/status")
    assert out == "CapEff:\t00000000a80425fb\nCapBnd:\t00000000a80425fb\nNoNewPrivs:\t1\n"
    _, out = await shared.sh("id -u; id -g; id -G; echo $HOME; grep CapEff /proc/self/status", user="app")
    assert out == "1234\n1235\n1235 2000\n/srv\nCapEff:\t0000000000000000\n"
    with pytest.raises(ImageError, match="nobody-here"):
        await shared.sh("true", user="nobody-here")


async def test_files_belong_inside_to_whom_the_image_says(shared: Shared) -> None:
    _, out = await shared.sh("stat -c %u:%g /srv/owned /bin/busybox; stat -c %a /tmp")
    assert out == "1234:1235\n0:0\n1777\n"


async def test_kernel_paths_are_hidden_or_read_only_and_dangerous_calls_refused(shared: Shared) -> None:
    code, out = await shared.sh(
        "wc -c < /proc/keys; wc -c < /proc/timer_list; ls /sys/firmware | wc -l; mkdir -p /tmp/m;"
        "for p in /proc/sys/kernel/hostname /proc/sysrq-trigger /sys/kernel/uevent_helper; do"
        " (echo x > $p) 2>/dev/null && echo wrote $p; done; mount -o remount,rw /proc/sys 2>/dev/null && echo remounted;"
        "mount -t tmpfs x /tmp/m 2>/dev/null && echo mounted; umount /proc 2>/dev/null && echo unmounted;"
        "dd if=/dev/mem count=1 2>/dev/null && echo memory; ls /dev/vd* /dev/vport* /dev/kmsg 2>/dev/null; exit 0"
    )
    assert (code, out) == (0, "0\n0\n0\n")


async def test_its_init_and_disks_are_out_of_reach(shared: Shared) -> None:
    _, out = await shared.sh(
        "ls /proc | grep -c '^[0-9]';"
        "ls /image /own /modules 2>/dev/null; busybox mknod /tmp/disk b 254 0 && cat /tmp/disk; echo end"
    )
    assert out.endswith("end\n")
    assert int(out.split()[0]) <= 6
    assert "atoll" not in out


async def test_volumes_keep_their_files_and_owners_and_the_read_only_one_is_so_on_the_node(shared: Shared) -> None:
    if not shared.world.runtime.takes_volumes:  # type: ignore[attr-defined]
        pytest.skip("this kind takes no volumes")
    _, out = await shared.sh(
        "exec 2>/dev/null; echo kept > /data/file; chmod 600 /data/file; chown 1234:1235 /data/file; cat /data/in/ner/file;"
        "(echo x > /data/in/ner/new) || echo refused; busybox mknod /data/device c 1 3 || echo no device;"
        "echo '#!/bin/sh' > /data/root; chmod 4755 /data/root; grep -c virtiofs /proc/mounts"
    )
    assert out == "image\nrefused\nno device\n2\n"
    own = shared.world.directory / "own"
    about = (own / "file").stat()
    assert ((own / "file").read_text(), about.st_uid, about.st_gid, about.st_mode & 0o777) == ("kept\n", 1234, 1235, 0o600)
    (own / "from-the-node").write_text("new\n")
    assert (await shared.sh("cat /data/from-the-node; cat /data/file", user="app"))[1] == "new\nkept\n"
    servers = _servers(shared.world)
    assert len(servers) == 4  # each has a process that waits for it
    roots = {line.split()[5].split(",")[0] for pid in servers for line in _mounts(pid) if line.split()[4] == "/"}
    assert roots >= {"ro", "rw"}
    for pid in servers:
        status = dict(line.split(":\t") for line in Path(f"/proc/{pid}/status").read_text().splitlines() if ":\t" in line)
        if int(status["NSpid"].split()[-1]) != int(pid):  # the one that serves is in namespaces of its own
            assert int(status["CapEff"], 16) & (1 << 21 | 1 << 27 | 1 << 31) == 0  # SYS_ADMIN, MKNOD, SETFCAP
            assert status["Seccomp"] == "2"
            assert Path(f"/proc/{pid}/ns/net").readlink() != Path("/proc/self/ns/net").readlink()


def _mounts(pid: str) -> list[str]:
    return Path(f"/proc/{pid}/mountinfo").read_text().splitlines()


def _servers(world: World) -> list[str]:
    """Return the processes that serve this world's volumes."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            words = path.read_bytes()
            if words.startswith(b"/usr/lib/qemu/virtiofsd") and os.fsencode(world.directory) in words:
                found.append(path.parent.name)
    return found


async def test_files_are_copied_out_and_in_as_the_instance_sees_them(shared: Shared) -> None:
    await shared.sh(
        "mkdir -p /tmp/x/y; ln -s /etc/passwd /tmp/x/y/link; dd if=/dev/urandom of=/tmp/x/big bs=1000 count=300 2>/dev/null;"
        "chown 1234:1235 /tmp/x/big; chmod 640 /tmp/x/big; busybox mkfifo /tmp/x/fifo; ln -s /tmp/x /srv/to"
    )
    copier = await shared.world.runtime.copier("shared")
    assert copier is not None
    packed = io.BytesIO()
    await asyncio.to_thread(copier.pack, "/srv/to", packed)
    packed.seek(0)
    with tarfile.open(fileobj=packed) as archive:
        members = {member.name: member for member in archive}
        big = archive.extractfile("to/big")
        assert big is not None
        data = big.read()
    assert sorted(members) == ["to", "to/big", "to/y", "to/y/link"]  # a pipe is not copied
    about = members["to/big"]
    assert (about.uid, about.gid, about.mode, len(data)) == (1234, 1235, 0o640, 300_000)
    assert members["to/y/link"].linkname == "/etc/passwd"
    packed.seek(0)
    await asyncio.to_thread(copier.unpack, "/srv/made/deep", packed)
    _, out = await shared.sh("cd /srv/made/deep/to; cmp big /tmp/x/big 2>&1; stat -c '%u:%g %a' big; ls; ls /srv/made/deep")
    assert out.replace("sh: cmp: not found\n", "") == "1234:1235 640\nbig\ny\nto\n"
    again = io.BytesIO()
    await asyncio.to_thread(copier.pack, "/srv/made/deep/to/big", again)
    with tarfile.open(fileobj=io.BytesIO(again.getvalue())) as archive:
        copied = archive.extractfile("big")
        assert copied is not None
        assert copied.read() == data
    await shared.sh("rm -r /tmp/x /srv/made")


async def test_copies_that_cannot_be_say_why_and_lead_nowhere_else(shared: Shared) -> None:
    copier = await shared.world.runtime.copier("shared")
    assert copier is not None
    for path, number in (("/no/such", errno.ENOENT), ("/etc/passwd/x", errno.ENOTDIR)):
        with pytest.raises(OSError, match=path) as raised:
            await asyncio.to_thread(copier.pack, path, io.BytesIO())
        assert raised.value.errno == number
    for name, kind, error in (
        ("../out", tarfile.REGTYPE, Invalid),
        ("device", tarfile.CHRTYPE, Invalid),
        ("fine", tarfile.REGTYPE, OSError),
    ):
        packed = io.BytesIO()
        with tarfile.open(mode="w", fileobj=packed) as archive:
            member = tarfile.TarInfo(name)
            member.type = kind
            archive.addfile(member)
        packed.seek(0)
        with pytest.raises(error):
            await asyncio.to_thread(copier.unpack, "/tmp" if error is Invalid else "/proc/there", packed)
    with pytest.raises(Invalid, match="tar"):
        await asyncio.to_thread(copier.unpack, "/tmp", io.BytesIO(b"garbage" * 1000))
    assert (await shared.sh("ls /tmp | grep -c -E 'out|device'; ls / | grep -c -E '^out'"))[1] == "0\n0\n"


async def test_open_files_have_a_limit_and_no_core_is_dumped(shared: Shared) -> None:
    _, out = await shared.sh("ulimit -n; ulimit -Hn; ulimit -c")
    soft, hard, core = (int(line) for line in out.split())
    assert soft <= 1024
    assert hard >= soft
    assert core == 0


async def test_a_fork_bomb_stays_inside_and_commands_go_on(shared: Shared) -> None:
    bomb = await shared.world.runtime.exec("shared", ["sh", "-c", "for i in $(seq 100); do sleep 100 & done; wait"])
    await asyncio.sleep(1.0)
    usage = await shared.world.runtime.usage("shared")
    assert 10 < usage.pids <= LIMITS.pids
    assert (await shared.sh("exit 3"))[0] in {2, 3}  # a shell that may not fork says 2
    await bomb.close()
    execution = await shared.world.runtime.exec("shared", ["sh", "-c", "kill -9 -1"])
    await asyncio.wait_for(execution.wait(), 10)
    await execution.close()
    assert (await shared.sh("echo well"))[1] == "well\n"


async def test_a_disk_bomb_gets_enospc_and_the_node_is_unharmed(shared: Shared) -> None:
    code, out = await shared.sh(
        "exec 2>&1; dd if=/dev/zero of=/tmp/big bs=1M count=100; echo after; echo x > /dev/shm/still; cat /dev/shm/still"
    )
    assert "No space left" in out
    assert out.endswith("after\nx\n")
    assert code == 0
    assert 50 << 20 < (await shared.world.runtime.usage("shared")).disk_bytes <= LIMITS.disk_bytes
    disk = shared.world.directory / "instances/shared/vm/disk.img"
    assert disk.stat().st_blocks * 512 <= LIMITS.disk_bytes + (1 << 20)
    await shared.sh("rm /tmp/big; sync")


async def test_a_terminal_resizes_and_belongs_to_whoever_runs_in_it(shared: Shared) -> None:
    execution = await shared.world.runtime.exec(
        "shared",
        ["sh", "-c", "stty size; read x; stty size; echo tty > /dev/tty; id -u; exit 9"],
        tty=True,
        rows=33,
        columns=99,
        user="app",
    )
    await _until(execution, b"33 99")
    await execution.resize(44, 111)
    await execution.write(b"\n")
    await _until(execution, b"1234")
    assert await asyncio.wait_for(execution.wait(), 10) == 9
    while await asyncio.wait_for(execution.read(), 10) is not None:
        pass
    await execution.close()


async def _until(execution: Any, text: bytes) -> bytes:
    seen = b""
    while text not in seen:
        part = await asyncio.wait_for(execution.read(), 10)
        assert part is not None, seen
        seen += part[1]
    return seen


async def test_exec_takes_user_directory_and_environment(shared: Shared) -> None:
    _, out = await shared.sh("id -u; pwd; echo $MORE $GREETING $HOME", user="app", workdir="/srv", env=[("MORE", "x")])
    assert out == "1234\n/srv\nx hello /srv\n"


async def test_much_data_goes_through_a_command_without_loss(shared: Shared) -> None:
    execution = await shared.world.runtime.exec("shared", ["cat"])
    data = os.urandom(1 << 20)

    async def feed() -> None:
        await execution.write(data)
        await execution.close_stdin()

    feeding = asyncio.create_task(feed())
    back = b""
    while (part := await asyncio.wait_for(execution.read(), 20)) is not None:
        assert len(part[1]) <= 64 << 10
        back += part[1]
    await feeding
    assert back == data
    await execution.close()


async def test_a_child_that_keeps_the_pipes_does_not_hold_a_command(shared: Shared) -> None:
    started = time.monotonic()
    assert await shared.sh("sleep 100 & echo done") == (0, "done\n")
    assert time.monotonic() - started < 8


async def test_a_cancelled_command_is_left_nowhere(shared: Shared) -> None:
    for step in range(6):
        task = asyncio.create_task(shared.world.runtime.exec("shared", ["sleep", "54321"]))
        await asyncio.sleep(0.004 * step)
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await (await task).close()
    async with asyncio.timeout(60):
        while "sleep 54321" in (await shared.sh("sleep 0.1; ps"))[1]:
            pass


async def test_it_is_reached_at_its_addresses_and_reaches_the_node_by_its_gateway_only(shared: Shared) -> None:
    _, out = await shared.sh(
        "ls /sys/class/net; busybox ip -4 addr show eth0 | grep -c 'inet " + shared.link.address + "/32'; busybox ip route"
    )
    assert out.split("\n")[:3] == ["eth0", "lo", "1"]
    assert "default via 169.254.1.1 dev eth0" in out
    for address in filter(None, (shared.link.address, shared.link.ipv6)):
        server = await shared.world.runtime.exec("shared", ["sh", "-c", "echo hello from the guest | nc -l -p 8080"])
        for _ in range(50):
            with contextlib.suppress(OSError):
                reader, writer = await asyncio.open_connection(address, 8080)
                assert await asyncio.wait_for(reader.read(100), 5) == b"hello from the guest\n"
                writer.close()
                break
            await asyncio.sleep(0.1)
        else:
            raise AssertionError(f"nobody answers at {address}")
        await server.close()
    if shared.link.ipv6:
        _, out = await shared.sh("busybox ip -6 addr show eth0; busybox ip -6 route; ls /proc/net/if_inet6")
        assert out.count("inet6") == 2  # its own and the file; none that it gave itself
        assert f"inet6 {shared.link.ipv6}/128" in out
        assert "default via fe80::1 dev eth0" in out  # as the node leads there: test_runtime_outward.py goes there
    # Metadata services and the node itself are out of reach, as they are for a container.
    _, out = await shared.sh(
        "echo x | nc -w 1 169.254.169.254 80 && echo reached; echo x | nc -w 1 169.254.1.1 22 && echo node; echo end"
    )
    assert out.endswith("end\n")
    assert "reached" not in out
    assert "node" not in out


async def test_the_monitor_is_nobody_in_a_jail_with_nothing_in_it(shared: Shared) -> None:
    proc = Path(f"/proc/{shared.pid}")
    status = dict(line.split(":\t", 1) for line in (proc / "status").read_text().splitlines() if ":\t" in line)
    assert set(status["Uid"].split()) == set(status["Gid"].split())
    assert int(status["Uid"].split()[0]) >= 0x7FFF0000
    assert {status[name] for name in ("CapEff", "CapPrm", "CapInh", "CapBnd", "CapAmb")} == {"0" * 16}
    assert (status["NoNewPrivs"], status["Seccomp"], status["Groups"].strip()) == ("1", "2", "")
    for name in ("mnt", "pid", "ipc", "uts", "net"):
        assert (proc / "ns" / name).readlink() != Path(f"/proc/self/ns/{name}").readlink()
    root = proc / "root"
    assert {path.name for path in root.iterdir()} <= {"box", "dev", "image", "initramfs", "kernel", "lib", "lib64", "usr"}
    assert not (root / "etc").exists()
    assert not (root / "usr/bin/sh").exists()
    mounts = [line.split() for line in (proc / "mountinfo").read_text().splitlines()]
    assert [fields[4] for fields in mounts if "rw" in fields[5].split(",")] == ["/box"]
    assert all("nosuid" in fields[5] for fields in mounts)
    nodes = list((root / "dev").iterdir()) if (root / "dev").exists() else []
    assert {path.name for path in nodes} <= {"kvm"}
    owned = Path(f"/proc/{shared.pid}/root/box")
    sockets = {"agent.sock", "qmp.sock", "volume0.sock", "volume1.sock"}  # the last two: of the volumes that it is shown
    assert {path.name for path in owned.iterdir()} <= {"disk.img", *sockets}


async def test_the_monitor_holds_no_descriptor_of_the_node_but_its_own(shared: Shared) -> None:
    targets = [str(path.readlink()) for path in Path(f"/proc/{shared.pid}/fd").iterdir()]
    allowed = ("/dev/null", "/dev/net/tun", "/dev/kvm", "anon_inode:", "socket:", "pipe:", "/memfd:", str(shared.world.directory))
    inside = ("/box/", "/image", "/kernel", "/initramfs", "/usr/")
    assert [target for target in targets if not target.startswith((*allowed, *inside))] == []


async def test_its_memory_is_bounded_on_the_node_with_a_stated_overhead(shared: Shared) -> None:
    boxes = shared.world.runtime._made  # type: ignore[attr-defined]
    bound = boxes.limits_of(LIMITS, booting=False).memory_bytes
    assert bound == LIMITS.memory_bytes + (64 << 20) + shared.world.runtime.overhead_bytes()  # type: ignore[attr-defined]
    used = (await shared.world.runtime.usage("shared")).memory_bytes
    assert 16 << 20 < used < bound
    groups = [path for path in boxes.group("shared").directories if (path / "memory.limit_in_bytes").exists()]
    assert [int((path / "memory.limit_in_bytes").read_text()) for path in groups] in ([bound], [])


async def test_a_paused_machine_stands_still_and_costs_nothing(shared: Shared) -> None:
    await shared.world.runtime.pause("shared")
    await shared.world.runtime.usage("shared")
    await asyncio.sleep(0.5)
    assert (await shared.world.runtime.usage("shared")).cpu_milli < 50
    await shared.world.runtime.resume("shared")
    assert (await shared.sh("echo on"))[1] == "on\n"


async def test_what_is_asked_of_its_surroundings_is_so(world: World) -> None:
    resolver = world.directory / "resolv.conf"
    resolver.write_text("nameserver 192.0.2.1\n")
    script = (
        "pwd; echo $GREETING $HOME; cat /etc/resolv.conf;"
        "(echo x > /file) 2>/dev/null && echo wrote; echo x > /dev/shm/f && echo shm;"
        "echo out > /dev/stdout; echo err > /dev/stderr; i=0; while [ $i -lt 20000 ]; do echo line$i; i=$((i+1)); done"
    )
    await world.launch("a", "sh", "-c", script, user="app", workdir="/srv", read_only_root=True, resolv_conf=resolver)
    seen = await world.output_until("a", "line19999\n", 30)
    assert seen.startswith("/srv\nhello /srv\nnameserver 192.0.2.1\nshm\nout\nline0\nline1\n")
    assert seen.count("line") == 20_000
    assert (await asyncio.wait_for(world.runtime.wait("a"), 20)).code == 0
    assert world.output("a", "stderr") == "err\n"


async def test_memory_beyond_the_limit_ends_it_and_is_told_to_the_next_agent_too(world: World) -> None:
    script = "exec dd if=/dev/zero of=/dev/null bs=200M count=1"
    await world.launch("a", "sh", "-c", script, limits=limits(memory_bytes=32 << 20))
    end = await asyncio.wait_for(world.runtime.wait("a"), 20)
    assert (end.code, end.signal, end.oom) == (137, "SIGKILL", True)
    await world.reopen()
    (found,) = await world.runtime.recover()
    assert found.exit == end


async def test_processor_time_is_bounded_and_delete_leaves_no_trace(world: World) -> None:
    mounts = _volumes(world)
    pid = await world.launch("a", "sh", "-c", "while :; do :; done", limits=limits(cpu_milli=200), mounts=mounts)
    assert bool(_servers(world)) == bool(mounts)
    await world.runtime.usage("a")
    await asyncio.sleep(2.0)
    assert 100 <= (await world.runtime.usage("a")).cpu_milli <= 300
    execution = await world.runtime.exec("a", ["sleep", "100"])
    assert _traces(world, "a")
    await world.runtime.delete("a")
    assert await asyncio.wait_for(execution.wait(), 5) == 137
    await execution.close()
    assert _traces(world, "a") == []
    assert not Path(f"/proc/{pid}").exists()
    assert list(mounts_below(world.directory)) == []
    assert _servers(world) == []


def _traces(world: World, id: str) -> list[str]:
    found = [str(path) for path in Path("/sys/fs/cgroup").glob(f"*/{world.cgroup[1:]}/{id}")]
    found += [str(path) for path in Path(f"/sys/fs/cgroup{world.cgroup}").glob(id)]
    found += [str(path) for path in world.directory.glob(f"runtime/boxes/{id}*")]
    found += [str(path) for path in (world.directory / "instances").glob(id)]
    return found


async def test_what_it_cannot_do_is_refused_before_anything_is_made(world: World) -> None:
    takes_volumes = world.runtime.takes_volumes  # type: ignore[attr-defined]
    gone = (Mount(source=world.directory / "gone", target="/data"),)
    kernel_s = (Mount(source=world.directory, target="/proc/x"),)
    device = Edits(nodes=(DeviceNode(path="/dev/x", host_path="/dev/null", major=1, minor=3),))
    for id, error, changes in (
        ("gone", RuntimeFailed if takes_volumes else Unsupported, {"mounts": gone}),
        ("kernel-s", Invalid if takes_volumes else Unsupported, {"mounts": kernel_s}),
        ("device", Unsupported, {"devices": device}),
        ("user", ImageError, {"user": "nobody-here"}),
        ("netns", RuntimeFailed, {"netns": Path("/run/netns/gone")}),
        ("workdir", Invalid, {"workdir": "relative"}),
    ):
        with pytest.raises(error) as raised:
            await world.runtime.create(world.box(id, "run", **changes))
        assert isinstance(raised.value, AtollError)
        assert _traces(world, id) == []


async def test_a_guest_that_never_answers_is_given_up_and_leaves_nothing_running(world: World) -> None:
    world.runtime.boot_s_max = 0.2  # type: ignore[attr-defined]
    await world.runtime.create(world.box("a", "run"))
    with pytest.raises(RuntimeFailed, match="did not answer") as raised:
        await world.runtime.start("a")
    assert raised.value.mend
    assert [path for path in _traces(world, "a") if "cgroup" in path] == []
    world.runtime.boot_s_max = 60.0  # type: ignore[attr-defined]
    await world.runtime.start("a")  # it is as `create` left it


async def test_a_damaged_image_or_kernel_is_said_and_leaves_nothing_running(world: World) -> None:
    await world.runtime.create(world.box("a", "run"))
    (image,) = world.directory.glob("runtime/images/*/root.img")
    image.write_bytes(image.read_bytes()[:512])
    with pytest.raises(RuntimeFailed, match="ended before it ran"):
        await world.runtime.start("a")
    bad = world.directory / "kernels"
    (bad / "boot").mkdir(parents=True)
    (bad / "lib/modules/6.1.0-1-cloud-amd64").mkdir(parents=True)
    (bad / "boot/vmlinuz-6.1.0-1-cloud-amd64").write_bytes(b"no kernel")
    runtime = QemuRuntime(world.directory / "other", kernels=(bad,), cgroup=world.cgroup)
    with pytest.raises(Unsupported, match="no Linux kernel"):
        await runtime.probe()
    with pytest.raises(Unsupported, match="no kernel for virtual machines"):
        await QemuRuntime(world.directory / "other", kernels=(world.directory,), cgroup=world.cgroup).probe()
    with pytest.raises(Unsupported, match="qemu-of-another-name"):
        await QemuRuntime(world.directory / "other", binary="qemu-of-another-name", cgroup=world.cgroup).probe()


_AGENT = """
    import asyncio, sys
    from pathlib import Path
    sys.path.insert(0, {tests!r})
    from runtime_world import real_world

    async def main():
        world = real_world({name!r}, Path({directory!r}), Path({layer!r}), {cgroup!r})
        await asyncio.gather(
            world.launch("stays", "graceful"),
            world.launch("ends", "exit", "42", "1"),
        )
        await world.runtime.create(world.box("made", "exit", "1"))
        execution = await world.runtime.exec("stays", ["sleep", "12345"])
        await world.runtime.create(world.box("starting", "sh", "-c", "echo begun; exec sleep 1000"))
        starting = asyncio.create_task(world.runtime.start("starting"))
        await asyncio.sleep(0.3)
        print("ready", flush=True)
        await asyncio.sleep(1000)
    asyncio.run(main())
"""


async def test_after_kill_9_of_the_agent_all_is_adopted_and_nothing_leaks(world: World, layer: Path, kind: str) -> None:
    names = {"tests": str(Path(__file__).parent), "directory": str(world.directory), "layer": str(layer), "cgroup": world.cgroup}
    script = textwrap.dedent(_AGENT).format(name=kind, **names)
    agent = await asyncio.create_subprocess_exec(sys.executable, "-c", script, stdout=subprocess.PIPE)
    assert agent.stdout is not None
    assert await agent.stdout.readline() == b"ready\n"
    reader = os.open(world.directory / "starting.stdout", os.O_RDONLY | os.O_NONBLOCK)
    agent.kill()
    await agent.wait()
    async with asyncio.timeout(40):
        done = [world.directory / "instances" / path for path in ("ends/exit", "starting/pid")]
        while not all(path.exists() for path in done):  # noqa: ASYNC110 - nobody is there to tell
            await asyncio.sleep(0.1)

    found = {entry.id: entry for entry in await world.runtime.recover()}
    assert set(found) == {"stays", "ends", "made", "starting"}
    assert found["ends"].exit is not None
    assert found["ends"].exit.code == 42
    assert (found["made"].pid, found["made"].exit) == (None, None)
    assert found["stays"].pid is not None
    assert "sleep 12345" not in (await world.shell("stays", "ps"))[1]  # the command ended with its agent
    assert found["starting"].pid is not None
    for _ in range(600):
        with contextlib.suppress(BlockingIOError):
            if os.read(reader, 100) == b"begun\n":
                break
        await asyncio.sleep(0.1)
    else:
        raise AssertionError("a start that was begun did not come to its end alone")
    os.close(reader)
    assert (await world.shell("starting", "exit 5"))[0] == 5
    await world.runtime.signal("stays", "SIGTERM")
    assert (await asyncio.wait_for(world.runtime.wait("stays"), 10)).code == 0
    for id in found:
        await world.runtime.delete(id)
        assert _traces(world, id) == []


async def test_a_machine_that_stands_stays_so_when_the_next_agent_writes_it_down(world: World, kind: str) -> None:
    if kind != "qemu":
        pytest.skip("for the others test_runtime_monitors.py says so, over stand-ins too")
    await world.launch("a", "run")
    await world.runtime.pause("a")
    await world.reopen()
    await world.runtime.recover()
    await world.runtime.snapshot("a", world.directory / "taken")
    monitor = world.directory / "instances/a/vm/qmp.sock"
    assert (await qmp(monitor, "query-status"))["running"] is False
    await world.runtime.resume("a")
    assert (await world.shell("a", "exit 5"))[0] == 5


async def test_the_memory_of_a_snapshot_that_was_removed_is_let_go_of_and_its_copy_runs_on(world: World, kind: str) -> None:
    if kind != "qemu":
        pytest.skip("the others' monitors read the snapshot's files themselves")
    world.runtime.removed_s = 0.05  # type: ignore[attr-defined]
    await world.launch("a", "run")
    await world.runtime.snapshot("a", world.directory / "taken")
    await world.runtime.restore(world.box("b", "run"), world.directory / "taken")
    assert _memories_held() == 1
    shutil.rmtree(world.directory / "taken")
    async with asyncio.timeout(10):
        while _memories_held():  # noqa: ASYNC110 - nobody tells
            await asyncio.sleep(0.05)
    assert (await world.shell("b", "exit 5"))[0] == 5


def _memories_held() -> int:
    links = []
    for fd in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            links.append(str(fd.readlink()))
    return sum("memfd:atoll-snapshot" in link for link in links)


async def test_a_damaged_record_is_removed_with_the_machine_that_it_spoke_of(world: World) -> None:
    pid = await world.launch("a", "run")
    await world.runtime.close()
    (world.directory / "runtime/boxes/a.json").write_text("{broken")
    await world.reopen()
    assert list(await world.runtime.recover()) == []
    assert [trace for trace in _traces(world, "a") if "instances" not in trace] == []
    assert not Path(f"/proc/{pid}").exists() or "Z" in Path(f"/proc/{pid}/stat").read_text().split()[2]


async def test_a_monitor_that_is_killed_by_another_is_told_as_such(world: World) -> None:
    pid = await world.launch("a", "run")
    os.kill(pid, signal.SIGKILL)
    end = await asyncio.wait_for(world.runtime.wait("a"), 10)
    assert (end.code, end.signal, end.oom) == (137, "SIGKILL", False)
    await world.runtime.delete("a")
    assert _traces(world, "a") == []
