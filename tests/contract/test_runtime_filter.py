"""The system call filter of runc's, crun's and LXC's processes: on in each of them before anything of the tenant's runs."""

from __future__ import annotations

import os
import shutil
import struct
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from runtime_world import World, make_layer, real_world

from atoll.model.errors import RuntimeFailed
from atoll.model.ports.runtime import Mount
from atoll.runtimes.inside import process_file
from atoll.runtimes.native import shim_path
from atoll.runtimes.oci_filter import BUNDLE, handed, has_bundle, is_reached, open_filter

pytestmark = pytest.mark.system

MOUNT, KEYCTL, TOO_NEW, X32 = 165, 250, 500, 0x40000000
EPERM, ENOSYS, KILLED = 1, 38, 159
REFUSED = ((MOUNT, EPERM), (KEYCTL, EPERM), (TOO_NEW, ENOSYS), (X32 + 39, KILLED))


def calling(number: int) -> bytes:
    """Return a program of x86-64 that makes one system call, without arguments, and exits with its error."""
    code = b"\xb8" + struct.pack("<I", number)  # mov eax, number
    code += bytes.fromhex("31ff31f631d20f05f7d889c7b83c0000000f05")  # no arguments; syscall; exit(-eax)
    size = 120 + len(code)
    head = b"\x7fELF\x02\x01\x01" + bytes(9) + struct.pack("<HHIQQQIHHHHHH", 2, 62, 1, 0x400078, 64, 0, 0, 64, 56, 1, 0, 0, 0)
    return head + struct.pack("<IIQQQQQQ", 1, 5, 0, 0x400000, 0x400000, size, size, 0x1000) + code


@pytest.fixture(scope="module")
def layer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    layer = make_layer(tmp_path_factory.mktemp("image"))
    for number, _ in REFUSED:
        program = layer / f"bin/call-{number}"
        program.write_bytes(calling(number))
        program.chmod(0o755)
    (layer / "bin/garbage").write_text("no program")
    (layer / "bin/garbage").chmod(0o755)
    return layer


@pytest.fixture(params=["runc", "crun", "lxc"])
async def world(request: pytest.FixtureRequest, layer: Path, tmp_path: Path) -> AsyncIterator[World]:
    world = real_world(request.param, tmp_path, layer)
    yield world
    await world.close()


with_a_bundle = pytest.mark.parametrize("world", ["runc", "crun"], indirect=True)


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="the numbers are those of x86-64")
async def test_forbidden_calls_are_refused_in_what_is_started_and_what_is_executed(world: World) -> None:
    await world.launch("beside", "run")
    for number, answer in REFUSED:
        assert (await world.run(f"call-{number}", f"call-{number}"))[0] == answer
        execution = await world.runtime.exec("beside", [f"call-{number}"])
        assert await execution.wait() == answer
        await execution.close()


async def test_every_way_to_a_process_has_the_filter(world: World) -> None:
    script = "grep -E 'Seccomp:|NoNewPrivs' /proc/self/status"
    for user in ("", "app"):
        id = f"a{user}"
        await world.launch(id, "sh", "-c", f"{script}; exec run", user=user)
        assert await world.output_until(id, "Seccomp:\t2\n") == "NoNewPrivs:\t1\nSeccomp:\t2\n"
        for options in ({}, {"user": "app"}, {"user": "root"}, {"tty": True}, {"user": "app", "tty": True, "workdir": "/srv"}):
            code, out = await world.shell(id, script, **options)
            assert (code, out.replace("\r", "")) == (0, "NoNewPrivs:\t1\nSeccomp:\t2\n")


async def test_no_descriptor_is_left_to_a_process(world: World) -> None:
    script = "for fd in /proc/self/fd/*; do echo ${fd##*/}; done; echo end"
    await world.launch("a", "sh", "-c", f"{script}; exec run")
    beside = (await world.shell("a", script))[1].split()
    for seen in ((await world.output_until("a", "end")).split(), beside):
        assert set(seen) - {"end"} <= {"0", "1", "2", "3"}  # 3 is the shell's own, of the directory


@with_a_bundle
async def test_variables_and_arguments_arrive_as_they_were_given(world: World) -> None:
    env = (
        ("GLIBC_TUNABLES", "glibc.malloc.check=3"),
        ("LINES", "a\nb"),
        ("EMPTY", ""),
        ("HOME", "/data"),
        ("PATH", "/nowhere:/bin"),
    )
    await world.launch("a", "sh", "-c", 'env; for word; do echo "<$word>"; done; exec run', "sh", "", "x y", "\n", env=env)
    seen = await world.output_until("a", "<\n>\n")
    assert seen.endswith("<>\n<x y>\n<\n>\n")
    for name, value in env:
        assert f"{name}={value}\n" in seen
    assert (await world.shell("a", "echo $GLIBC_TUNABLES $HOME $0"))[1] == "glibc.malloc.check=3 /data sh\n"


@pytest.mark.parametrize(("argv", "why"), [("missing", "not found|No such file"), ("/bin/garbage", "format"), ("/bin", "denied")])
async def test_what_cannot_be_run_is_said_at_the_start(world: World, argv: str, why: str) -> None:
    await world.runtime.create(world.box("a", argv))
    with pytest.raises(RuntimeFailed, match=f"cannot run '{argv}': .*({why})"):
        await world.runtime.start("a")
    await world.launch("b", "run")
    with pytest.raises(RuntimeFailed, match=f"cannot run '{argv}': .*({why})"):
        await world.runtime.exec("b", [argv])


@with_a_bundle
async def test_a_box_of_an_earlier_agent_is_started_with_the_tool_s_own_filter(world: World) -> None:
    script = "grep Seccomp: /proc/self/status"
    await world.runtime.create(world.box("a", "sh", "-c", f"{script}; exec run"))
    shutil.rmtree(world.directory / "instances/a" / BUNDLE)
    await world.runtime.start("a")
    assert await world.output_until("a", "\n") == "Seccomp:\t2\n"
    assert (await world.shell("a", script))[1] == "Seccomp:\t2\n"


@with_a_bundle
async def test_a_volume_among_the_kernel_s_files_leaves_the_filter_to_the_tool(world: World) -> None:
    volume = world.directory / "volume"
    (volume / "fd").mkdir(parents=True)
    await world.launch("a", "run", mounts=(Mount(volume, "/dev/self"),))
    assert not has_bundle(world.directory / "instances/a")
    assert (await world.shell("a", "ls /dev/self; grep Seccomp: /proc/self/status; grep Seccomp: /proc/1/status"))[1] == (
        "fd\nSeccomp:\t2\nSeccomp:\t2\n"
    )
    await world.launch("b", "run", mounts=(Mount(volume, "/data"),))
    assert has_bundle(world.directory / "instances/b")


@pytest.mark.parametrize(
    ("link", "mounts", "volumes", "reached"),
    [
        ("", ["/proc", "/dev"], ["/data"], True),
        ("", ["/proc", "/dev", "/proc/self"], ["/proc/self"], False),
        ("", ["/proc", "/dev", "/dev/self"], ["/data", "/dev/self"], False),
        ("proc", ["/proc", "/dev"], [], False),
        ("dev", ["/proc", "/dev"], [], False),
        ("sys", ["/proc", "/dev"], [], False),
    ],
)
def test_the_program_is_used_where_nothing_of_the_tenant_s_can_be_in_its_place(
    tmp_path: Path, link: str, mounts: list[str], volumes: list[str], reached: bool
) -> None:
    (tmp_path / "data").mkdir()
    if link:
        (tmp_path / link).symlink_to("data")
    assert is_reached(tmp_path, [{"destination": path} for path in mounts], volumes) == reached


def test_without_a_filter_of_its_own_such_a_box_starts_nothing(tmp_path: Path) -> None:
    (tmp_path / BUNDLE).mkdir()
    with pytest.raises(RuntimeFailed, match="filter"), handed(tmp_path, None, {}):
        pytest.fail("something would be started")


PROCESS: dict[str, Any] = {
    "capabilities": {},
    "user": {"uid": 0, "gid": 0},
    "args": ["/bin/echo", "it runs"],
    "env": [],
    "cwd": "/",
    "rlimits": [{"type": "RLIMIT_NOFILE", "soft": 9, "hard": 9}],
}


@pytest.mark.parametrize(
    ("program", "words", "out"),
    [
        (bytes.fromhex("060000000000ff7f"), b"", b"it runs\n"),  # return ALLOW
        (bytes(8), b"cannot filter system calls", b""),
        (b"", b"cannot read what to run", b""),
    ],
)
def test_a_command_whose_filter_cannot_be_put_on_does_not_run(program: bytes, words: bytes, out: bytes) -> None:
    file = os.memfd_create("words")
    os.write(file, process_file(PROCESS, program, make_directory=False))
    reader, writer = os.pipe()
    script = f"exec 4< /proc/self/fd/{file} 5> /proc/self/fd/{writer}; exec {shim_path()} filter"
    done = subprocess.run(["/bin/sh", "-c", script], pass_fds=(file, writer), capture_output=True, check=False)
    os.close(writer)
    os.close(file)
    with os.fdopen(reader, "rb") as pipe:
        told = pipe.read()
    assert (words in told, done.stdout, done.returncode == 0) == (True, out, bool(out))


def test_a_program_that_is_not_safe_from_the_tenant_is_left_to_the_tool(tmp_path: Path) -> None:
    setting = tmp_path / "suid_dumpable"
    setting.write_text("0\n")
    program = open_filter(suid_dumpable=setting)
    assert program is not None
    program.close()
    assert open_filter(Path(sys.executable).resolve(), suid_dumpable=setting) is None  # the image's loader would be run
    setting.write_text("1\n")
    assert open_filter(suid_dumpable=setting) is None


@pytest.fixture
def namespace() -> Iterator[list[str]]:
    """Give what runs a command as the root of a user namespace with ids of its own, as an instance's root."""
    with subprocess.Popen([shim_path(), "userns"], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.read(1) == b"."
        for kind in ("uid", "gid"):
            Path(f"/proc/{process.pid}/{kind}_map").write_text(f"0 {0x7FFF0000 - (64 << 10)} 65536")
        yield ["nsenter", f"--user=/proc/{process.pid}/ns/user", "--setuid", "0", "--setgid", "0", "--"]


LOOKS = ("readlink /proc/{pid}/exe", "ls /proc/{pid}/fd", "head -c 1 /proc/{pid}/environ", "exec 3<> /proc/{pid}/mem")


@pytest.mark.parametrize(("program", "seen"), [("ours", [False] * len(LOOKS)), ("readable", [True] * len(LOOKS))])
def test_nobody_beside_looks_into_a_process_that_has_no_filter_yet(namespace: list[str], program: str, seen: list[bool]) -> None:
    """It is held before it has one, because it has nothing to read and tells so to a pipe that is full.

    That another file is looked into shows that the attack works.
    """
    filter = open_filter()
    assert filter is not None
    reader, writer = os.pipe2(os.O_NONBLOCK)
    with suppress(BlockingIOError):
        while True:
            os.write(writer, bytes(4096))
    os.set_blocking(writer, True)
    with filter.handed(PROCESS) as (ours, _):
        file = f"/proc/self/fd/{ours}" if program == "ours" else str(shim_path())
        script = f"exec 3< {file} 4< /dev/null 5> /proc/self/fd/{writer}; exec {' '.join(namespace)} /proc/self/fd/3 filter"
        held = subprocess.Popen(["/bin/sh", "-c", script], pass_fds=(ours, writer))
    filter.close()
    try:
        deadline = time.monotonic() + 10
        while Path(f"/proc/{held.pid}/comm").read_text() != "3\n":
            assert time.monotonic() < deadline
            time.sleep(0.01)
        attacks = [[*namespace, "/bin/sh", "-c", look.format(pid=held.pid)] for look in LOOKS]
        assert [subprocess.run(attack, capture_output=True, check=False).returncode == 0 for attack in attacks] == seen
        assert "Seccomp:\t0" in Path(f"/proc/{held.pid}/status").read_text()
    finally:
        held.kill()
        held.wait()
        os.close(reader)
        os.close(writer)
