"""What Firecracker's and Cloud Hypervisor's drivers promise beyond the contract, over stand-ins for their monitors."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import stat
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
from runtime_world import World, make_layer
from vmm_stand_ins import read_pages
from vmm_world import STAND_INS, make_kernel, stand_in_world

from atoll.model.errors import NotFound, RuntimeFailed, Unsupported
from atoll.model.ports.devices import DeviceNode, Edits, FileMount
from atoll.model.ports.network import Link
from atoll.model.ports.runtime import Feature, Limits
from atoll.model.records import Usage
from atoll.model.spec import Port
from atoll.network.links import LinkNetwork
from atoll.runtimes.cgroup import Cgroups
from atoll.runtimes.cloud_hypervisor import CloudHypervisorRuntime
from atoll.runtimes.firecracker import FirecrackerRuntime
from atoll.runtimes.mounts import mounts_below
from atoll.runtimes.oci_runtime import STARTS_MAX
from atoll.runtimes.seccomp import capabilities_here
from atoll.runtimes.snapshots import seal
from atoll.runtimes.vm import cloud_hypervisor_api, firecracker_api
from atoll.runtimes.vm.boxes import load_plan
from atoll.runtimes.vm.http_api import Call, Refused
from atoll.runtimes.vm.rates import Rates
from atoll.runtimes.vm.told import ToldRuntime

pytestmark = pytest.mark.system

PCI = "0000:00:01.0"
CAP_SYS_RESOURCE = 24
Make = Callable[..., World]


@pytest.fixture(scope="module")
def layer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_layer(tmp_path_factory.mktemp("image"))


@pytest.fixture(params=STAND_INS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
async def make(kind: str, layer: Path, tmp_path: Path) -> AsyncIterator[Make]:
    worlds: list[World] = []

    def another(trouble: str = "", **options: Any) -> World:
        directory = tmp_path / str(len(worlds))
        directory.mkdir()
        worlds.append(stand_in_world(kind, directory, layer, trouble, **options))
        return worlds[-1]

    yield another
    for world in worlds:
        await world.close()


@pytest.fixture
def world(make: Make) -> World:
    return make()


def told(world: World) -> ToldRuntime:
    assert isinstance(world.runtime, ToldRuntime)
    return world.runtime


def directory_of(world: World, id: str) -> Path:
    return world.directory / "instances" / id


async def send(world: World, id: str, call: Call) -> bytes:
    return await told(world).api(directory_of(world, id)).send(call)


def facts(pid: int) -> dict[str, str]:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}


async def test_the_monitor_is_a_user_of_its_own_without_capabilities_in_its_own_processes_and_the_instance_s_group(
    world: World,
) -> None:
    pids = [await world.launch(id, "run") for id in ("a", "b")]
    uids = set()
    for id, pid in zip(("a", "b"), pids, strict=True):
        seen = facts(pid)
        uid = load_plan(directory_of(world, id)).uid
        assert set(seen["Uid"].split()) == set(seen["Gid"].split()) == {str(uid)}
        assert seen["Groups"] == ""
        assert int(seen["CapEff"], 16) == int(seen["CapPrm"], 16) == 0
        assert seen["NSpid"].split()[-1] == "1"
        assert Path(f"/proc/{pid}/ns/mnt").readlink() != Path("/proc/self/ns/mnt").readlink()
        assert not Path(f"/proc/{pid}/root/etc/passwd").exists()
        groups = Cgroups.detect().group(f"{world.cgroup}/{id}")
        assert pid in groups.processes()
        uids.add(uid)
    assert len(uids) == 2


async def test_an_instance_s_plan_with_its_environment_is_no_file_that_its_monitor_can_open(world: World) -> None:
    pid = await world.launch("a", "run", env=(("SECRET", "hidden"),))
    plan = directory_of(world, "a") / "plan.json"
    assert stat.S_IMODE(plan.stat().st_mode) == 0o600
    assert plan.stat().st_uid == 0
    assert b"hidden" not in Path(f"/proc/{pid}/cmdline").read_bytes()
    shown = (
        await told(world)
        .api(directory_of(world, "a"))
        .send(firecracker_api.FULL_CONFIG if isinstance(world.runtime, FirecrackerRuntime) else cloud_hypervisor_api.INFO)
    )
    assert b"hidden" not in shown


async def test_the_monitor_s_answers_are_those_of_a_machine_that_runs_and_stands(world: World, kind: str) -> None:
    await world.launch("a", "run")
    api = told(world).api(directory_of(world, "a"))
    assert not await told(world).is_paused(api)
    await world.runtime.pause("a")
    assert await told(world).is_paused(api)
    await world.runtime.resume("a")
    assert not await told(world).is_paused(api)


async def test_a_paused_machine_is_known_to_be_so_by_the_next_agent(world: World) -> None:
    pid = await world.launch("a", "graceful")
    await asyncio.sleep(world.settle_s)
    await world.runtime.pause("a")
    await world.reopen()
    (found,) = await world.runtime.recover()
    assert found.pid == pid
    usage = await asyncio.wait_for(world.runtime.usage("a"), 1)  # the guest, which stands, is not asked
    assert isinstance(usage, Usage)
    await world.runtime.resume("a")
    await world.runtime.signal("a", "SIGTERM")
    assert (await asyncio.wait_for(world.runtime.wait("a"), 10)).code == 0


async def test_a_guest_that_does_not_answer_keeps_nobody_else_s_from_starting(world: World) -> None:
    pid = await world.launch("a", "run")
    os.kill(pid, signal.SIGSTOP)
    waiting = [asyncio.create_task(world.runtime.exec("a", ["true"])) for _ in range(STARTS_MAX)]
    await asyncio.wait(waiting, timeout=0.5)
    assert not any(task.done() for task in waiting)
    await asyncio.wait_for(world.launch("b", "run"), 10)
    assert (await world.shell("b", "exit 5"))[0] == 5
    assert not any(task.done() for task in waiting)
    for task in waiting:
        task.cancel()
    await asyncio.gather(*waiting, return_exceptions=True)
    os.kill(pid, signal.SIGCONT)


async def test_a_monitor_that_nobody_told_anything_is_ended_and_the_instance_can_be_started(world: World) -> None:
    pid = await world.launch("a", "exit", "3", "1000")
    (directory_of(world, "a") / "booted").unlink()  # as after a `kill -9` of the agent before the machine's boot
    await world.reopen()
    (found,) = await world.runtime.recover()
    assert (found.id, found.pid, found.exit) == ("a", None, None)
    assert not Path(f"/proc/{pid}").exists()
    await world.runtime.start("a")
    await world.runtime.kill("a")
    assert (await asyncio.wait_for(world.runtime.wait("a"), 10)).code == 137


async def test_output_of_the_time_without_an_agent_comes_when_there_is_one(world: World) -> None:
    await world.launch("a", "sh", "-c", "sleep 0.3; echo late; sleep 1000")
    await world.runtime.close()
    await asyncio.sleep(0.6)
    assert world.output("a") == ""
    await world.reopen()
    await world.runtime.recover()
    assert "late" in await world.output_until("a", "late")


async def test_output_that_nobody_reads_makes_the_process_wait_and_is_not_lost(world: World) -> None:
    await world.launch("a", "sh", "-c", "seq 1 300000; echo done >&2")
    await asyncio.sleep(world.settle_s)
    assert world.output("a", "stderr") == ""  # it waits: pipes and buffers hold less than that
    seen = await world.output_until("a", "\n300000\n")
    assert seen == "".join(f"{number}\n" for number in range(1, 300001))
    assert (await asyncio.wait_for(world.runtime.wait("a"), 10)).code == 0
    assert world.output("a", "stderr") == "done\n"


async def test_a_killed_monitor_is_told_by_its_signal(world: World) -> None:
    pid = await world.launch("a", "run")
    os.kill(pid, signal.SIGKILL)
    end = await asyncio.wait_for(world.runtime.wait("a"), 10)
    assert (end.code, end.signal) == (137, "SIGKILL")


async def test_a_guest_whose_init_is_silent_is_ended_by_its_power_button(world: World) -> None:
    await world.launch("a", "stubborn")
    await told(world).press_power(told(world).api(directory_of(world, "a")))
    assert (await asyncio.wait_for(world.runtime.wait("a"), 10)).code == 255  # nobody says with what


@pytest.mark.parametrize(
    ("trouble", "match"),
    [
        ("garbage", "no HTTP"),
        ("silent", "did not answer"),
        ("refusing", "KVM refuses"),
        ("dying", "went away|no HTTP|does not listen"),
    ],
)
async def test_a_monitor_in_trouble_fails_the_start_with_its_reason_and_leaves_nothing(
    make: Make, trouble: str, match: str
) -> None:
    world = make(trouble)
    told(world).answer_s = 1.0
    await world.runtime.create(world.box("a", "run"))
    for _ in range(2):  # it is as `create` left it
        with pytest.raises(RuntimeFailed, match=match):
            await asyncio.wait_for(world.runtime.start("a"), 20)
        assert not Cgroups.detect().group(f"{world.cgroup}/a").processes()
        assert list(mounts_below(directory_of(world, "a"))) == []
    await world.runtime.delete("a")
    assert not directory_of(world, "a").exists()
    with pytest.raises(NotFound):
        await world.runtime.wait("a")


async def test_a_kvm_that_boots_nothing_is_found_out_and_the_runtime_not_offered(make: Make) -> None:
    with pytest.raises(Unsupported, match=r"boots no guest with this machine's KVM.*KVM refuses") as raised:
        await make("refusing").runtime.probe()
    assert "qemu" in str(raised.value.mend)
    with pytest.raises(Unsupported, match="too old") as raised:
        await make("old").runtime.probe()
    assert raised.value.mend


async def test_a_probe_that_boots_tells_the_version_and_leaves_nothing(world: World, kind: str) -> None:
    assert await world.runtime.probe() == ("48.0" if kind.startswith("cloud") else "1.17.0")
    assert Cgroups.detect().group(world.cgroup).processes() == set()


async def test_a_missing_program_is_one_clear_error(tmp_path: Path) -> None:
    kernels = (make_kernel(tmp_path),)
    runtimes = [
        FirecrackerRuntime(tmp_path / "f", binary="firecracker-of-no-name", kernels=kernels),
        FirecrackerRuntime(tmp_path / "f", binary="true", jailer="jailer-of-no-name", kernels=kernels),
        CloudHypervisorRuntime(tmp_path / "c", binary="hypervisor-of-no-name", kernels=kernels),
    ]
    for runtime in runtimes:
        with pytest.raises(Unsupported, match="of-no-name is not installed") as raised:
            await runtime.probe()
        assert "/usr/local/bin" in str(raised.value.mend)
        await runtime.close()


@pytest.fixture
async def link(tmp_path: Path) -> AsyncIterator[Link]:
    network = LinkNetwork(f"10.94.{os.getpid() % 256}.0/24", tmp_path / "network", prepared=0, resolver_sources=())
    try:
        yield await network.attach("a", project="p", ports=[Port(name="http", port=8080)])
    finally:
        await network.detach("a")
        await network.close()


async def test_the_monitor_opens_the_tap_of_the_instance_s_namespace_and_no_other(make: Make, link: Link, kind: str) -> None:
    world = make(options=_with_rates(kind))
    pid = await world.launch("a", "run", netns=link.netns)
    assert Path(f"/proc/{pid}/ns/net").stat().st_ino == link.netns.stat().st_ino
    taps = [Path(f"/proc/{pid}/fdinfo/{fd.name}").read_text() for fd in Path(f"/proc/{pid}/fd").iterdir() if _is_tun(fd)]
    assert len(taps) == 1
    assert "iff:\ttap0" in taps[0]


def _is_tun(fd: Path) -> bool:
    with contextlib.suppress(OSError):
        return str(fd.readlink()).endswith("/dev/net/tun")
    return False


def _with_rates(kind: str) -> Any:
    rates = Rates(disk_bytes=100 << 20, net_bytes=10 << 20, net_packets=1000)
    if kind.startswith("firecracker"):
        return firecracker_api.MachineOptions(rates=rates, metadata=True)
    return cloud_hypervisor_api.MachineOptions(rates=rates, landlock=True)


# each its own


@pytest.fixture
async def fire(layer: Path, tmp_path: Path) -> AsyncIterator[World]:
    world = stand_in_world("firecracker-stand-in", tmp_path, layer)
    yield world
    await world.close()


@pytest.fixture
async def hyper(layer: Path, tmp_path: Path) -> AsyncIterator[World]:
    world = stand_in_world("cloud-hypervisor-stand-in", tmp_path, layer)
    yield world
    await world.close()


async def test_firecracker_refuses_devices_and_names_the_runtimes_that_do_not(fire: World) -> None:
    assert Feature.GPU not in FirecrackerRuntime.features
    with pytest.raises(Unsupported, match="Firecracker hands on no devices") as raised:
        await fire.runtime.create(fire.box("a", "run", devices=Edits(pci=(PCI,))))
    assert "cloud-hypervisor" in str(raised.value.mend)
    assert raised.value.field == "resources.gpu"
    assert not directory_of(fire, "a").exists()


async def test_firecracker_refuses_more_processors_than_it_has(fire: World) -> None:
    limits = Limits(cpu_milli=32_001, memory_bytes=64 << 20, disk_bytes=64 << 20, pids=64)
    with pytest.raises(Unsupported, match="32 processors"):
        await fire.runtime.create(fire.box("a", "run", limits=limits))


async def test_a_firecracker_machine_is_written_to_its_jail_while_it_stands_and_goes_on(fire: World) -> None:
    await fire.launch("a", "graceful")
    with pytest.raises(Refused, match="while the microVM is running"):
        await send(fire, "a", firecracker_api.snapshot("/state", "/memory"))
    await fire.runtime.pause("a")
    await send(fire, "a", firecracker_api.snapshot("/state", "/memory", changes_only=True))
    jail = told(fire).own(directory_of(fire, "a"))
    assert {"state", "memory"} <= {path.name for path in jail.iterdir()}
    await fire.runtime.resume("a")
    await fire.runtime.signal("a", "SIGTERM")
    assert (await asyncio.wait_for(fire.runtime.wait("a"), 10)).code == 0


async def test_firecracker_writes_what_has_changed_since_the_last_snapshot_and_each_snapshot_is_whole(fire: World) -> None:
    await fire.launch("a", "run")
    first, second, third = (fire.directory / name for name in ("first", "second", "third"))
    await fire.runtime.snapshot("a", first)
    await fire.runtime.snapshot("a", second)
    assert len(read_pages(first / "ram")) == 1
    assert read_pages(second / "ram") == [read_pages(first / "ram")[0], read_pages(second / "ram")[1]]
    shutil.rmtree(first)
    await fire.runtime.restore(fire.box("b", "run"), second)
    shutil.rmtree(second)
    await fire.reopen()
    await fire.runtime.recover()
    await fire.runtime.snapshot("b", third)
    assert len(read_pages(third / "ram")) == 3
    jail = told(fire).own(directory_of(fire, "b"))
    assert not {"state", "ram"} & {path.name for path in jail.iterdir()}, "the room that it takes is the node's to give back"
    await fire.runtime.restore(fire.box("c", "run"), third)
    assert (await fire.shell("c", "exit 3"))[0] == 3


async def test_copies_share_one_file_of_memory_that_no_monitor_can_write_to(fire: World) -> None:
    await fire.launch("a", "run")
    await fire.runtime.snapshot("a", fire.directory / "taken")
    for id in ("b", "c"):
        await fire.runtime.restore(fire.box(id, "run"), fire.directory / "taken")
        memory = told(fire).own(directory_of(fire, id)) / "ram"
        assert memory.samefile(fire.directory / "taken/ram")
        assert (memory.stat().st_uid, stat.S_IMODE(memory.stat().st_mode)) == (0, 0o444)


async def test_a_copy_that_its_monitor_refuses_is_gone_with_the_monitor_s_words(make: Make, world: World) -> None:
    await world.launch("a", "run")
    taken = world.directory / "taken"
    snapshot = await world.runtime.snapshot("a", taken)
    spoilt = taken / told(world).written[0]
    spoilt.chmod(0o600)
    spoilt.write_text("no state")
    (taken / "manifest.json").unlink()
    names = [file.name for file in snapshot.files]
    seal(taken, names, compatibility=snapshot.compatibility, image=snapshot.image, limits=snapshot.limits, networked=False)
    spoilt.chmod(0o444)
    with pytest.raises(RuntimeFailed, match=r"refused PUT .*(load|restore)"):
        await world.runtime.restore(world.box("b", "run"), taken)
    assert not directory_of(world, "b").exists()
    assert (await world.shell("a", "exit 4"))[0] == 4


async def test_a_monitor_that_reads_memory_only_as_a_whole_makes_copies_all_the_same(make: Make) -> None:
    world = make("whole")
    await world.launch("a", "run")
    await world.runtime.snapshot("a", world.directory / "taken")
    await world.runtime.restore(world.box("b", "run"), world.directory / "taken")
    assert (await world.shell("b", "exit 5"))[0] == 5


async def test_a_firecracker_jail_holds_the_image_as_a_link_and_no_copy(fire: World) -> None:
    await fire.launch("a", "run")
    jail, plan = told(fire).own(directory_of(fire, "a")), load_plan(directory_of(fire, "a"))
    assert (jail / "image").samefile(plan.image_disk)
    assert (jail / "disk.img").samefile(plan.disk)
    assert (jail / "image").stat().st_uid == 0
    assert (jail / "disk.img").stat().st_uid == plan.uid


async def test_cloud_hypervisor_is_handed_whole_pci_devices_only(hyper: World) -> None:
    assert Feature.GPU in CloudHypervisorRuntime.features
    node = DeviceNode(path="/dev/nvidia0", host_path="/dev/nvidia0", major=195, minor=0)
    for edits in (Edits(nodes=(node,)), Edits(pci=(PCI,), nodes=(node,)), Edits(pci=(PCI,), mounts=(FileMount("/a", "/b"),))):
        with pytest.raises(Unsupported, match="whole PCI devices only") as raised:
            await hyper.runtime.create(hyper.box(f"a{id(edits)}", "run", id="a", devices=edits))
        assert raised.value.field == "resources.gpu"


async def test_a_pci_device_is_added_before_the_boot_with_its_files_and_memory_that_cannot_move(hyper: World) -> None:
    if not Path(cloud_hypervisor_api.DEVICES, PCI).exists():
        pytest.skip("this machine has no PCI devices")
    node = DeviceNode(path="/dev/vfio/7", host_path="/dev/vfio/7", major=1, minor=5)
    box = hyper.box("a", "run", devices=Edits(pci=(PCI,), nodes=(node,), env=(("GPU", "1"),)))
    await hyper.runtime.create(box)
    if not capabilities_here() >> CAP_SYS_RESOURCE & 1:
        with pytest.raises(RuntimeFailed, match="locked memory") as raised:
            await hyper.runtime.start("a")
        assert "LimitMEMLOCK" in str(raised.value.mend)
        return
    pid = (await hyper.runtime.start("a")).pid
    with pytest.raises(Refused, match="not unique"):
        await send(hyper, "a", cloud_hypervisor_api.add_device(PCI))
    assert stat.S_ISCHR(Path(f"/proc/{pid}/root/dev/vfio/7").stat().st_mode)
    assert (await hyper.shell("a", 'test "$GPU" = 1'))[0] == 0
    limits = Path(f"/proc/{pid}/limits").read_text()
    (locked,) = (line.split()[3] for line in limits.splitlines() if line.startswith("Max locked memory"))
    assert int(locked) >= load_plan(directory_of(hyper, "a")).ram_bytes


async def test_a_switch_in_user_space_connects_what_it_has_a_socket_for(layer: Path, tmp_path: Path, link: Link) -> None:
    switch = tmp_path / "switch"
    switch.mkdir()
    server = await asyncio.start_unix_server(lambda reader, writer: writer.close(), switch / "a.sock")
    (tmp_path / "world").mkdir()
    world = stand_in_world("cloud-hypervisor-stand-in", tmp_path / "world", layer, vhost=switch)
    try:
        await world.launch("a", "run", netns=link.netns)
        info = await told(world).api(directory_of(world, "a")).ask(cloud_hypervisor_api.INFO, cloud_hypervisor_api.Info)
        assert info.config["net"][0]["vhost_user"] is True
        assert info.config["memory"]["shared"] is True
    finally:
        await world.close()
        server.close()


async def test_cloud_hypervisor_s_machine_is_resized_and_bound_by_landlock(hyper: World) -> None:
    await hyper.launch("a", "run")
    await send(hyper, "a", cloud_hypervisor_api.resize(balloon_bytes=16 << 20))
    info = await told(hyper).api(directory_of(hyper, "a")).ask(cloud_hypervisor_api.INFO, cloud_hypervisor_api.Info)
    assert info.config["landlock_enable"] is True
    assert info.config["balloon"]["free_page_reporting"] is True
