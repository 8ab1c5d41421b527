"""What is LXC's own way: what it leaves behind, what its configuration must not let in, how commands come into an instance."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from msgspec import structs
from runtime_world import LIMITS, World, make_layer, real_world

from atoll.model.errors import ImageError, Invalid, RuntimeFailed, Unsupported
from atoll.model.ports.images import Image
from atoll.model.ports.runtime import Mount
from atoll.runtimes.cgroup import Cgroups
from atoll.runtimes.lxc import LxcRuntime
from atoll.runtimes.oci_runtime import START_S_MAX

pytestmark = pytest.mark.system

ODD = 'it\'s "odd" $HOME `id` \\ ; # = | \n[end]'


@pytest.fixture(scope="module")
def layer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_layer(tmp_path_factory.mktemp("image"))


@pytest.fixture
async def world(layer: Path, tmp_path: Path) -> AsyncIterator[World]:
    world = real_world("lxc", tmp_path, layer)
    yield world
    await world.close()


def image_with(world: World, layer: Path) -> Image:
    image = world.box("unused").image
    return Image(reference="x", digest="d", config=image.config, layers=(*image.layers, layer))


def monitors(world: World) -> list[str]:
    """Return the commands of LXC's processes that live for this world."""
    words = [path.read_bytes().replace(b"\0", b" ").decode(errors="replace") for path in Path("/proc").glob("[0-9]*/cmdline")]
    return [line for line in words if line.split(" ")[0].endswith("lxc-start") and str(world.directory) in line]


def leftovers(world: World) -> list[Path]:
    """Return the control groups that LXC's own processes have, or had."""
    cgroups = Cgroups.detect()
    places = [*cgroups.group(world.cgroup).directories, *cgroups.group("/lxc.pivot").directories]
    return [path for place in places for path in (place.glob("_monitor_*") if "atoll" in place.name else [place]) if path.exists()]


async def test_nothing_of_lxc_s_own_stays_beside_a_running_instance(world: World) -> None:
    pid = await world.launch("a", "run")
    assert monitors(world) == []
    assert leftovers(world) == []
    assert not list(Path("/run/lxc/lock").rglob(".a"))
    parent = int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1])
    assert Path(f"/proc/{parent}/comm").read_text() == "atoll-shim\n"


async def test_nothing_of_lxc_s_own_stays_after_a_start_that_failed(world: World) -> None:
    for id, argv in (("a", "missing"), ("b", "/tmp")):
        await world.runtime.create(world.box(id, argv))
        with pytest.raises(RuntimeFailed, match=argv):
            await world.runtime.start(id)
    (world.directory / "instances/a/lxc.conf").write_text("lxc.no.such.key = 1\n")
    with pytest.raises(RuntimeFailed, match="LXC says"):
        await world.runtime.start("a")
    assert monitors(world) == []
    assert leftovers(world) == []


@pytest.mark.parametrize("memory_bytes", [64 << 10, 128 << 10, 256 << 10])
async def test_lxc_that_waits_for_a_child_killed_for_memory_is_not_waited_for(world: World, memory_bytes: int) -> None:
    await world.runtime.create(world.box("a", "run", limits=structs.replace(LIMITS, memory_bytes=memory_bytes)))
    with pytest.raises(RuntimeFailed) as raised:
        await asyncio.wait_for(world.runtime.start("a"), START_S_MAX / 2)
    assert "memory" in (raised.value.mend or ""), str(raised.value)
    assert monitors(world) == []


async def test_no_descriptor_of_the_agent_s_is_open_inside(world: World) -> None:
    leaked = os.open("/etc/shadow", os.O_RDONLY)
    os.set_inheritable(leaked, True)
    try:
        script = "for fd in /proc/self/fd/*; do echo ${fd##*/}; done"
        await world.launch("a", "sh", "-c", f"{script}; sleep 1000")
        seen = set((await world.output_until("a", "2\n")).split())
        assert {"0", "1", "2"} <= seen
        assert str(leaked) not in seen
        assert not seen & {"4", "5", "6", "7", "8"}
        beside = set((await world.shell("a", script))[1].split())
        assert {"0", "1", "2"} <= beside
        assert not beside & {str(leaked), "4", "5", "6", "7", "8"}
    finally:
        os.close(leaked)


async def test_odd_words_arrive_as_they_are(world: World) -> None:
    code, out, _ = await world.run("a", "sh", "-c", 'printf "%s|%s" "$1" "$ODD"', "sh", ODD, env=(("ODD", ODD),))
    assert (code, out) == (0, f"{ODD}|{ODD}")
    await world.launch("b", "run")
    execution = await world.runtime.exec("b", ["sh", "-c", 'printf %s "$1"', "sh", ODD], env=[("MORE", ODD)])
    assert await asyncio.wait_for(execution.read(), 10) == (1, ODD.encode())
    await execution.close()


async def test_a_line_break_in_a_host_name_cannot_add_to_the_configuration(world: World) -> None:
    with pytest.raises(Invalid, match="line break"):
        await world.runtime.create(world.box("a", "run", hostname="a\nlxc.cap.keep = sys_admin"))
    assert not (world.directory / "instances/a").exists()


async def test_volumes_may_have_odd_names_and_lie_in_one_another(world: World) -> None:
    outer, inner = world.directory / "outer # 1", world.directory / "inner\n2"
    outer.mkdir()
    inner.mkdir()
    (inner / "file").write_text("found\n")
    mounts = (Mount(source=outer, target="/data/a b\\c\td"), Mount(source=inner, target="/data/a b\\c\td/in\nside", read_only=True))
    script = "cat '/data/a b\\c\td/in\nside/file'; (: > '/data/a b\\c\td/in\nside/new') 2>/dev/null || echo refused"
    assert await world.run("a", "sh", "-c", script, mounts=mounts) == (0, "found\nrefused\n", "")


@pytest.mark.parametrize("target", ["/proc", "/proc/self", "/proc/sys/../1", "/dev", "/"])
async def test_a_volume_cannot_lie_over_what_the_start_relies_on(world: World, target: str) -> None:
    source = world.directory / "volume"
    source.mkdir()
    with pytest.raises(Invalid, match="nothing can be mounted") as raised:
        await world.runtime.create(world.box("a", "run", mounts=(Mount(source=source, target=target),)))
    assert raised.value.field == "volumes"


@pytest.mark.parametrize("name", ["proc", "dev", "sys"])
async def test_an_image_cannot_have_the_kernel_s_files_elsewhere(world: World, tmp_path: Path, name: str) -> None:
    trap = tmp_path / "trap"
    (trap / "tmp/else").mkdir(parents=True)
    (trap / name).symlink_to("/tmp/else")
    with pytest.raises((Invalid, ImageError), match=f"/{name}"):
        await world.runtime.create(world.box("a", "run", image=image_with(world, trap)))
    assert not (world.directory / "instances/a").exists()


@pytest.mark.parametrize("goal", ["../run/resolve/stub.conf", "/run/resolve/stub.conf", "/../../../run/resolve/stub.conf"])
async def test_a_file_that_the_image_has_as_a_link_is_mounted_where_that_leads_inside(
    world: World, tmp_path: Path, goal: str
) -> None:
    linked = tmp_path / "linked"
    (linked / "etc").mkdir(parents=True)
    (linked / "etc/resolv.conf").symlink_to(goal)
    resolver = world.directory / "resolv.conf"
    resolver.write_text("nameserver 192.0.2.1\n")
    changes = {"image": image_with(world, linked), "resolv_conf": resolver}
    assert (await world.run("a", "cat", "/etc/resolv.conf", "/run/resolve/stub.conf", **changes))[1] == "nameserver 192.0.2.1\n" * 2
    assert not Path("/run/resolve").exists()


async def test_an_image_with_a_loop_of_links_is_refused(world: World, tmp_path: Path) -> None:
    loop = tmp_path / "loop"
    (loop / "etc").mkdir(parents=True)
    (loop / "etc/hosts").symlink_to("hosts2")
    (loop / "etc/hosts2").symlink_to("hosts")
    with pytest.raises(ImageError, match="/etc/hosts"):
        await world.runtime.create(world.box("a", "run", image=image_with(world, loop)))


async def test_commands_beside_are_in_every_namespace_group_and_bound_of_the_instance(world: World) -> None:
    pid = await world.launch("a", "run", user="app")
    script = "ls -l /proc/self/ns; cat /proc/self/cgroup; grep -E 'Cap|NoNew|Seccomp:|Groups' /proc/self/status"
    _, beside = await world.shell("a", script)
    links = {line.rsplit("-> ", 1)[1] for line in beside.splitlines() if "-> " in line}
    kinds = ("user", "pid", "mnt", "net", "ipc", "uts", "cgroup")
    assert {str(Path(f"/proc/{pid}/ns/{kind}").readlink()) for kind in kinds} <= links
    assert "CapBnd:\t00000000a80425fb" in beside
    assert "CapEff:\t0000000000000000" in beside
    assert "NoNewPrivs:\t1" in beside
    assert "Seccomp:\t2" in beside
    assert "Groups:\t2000 " in beside
    assert {line.split(":")[2] for line in beside.splitlines() if line[:1].isdigit() and line.count(":") == 2} == {"/"}


async def test_a_command_cannot_enter_what_has_ended(world: World) -> None:
    pid = await world.launch("a", "exit", "0", "0.1")
    await world.runtime.wait("a")
    shim = await asyncio.create_subprocess_exec(
        str(Path(__file__).parents[2] / "src/atoll/runtimes/native/atoll-shim"),
        *("enter", str(world.directory / "pid"), str(world.directory / "instances/a/process"), str(world.directory / "log"), "-"),
        *(str(pid if Path(f"/proc/{pid}").exists() else os.getpid()), str(world.directory / "instances/a/exit"), "/nowhere"),
    )
    assert await shim.wait() == 1
    assert "has ended" in (world.directory / "log").read_text()
    assert not (world.directory / "pid").exists()


async def test_a_machine_without_lxc_or_with_an_old_one_is_told_so(world: World, tmp_path: Path) -> None:
    with pytest.raises(Unsupported, match="lxc-of-another-name") as raised:
        await LxcRuntime(tmp_path / "r", binary="lxc-of-another-name").probe()
    assert raised.value.mend == "apt-get install lxc"
    old = tmp_path / "old-lxc"
    old.write_text("#!/bin/sh\necho 3.0.3\n")
    old.chmod(0o755)
    with pytest.raises(Unsupported, match="too old"):
        await LxcRuntime(tmp_path / "r", binary=str(old)).probe()
    broken = tmp_path / "broken-lxc"
    broken.write_text('#!/bin/sh\ntest "$1" = --version && echo 5.0.2 && exit 0\nexit 1\n')
    broken.chmod(0o755)
    with pytest.raises(Unsupported, match="runs nothing on this machine") as raised:
        await LxcRuntime(tmp_path / "r", binary=str(broken), cgroup=world.cgroup).probe()
    assert "runc" in (raised.value.mend or "")
