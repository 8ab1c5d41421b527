"""The parts of the LXC runtime that need no root: its configuration, the process file, the system call filter, mount points."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from test_runtime_parts import LIMITS, V1, box, bundle

from atoll.model.errors import ImageError, Invalid
from atoll.model.ports.devices import DeviceNode, Edits
from atoll.model.ports.runtime import Mount
from atoll.runtimes.cgroup import Cgroups
from atoll.runtimes.inside import CAPABILITY_BITS, process_file
from atoll.runtimes.lxc_config import configuration_lines
from atoll.runtimes.mount_points import make_point
from atoll.runtimes.oci import CAPABILITIES, configuration
from atoll.runtimes.oci_devices import device_rules
from atoll.runtimes.seccomp import profile
from atoll.runtimes.seccomp_program import INSTRUCTION_BYTES, compile_profile

MIXED = Cgroups(v1=V1, v2=Path("/cg/unified"))
PURE = Cgroups(v1={}, v2=Path("/cg"))


def lines(cgroups: Cgroups = MIXED, netns: Path | None = None, **changes: Any) -> list[str]:
    given = box(**changes)
    resources = cgroups.resources(LIMITS)
    resources["devices"] += device_rules(given.devices)
    config = configuration(given, bundle(resources=resources, volumes=tuple(mount.source for mount in given.mounts)))
    return configuration_lines(config, netns=netns, cgroups=cgroups, point=lambda path, _: path).splitlines()


def values(found: list[str], key: str) -> list[str]:
    return [value for name, _, value in (line.partition(" = ") for line in found) if name == key]


def test_lxc_is_told_what_the_oci_runtimes_are_told() -> None:
    found = lines()
    assert values(found, "lxc.cap.keep") == [" ".join(name.removeprefix("CAP_").lower() for name in CAPABILITIES)]
    assert values(found, "lxc.idmap") == ["u 0 1048576 65536", "g 0 1048576 65536"]
    assert values(found, "lxc.no_new_privs") == ["1"]
    assert values(found, "lxc.cgroup.dir.container") == ["atoll/a"]
    assert values(found, "lxc.net.0.type") == ["empty"]
    entries = values(found, "lxc.mount.entry")
    for path in ("proc/keys", "proc/kcore", "proc/timer_list"):
        assert f"dev/null {path} none bind,relative,optional 0 0" in entries
    assert any(entry.startswith("proc/sys proc/sys none bind,relative,ro") for entry in entries)
    assert all(not entry.split()[1].startswith("/") for entry in entries)


def test_nothing_of_the_process_is_in_lxc_s_configuration() -> None:
    text = "\n".join(lines(env=(("TOKEN", "s3cret"),), argv=("program", "argument")))
    assert "s3cret" not in text
    assert "argument" not in text


@pytest.mark.parametrize(("cgroups", "prefix"), [(MIXED, "lxc.cgroup"), (PURE, "lxc.cgroup2")])
def test_all_devices_are_denied_before_any_is_allowed(cgroups: Cgroups, prefix: str) -> None:
    node = DeviceNode("/dev/gpu", "/dev/nvidia0", 195, 0, "rw")
    found = lines(cgroups, devices=Edits(nodes=(node,)))
    rules = [line for line in found if ".devices." in line]
    assert rules[0] == f"{prefix}.devices.deny = a"
    assert f"{prefix}.devices.allow = c 195:0 rw" in rules
    assert all(line.startswith(f"{prefix}.devices.allow = c ") for line in rules[1:])
    assert f"{prefix}.devices.allow = c 195:0 rw" not in lines(cgroups)


def test_limits_in_the_words_of_each_version() -> None:
    mixed = lines()
    assert values(mixed, "lxc.cgroup.memory.limit_in_bytes") == [str(LIMITS.memory_bytes)]
    assert values(mixed, "lxc.cgroup.cpu.cfs_quota_us") == ["50000"]
    assert values(mixed, "lxc.cgroup.pids.max") == ["100"]
    pure = lines(PURE)
    assert values(pure, "lxc.cgroup2.memory.max") == [str(LIMITS.memory_bytes)]
    assert values(pure, "lxc.cgroup2.memory.swap.max") == ["0"]
    assert values(pure, "lxc.cgroup2.cpu.max") == ["50000 100000"]
    assert values(pure, "lxc.cgroup2.cpu.weight") == ["20"]
    assert values(pure, "lxc.cgroup2.pids.max") == ["100"]
    assert not [line for line in pure if line.startswith("lxc.cgroup.") and ".dir." not in line]


def test_a_network_namespace_is_joined_by_its_path() -> None:
    found = lines(netns=Path("/run/netns/x"))
    assert values(found, "lxc.namespace.share.net") == ["/run/netns/x"]
    assert values(found, "lxc.net.0.type") == []


def test_odd_paths_are_written_as_fstab_has_them() -> None:
    entry = next(
        each for each in values(lines(mounts=(Mount(Path("/v"), "/a b\tc\\d\ne#"),)), "lxc.mount.entry") if "v " in each[:3]
    )
    assert entry.split(" ")[1] == "a\\040b\\011c\\134d\\012e\\043"


@pytest.mark.parametrize("target", ["/", "/proc", "/proc/1", "/data/../proc", "/dev"])
def test_a_mount_over_the_kernel_s_files_is_refused(target: str) -> None:
    with pytest.raises(Invalid, match="nothing can be mounted"):
        lines(mounts=(Mount(Path("/v"), target),))


def test_a_path_longer_than_lxc_reads_is_refused() -> None:
    with pytest.raises(Invalid, match="too long"):
        lines(mounts=(Mount(Path("/v"), "/x" * 2100),))


@pytest.mark.parametrize("name", ["a\nlxc.cap.keep = sys_admin", "a\rb", "a\x00b"])
def test_a_value_with_a_line_break_is_refused(name: str) -> None:
    with pytest.raises(Invalid):
        lines(hostname=name)


def test_the_process_file_has_the_filter_and_every_word() -> None:
    process = configuration(box(argv=("sh", "", "x y\n"), env=(("A", "1"), ("E", ""))), bundle())["process"]
    data = process_file(process, b"\0" * 16, make_directory=True)
    size, _, rest = data.partition(b"\0")
    assert size == b"16"
    words = rest[16:].split(b"\0")
    assert words[:2] == [b"0", b"0"]
    assert int(words[3], 16) == 0xA80425FB
    assert words[8:15] == [b"1", b"/w", b"3", b"sh", b"", b"x y\n", b"4"]
    assert words[15:17] == [b"A=1", b"E="]
    assert words[-1] == b""


def test_every_capability_has_its_number() -> None:
    assert set(CAPABILITY_BITS) == set(CAPABILITIES)
    assert sum(1 << bit for bit in CAPABILITY_BITS.values()) == 0xA80425FB


def run(program: bytes, number: int, architecture: int, *arguments: int) -> int:
    """Return what a program of classic BPF says to a system call, as the kernel would have it (the instructions seccomp allows)."""
    given = [*arguments, *[0] * (6 - len(arguments))]
    data = struct.pack("<iIQ6Q", number, architecture, 0, *given)
    at, a, x, memory = 0, 0, 0, [0] * 16
    while True:
        code, true, false, k = struct.unpack_from("<HBBI", program, at * INSTRUCTION_BYTES)
        at += 1
        match code:
            case 0x20:
                a = struct.unpack_from("<I", data, k)[0]
            case 0x15 | 0x25 | 0x35 | 0x45:
                holds = {0x15: a == k, 0x25: a > k, 0x35: a >= k, 0x45: bool(a & k)}[code]
                at += true if holds else false
            case 0x05:
                at += k
            case 0x54:
                a &= k
            case 0x02:
                memory[k] = a
            case 0x60:
                a = memory[k]
            case 0x07:
                x = a
            case 0x87:
                a = x
            case 0x06:
                return int(k)
            case _:
                raise AssertionError(f"instruction {code:#x}")


ALLOW, EPERM, ENOSYS, KILL = 0x7FFF0000, 0x00050001, 0x00050026, 0x00000000
X86_64, X32_BIT = 0xC000003E, 0x40000000


@pytest.fixture(scope="module")
def program() -> bytes:
    if os.uname().machine != "x86_64":
        pytest.skip("the numbers are those of x86-64")
    return compile_profile(profile(frozenset(CAPABILITIES)))


@pytest.mark.parametrize(
    ("number", "arguments", "answer"),
    [
        (0, (), ALLOW),  # read
        (59, (), ALLOW),  # execve
        (165, (), EPERM),  # mount
        (101, (), ALLOW),  # ptrace: since Linux 4.8
        (250, (), EPERM),  # keyctl
        (321, (), EPERM),  # bpf
        (435, (), ENOSYS),  # clone3
        (56, (0x11,), ALLOW),  # clone of a process
        (56, (0x10000000,), EPERM),  # clone into a user namespace
        (41, (2,), ALLOW),  # socket: AF_INET
        (41, (38,), EPERM),  # socket: AF_ALG
        (41, (40,), EPERM),  # socket: AF_VSOCK
        (135, (8,), ALLOW),  # personality
        (135, (1,), EPERM),
        (403, (), EPERM),  # a number that no call of x86-64 has, below others that are known
        (500, (), ENOSYS),  # newer than the profile
        (X32_BIT - 1, (), ENOSYS),
    ],
)
def test_the_filter_says_what_docker_s_profile_says(program: bytes, number: int, arguments: tuple[int, ...], answer: int) -> None:
    assert run(program, number, X86_64, *arguments) == answer


def test_the_filter_lets_no_other_architecture_s_calls_through(program: bytes) -> None:
    for number in (0, 165, 500):
        assert run(program, X32_BIT + number, X86_64) == KILL
    assert run(program, 0, 0xC00000B7) != ALLOW


@pytest.fixture
def root(tmp_path: Path) -> Iterator[int]:
    (tmp_path / "root").mkdir()
    fd = os.open(tmp_path / "root", os.O_PATH | os.O_DIRECTORY)
    yield fd
    os.close(fd)


@pytest.mark.parametrize(
    ("link", "goal", "path", "found"),
    [
        ("l", "/there", "/l/file", "/there/file"),
        ("l", "../../there", "/l/file", "/there/file"),
        ("l", "there/./x/..", "/l/file", "/there/file"),
        ("l", "m", "/l/../l/file", "/m/file"),
    ],
)
def test_a_mount_point_is_where_the_links_lead_inside(
    root: int, tmp_path: Path, link: str, goal: str, path: str, found: str
) -> None:
    (tmp_path / "root" / link).symlink_to(goal)
    assert make_point(root, path, directory=False, owner=os.getuid()) == found
    assert (tmp_path / "root" / found.lstrip("/")).is_file()
    assert sorted(each.name for each in tmp_path.iterdir()) == ["root"]


def test_a_mount_point_that_is_there_is_left_as_it_is(root: int, tmp_path: Path) -> None:
    (tmp_path / "root/etc").mkdir()
    (tmp_path / "root/etc/hosts").write_text("mine")
    assert make_point(root, "//etc/./hosts", directory=False, owner=os.getuid()) == "/etc/hosts"
    assert (tmp_path / "root/etc/hosts").read_text() == "mine"


@pytest.mark.parametrize(("path", "directory"), [("/file/below", True), ("/file", True), ("/dir", False), ("/loop/x", False)])
def test_something_in_a_mount_point_s_way_is_named(root: int, tmp_path: Path, path: str, directory: bool) -> None:
    (tmp_path / "root/file").write_text("")
    (tmp_path / "root/dir").mkdir()
    (tmp_path / "root/loop").symlink_to("loop")
    with pytest.raises(ImageError, match=path):
        make_point(root, path, directory=directory, owner=os.getuid())
