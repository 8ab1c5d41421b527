"""Snapshots and copies, on every runtime that can make them: one instance is written down, and what may be made of that is tried.

Most is tried on one snapshot, since the instance that it is taken of may take long to start.
"""

from __future__ import annotations

import asyncio
import os
import shutil
from collections.abc import AsyncIterator
from ipaddress import IPv6Address
from pathlib import Path

import pytest
import pytest_asyncio
from msgspec import structs
from runtime_world import LIMITS, World, make_layer, real_world
from vmm_world import STAND_INS, stand_in_world

from atoll.model.codec import decode, encode
from atoll.model.errors import AtollError, Conflict, Corrupt, Invalid, NotFound, RuntimeFailed, Unsupported
from atoll.model.fabric import new_ula
from atoll.model.ports.network import Link
from atoll.model.ports.runtime import Feature, Snapshot
from atoll.model.spec import Port
from atoll.network.links import LinkNetwork
from atoll.network.sysctls import no_ipv6
from atoll.runtimes.fake import FakeHost, FakeRuntime
from atoll.runtimes.snapshots import MANIFEST

pytestmark = pytest.mark.asyncio(loop_scope="module")

ABLE = ("gvisor", "qemu", "firecracker", "cloud-hypervisor")
UNABLE = ("runc", "crun", "lxc")
COPIES = 4


@pytest.fixture(scope="module")
def layer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_layer(tmp_path_factory.mktemp("image"))


class Taken:
    """An instance that runs, with `/data/mark` written, and a snapshot of it."""

    def __init__(self, world: World, network: LinkNetwork | None, snapshot: Snapshot, *, carries: bool) -> None:
        """`carries` says whether what a copy is made of is in the snapshot: a stand-in's guest is no machine."""
        self.world, self.network, self.snapshot, self.carries = world, network, snapshot, carries
        self.directory = world.directory / "snapshot"

    async def netns(self, id: str) -> Path | None:
        return (await self.network.attach(id, project="p", ports=[])).netns if self.network else None

    async def copy(self, id: str, directory: Path | None = None) -> None:
        box = self.world.box(id, "run", netns=await self.netns(id))
        await self.world.runtime.restore(box, directory or self.directory)

    async def refused(self, expected: type[AtollError], directory: Path, match: str, **changes: object) -> None:
        """Nothing can be restored from `directory`, for one clear reason, and nothing is left of the attempt."""
        id = f"refused{len(self.world._readers)}"
        box = structs.replace(self.world.box(id, "run", netns=await self.netns(id)), **changes)
        with pytest.raises(expected, match=match) as raised:
            await self.world.runtime.restore(box, directory)
        assert raised.value.mend or expected is Invalid
        assert not box.directory.exists()
        with pytest.raises(NotFound):
            await self.world.runtime.wait(id)

    def changed(self, name: str) -> Path:
        """Return a copy of the snapshot to be spoilt."""
        return Path(shutil.copytree(self.directory, self.world.directory / name))


@pytest_asyncio.fixture(
    scope="module",
    loop_scope="module",
    params=["fake", *(pytest.param(name, marks=pytest.mark.system) for name in (*ABLE, *STAND_INS))],
)
async def taken(request: pytest.FixtureRequest, layer: Path, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Taken]:
    directory = tmp_path_factory.mktemp("taken")
    network = None
    if request.param == "fake":
        host = FakeHost()
        world = World(directory, lambda: FakeRuntime(host))
    else:
        stands_in = request.param in STAND_INS
        world = stand_in_world(request.param, directory, layer) if stands_in else real_world(request.param, directory, layer)
        subnet, ula = f"10.94.{os.getpid() % 256}.0/24", "" if no_ipv6() else new_ula(os.urandom(5))
        network = LinkNetwork(subnet, directory / "network", prepared=1, resolver_sources=(), ula=ula)
    links = []
    try:
        netns = (await network.attach("origin", project="p", ports=[])).netns if network else None
        await world.launch("origin", "run", netns=netns)
        carries = request.param in ABLE
        if carries:
            await world.shell("origin", "echo kept > /data/mark; echo origin > /etc/machine-id; echo in memory > /dev/shm/mark")
        snapshot = await world.runtime.snapshot("origin", directory / "snapshot")
        yield Taken(world, network, snapshot, carries=carries)
    finally:
        await world.close()
        if network is not None:
            for path in directory.glob("*.stdout"):
                links.append(path.name.removesuffix(".stdout"))
            for id in links:
                await network.detach(id)
            await network.close()


def needs_programs(taken: Taken) -> None:
    if not taken.carries:
        pytest.skip("neither the fake runtime nor a stand-in has a guest in which programs could look around")


async def test_the_instance_goes_on_after_its_snapshot(taken: Taken) -> None:
    assert (await taken.world.shell("origin", "exit 3"))[0] == 3


async def test_a_snapshot_says_what_it_is(taken: Taken) -> None:
    found = decode((taken.directory / MANIFEST).read_bytes(), Snapshot)
    assert found == taken.snapshot
    assert found.compatibility.runtime == taken.world.runtime.name
    assert found.limits == LIMITS
    assert {file.name for file in found.files} | {MANIFEST} == {path.name for path in taken.directory.iterdir()}
    assert found.digest.startswith("sha256:")


async def test_copies_go_on_where_it_was_taken_and_end_by_themselves(taken: Taken) -> None:
    await asyncio.gather(*(taken.copy(f"copy{at}") for at in range(COPIES)))
    for at in range(COPIES):
        assert (await taken.world.shell(f"copy{at}", f"exit {at}"))[0] == at
    await taken.world.runtime.kill("copy0")
    end = await asyncio.wait_for(taken.world.runtime.wait("copy0"), 10)
    assert (end.code, end.signal) == (137, "SIGKILL")
    assert (await taken.world.shell("copy1", "exit 7"))[0] == 7
    for at in range(COPIES):
        await taken.world.runtime.delete(f"copy{at}")


async def test_a_copy_has_files_and_memory_of_its_origin_and_its_changes_for_itself(taken: Taken) -> None:
    needs_programs(taken)
    await taken.copy("mine")
    _, out = await taken.world.shell("mine", "cat /data/mark /dev/shm/mark; echo mine > /data/mark; echo mine > /dev/shm/mark")
    assert out == "kept\nin memory\n"
    await taken.copy("other")
    for id in ("origin", "other"):
        assert (await taken.world.shell(id, "cat /data/mark /dev/shm/mark"))[1] == "kept\nin memory\n"
    for id in ("mine", "other"):
        await taken.world.runtime.delete(id)


async def test_no_two_copies_have_the_same_randomness_machine_id_name_address_or_hardware_address(taken: Taken) -> None:
    needs_programs(taken)
    ids = [f"twin{at}" for at in range(COPIES)]
    for id in ids:
        await taken.copy(id)
    script = (
        "head -c 32 /dev/urandom | od -An -v -tx1 | tr -d ' \\n'; echo; echo $(cat /etc/machine-id); cat /etc/hostname;"
        " ip address show eth0 | grep ether | tr -s ' ' | cut -d' ' -f3;"
        " ip -4 -o address show eth0 | tr -s ' ' | cut -d' ' -f4; grep '^fd.* eth0' /proc/net/if_inet6 | cut -c 1-32"
    )
    seen = [(await taken.world.shell(id, script))[1].splitlines() for id in ["origin", *ids]]
    for facts in zip(*seen, strict=True):
        assert len({fact for fact in facts if fact}) == len(seen), facts
    links = [await taken.network.attach(id, project="p", ports=[]) for id in ids] if taken.network else []
    assert {line[4].partition("/")[0] for line in seen[1:]} == {link.address for link in links}
    assert [line[5:] for line in seen[1:]] == [[IPv6Address(link.ipv6).packed.hex()] if link.ipv6 else [] for link in links]
    for id in ids:
        await taken.world.runtime.delete(id)


async def test_a_copy_is_reached_at_its_own_address(taken: Taken) -> None:
    needs_programs(taken)
    assert taken.network is not None
    await taken.copy("reached")
    link: Link = await taken.network.attach("reached", project="p", ports=[Port(port=8080)])
    # Nobody listens there, which only the guest itself can say.
    for address in filter(None, (link.address, link.ipv6)):
        with pytest.raises(ConnectionRefusedError):
            await asyncio.wait_for(asyncio.open_connection(address, 8080), 10)
    await taken.world.runtime.delete("reached")


async def test_a_copy_can_be_written_down_and_copied_itself(taken: Taken) -> None:
    await taken.copy("parent")
    if taken.carries:
        await taken.world.shell("parent", "echo second > /dev/shm/second")
    again = taken.world.directory / "again"
    snapshot = await taken.world.runtime.snapshot("parent", again)
    await taken.copy("child", again)
    if taken.carries:
        assert (await taken.world.shell("child", "cat /data/mark /dev/shm/second"))[1] == "kept\nsecond\n"
        assert snapshot.digest != taken.snapshot.digest
    shutil.rmtree(again)  # what was restored needs it no more
    assert (await taken.world.shell("child", "exit 4"))[0] == 4
    for id in ("parent", "child"):
        await taken.world.runtime.delete(id)


async def test_what_stands_still_stays_so_when_it_is_written_down_and_its_copy_runs(taken: Taken) -> None:
    needs_programs(taken)
    await taken.copy("still")
    await taken.world.runtime.pause("still")
    still = taken.world.directory / "still"
    await taken.world.runtime.snapshot("still", still)
    await taken.copy("moves", still)
    assert (await taken.world.shell("moves", "exit 6"))[0] == 6
    waiting = asyncio.ensure_future(taken.world.shell("still", "exit 5"))
    await asyncio.wait({waiting}, timeout=0.2)
    assert not waiting.done() or isinstance(waiting.exception(), RuntimeFailed)  # it waits, or is refused
    await taken.world.runtime.resume("still")
    if waiting.done():
        waiting = asyncio.ensure_future(taken.world.shell("still", "exit 5"))
    assert (await waiting)[0] == 5
    for id in ("still", "moves"):
        await taken.world.runtime.delete(id)


async def test_the_next_agent_adopts_copies(taken: Taken) -> None:
    await taken.copy("adopted")
    await taken.world.reopen()
    assert "adopted" in {found.id for found in await taken.world.runtime.recover() if found.pid}
    assert (await taken.world.shell("adopted", "exit 8"))[0] == 8
    await taken.world.runtime.delete("adopted")
    await taken.copy("after")
    await taken.world.runtime.delete("after")


async def test_what_does_not_fit_is_refused_with_its_reason(taken: Taken) -> None:
    for field, value, match in (
        ("version", "0.1", "version"),
        ("cpu", "i486", "processor"),
        ("kernel", "2.6.32", "kernel"),
        ("runtime", "lxc", "of lxc"),
    ):
        directory = taken.changed(f"other-{field}")
        there = structs.replace(taken.snapshot.compatibility, **{field: value})
        (directory / MANIFEST).write_bytes(encode(structs.replace(taken.snapshot, compatibility=there)))
        await taken.refused(Unsupported, directory, match)
    more = structs.replace(LIMITS, memory_bytes=LIMITS.memory_bytes * 2)
    await taken.refused(Invalid, taken.directory, "limits", limits=more)


async def test_a_damaged_snapshot_is_refused_with_its_reason(taken: Taken) -> None:
    cut = taken.changed("cut")
    largest = max(taken.snapshot.files, key=lambda file: file.size_bytes)
    os.truncate(cut / largest.name, largest.size_bytes // 2)
    await taken.refused(Corrupt, cut, "cut off")
    spoilt = taken.changed("spoilt")
    with (spoilt / largest.name).open("r+b") as file:
        byte = file.read(1)
        file.seek(0)
        file.write(bytes([byte[0] ^ 1]))
    await taken.refused(Corrupt, spoilt, "hold")
    unfinished = taken.changed("unfinished")
    (unfinished / MANIFEST).unlink()
    await taken.refused(NotFound, unfinished, "no whole snapshot")
    (unfinished / MANIFEST).write_bytes(b"{")
    await taken.refused(Corrupt, unfinished, "manifest")


async def test_a_snapshot_is_taken_of_what_runs_into_a_new_directory(taken: Taken) -> None:
    with pytest.raises(Conflict):
        await taken.world.runtime.snapshot("origin", taken.directory)
    assert (taken.directory / MANIFEST).exists()
    box = taken.world.box("idle", "run", netns=await taken.netns("idle"))
    await taken.world.runtime.create(box)
    with pytest.raises(Conflict):
        await taken.world.runtime.snapshot("idle", taken.world.directory / "none")
    assert not (taken.world.directory / "none").exists()
    await taken.world.runtime.delete("idle")


@pytest.mark.system
@pytest.mark.parametrize("name", UNABLE)
async def test_a_runtime_without_snapshots_refuses_them_and_names_those_that_have(name: str, layer: Path, tmp_path: Path) -> None:
    world = real_world(name, tmp_path, layer)
    try:
        assert not {Feature.SNAPSHOT, Feature.FORK} & world.runtime.features
        await world.launch("a", "run")
        with pytest.raises(Unsupported, match=f"{name} takes no snapshots: ") as raised:
            await world.runtime.snapshot("a", tmp_path / "snapshot")
        assert "qemu" in (raised.value.mend or "")
        with pytest.raises(Unsupported, match="snapshots"):
            await world.runtime.restore(world.box("b", "run"), tmp_path / "snapshot")
        assert (await world.shell("a", "exit 3"))[0] == 3
    finally:
        await world.close()
