"""What an instance sees of the node's devices: those in its box, and no others. Probes from inside, on every real runtime.

Harmless devices stand for GPUs: /dev/zero and /dev/null under other names are granted, /dev/fuse and the rest are not. What needs
a GPU says so where there is none.
"""

from __future__ import annotations

import os
import re
import shutil
import stat
import subprocess
import textwrap
import uuid
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from runtime_world import REAL, World, make_layer, real_world, why_not

from atoll.devices.nvidia_files import nvidia_edits
from atoll.model.devices import GpuDevice, GpuGrant
from atoll.model.errors import ImageError, RuntimeFailed, Unsupported
from atoll.model.ports.devices import DeviceNode, Edits, FileMount
from atoll.model.ports.runtime import Feature
from atoll.model.spec import GpuCapability
from atoll.runtimes.cgroup import Cgroups
from atoll.runtimes.nvproxy import gvisor_drivers

pytestmark = pytest.mark.system

ZERO = DeviceNode("/dev/granted/zero", "/dev/zero", 1, 5)
NULL = DeviceNode("/dev/granted-null", "/dev/null", 1, 3, mode=0o444)
USUAL = ("console", "core", "fd", "full", "mqueue", "null", "ptmx", "pts", "random", "shm", "stderr", "stdin", "stdout", "tty")
USUAL += ("urandom", "zero")
LIBRARIES = "/usr/local/nvidia/lib64"


@pytest.fixture(scope="module")
def layer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    layer = make_layer(tmp_path_factory.mktemp("image"))
    (layer / "bin/mknod").symlink_to("busybox")
    return layer


@pytest.fixture(params=[(name, userns) for name in REAL if name != "gvisor" for userns in (True, False)], ids=str)
async def world(request: pytest.FixtureRequest, layer: Path, tmp_path: Path) -> AsyncIterator[World]:
    """On the node's kernel, with ids of its own and without."""
    name, userns = request.param
    if why := why_not(name):
        pytest.skip(why)
    cgroup = f"/atoll-test-{name}-{uuid.uuid4().hex[:8]}"
    world = World(tmp_path, lambda: REAL[name](tmp_path / "runtime", cgroup=cgroup, userns=userns), (layer,), cgroup=cgroup)
    yield world
    await world.close()


async def sh(world: World, script: str, **changes: object) -> tuple[int, str, str]:
    return await world.run("a", "sh", "-c", script, **changes)


async def test_a_granted_device_works_and_has_its_name_and_mode(world: World) -> None:
    script = "head -c 3 /dev/granted/zero | wc -c; stat -c '%t:%T %a %u' /dev/granted/zero /dev/granted-null; : < /dev/granted-null"
    code, out, err = await sh(world, script, devices=Edits(nodes=(ZERO, NULL)))
    assert (code, err) == (0, "")
    assert out == "3\n1:5 666 0\n1:3 444 0\n"


async def test_a_granted_device_works_for_another_user_and_in_commands_beside(world: World) -> None:
    await world.launch("a", "run", user="app", devices=Edits(nodes=(ZERO,)))
    assert await world.shell("a", "id -u; head -c 2 /dev/granted/zero | wc -c") == (0, "1234\n2\n")


async def test_dev_has_what_was_granted_and_nothing_else_of_the_node(world: World) -> None:
    _, out, _ = await sh(world, "ls /dev /dev/granted", devices=Edits(nodes=(ZERO, NULL)))
    here, there = out.split("\n\n")
    assert set(here.splitlines()[1:]) <= {*USUAL, "granted", "granted-null"}
    assert {"granted", "granted-null"} <= set(here.splitlines())
    assert there.splitlines()[1:] == ["zero"]


@pytest.mark.parametrize("name", ["/dev/fuse", "/dev/loop-control", "/dev/kmsg"])
async def test_a_device_that_was_not_granted_can_neither_be_opened_nor_made(world: World, name: str) -> None:
    if not Path(name).exists():
        pytest.skip(f"this machine has no {name}")
    found = Path(name).stat()
    major, minor = os.major(found.st_rdev), os.minor(found.st_rdev)
    script = (
        f"test -e {name} && echo there; for d in /dev /dev/shm /tmp; do"
        f" mknod $d/x c {major} {minor} 2>/dev/null; (: < $d/x) 2>/dev/null && echo opened $d; done; echo end"
    )
    assert (await sh(world, script, devices=Edits(nodes=(ZERO,))))[1] == "end\n"


async def test_a_disk_of_the_node_cannot_be_read(world: World) -> None:
    disks = [line.split() for line in Path("/proc/partitions").read_text().splitlines()[2:] if line.strip()]
    if not disks:
        pytest.skip("this machine shows no disk")
    script = f"mknod /dev/x b {disks[0][0]} {disks[0][1]} 2>/dev/null; head -c 1 /dev/x > /dev/null 2>&1 && echo read; echo end"
    assert (await sh(world, script, devices=Edits(nodes=(ZERO,))))[1] == "end\n"


async def test_the_control_group_allows_exactly_what_was_granted(world: World) -> None:
    devices = Cgroups.detect().v1.get("devices")
    if devices is None:
        pytest.skip("the rules of cgroup v2 are programs: they cannot be read, only tried, which the other tests do")
    await world.launch("plain", "run")
    await world.launch("granted", "run", devices=Edits(nodes=(DeviceNode("/dev/f", "/dev/fuse", 10, 229, "r"),)))
    rules = [
        set((devices / f"{world.cgroup}/{id}".lstrip("/") / "devices.list").read_text().splitlines()) for id in ("plain", "granted")
    ]
    assert rules[1] - rules[0] == {"c 10:229 r"}
    assert rules[0] - rules[1] == set()
    assert not any(rule.startswith("a ") for rule in rules[0])


async def test_a_device_granted_for_reading_cannot_be_written(world: World) -> None:
    fuse = DeviceNode("/dev/f", "/dev/fuse", 10, 229, "r")
    script = "(: < /dev/f) && echo reads; (: > /dev/f) 2>/dev/null && echo writes; echo end"
    assert (await sh(world, script, devices=Edits(nodes=(fuse,))))[1] == "reads\nend\n"


async def test_two_instances_see_each_its_own_device_only(world: World) -> None:
    await world.launch("a", "run", devices=Edits(nodes=(DeviceNode("/dev/gpu0", "/dev/zero", 1, 5),)))
    await world.launch("b", "run", devices=Edits(nodes=(DeviceNode("/dev/gpu1", "/dev/full", 1, 7),)))
    assert (await world.shell("a", "ls /dev | grep gpu"))[1] == "gpu0\n"
    assert (await world.shell("b", "ls /dev | grep gpu"))[1] == "gpu1\n"


def library(directory: Path, text: str = "real\n") -> Edits:
    """Return the edits for a file that stands for a library with two shorter names."""
    source = directory / "libgpu.so.580.1"
    source.write_text(text)
    return Edits(
        mounts=(FileMount(str(source), f"{LIBRARIES}/libgpu.so.580.1"),),
        library_directories=(LIBRARIES,),
        links=((f"{LIBRARIES}/libgpu.so.1", "libgpu.so.580.1"), (f"{LIBRARIES}/libgpu.so", "libgpu.so.1")),
        env=(("NVIDIA_VISIBLE_DEVICES", "void"), ("GREETING", "of the device's")),
    )


@pytest.mark.parametrize("read_only", [True, False])
async def test_libraries_are_there_under_all_their_names_and_cannot_be_written(world: World, read_only: bool) -> None:
    script = (
        f"cd {LIBRARIES}; cat libgpu.so libgpu.so.1; stat -c %u libgpu.so; (echo x > libgpu.so) 2>/dev/null && echo wrote; echo end"
    )
    code, out, err = await sh(world, script, devices=library(world.directory), read_only_root=read_only)
    assert (code, out, err) == (0, "real\nreal\n0\nend\n", "")
    assert (world.directory / "libgpu.so.580.1").read_text() == "real\n"


async def test_the_linker_is_told_before_what_the_instance_has_and_the_spec_s_own_variables_stay(world: World) -> None:
    env = (("LD_LIBRARY_PATH", "/mine:/other"), ("GREETING", "mine"), ("NVIDIA_VISIBLE_DEVICES", "all"))
    await world.launch("a", "run", devices=library(world.directory), env=env)
    _, out = await world.shell("a", "echo $LD_LIBRARY_PATH; echo $GREETING; echo $NVIDIA_VISIBLE_DEVICES")
    assert out == f"{LIBRARIES}:/mine:/other\nmine\nvoid\n"


async def test_what_the_image_has_of_the_same_name_gives_way_in_this_instance_only(world: World, tmp_path: Path) -> None:
    old = tmp_path / "old"
    (old / LIBRARIES.strip("/")).mkdir(parents=True)
    (old / LIBRARIES.strip("/") / "libgpu.so.1").write_text("the image's\n")
    image = world.box("unused").image
    both = type(image)(reference="x", digest=image.digest, config=image.config, layers=(*image.layers, old))
    assert (await sh(world, f"cat {LIBRARIES}/libgpu.so.1", devices=library(world.directory), image=both))[1] == "real\n"
    assert (old / LIBRARIES.strip("/") / "libgpu.so.1").read_text() == "the image's\n"


async def test_an_image_whose_links_lead_out_leads_nowhere(world: World, tmp_path: Path) -> None:
    trap = tmp_path / "trap"
    outside = tmp_path / "outside"
    outside.mkdir()
    (trap / "usr/local").mkdir(parents=True)
    (trap / "usr/local/nvidia").symlink_to(outside)
    (trap / str(outside).strip("/")).mkdir(parents=True)
    image = world.box("unused").image
    both = type(image)(reference="x", digest=image.digest, config=image.config, layers=(*image.layers, trap))
    assert (await sh(world, f"cat {LIBRARIES}/libgpu.so", devices=library(world.directory), image=both))[1] == "real\n"
    assert list(outside.iterdir()) == []


async def test_an_image_with_a_directory_in_a_library_s_place_is_refused_and_nothing_stays(world: World, tmp_path: Path) -> None:
    bad = tmp_path / "bad"
    (bad / LIBRARIES.strip("/") / "libgpu.so").mkdir(parents=True)
    image = world.box("unused").image
    both = type(image)(reference="x", digest=image.digest, config=image.config, layers=(*image.layers, bad))
    with pytest.raises(ImageError, match=re.escape(f"{LIBRARIES}/libgpu.so")):
        await world.runtime.create(world.box("a", "run", devices=library(world.directory), image=both))
    assert not (world.directory / "instances/a").exists()


async def test_a_library_that_is_gone_from_the_node_is_named(world: World) -> None:
    edits = library(world.directory)
    (world.directory / "libgpu.so.580.1").unlink()
    with pytest.raises(RuntimeFailed, match=r"libgpu\.so\.580\.1"):
        await world.runtime.create(world.box("a", "run", devices=edits))
    assert not (world.directory / "instances/a").exists()


async def test_what_speaks_of_others_devices_is_found_empty(world: World) -> None:
    await world.launch("plain", "run")
    await world.launch("masked", "run", devices=Edits(nodes=(ZERO,), masked=("/proc/bus", "/proc/driver/nvidia/gpus/none")))
    assert (await world.shell("plain", "ls /proc/bus"))[1] != ""
    assert (await world.shell("masked", "ls /proc/bus"))[1] == ""


async def test_devices_outlive_the_agent_and_leave_with_the_instance(world: World) -> None:
    await world.launch("a", "run", devices=Edits(nodes=(ZERO,)))
    runtime = await world.reopen()
    await runtime.recover()
    assert (await world.shell("a", "head -c 2 /dev/granted/zero | wc -c"))[1] == "2\n"
    await runtime.delete("a")
    assert not (world.directory / "instances/a").exists()


def compile_c(source: str, target: Path, *options: str) -> None:
    subprocess.run(["cc", "-x", "c", "-", "-o", str(target), *options], input=textwrap.dedent(source), text=True, check=True)


def copy_libraries(program: Path, layer: Path) -> None:
    """Copy what the linker needs for a program into the layer, without a cache and without the driver's own."""
    listed = subprocess.run(["ldd", str(program)], capture_output=True, text=True, check=False).stdout
    for path in re.findall(r"(/\S+) \(0x", listed):
        if "nvidia" in Path(path).name or "cuda" in Path(path).name:
            continue
        target = layer / path.strip("/")
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)


async def test_a_program_finds_the_library_in_an_image_without_a_linker_s_cache(world: World, tmp_path: Path) -> None:
    if shutil.which("cc") is None:
        pytest.skip("needs a C compiler")
    compile_c("int answer(void) { return 42; }", tmp_path / "libgpu.so.580.1", "-shared", "-fPIC", "-Wl,-soname,libgpu.so.1")
    program = """
        #include <dlfcn.h>
        #include <stdio.h>
        int main(void) {
            void *library = dlopen("libgpu.so.1", RTLD_NOW);
            if (library == NULL) { puts(dlerror()); return 1; }
            printf("%d\\n", ((int (*)(void)) dlsym(library, "answer"))());
            return 0;
        }"""
    compile_c(program, tmp_path / "program", "-ldl")
    glibc = tmp_path / "glibc"
    (glibc / "bin").mkdir(parents=True)
    copy_libraries(tmp_path / "program", glibc)
    shutil.copy(tmp_path / "program", glibc / "bin/ask")
    assert not (glibc / "etc/ld.so.cache").exists()
    image = world.box("unused").image
    both = type(image)(reference="x", digest=image.digest, config=image.config, layers=(*image.layers, glibc))
    edits = library(world.directory)
    compile_c("int answer(void) { return 42; }", world.directory / "libgpu.so.580.1", "-shared", "-fPIC", "-Wl,-soname,libgpu.so.1")
    assert await world.run("a", "ask", devices=edits, image=both) == (0, "42\n", "")
    assert (await world.run("b", "ask", image=both))[0] == 1


@pytest.fixture
async def sandbox(layer: Path, tmp_path: Path) -> AsyncIterator[World]:
    world = real_world("gvisor", tmp_path, layer)
    yield world
    await world.close()


async def test_gvisor_refuses_in_words_what_its_proxy_does_not_know(sandbox: World) -> None:
    await sandbox.runtime.probe()
    assert (Feature.GPU in sandbox.runtime.features) == bool(gvisor_drivers())
    with pytest.raises(Unsupported, match=r"MIG") as raised:
        await sandbox.runtime.create(sandbox.box("a", "run", devices=Edits(nodes=(ZERO,))))
    assert "runc or crun" in (raised.value.mend or "")
    unknown = Edits(nodes=(DeviceNode("/dev/nvidiactl", "/dev/null", 1, 3),), gvisor_driver="999.99.99")
    with pytest.raises(Unsupported, match=r"nvproxy") as raised:
        await sandbox.runtime.create(sandbox.box("b", "run", devices=unknown))
    assert "newer runsc" in (raised.value.mend or "") or "999.99.99" in (raised.value.mend or "")
    assert not (sandbox.directory / "instances/a").exists()
    assert not (sandbox.directory / "instances/b").exists()


def gpus() -> dict[str, GpuDevice]:
    """Return this machine's GPUs as the kernel driver itself tells of them. Skips where there is none."""
    found: dict[str, GpuDevice] = {}
    for path in sorted(Path("/proc/driver/nvidia/gpus").glob("*/information")):
        fields = dict(re.findall(r"^([^:\n]+):[ \t]*(.*)$", path.read_text(), re.MULTILINE))
        id = fields["GPU UUID"].strip()
        found[id] = GpuDevice(
            id=id, model=fields["Model"].strip(), memory_bytes=0, pci=path.parent.name, minor=int(fields["Device Minor"])
        )
    if not found:
        pytest.skip("no NVIDIA GPU: /proc/driver/nvidia/gpus names none")
    return found


async def test_an_instance_sees_its_own_gpu_only(world: World, tmp_path: Path) -> None:
    devices = gpus()
    mine = next(iter(devices.values()))
    edits = nvidia_edits([GpuGrant(device=mine.id)], (GpuCapability.COMPUTE, GpuCapability.UTILITY), (), devices)
    if not any(mount.target.endswith("/nvidia-smi") for mount in edits.mounts):
        pytest.skip("nvidia-smi is not on this machine")
    glibc = tmp_path / "glibc"
    (glibc / "bin").mkdir(parents=True)
    for mount in edits.mounts:
        copy_libraries(Path(mount.source), glibc)
    image = world.box("none").image
    both = type(image)(reference="x", digest=image.digest, config=image.config, layers=(*image.layers, glibc))
    await world.launch("a", "run", devices=edits, image=both)
    code, out = await world.shell("a", "nvidia-smi -L")
    assert code == 0, out
    assert re.findall(r"UUID: (GPU-[-0-9a-f]+)", out) == [mine.id]
    seen = (await world.shell("a", "ls /dev | grep nvidia"))[1].split()
    assert set(seen) == {Path(node.path).name for node in edits.nodes}
    for other in Path("/dev").glob("nvidia*"):
        if other.name in seen or not stat.S_ISCHR(other.stat().st_mode):
            continue
        number = other.stat().st_rdev
        made = f"mknod /dev/x c {os.major(number)} {os.minor(number)} 2>/dev/null"
        assert (await world.shell("a", f"{made}; (: < /dev/x) 2>/dev/null && echo opened; rm -f /dev/x"))[1] == "", other
