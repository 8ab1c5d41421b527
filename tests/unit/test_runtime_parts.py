"""The parts of the runc runtime that need no root: configuration, seccomp, users, control groups, signals, records."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft4Validator
from referencing import Registry, Resource
from referencing.jsonschema import DRAFT4

from atoll.model.errors import ImageError, Invalid, Unsupported
from atoll.model.ports.images import Image, ImageConfig
from atoll.model.ports.runtime import Box, Limits, Mount
from atoll.runtimes.box_record import BoxRecord, BoxRecords
from atoll.runtimes.cgroup import Cgroups
from atoll.runtimes.native import shim_path
from atoll.runtimes.oci import CAPABILITIES, Bundle, configuration, launch_netns
from atoll.runtimes.seccomp import profile
from atoll.runtimes.shim import Launch
from atoll.runtimes.signals import signal_name, signal_number
from atoll.runtimes.users import User, resolve_user

SCHEMAS = Path(__file__).parent / "data/oci-runtime"
V1 = {name: Path(f"/cg/{name}") for name in ("cpu", "cpuacct", "memory", "pids", "freezer")}
LIMITS = Limits(cpu_milli=500, memory_bytes=64 << 20, disk_bytes=1 << 30, pids=100)


def box(**changes: Any) -> Box:
    fields: dict[str, Any] = {
        "id": "a",
        "directory": Path("/d"),
        "image": Image(reference="x", digest="d", config=ImageConfig(), layers=()),
        "argv": ("sh", "-c", "true"),
        "env": (("A", "1"), ("B", "x=y")),
        "workdir": "/w",
        "user": "",
        "hostname": "h",
        "limits": LIMITS,
        "stdout": Path("/out"),
        "stderr": Path("/err"),
    }
    return Box(**(fields | changes))


def bundle(**changes: Any) -> Bundle:
    resources = Cgroups(v1=V1, v2=None).resources(LIMITS)
    fields: dict[str, Any] = {
        "root": Path("/root-of-a"),
        "user": User(0, 0),
        "base_id": 1 << 20,
        "cgroup": "/atoll/a",
        "resources": resources,
    }
    return Bundle(**(fields | changes))


def validator() -> Draft4Validator:
    def retrieve(uri: str) -> Resource[Any]:
        return Resource(json.loads((SCHEMAS / uri.rsplit("/", 1)[-1]).read_text()), DRAFT4)

    registry: Registry[Any] = Registry(retrieve=retrieve)  # type: ignore[call-arg]
    return Draft4Validator(json.loads((SCHEMAS / "config-schema.json").read_text()), registry=registry)


@pytest.mark.parametrize("base_id", [None, 1 << 20])
@pytest.mark.parametrize("netns", [None, Path("/run/netns/a")])
def test_the_configuration_is_what_the_specification_allows(base_id: int | None, netns: Path | None) -> None:
    mounts = (Mount(source=Path("/v"), target="/data", read_only=True),)
    config = configuration(
        box(mounts=mounts, netns=netns, resolv_conf=Path("/r"), read_only_root=True),
        bundle(base_id=base_id, volumes=(Path("/shown"),), hosts=Path("/h"), user=User(5, 6, (7,)), sysfs=Path("/s")),
    )
    errors = [f"{list(error.absolute_path)}: {error.message}" for error in validator().iter_errors(config)]
    assert errors == []
    kinds = {entry["type"] for entry in config["linux"]["namespaces"]}
    assert {"pid", "ipc", "uts", "mount", "cgroup"} <= kinds
    assert ("user" in kinds) == (base_id is not None)
    inherited = netns is not None and base_id is not None
    assert ("network" in kinds) != inherited
    assert launch_netns(box(netns=netns), bundle(base_id=base_id)) == ("/run/netns/a" if inherited else "-")
    assert config["process"]["noNewPrivileges"] is True
    assert config["root"]["readonly"] is True
    shown = next(entry for entry in config["mounts"] if entry["destination"] == "/data")
    assert "ro" in shown["options"]


def test_the_schema_does_refuse() -> None:
    config = configuration(box(), bundle())
    config["process"]["cwd"] = 5
    assert not validator().is_valid(config)


def test_root_has_docker_s_capabilities_and_others_have_none() -> None:
    assert configuration(box(), bundle())["process"]["capabilities"]["effective"] == list(CAPABILITIES)
    other = configuration(box(), bundle(user=User(7, 7)))["process"]["capabilities"]
    assert other["effective"] == other["permitted"] == []


def test_environment_defaults_yield_to_what_is_given() -> None:
    env = configuration(box(env=(("PATH", "/mine"),)), bundle(user=User(7, 7, (), "/home/x")))["process"]["env"]
    assert env == ["PATH=/mine", "HOME=/home/x"]


def test_the_seccomp_profile_follows_capability_architecture_and_kernel() -> None:
    plain = profile(frozenset(CAPABILITIES), machine="aarch64", kernel="6.1.0")
    names = {name for rule in plain["syscalls"] for name in rule["names"] if rule["action"] == "SCMP_ACT_ALLOW"}
    assert {"read", "execve", "chroot", "ptrace"} <= names
    assert not {"bpf", "init_module", "reboot", "keyctl", "arch_prctl"} & names
    unconditional = {
        name for rule in plain["syscalls"] for name in rule["names"] if "args" not in rule and rule["action"] == "SCMP_ACT_ALLOW"
    }
    assert not {"mount", "unshare", "setns"} & unconditional
    assert plain["architectures"][0] == "SCMP_ARCH_AARCH64"
    admin = profile(frozenset({"CAP_SYS_ADMIN"}), machine="x86_64", kernel="6.1.0")
    assert any("mount" in rule["names"] for rule in admin["syscalls"])
    assert any("arch_prctl" in rule["names"] for rule in admin["syscalls"])
    assert not any("chroot" in rule["names"] for rule in admin["syscalls"])
    old = profile(frozenset(), machine="x86_64", kernel="4.4.0-1-generic")
    assert not any("ptrace" in rule["names"] and rule["action"] == "SCMP_ACT_ALLOW" for rule in old["syscalls"])
    assert plain["defaultAction"] == "SCMP_ACT_ERRNO"
    with pytest.raises(Unsupported, match="s390x"):
        profile(frozenset(), machine="s390x")


@pytest.fixture
def root(tmp_path: Path) -> Any:
    (tmp_path / "root/etc").mkdir(parents=True)
    fd = os.open(tmp_path / "root", os.O_PATH | os.O_DIRECTORY)
    yield fd
    os.close(fd)


def test_users_are_found_by_name_and_number(root: int, tmp_path: Path) -> None:
    (tmp_path / "root/etc/passwd").write_text("# x\nbroken\nroot:x:0:0::/root:/bin/sh\napp:x:10:11:A:/srv:/bin/sh\n")
    (tmp_path / "root/etc/group").write_text("staff:x:50:app\nwheel:x:51:root,app\nodd:x:y:app\n")
    assert resolve_user(root, "") == User(0, 0, (51,), "/root")
    assert resolve_user(root, "app") == User(10, 11, (50, 51), "/srv")
    assert resolve_user(root, "10") == User(10, 11, (50, 51), "/srv")
    assert resolve_user(root, "app:staff") == User(10, 50, (), "/srv")
    assert resolve_user(root, "77") == User(77, 0, (), "/")
    assert resolve_user(root, "77:88") == User(77, 88, (), "/")
    for bad in ("nobody", "app:nogroup", "70000", "0:70000", "-1"):
        with pytest.raises(ImageError) as raised:
            resolve_user(root, bad)
        assert raised.value.mend


def test_an_image_without_accounts_has_numbers_only(root: int) -> None:
    assert resolve_user(root, "") == User(0, 0, (), "/root")
    with pytest.raises(ImageError, match="app"):
        resolve_user(root, "app")


def test_account_files_cannot_lead_out_of_the_image(root: int, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.write_text("spy:x:1:1::/:/\n")
    link = tmp_path / "root/etc/passwd"
    for target in (str(outside), "../../outside", "../../../../../../../../etc/passwd"):
        link.symlink_to(target)
        with pytest.raises(ImageError):
            resolve_user(root, "spy")
        link.unlink()
    os.mkfifo(link)
    assert resolve_user(root, "0").uid == 0


def test_limits_in_the_form_of_each_cgroup_version() -> None:
    resources = Cgroups(v1=V1, v2=None).resources(LIMITS)
    assert resources["cpu"] == {"shares": 512, "quota": 50_000, "period": 100_000}
    assert resources["memory"] == {"limit": 64 << 20}
    assert resources["pids"] == {"limit": 100}
    assert Cgroups(v1={}, v2=Path("/cg")).resources(LIMITS)["memory"] == {"limit": 64 << 20, "swap": 64 << 20}
    tiny = Cgroups(v1=V1, v2=None).resources(Limits(cpu_milli=1, memory_bytes=1, disk_bytes=1, pids=1))
    assert tiny["cpu"] == {"shares": 2, "quota": 1000, "period": 100_000}


def mountinfo(path: Path, *lines: str) -> Path:
    path.write_text("".join(f"{at} 1 0:{at} / {line}\n" for at, line in enumerate(lines)))
    return path


def test_the_machine_s_hierarchies_are_told_apart(tmp_path: Path) -> None:
    info = tmp_path / "mountinfo"
    v1 = [f"/cg/{name} rw - cgroup cgroup rw,{name}" for name in ("memory", "pids", "freezer")]
    v1.append("/cg/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct")
    assert Cgroups.detect(mountinfo(info, *v1)).version == "v1"
    hybrid = Cgroups.detect(mountinfo(info, *v1, "/cg/unified rw - cgroup2 cgroup2 rw"))
    assert hybrid.version == "hybrid"
    assert Path("/cg/cpu,cpuacct/atoll/a") in hybrid.group("/atoll/a").directories
    assert len(hybrid.group("/atoll/a").directories) == 5
    pure = tmp_path / "pure"
    pure.mkdir()
    (pure / "cgroup.controllers").write_text("cpu memory pids io\n")
    assert Cgroups.detect(mountinfo(info, f"{pure} rw shared:4 - cgroup2 cgroup2 rw")).version == "v2"
    (pure / "cgroup.controllers").write_text("cpu\n")
    with pytest.raises(Unsupported, match="memory, pids") as raised:
        Cgroups.detect(mountinfo(info, f"{pure} rw - cgroup2 cgroup2 rw"))
    assert raised.value.mend
    with pytest.raises(Unsupported):
        Cgroups.detect(mountinfo(info))


def tree(directory: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_text(text)


def test_a_v2_group_is_read_and_driven(tmp_path: Path) -> None:
    files = {
        "cpu.stat": "usage_usec 1234\nuser_usec 1\n",
        "memory.current": "5000\n",
        "memory.stat": "anon 1\ninactive_file 2000\n",
        "memory.events": "oom 1\noom_kill 2\n",
        "pids.current": "3\n",
        "pids.max": "max\n",
        "cgroup.procs": "",
        "cgroup.events": "populated 1\nfrozen 1\n",
        "cgroup.freeze": "0",
        "cgroup.kill": "",
    }
    tree(tmp_path / "atoll/a", files)
    group = Cgroups(v1={}, v2=tmp_path).group("/atoll/a")
    assert (group.cpu_us(), group.memory_bytes(), group.pids(), group.oom_kills()) == (1234, 3000, 3, 2)
    group.settle(Limits(cpu_milli=250, memory_bytes=1 << 26, disk_bytes=1 << 20, pids=7))
    assert (tmp_path / "atoll/a/pids.max").read_text() == "7"
    assert (tmp_path / "atoll/a/cpu.max").read_text() == "25000 100000"
    group.freeze()
    assert (tmp_path / "atoll/a/cgroup.freeze").read_text() == "1"
    group.thaw()
    assert (tmp_path / "atoll/a/cgroup.freeze").read_text() == "0"
    group.kill()


def test_a_v1_group_is_read_and_driven(tmp_path: Path) -> None:
    files = {
        "cpuacct/a/cpuacct.usage": "7000000\n",
        "memory/a/memory.usage_in_bytes": "9000\n",
        "memory/a/memory.stat": "total_inactive_file 4000\n",
        "memory/a/memory.oom_control": "oom_kill_disable 0\nunder_oom 0\noom_kill 1\n",
        "pids/a/pids.current": "2\n",
        "freezer/a/freezer.state": "THAWED\n",
    }
    tree(tmp_path, files)
    group = Cgroups(v1={name: tmp_path / name for name in V1}, v2=None).group("/a")
    assert (group.cpu_us(), group.memory_bytes(), group.pids(), group.oom_kills()) == (7000, 5000, 2, 1)
    group.freeze()
    assert (tmp_path / "freezer/a/freezer.state").read_text() == "FROZEN"


def test_a_group_that_is_gone_is_empty(tmp_path: Path) -> None:
    for cgroups in (Cgroups(v1={}, v2=tmp_path), Cgroups(v1={name: tmp_path / name for name in V1}, v2=None)):
        group = cgroups.group("/gone")
        assert (group.cpu_us(), group.memory_bytes(), group.pids(), group.oom_kills(), group.processes()) == (0, 0, 0, 0, set())
        group.thaw()
        group.kill()
        group.remove()


def test_signals_have_names_and_numbers() -> None:
    assert signal_number("SIGTERM") == 15
    assert signal_name(15) == "SIGTERM"
    assert signal_name(signal_number("SIGRTMIN+3")) == "SIGRTMIN+3"
    for bad in ("TERM", "SIGNOPE", "", "SIGRTMIN+99", "9"):
        with pytest.raises(Invalid):
            signal_number(bad)


def test_records_come_back_and_odd_ids_are_refused(tmp_path: Path) -> None:
    records = BoxRecords(tmp_path / "boxes")
    assert list(records.ids()) == []
    record = BoxRecord(id="a.b", path="/d", boot_id="x", slot=3, disk="1", limits=LIMITS)
    records.write(record)
    assert records.read("a.b") == record
    assert list(records.ids()) == ["a.b"]
    records.remove("a.b")
    records.remove("a.b")
    assert records.read("a.b") is None
    for bad in ("../x", "", ".", "a/b", "a\n", "x" * 200):
        with pytest.raises(Invalid):
            records.exists(bad)


async def test_a_shim_whose_tool_failed_leaves_nothing_that_the_tool_had_started(tmp_path: Path) -> None:
    for name in ("out", "err"):
        os.mkfifo(tmp_path / name)
    words = ["run", "-", *(str(tmp_path / name) for name in ("out", "err", "pid", "exit", "lock"))]
    tool = ["/bin/sh", "-c", f"sleep 300 & echo $! > {tmp_path}/left; exit 3"]
    launch = Launch([*words, "--", *tool], stdio=None, output=tmp_path / "log")
    assert await launch.news(20) == ("failed", 3 << 8)
    await launch.abandon()
    left = Path(f"/proc/{int((tmp_path / 'left').read_text())}/cmdline")
    assert not left.exists()


def test_a_missing_shim_says_how_to_build_it(tmp_path: Path) -> None:
    with pytest.raises(Unsupported) as raised:
        shim_path(tmp_path / "atoll-shim")
    assert "make" in (raised.value.mend or "")
