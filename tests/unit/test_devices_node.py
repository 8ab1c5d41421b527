"""A node's devices over the fake driver, on a loop with virtual time: claims, faults, and what a killed agent leaves."""

from __future__ import annotations

import asyncio
import contextlib
import random
import stat
import tempfile
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from atoll.devices.fake import FakeHardware
from atoll.devices.ledger import FILE, Ledger, LedgerFile
from atoll.devices.mps import INSIDE, NvidiaMps
from atoll.devices.node import NodeDevices
from atoll.devices.watch import STUCK_MAX, Patience
from atoll.model.devices import GpuDevice, GpuGrant, GpuHealth, GpuPartition, GpuSample, GpuSharing
from atoll.model.errors import Conflict, Unavailable, Unsupported
from atoll.model.ports.clock import SystemClock
from atoll.model.ports.devices import DeviceEvent, Trouble
from atoll.model.spec import Gpu, RuntimeName
from atoll.sim.clock import VirtualClock
from atoll.sim.loop import run_virtual

GIB = 1 << 30
PATIENCE = Patience()


class World:
    """One machine: its driver, and the agent's devices, which can be killed and begun again over the same directory."""

    def __init__(self, directory: Path, hardware: FakeHardware | None = None, *, boot: str = "boot-1") -> None:
        self.hardware = hardware or FakeHardware(count=2, clock=VirtualClock(asyncio.get_running_loop()))
        self.directory, self.boot = directory, boot
        self.devices = self.begin()
        self.told: list[DeviceEvent] = []
        self._reading: asyncio.Task[None] | None = None

    def begin(self, **more: Any) -> NodeDevices:
        """A new agent; the old one, if there was one, is dead without a word."""
        clock = VirtualClock(asyncio.get_running_loop())
        self.devices = NodeDevices([self.hardware], directory=self.directory, clock=clock, boot=self.boot, **more)
        return self.devices

    def listen(self) -> None:
        async def read() -> None:
            async for event in self.devices.events():
                self.told.append(event)

        self._reading = asyncio.ensure_future(read())

    async def device(self, index: int = 0) -> GpuDevice:
        found = {device.id: device for device in await self.devices.inventory()}
        return found[self.hardware.ids[index]]

    async def claim(self, instance: str, *grants: GpuGrant, **gpu: Any) -> tuple[GpuPartition, ...]:
        claim = await self.devices.claim(instance, grants, Gpu(**gpu), RuntimeName.RUNC)
        return claim.partitions

    def whole(self, index: int = 0) -> GpuGrant:
        return GpuGrant(device=self.hardware.ids[index], memory_bytes=80 * GIB)

    def share(self, milli: int, *, gib: int = 10, sharing: GpuSharing = GpuSharing.TIME_SLICE, index: int = 0) -> GpuGrant:
        return GpuGrant(device=self.hardware.ids[index], sharing=sharing, milli=milli, memory_bytes=gib * GIB)

    def part(self, profile: str, start: int, size: int, index: int = 0) -> GpuGrant:
        return GpuGrant(device=self.hardware.ids[index], sharing=GpuSharing.MIG, profile=profile, start=start, size=size)

    async def there(self, index: int = 0) -> list[tuple[str, int]]:
        return [(p.profile, p.start) for p in await self.hardware.partitions(self.hardware.ids[index])]

    @property
    def troubles(self) -> list[Trouble]:
        return [event.trouble for event in self.told]

    async def close(self) -> None:
        if self._reading is not None:
            self._reading.cancel()
        await self.devices.close()


@contextlib.asynccontextmanager
async def world(directory: Path, hardware: FakeHardware | None = None) -> AsyncIterator[World]:
    made = World(directory, hardware)
    try:
        await made.devices.inventory()
        yield made
    finally:
        made.hardware.answer()
        await made.close()


def mig_hardware(count: int = 1) -> FakeHardware:
    return FakeHardware(count=count, mig=True, clock=VirtualClock(asyncio.get_running_loop()))


def in_world(directory: Path, story: Callable[[World], Coroutine[Any, Any, None]], *, mig: bool = False) -> None:
    """Play a story on virtual time; one that waits for ever raises Deadlock."""

    async def main() -> None:
        async with world(directory, mig_hardware() if mig else None) as made:
            await story(made)

    run_virtual(main, random.Random(7))


# what there is


def test_the_inventory_is_what_the_driver_shows_in_order_of_the_bus(tmp_path: Path) -> None:
    async def story(w: World) -> None:
        devices = await w.devices.inventory()
        assert [device.id for device in devices] == list(w.hardware.ids)
        assert all(device.health is GpuHealth.OK and device.present for device in devices)
        assert devices[0].sharing == (GpuSharing.EXCLUSIVE, GpuSharing.TIME_SLICE)

    in_world(tmp_path, story)


def test_vendors_are_merged(tmp_path: Path) -> None:
    async def main() -> None:
        clock = VirtualClock(asyncio.get_running_loop())
        drivers = [FakeHardware(clock=clock), FakeHardware("MI300X", count=2, clock=clock)]
        devices = NodeDevices(drivers, directory=tmp_path, clock=clock)
        assert sorted(device.vendor for device in await devices.inventory()) == ["amd", "amd", "nvidia"]
        assert len(await devices.samples()) == 3
        await devices.close()
        assert all(driver.closed for driver in drivers)

    run_virtual(main, random.Random(7))


def test_one_vendor_that_hangs_does_not_hide_the_other(tmp_path: Path) -> None:
    async def main() -> None:
        clock = VirtualClock(asyncio.get_running_loop())
        hung, well = FakeHardware(clock=clock), FakeHardware("MI300X", clock=clock)
        devices = NodeDevices([hung, well], directory=tmp_path, clock=clock)
        await devices.inventory()
        hung.hang()
        health = {device.id: device.health for device in await devices.inventory()}
        assert health == {hung.ids[0]: GpuHealth.QUARANTINED, well.ids[0]: GpuHealth.OK}
        claim = await devices.claim("i-1", [GpuGrant(device=well.ids[0])], Gpu(), RuntimeName.RUNC)
        assert claim.edits.devices == (f"amd.com/gpu={well.ids[0]}",)
        await devices.close()

    run_virtual(main, random.Random(7))


def test_partitions_that_someone_else_made_are_foreign_and_ours_are_not(tmp_path: Path) -> None:
    async def story(w: World) -> None:
        w.hardware.partition_by_hand(w.hardware.ids[0], "2g.20gb", 4)
        await w.claim("i-1", w.part("3g.40gb", 0, 4))
        device = await w.device()
        assert [(partition.profile, partition.start) for partition in device.foreign] == [("2g.20gb", 4)]
        assert device.sharing == (GpuSharing.MIG,)

    in_world(tmp_path, story, mig=True)


def test_samples_are_none_rather_than_late(tmp_path: Path) -> None:
    async def story(w: World) -> None:
        assert len(await w.devices.samples()) == 2
        w.hardware.hang()
        began = asyncio.get_running_loop().time()
        assert await w.devices.samples() == ()
        assert asyncio.get_running_loop().time() - began <= PATIENCE.samples_s

    in_world(tmp_path, story)


# claims


def test_a_claim_gives_exactly_the_granted_device(tmp_path: Path) -> None:
    async def story(w: World) -> None:
        claim = await w.devices.claim("i-1", [w.whole(1)], Gpu(), RuntimeName.RUNC)
        names = [node.path for node in claim.edits.nodes]
        assert "/dev/nvidia1" in names
        assert "/dev/nvidia0" not in names
        assert dict(claim.edits.env)["NVIDIA_VISIBLE_DEVICES"] == w.hardware.ids[1]

    in_world(tmp_path, story)


def test_a_whole_device_is_held_by_one_instance_only(tmp_path: Path) -> None:
    async def story(w: World) -> None:
        await w.claim("i-1", w.whole())
        await w.claim("i-1", w.whole())  # the same again is safe
        with pytest.raises(Conflict, match="another instance holds it"):
            await w.claim("i-2", w.whole())
        await w.devices.release("i-1")
        await w.devices.release("i-1")
        await w.claim("i-2", w.whole())

    in_world(tmp_path, story)


def test_a_device_that_a_stranger_uses_is_not_given_away(tmp_path: Path) -> None:
    async def story(w: World) -> None:
        w.hardware.use(w.hardware.ids[0], 4242, 30 * GIB)
        with pytest.raises(Unavailable, match="4242"):
            await w.claim("i-1", w.whole())
        w.hardware.leave(4242)
        await w.claim("i-1", w.whole())

    in_world(tmp_path, story)


@pytest.mark.parametrize(("model", "times", "granted"), [("H100-80GB", 2, True), ("H100-80GB", 9, False), ("MI300X", 9, True)])
def test_a_device_of_which_nobody_says_who_uses_it_is_given_away_only_where_its_driver_never_can(
    tmp_path: Path, model: str, times: int, granted: bool
) -> None:
    class Dumb(FakeHardware):
        async def samples(self) -> tuple[GpuSample, ...]:
            nonlocal times
            times -= 1
            found = await super().samples()
            return found if times < 0 else found[1:]

    async def main() -> None:
        async with world(tmp_path, Dumb(model, count=2, clock=VirtualClock(asyncio.get_running_loop()))) as w:
            await w.claim("i-1", w.whole(1))
            if granted:
                await w.claim("i-2", w.whole(0))
                return
            with pytest.raises(Unavailable, match="does not say who uses it"):
                await w.claim("i-2", w.whole(0))
            assert set(LedgerFile(tmp_path, w.boot).now.holdings) == {"i-1"}

    run_virtual(main, random.Random(7))


def test_a_device_that_a_stranger_draws_on_is_given_away_by_what_that_holds_and_is_not_reset(tmp_path: Path) -> None:
    class Drawn(FakeHardware):
        async def samples(self) -> tuple[GpuSample, ...]:
            first, second = await super().samples()
            return replace(first, graphics=(77,)), second

    async def main() -> None:
        async with world(tmp_path, Drawn(count=2, clock=VirtualClock(asyncio.get_running_loop()))) as w:
            with pytest.raises(Conflict, match="77"):
                await w.devices.reinstate(w.hardware.ids[0], reset=True)
            await w.claim("i-1", w.whole(0))

    run_virtual(main, random.Random(7))


def test_shares_never_come_to_more_than_the_device(tmp_path: Path) -> None:
    async def story(w: World) -> None:
        await w.claim("i-1", w.share(600))
        with pytest.raises(Conflict, match="600 of 1000"):
            await w.claim("i-2", w.share(500))
        with pytest.raises(Conflict, match="memory"):
            await w.claim("i-3", w.share(100, gib=75))
        with pytest.raises(Conflict, match="a share of it"):
            await w.claim("i-4", w.whole())
        await w.claim("i-5", w.share(400))

    in_world(tmp_path, story)


def test_a_share_is_refused_where_the_memory_is_really_used_up(tmp_path: Path) -> None:
    async def story(w: World) -> None:
        await w.claim("i-1", w.share(500, gib=10))
        w.hardware.use(w.hardware.ids[0], 7, 75 * GIB)  # nothing holds a time-slice to its memory
        with pytest.raises(Unavailable, match="in use"):
            await w.claim("i-2", w.share(500, gib=10))

    in_world(tmp_path, story)


def test_a_device_that_is_taken_out_is_refused_with_its_reason(tmp_path: Path) -> None:
    async def story(w: World) -> None:
        w.hardware.xid(w.hardware.ids[0], 95)
        await asyncio.sleep(1)
        with pytest.raises(Unavailable, match="XID 95"):
            await w.claim("i-1", w.whole())
        await w.claim("i-1", w.whole(1))

    in_world(tmp_path, story)


def test_a_device_that_is_not_there_is_refused(tmp_path: Path) -> None:
    async def story(w: World) -> None:
        with pytest.raises(Unavailable, match="no such device"):
            await w.claim("i-1", GpuGrant(device="GPU-elsewhere"))

    in_world(tmp_path, story)


def test_a_device_in_another_mode_than_was_granted_is_refused(tmp_path: Path) -> None:
    async def story(w: World) -> None:
        with pytest.raises(Unavailable, match="MIG mode"):
            await w.claim("i-1", w.whole())
        with pytest.raises(Unavailable, match=r"offers no 3g\.40gb at 1"):
            await w.claim("i-1", w.part("3g.40gb", 1, 4))
        with pytest.raises(Unavailable, match=r"offers no 9g\.90gb"):
            await w.claim("i-1", w.part("9g.90gb", 0, 8))

    in_world(tmp_path, story, mig=True)


def test_a_driver_older_than_wanted_is_refused(tmp_path: Path) -> None:
    async def story(w: World) -> None:
        with pytest.raises(Unavailable, match="590"):
            await w.claim("i-1", w.whole(), driver="590")
        await w.claim("i-1", w.whole(), driver="580.65")

    in_world(tmp_path, story)


def test_a_driver_changed_since_the_node_was_registered_is_refused_once(tmp_path: Path) -> None:
    async def story(w: World) -> None:
        w.hardware.driver_change("590.1")
        with pytest.raises(Unavailable, match=r"changed from 580\.159\.04 to 590\.1"):
            await w.claim("i-1", w.whole())
        await w.devices.inventory()  # it is registered anew
        await w.claim("i-1", w.whole())

    in_world(tmp_path, story)


def test_partitions_are_all_made_or_none(tmp_path: Path) -> None:
    async def story(w: World) -> None:
        w.hardware.partition_by_hand(w.hardware.ids[0], "1g.10gb", 6)
        with pytest.raises(Conflict):
            await w.claim("i-1", w.part("2g.20gb", 0, 2), w.part("2g.20gb", 2, 2), w.part("3g.40gb", 4, 4))
        assert await w.there() == [("1g.10gb", 6)]
        made = await w.claim("i-1", w.part("2g.20gb", 0, 2), w.part("2g.20gb", 2, 2))
        assert [partition.start for partition in made] == [0, 2]
        assert await w.claim("i-1", w.part("2g.20gb", 0, 2), w.part("2g.20gb", 2, 2)) == made
        await w.devices.release("i-1")
        assert await w.there() == [("1g.10gb", 6)]

    in_world(tmp_path, story, mig=True)


def test_the_second_partition_that_fails_takes_the_first_with_it(tmp_path: Path) -> None:
    async def story(w: World) -> None:
        made = []

        class Failing(FakeHardware):
            async def make_partition(self, device: str, profile: str, start: int) -> GpuPartition:
                if made:
                    raise Unavailable("the driver is out of sorts")
                made.append(start)
                return await super().make_partition(device, profile, start)

        hardware = Failing(mig=True)
        devices = NodeDevices([hardware], directory=tmp_path / "other", clock=VirtualClock(asyncio.get_running_loop()))
        grants = [
            GpuGrant(device=hardware.ids[0], sharing=GpuSharing.MIG, profile="1g.10gb", start=start, size=1) for start in (0, 1)
        ]
        await devices.inventory()
        with pytest.raises(Unavailable, match="out of sorts"):
            await devices.claim("i-1", grants, Gpu(), RuntimeName.RUNC)
        assert made == [0]
        assert await hardware.partitions(hardware.ids[0]) == ()
        await devices.close()

    in_world(tmp_path, story)


def test_two_claims_for_the_same_slices_end_with_one_holder(tmp_path: Path) -> None:
    async def story(w: World) -> None:
        tries = await asyncio.gather(
            *(w.claim(f"i-{index}", w.part("3g.40gb", 4, 4)) for index in range(5)), return_exceptions=True
        )
        assert sum(not isinstance(one, BaseException) for one in tries) == 1
        assert sum(isinstance(one, Conflict) for one in tries) == 4
        assert await w.there() == [("3g.40gb", 4)]

    in_world(tmp_path, story, mig=True)


def test_a_strangers_partition_that_came_just_now_is_not_taken_for_ours(tmp_path: Path) -> None:
    async def main() -> None:
        class Raced(FakeHardware):
            async def samples(self) -> tuple[GpuSample, ...]:
                self.partition_by_hand(self.ids[0], "3g.40gb", 0)  # after the look, before the partition is made
                return await super().samples()

        w = World(tmp_path, Raced(mig=True, clock=VirtualClock(asyncio.get_running_loop())))
        await w.devices.inventory()
        with pytest.raises(Conflict, match="someone else made"):
            await w.claim("i-1", w.part("3g.40gb", 0, 4))
        await w.devices.release("i-1")
        assert await w.there() == [("3g.40gb", 0)]
        await w.close()

    run_virtual(main, random.Random(7))


def test_a_partition_still_in_use_is_removed_when_its_process_has_ended(tmp_path: Path) -> None:
    async def story(w: World) -> None:
        w.listen()
        await w.claim("i-1", w.part("3g.40gb", 0, 4))
        w.hardware.use(w.hardware.ids[0], 99, GIB, start=0)
        await w.devices.release("i-1")
        assert [partition.start for partition in (await w.device()).foreign] == [0]  # taken, and no instance's
        with pytest.raises(Conflict):
            await w.claim("i-2", w.part("3g.40gb", 0, 4))
        w.hardware.leave(99)
        await asyncio.sleep(2 * PATIENCE.look_s)
        assert await w.there() == []
        assert (await w.device()).foreign == ()
        assert w.troubles == [Trouble.RECOVERED]
        await w.claim("i-2", w.part("3g.40gb", 0, 4))

    in_world(tmp_path, story, mig=True)


def test_an_instance_cannot_claim_other_devices_beside_its_own(tmp_path: Path) -> None:
    async def story(w: World) -> None:
        await w.claim("i-1", w.whole(0))
        with pytest.raises(Conflict, match="holds other devices"):
            await w.claim("i-1", w.whole(1))

    in_world(tmp_path, story)


@pytest.mark.parametrize("runtime", [RuntimeName.FIRECRACKER, RuntimeName.WORKERD])
def test_a_runtime_that_cannot_hand_on_devices_is_refused_by_type_with_what_can(tmp_path: Path, runtime: RuntimeName) -> None:
    async def story(w: World) -> None:
        assert "runc" in w.devices.offers(runtime)
        with pytest.raises(Unsupported, match="use runc"):
            await w.devices.claim("i-1", [w.whole()], Gpu(), runtime)

    in_world(tmp_path, story)


def test_gvisor_is_offered_where_its_proxy_knows_the_driver_and_says_what_it_knows_elsewhere(tmp_path: Path) -> None:
    async def story(w: World) -> None:
        assert "could not be found out" in w.devices.offers(RuntimeName.GVISOR)
        knows = w.begin(gvisor_drivers=lambda: frozenset({"580.159.04"}))
        await knows.inventory()
        assert knows.offers(RuntimeName.GVISOR) == ""
        other = w.begin(gvisor_drivers=lambda: frozenset({"535.1", "580.82.7", "580.9"}))
        await other.inventory()
        assert other.offers(RuntimeName.GVISOR) == (
            "gVisor's proxy does not know driver 580.159.04; of that series it knows 580.9, 580.82.7"
        )
        for devices in (knows, other):
            await devices.close()

    in_world(tmp_path, story)


def test_a_node_without_devices_says_so(tmp_path: Path) -> None:
    devices = NodeDevices([], directory=tmp_path, clock=SystemClock())
    assert devices.offers(RuntimeName.RUNC) == "this node has no GPU"


# faults


def test_a_storm_of_errors_is_one_event_and_a_sum_and_the_device_stays_on_offer(tmp_path: Path) -> None:
    async def story(w: World) -> None:
        w.listen()
        await w.claim("i-1", w.whole())
        w.hardware.storm(w.hardware.ids[0], 20_000)
        await asyncio.sleep(200)
        assert [(event.trouble, event.code) for event in w.told] == [(Trouble.FAULT, 31), (Trouble.FAULT, 31)]
        assert "19999 more" in w.told[1].message
        assert (await w.device()).health is GpuHealth.OK

    in_world(tmp_path, story)


def test_an_error_that_is_reported_before_the_first_look_counts(tmp_path: Path) -> None:
    async def story(w: World) -> None:
        await w.devices.close()
        w.begin()
        w.hardware.hang(2)
        w.listen()
        w.hardware.xid(w.hardware.ids[0], 48)
        w.hardware.storm(w.hardware.ids[1], 200)
        await asyncio.sleep(1)
        assert w.troubles == [Trouble.BROKEN, Trouble.FAULT]
        assert [(await w.device(index)).health for index in (0, 1)] == [GpuHealth.QUARANTINED, GpuHealth.OK]
        assert [device.health for device in await w.begin().inventory()] == [GpuHealth.QUARANTINED, GpuHealth.OK]

    in_world(tmp_path, story)


def test_a_storm_of_a_device_fault_is_one_event_and_a_quarantine(tmp_path: Path) -> None:
    async def story(w: World) -> None:
        w.listen()
        w.hardware.storm(w.hardware.ids[0], 5_000, code=48)
        await asyncio.sleep(1)
        assert [(event.trouble, event.code) for event in w.told] == [(Trouble.BROKEN, 48)]
        assert (await w.device()).health is GpuHealth.QUARANTINED
        assert (await w.device(1)).health is GpuHealth.OK

    in_world(tmp_path, story)


@pytest.mark.parametrize("told", [True, False])
def test_a_device_that_vanishes_under_an_instance_is_noticed_kept_and_let_go(tmp_path: Path, told: bool) -> None:
    async def story(w: World) -> None:
        w.listen()
        await w.claim("i-1", w.whole())
        w.hardware.vanish(w.hardware.ids[0], told=told)
        await asyncio.sleep(PATIENCE.look_s + 1)
        assert w.troubles == [Trouble.VANISHED]
        device = await w.device()
        assert (device.health, device.present) == (GpuHealth.QUARANTINED, False)
        assert ("off the bus" if told else "vanished") in device.reason
        assert device.id in w.told[0].message
        await w.devices.release("i-1")
        assert [device.id for device in await w.devices.inventory()] == [w.hardware.ids[1]]

    in_world(tmp_path, story)


def test_a_vanished_device_that_comes_back_is_told_and_offered_again(tmp_path: Path) -> None:
    async def story(w: World) -> None:
        w.listen()
        await w.claim("i-1", w.whole())
        w.hardware.vanish(w.hardware.ids[0])
        await asyncio.sleep(PATIENCE.look_s + 1)
        w.hardware.come_back(w.hardware.ids[0])
        await asyncio.sleep(PATIENCE.look_s + 1)
        assert w.troubles == [Trouble.VANISHED, Trouble.RECOVERED]
        assert (await w.device()).health is GpuHealth.OK

    in_world(tmp_path, story)


def test_a_device_that_vanishes_with_partitions_is_let_go_without_its_driver(tmp_path: Path) -> None:
    async def story(w: World) -> None:
        await w.claim("i-1", w.part("3g.40gb", 0, 4))
        w.hardware.vanish(w.hardware.ids[0])
        await w.devices.release("i-1")
        assert await w.devices.inventory() == ()
        w.hardware.come_back(w.hardware.ids[0])
        await w.devices.inventory()
        await w.claim("i-2", w.part("7g.80gb", 0, 8))

    in_world(tmp_path, story, mig=True)


def test_a_driver_that_differs_from_its_library_is_told_once_and_takes_all_out_until_it_fits(tmp_path: Path) -> None:
    async def story(w: World) -> None:
        w.listen()
        await w.claim("i-1", w.whole())
        w.hardware.driver_mismatch()
        await asyncio.sleep(3 * PATIENCE.look_s)
        assert w.troubles == [Trouble.SILENT]
        assert "differ" in w.told[0].message
        assert w.told[0].mend
        devices = await w.devices.inventory()
        assert [device.health for device in devices] == [GpuHealth.QUARANTINED] * 2
        assert all("differ" in device.reason for device in devices)
        with pytest.raises(Unavailable, match="differ"):
            await w.claim("i-2", w.whole(1))
        w.hardware.driver_change("590.1")
        await asyncio.sleep(PATIENCE.look_s + 1)
        held, free = await w.devices.inventory()
        assert "under what runs" in held.reason
        assert (held.health, free.health, free.driver) == (GpuHealth.QUARANTINED, GpuHealth.OK, "590.1")
        await w.devices.release("i-1")
        assert (await w.device()).health is GpuHealth.OK

    in_world(tmp_path, story)


def test_a_half_made_partition_is_cleared_and_made_whole(tmp_path: Path) -> None:
    async def story(w: World) -> None:
        w.hardware.half_make_next_partition()
        made = await w.claim("i-1", w.part("3g.40gb", 0, 4))
        assert made[0].id
        assert await w.hardware.partitions(w.hardware.ids[0]) == made

    in_world(tmp_path, story, mig=True)


def test_a_partition_that_is_half_made_again_and_again_leaves_nothing_behind(tmp_path: Path) -> None:
    async def story(w: World) -> None:
        w.hardware.half_make_next_partition(times=5)
        with pytest.raises(Unavailable, match="compute instance"):
            await w.claim("i-1", w.part("3g.40gb", 0, 4))
        assert await w.there() == []
        device = await w.device()
        assert (device.foreign, device.health) == ((), GpuHealth.OK)

    in_world(tmp_path, story, mig=True)


@pytest.mark.parametrize("honest", [True, False])
def test_a_hung_driver_hangs_no_call_and_ends_as_one_event_and_a_quarantine(tmp_path: Path, honest: bool) -> None:
    async def story(w: World) -> None:
        loop = asyncio.get_running_loop()
        w.listen()
        await w.claim("i-1", w.whole())
        w.hardware.hang(honest=honest)
        began = loop.time()
        devices = await w.devices.inventory()
        assert loop.time() - began <= PATIENCE.silent_s
        assert [(device.health, device.answers) for device in devices] == [(GpuHealth.QUARANTINED, False)] * 2
        assert all("does not answer" in device.reason for device in devices)
        with pytest.raises(Unavailable):
            await w.claim("i-2", w.whole(1))
        await w.devices.release("i-1")
        await asyncio.sleep(10 * PATIENCE.look_s)
        assert w.troubles == [Trouble.SILENT]
        w.hardware.answer()
        await asyncio.sleep(PATIENCE.look_s + PATIENCE.silent_s)
        assert w.troubles == [Trouble.SILENT, Trouble.RECOVERED, Trouble.RECOVERED]
        await w.claim("i-2", w.whole(1))

    in_world(tmp_path, story)


def test_a_hang_in_the_middle_of_making_a_partition_is_cleared_up_later(tmp_path: Path) -> None:
    async def story(w: World) -> None:
        class Slow(FakeHardware):
            async def make_partition(self, device: str, profile: str, start: int) -> GpuPartition:
                made = await super().make_partition(device, profile, start)
                self.hang()  # it is made, and nobody is told
                await asyncio.sleep(3_600)
                return made

        hardware = Slow(mig=True)
        devices = NodeDevices([hardware], directory=tmp_path / "other", clock=VirtualClock(asyncio.get_running_loop()))
        await devices.inventory()
        grant = GpuGrant(device=hardware.ids[0], sharing=GpuSharing.MIG, profile="3g.40gb", start=0, size=4)
        with pytest.raises(Unavailable, match="does not answer"):
            await devices.claim("i-1", [grant], Gpu(), RuntimeName.RUNC)
        hardware.answer()
        await asyncio.sleep(2 * PATIENCE.look_s)
        assert await hardware.partitions(hardware.ids[0]) == ()
        await devices.close()

    in_world(tmp_path, story)


def test_a_driver_whose_calls_cannot_even_be_cancelled_is_not_called_without_bound(tmp_path: Path) -> None:
    async def main() -> None:
        freed = asyncio.Event()
        calls = []

        class Stone(FakeHardware):
            async def discover(self) -> tuple[GpuDevice, ...]:
                calls.append(1)
                while not freed.is_set():
                    with contextlib.suppress(asyncio.CancelledError):
                        await freed.wait()
                return await super().discover()

        clock = VirtualClock(asyncio.get_running_loop())
        devices = NodeDevices([Stone(clock=clock)], directory=tmp_path, clock=clock)
        for _ in range(200):
            assert await devices.inventory() == ()
            await asyncio.sleep(PATIENCE.again_s)
        assert len(calls) == STUCK_MAX
        freed.set()
        await asyncio.sleep(PATIENCE.again_s)
        assert len(await devices.inventory()) == 1
        await devices.close()

    run_virtual(main, random.Random(7))


def test_a_driver_that_is_silent_when_the_agent_starts_is_told_and_its_devices_appear_later(tmp_path: Path) -> None:
    async def main() -> None:
        w = World(tmp_path)
        w.hardware.hang()
        w.listen()
        assert await w.devices.inventory() == ()
        w.hardware.answer()
        await asyncio.sleep(PATIENCE.look_s + PATIENCE.silent_s)
        assert w.troubles == [Trouble.SILENT, Trouble.RECOVERED, Trouble.RECOVERED]
        assert len(await w.devices.inventory()) == 2
        await w.close()

    run_virtual(main, random.Random(7))


def test_waiting_for_events_goes_on_after_the_driver_could_not_be_waited_for(tmp_path: Path) -> None:
    async def main() -> None:
        tries = []

        class Flaky(FakeHardware):
            async def events(self) -> AsyncIterator[DeviceEvent]:
                tries.append(1)
                if len(tries) < 3:
                    raise Unavailable("no events today")
                async for event in super().events():
                    yield event

        clock = VirtualClock(asyncio.get_running_loop())
        w = World(tmp_path, Flaky(clock=clock))
        w.listen()
        w.hardware.xid(w.hardware.ids[0], 79)
        await asyncio.sleep(10)
        assert (len(tries), w.troubles) == (3, [Trouble.BROKEN])
        await w.close()

    run_virtual(main, random.Random(7))


def test_a_driver_that_answers_again_leaves_a_broken_device_out_and_is_told_once(tmp_path: Path) -> None:
    async def story(w: World) -> None:
        w.listen()
        w.hardware.xid(w.hardware.ids[0], 119)
        w.hardware.tell(Trouble.SILENT, "", "the driver does not answer")
        w.hardware.tell(Trouble.RECOVERED, "", "the driver answers again")
        await asyncio.sleep(1)
        assert w.troubles == [Trouble.BROKEN, Trouble.SILENT, Trouble.RECOVERED]
        assert [(await w.device(index)).health for index in (0, 1)] == [GpuHealth.QUARANTINED, GpuHealth.OK]

    in_world(tmp_path, story)


def test_an_operators_word_brings_a_device_back_that_was_reset(tmp_path: Path) -> None:
    async def story(w: World) -> None:
        w.hardware.xid(w.hardware.ids[0], 119)
        await asyncio.sleep(1)
        assert (await w.device()).health is GpuHealth.QUARANTINED
        await w.devices.reinstate(w.hardware.ids[0])
        assert (await w.device()).health is GpuHealth.OK

    in_world(tmp_path, story)


# off the device and back


def test_one_that_is_given_up_while_it_is_taken_off_is_put_back_and_so_are_those_before_it(tmp_path: Path) -> None:
    async def story(w: World) -> None:
        await w.claim("i-1", w.whole())
        for pid in (1, 2):
            w.hardware.use(w.hardware.ids[0], pid, GIB)
        await w.hardware.suspend(1)
        reached = asyncio.Event()
        w.hardware.hang_suspends(reached)
        suspending = asyncio.ensure_future(w.devices.suspend("i-1", [1, 2]))
        await reached.wait()
        suspending.cancel()
        with pytest.raises(asyncio.CancelledError):
            await suspending
        sample, _ = await w.devices.samples()
        assert set(sample.processes) == {1, 2}

    in_world(tmp_path, story)


def test_one_that_stays_off_keeps_no_other_off(tmp_path: Path) -> None:
    async def story(w: World) -> None:
        await w.claim("i-1", w.whole())
        for pid in (1, 2):
            w.hardware.use(w.hardware.ids[0], pid, GIB)
        await w.devices.suspend("i-1", [1, 2])
        w.hardware.failed.add(1)
        with pytest.raises(Unavailable, match="process 1"):
            await w.devices.resume("i-1", [1, 2])
        sample, _ = await w.devices.samples()
        assert set(sample.processes) == {2}

    in_world(tmp_path, story)


# what a killed agent leaves


def test_after_a_kill_the_next_agent_removes_what_is_wanted_no_more_and_nothing_else(tmp_path: Path) -> None:
    async def story(w: World) -> None:
        await w.claim("i-stays", w.part("2g.20gb", 0, 2))
        await w.claim("i-goes", w.part("1g.10gb", 2, 1))
        w.hardware.partition_by_hand(w.hardware.ids[0], "3g.40gb", 4)
        w.begin()
        await w.devices.recover(lambda: {"i-stays": [w.part("2g.20gb", 0, 2)]})
        assert await w.there() == [("2g.20gb", 0), ("3g.40gb", 4)]
        assert [partition.start for partition in (await w.device()).foreign] == [4]
        await w.claim("i-stays", w.part("2g.20gb", 0, 2))
        await w.devices.release("i-stays")
        assert await w.there() == [("3g.40gb", 4)]

    in_world(tmp_path, story, mig=True)


def test_a_partition_made_just_before_the_kill_is_known_as_ours(tmp_path: Path) -> None:
    async def story(w: World) -> None:
        class Killed(FakeHardware):
            async def make_partition(self, device: str, profile: str, start: int) -> GpuPartition:
                await super().make_partition(device, profile, start)
                raise asyncio.CancelledError  # the agent dies here

        hardware = Killed(mig=True)
        clock = VirtualClock(asyncio.get_running_loop())
        first = NodeDevices([hardware], directory=tmp_path / "other", clock=clock, boot="b")
        await first.inventory()
        grant = GpuGrant(device=hardware.ids[0], sharing=GpuSharing.MIG, profile="3g.40gb", start=0, size=4)
        with pytest.raises(asyncio.CancelledError):
            await first.claim("i-1", [grant], Gpu(), RuntimeName.RUNC)
        second = NodeDevices([hardware], directory=tmp_path / "other", clock=clock, boot="b")
        await second.recover(dict)
        assert await hardware.partitions(hardware.ids[0]) == ()
        await first.close()
        await second.close()

    in_world(tmp_path, story)


def test_a_half_made_partition_of_a_killed_agent_is_removed_and_a_strangers_is_not(tmp_path: Path) -> None:
    async def story(w: World) -> None:
        await w.claim("i-1", w.part("2g.20gb", 0, 2))
        device = w.hardware.ids[0]
        await w.hardware.remove_partition(device, 0)
        for profile, start in (("2g.20gb", 0), ("2g.20gb", 4)):
            w.hardware.half_make_next_partition()
            with pytest.raises(Unavailable):
                await w.hardware.make_partition(device, profile, start)
        w.begin()
        await w.devices.recover(dict)
        assert await w.there() == [("2g.20gb", 4)]

    in_world(tmp_path, story, mig=True)


def test_the_same_slices_made_by_someone_else_meanwhile_are_left_alone(tmp_path: Path) -> None:
    async def story(w: World) -> None:
        await w.claim("i-1", w.part("2g.20gb", 0, 2))
        await w.hardware.remove_partition(w.hardware.ids[0], 0)
        w.hardware.partition_by_hand(w.hardware.ids[0], "1g.10gb", 0)
        w.begin()
        await w.devices.recover(dict)
        assert await w.there() == [("1g.10gb", 0)]

    in_world(tmp_path, story, mig=True)


def test_without_its_file_the_next_agent_adopts_what_the_held_grants_name(tmp_path: Path) -> None:
    async def story(w: World) -> None:
        await w.claim("i-1", w.part("2g.20gb", 0, 2))
        (tmp_path / FILE).write_text("not json")
        w.begin()
        await w.devices.recover(lambda: {"i-1": [w.part("2g.20gb", 0, 2)]})
        assert (await w.device()).foreign == ()
        await w.devices.release("i-1")
        assert await w.there() == []

    in_world(tmp_path, story, mig=True)


def test_what_the_file_says_of_a_place_holds_against_a_grant_of_another(tmp_path: Path) -> None:
    async def story(w: World) -> None:
        await w.claim("i-1", w.part("2g.20gb", 0, 2))
        w.begin()
        await w.devices.recover(lambda: {id: [w.part("2g.20gb", 0, 2)] for id in ("i-1", "i-2")})
        await w.devices.release("i-2")
        assert await w.there() == [("2g.20gb", 0)]
        await w.devices.release("i-1")
        assert await w.there() == []

    in_world(tmp_path, story, mig=True)


def test_what_is_released_while_the_next_agent_looks_at_its_driver_is_not_held_afterwards(tmp_path: Path) -> None:
    async def story(w: World) -> None:
        held = {"i-1": [w.whole(0)], "i-2": [w.whole(1)]}
        for instance, grants in held.items():
            await w.claim(instance, *grants)
        w.begin()
        w.hardware.hang(2)
        recovering = asyncio.ensure_future(w.devices.recover(lambda: held))
        await asyncio.sleep(1)
        del held["i-1"]
        await w.devices.release("i-1")
        await recovering
        assert set(LedgerFile(tmp_path, w.boot).now.holdings) == {"i-2"}

    in_world(tmp_path, story)


def test_a_quarantine_outlives_the_agent_but_not_the_machine(tmp_path: Path) -> None:
    async def story(w: World) -> None:
        w.hardware.xid(w.hardware.ids[0], 119)
        await asyncio.sleep(1)
        w.begin()
        device = await w.device()
        assert device.health is GpuHealth.QUARANTINED
        assert "XID 119" in device.reason
        w.boot = "boot-2"
        w.begin()
        assert (await w.device()).health is GpuHealth.OK

    in_world(tmp_path, story)


def test_a_device_that_vanished_while_no_agent_ran_is_shown_as_gone_while_it_is_held(tmp_path: Path) -> None:
    async def story(w: World) -> None:
        await w.claim("i-1", w.whole())
        w.hardware.vanish(w.hardware.ids[0], told=False)
        w.begin()
        w.listen()
        await w.devices.recover(lambda: {"i-1": [w.whole()]})
        assert (await w.device()).present is False
        await asyncio.sleep(1)
        assert w.troubles == [Trouble.VANISHED]

    in_world(tmp_path, story)


def test_a_held_device_that_nobody_here_ever_saw_is_shown_as_gone(tmp_path: Path) -> None:
    async def story(w: World) -> None:
        await w.devices.recover(lambda: {"i-1": [GpuGrant(device="GPU-of-old")]})
        gone = {device.id: device.present for device in await w.devices.inventory()}
        assert gone["GPU-of-old"] is False

    in_world(tmp_path, story)


def test_recovery_with_a_hung_driver_ends_and_is_made_good_later(tmp_path: Path) -> None:
    async def story(w: World) -> None:
        await w.claim("i-1", w.part("2g.20gb", 0, 2))
        w.hardware.hang()
        w.begin()
        began = asyncio.get_running_loop().time()
        await w.devices.recover(dict)
        assert asyncio.get_running_loop().time() - began <= 3 * PATIENCE.silent_s
        w.hardware.answer()
        await asyncio.sleep(2 * PATIENCE.look_s)
        assert await w.there() == []

    in_world(tmp_path, story, mig=True)


def test_what_is_kept_is_private(tmp_path: Path) -> None:
    async def story(w: World) -> None:
        await w.claim("i-1", w.whole())
        assert stat.S_IMODE((tmp_path / FILE).stat().st_mode) == 0o600

    in_world(tmp_path, story)


def test_what_is_written_at_once_is_there_as_a_whole_or_not_at_all(tmp_path: Path) -> None:
    file = LedgerFile(tmp_path, "b")
    holdings = {"i-1": (GpuGrant(device="d"),)}
    with file.at_once():
        file.write(replace(file.now, holdings=holdings))
        assert file.now.holdings == holdings
        assert not (tmp_path / FILE).exists()
        file.write(replace(file.now, boot="c"))
    assert LedgerFile(tmp_path, "c").now == file.now == Ledger(boot="c", holdings=holdings)
    with contextlib.suppress(ZeroDivisionError), file.at_once():
        file.write(Ledger(boot="c"))
        raise ZeroDivisionError
    assert file.now.holdings == holdings
    (tmp_path / FILE).with_suffix(".new").mkdir()
    with pytest.raises(OSError, match="directory"), file.at_once():
        file.write(Ledger(boot="c"))
    assert LedgerFile(tmp_path, "c").now == file.now == Ledger(boot="c", holdings=holdings)


def test_a_claim_that_cannot_be_written_down_holds_nothing(tmp_path: Path) -> None:
    async def story(w: World) -> None:
        blocked = (tmp_path / FILE).with_suffix(".new")
        blocked.mkdir()
        with pytest.raises(OSError, match="directory"):
            await w.claim("i-1", w.whole())
        blocked.rmdir()
        await w.claim("i-2", w.whole())
        await w.devices.release("i-2")
        assert set(LedgerFile(tmp_path, w.boot).now.holdings) == set()
        assert [known.device.id for known in LedgerFile(tmp_path, w.boot).now.known if known.device.id == w.hardware.ids[0]] == []

    in_world(tmp_path, story)


# sharing by MPS, with a program that stands in for NVIDIA's

STAND_IN = """#!/bin/sh
# a daemon lives as long as its control file; every call is written down
state="$CUDA_MPS_PIPE_DIRECTORY/control"
echo "$* devices=$CUDA_VISIBLE_DEVICES" >> "$CUDA_MPS_LOG_DIRECTORY/../../calls"
case "$1" in
  -d)
    [ "$2" = -multiuser-server ] && [ -e "$0.old" ] && { echo "unknown option"; exit 1; }
    [ -e "$0.broken" ] && { echo "no device"; exit 1; }
    [ -e "$state" ] && { echo "already running"; exit 1; }
    touch "$state" ;;
  *)
    [ -e "$state" ] || { echo "cannot find MPS control daemon"; exit 1; }
    read -r line
    echo "$line" >> "$0.said"
    [ -e "$0.deaf" ] && exit 1
    case "$line" in
      quit*) rm "$state" ;;
      get_server_list) [ -e "$0.servers" ] && cat "$0.servers" ;;
      *mem_limit*GPU-*) [ -e "$0.by-number" ] && { echo "no such device"; exit 1; } ;;
      set_*) [ -e "$0.unlimited" ] && { echo "unknown command"; exit 1; } ;;
    esac
    exit 0 ;;
esac
"""


@pytest.fixture
def short_path() -> Iterator[Path]:
    """A directory in which the path of a socket has room, wherever the suite keeps its own."""
    with tempfile.TemporaryDirectory(prefix="mps-", dir="/tmp") as directory:
        yield Path(directory)


class MpsWorld:
    def __init__(self, directory: Path) -> None:
        self.binary = directory / "nvidia-cuda-mps-control"
        self.binary.write_text(STAND_IN)
        self.binary.chmod(0o755)
        self.root = directory / "mps"
        self.hardware = FakeHardware()
        self.directory = directory
        self.devices = self.begin()

    def begin(self) -> NodeDevices:
        mps = NvidiaMps(self.root, binary=self.binary)
        self.place = mps.place(self.hardware.ids[0])
        self.devices = NodeDevices([self.hardware], directory=self.directory / "kept", clock=SystemClock(), mps=mps, boot="b")
        return self.devices

    def grant(self, milli: int) -> GpuGrant:
        return GpuGrant(device=self.hardware.ids[0], sharing=GpuSharing.MPS, milli=milli, memory_bytes=10 * GIB)

    @property
    def runs(self) -> bool:
        return (self.place / "pipe" / "control").exists()

    def said(self) -> list[str]:
        """What the daemon was told of limits since this was asked last."""
        file = Path(f"{self.binary}.said")
        words = [line for line in file.read_text().splitlines() if line.startswith("set_")] if file.exists() else []
        file.unlink(missing_ok=True)
        return words

    @property
    def starts(self) -> list[str]:
        return [line for line in (self.root / "calls").read_text().splitlines() if line.startswith("-d")]


async def test_mps_runs_one_daemon_for_a_device_from_its_first_client_to_its_last(short_path: Path) -> None:
    w = MpsWorld(short_path)
    assert GpuSharing.MPS in (await w.devices.inventory())[0].sharing
    first = await w.devices.claim("i-1", [w.grant(250)], Gpu(), RuntimeName.RUNC)
    env = dict(first.edits.env)
    assert env["CUDA_MPS_PIPE_DIRECTORY"] == INSIDE
    assert env["CUDA_MPS_ACTIVE_THREAD_PERCENTAGE"] == "25"
    assert env["CUDA_MPS_PINNED_DEVICE_MEM_LIMIT"] == "0=10240M"
    mount = next(mount for mount in first.edits.mounts if mount.target == INSIDE)
    assert mount.source == str(w.place / "pipe")
    assert "rw" in mount.options
    assert first.edits.gvisor_driver == ""
    await w.devices.claim("i-2", [w.grant(500)], Gpu(), RuntimeName.RUNC)
    assert w.starts == [f"-d -multiuser-server devices={w.hardware.ids[0]}"]
    with pytest.raises(Conflict, match="by mps"):
        await w.devices.claim(
            "i-3", [GpuGrant(device=w.hardware.ids[0], sharing=GpuSharing.TIME_SLICE, milli=100)], Gpu(), RuntimeName.RUNC
        )
    await w.devices.release("i-1")
    assert w.runs
    await w.devices.release("i-2")
    assert not w.runs
    assert not w.place.exists()
    await w.devices.close()


async def test_mps_falls_back_to_one_user_at_a_time_where_the_driver_is_older(short_path: Path) -> None:
    w = MpsWorld(short_path)
    Path(f"{w.binary}.old").touch()
    await w.devices.inventory()
    await w.devices.claim("i-1", [w.grant(250)], Gpu(), RuntimeName.RUNC)
    assert [line.split(" devices")[0] for line in w.starts] == ["-d -multiuser-server", "-d"]
    await w.devices.close()


async def test_an_mps_daemon_that_does_not_start_is_said_in_its_own_words_and_leaves_nothing(short_path: Path) -> None:
    w = MpsWorld(short_path)
    Path(f"{w.binary}.broken").touch()
    await w.devices.inventory()
    with pytest.raises(Unavailable, match="no device"):
        await w.devices.claim("i-1", [w.grant(250)], Gpu(), RuntimeName.RUNC)
    assert not w.place.exists()
    await w.devices.claim("i-2", [GpuGrant(device=w.hardware.ids[0])], Gpu(), RuntimeName.RUNC)
    await w.devices.close()


async def test_an_mps_daemon_that_does_not_answer_is_left_alone_for_those_who_run_by_it(short_path: Path) -> None:
    w = MpsWorld(short_path)
    await w.devices.inventory()
    await w.devices.claim("i-1", [w.grant(250)], Gpu(), RuntimeName.RUNC)
    Path(f"{w.binary}.deaf").touch()
    command = ["sh", "-c", "read line", "nvidia-cuda-mps-control"]
    daemon = await asyncio.create_subprocess_exec(*command, stdin=asyncio.subprocess.PIPE)
    try:
        (w.place / "pipe" / "nvidia-cuda-mps-control.pid").write_text(str(daemon.pid))
        with pytest.raises(Unavailable, match="does not answer"):
            await w.devices.claim("i-2", [w.grant(250)], Gpu(), RuntimeName.RUNC)
        assert daemon.returncode is None
        assert w.place.exists()
    finally:
        await daemon.communicate(b"end\n")
    await w.devices.close()


async def test_an_mps_daemon_outlives_the_agent_and_is_adopted_or_ended_by_the_next(short_path: Path) -> None:
    w = MpsWorld(short_path)
    await w.devices.inventory()
    await w.devices.claim("i-1", [w.grant(250)], Gpu(), RuntimeName.RUNC)
    await w.devices.close()
    assert w.runs
    second = w.begin()
    await second.recover(lambda: {"i-1": [w.grant(250)]})
    await second.claim("i-1", [w.grant(250)], Gpu(), RuntimeName.RUNC)
    assert len(w.starts) == 1
    await second.close()
    third = w.begin()
    await third.recover(dict)
    assert not w.runs
    await third.close()


async def test_an_mps_daemon_gives_no_program_more_than_the_largest_share_of_its_device(short_path: Path) -> None:
    w = MpsWorld(short_path)
    (id,) = w.hardware.ids
    await w.devices.inventory()
    await w.devices.claim("i-1", [w.grant(250)], Gpu(), RuntimeName.RUNC)
    of_all = [f"set_default_device_pinned_mem_limit {id} 10240M"]
    assert w.said() == ["set_default_active_thread_percentage 25", *of_all]
    await w.devices.claim("i-2", [w.grant(250)], Gpu(), RuntimeName.RUNC)
    assert w.said() == []  # an equal share changes nothing
    Path(f"{w.binary}.servers").write_text("71\n")
    await w.devices.claim("i-3", [w.grant(500)], Gpu(), RuntimeName.RUNC)
    of_server = [f"set_device_pinned_mem_limit 71 {id} 10240M"]
    assert w.said() == ["set_default_active_thread_percentage 50", *of_all, "set_active_thread_percentage 71 50", *of_server]
    await w.devices.release("i-3")
    assert w.said() == ["set_default_active_thread_percentage 25", *of_all, "set_active_thread_percentage 71 25", *of_server]
    await w.devices.release("i-1")
    await w.devices.release("i-2")
    assert w.said() == []
    assert not w.runs
    # the next daemon knows nothing of the limits of the last
    await w.devices.claim("i-4", [w.grant(250)], Gpu(), RuntimeName.RUNC)
    assert "set_default_active_thread_percentage 25" in w.said()
    await w.devices.close()


async def test_an_older_mps_daemon_is_told_of_its_device_by_number(short_path: Path) -> None:
    w = MpsWorld(short_path)
    Path(f"{w.binary}.by-number").touch()
    await w.devices.inventory()
    await w.devices.claim("i-1", [w.grant(250)], Gpu(), RuntimeName.RUNC)
    assert w.said()[-1] == "set_default_device_pinned_mem_limit 0 10240M"
    await w.devices.claim("i-2", [w.grant(250)], Gpu(), RuntimeName.RUNC)
    assert w.said() == []
    await w.devices.close()


async def test_an_mps_daemon_that_takes_no_limits_is_used_with_those_of_the_environment_and_asked_again(short_path: Path) -> None:
    w = MpsWorld(short_path)
    Path(f"{w.binary}.unlimited").touch()
    await w.devices.inventory()
    claim = await w.devices.claim("i-1", [w.grant(250)], Gpu(), RuntimeName.RUNC)
    assert dict(claim.edits.env)["CUDA_MPS_ACTIVE_THREAD_PERCENTAGE"] == "25"
    assert w.said() == ["set_default_active_thread_percentage 25"]
    Path(f"{w.binary}.unlimited").unlink()
    await w.devices.claim("i-2", [w.grant(250)], Gpu(), RuntimeName.RUNC)
    assert len(w.said()) == 2
    await w.devices.close()


async def test_mps_is_not_offered_without_its_program(tmp_path: Path) -> None:
    hardware = FakeHardware()
    mps = NvidiaMps(tmp_path / "mps", binary=tmp_path / "none")
    devices = NodeDevices([hardware], directory=tmp_path, clock=SystemClock(), mps=mps)
    assert GpuSharing.MPS not in (await devices.inventory())[0].sharing
    grant = GpuGrant(device=hardware.ids[0], sharing=GpuSharing.MPS, milli=500)
    with pytest.raises(Unavailable, match="cannot be shared by mps"):
        await devices.claim("i-1", [grant], Gpu(), RuntimeName.RUNC)
    await devices.close()


def test_mps_without_its_program_says_what_is_missing(tmp_path: Path) -> None:
    assert "nvidia-cuda-mps-control is not installed" in NvidiaMps(tmp_path, binary=tmp_path / "none").missing()


@pytest.mark.parametrize("hears", [True, False])
async def test_an_mps_daemon_that_is_ended_takes_its_servers_with_it(short_path: Path, hears: bool) -> None:
    w = MpsWorld(short_path)
    (id,) = w.hardware.ids
    pipe = w.place / "pipe"
    pipe.mkdir(parents=True)
    (w.place / "log").mkdir()
    number = short_path / "server"
    server = 'bash -c "exec -a nvidia-cuda-mps-server sleep 600"'
    # one that was told to go and does not, or the child of a daemon that hangs
    daemon = await asyncio.create_subprocess_exec(
        "bash", "-c", f"{server} & echo $! > {number}.new; mv {number}.new {number}; exec -a nvidia-cuda-mps-control sleep 600"
    )
    async with asyncio.timeout(10):
        while not number.exists() or b"mps-server" not in _cmdline(int(number.read_text())):  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    if hears:
        (pipe / "control").touch()
        Path(f"{w.binary}.servers").write_text(number.read_text())
    else:
        (pipe / "nvidia-cuda-mps-control.pid").write_text(str(daemon.pid))
    await NvidiaMps(w.root, binary=w.binary).stop(id)
    async with asyncio.timeout(10):
        while _cmdline(int(number.read_text())):  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        if hears:
            daemon.kill()
        await daemon.wait()
    assert not w.place.exists()
    await w.devices.close()


def _cmdline(pid: int) -> bytes:
    """Return how a process was called; nothing of one that has ended."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


# claims soon after a look


class Counting(FakeHardware):
    """Counts how often it is asked what there is."""

    looks = 0

    async def discover(self) -> tuple[GpuDevice, ...]:
        self.looks += 1
        return await super().discover()


def in_counting_world(directory: Path, story: Callable[[World, Counting], Coroutine[Any, Any, None]]) -> None:
    async def main() -> None:
        hardware = Counting(count=2, clock=VirtualClock(asyncio.get_running_loop()))
        async with world(directory, hardware) as made:
            await asyncio.sleep(1.0)
            await story(made, hardware)

    run_virtual(main, random.Random(7))


def test_a_claim_soon_after_a_look_does_not_look_again_and_the_first_of_an_agent_does(tmp_path: Path) -> None:
    async def story(w: World, hardware: Counting) -> None:
        before = hardware.looks
        await w.claim("web-1", w.whole(0))
        assert hardware.looks == before
        await w.claim("web-1", w.whole(0))  # a repeat has no samples to go by: what runs there may be its own
        assert hardware.looks == before + 1
        await w.devices.close()
        w.begin()
        before = hardware.looks
        await w.claim("web-2", w.whole(1))
        assert hardware.looks == before + 1

    in_counting_world(tmp_path, story)


@pytest.mark.parametrize("told", [True, False])
def test_a_device_that_vanished_since_the_look_is_refused(tmp_path: Path, told: bool) -> None:
    async def story(w: World, hardware: Counting) -> None:
        hardware.vanish(hardware.ids[0], told=told)
        with pytest.raises(Unavailable):
            await w.claim("web-1", w.whole(0))
        await w.claim("web-2", w.whole(1))

    in_counting_world(tmp_path, story)


def test_a_device_that_was_cut_into_partitions_since_the_look_is_refused_as_a_whole(tmp_path: Path) -> None:
    async def story(w: World, hardware: Counting) -> None:
        hardware.change(hardware.ids[0], mig=True)
        with pytest.raises(Unavailable, match="MIG mode"):
            await w.claim("web-1", w.whole(0))

    in_counting_world(tmp_path, story)


def test_a_driver_that_was_replaced_since_the_look_is_refused(tmp_path: Path) -> None:
    async def story(w: World, hardware: Counting) -> None:
        hardware.driver_change("999.1")
        with pytest.raises(Unavailable, match="driver"):
            await w.claim("web-1", w.whole(0))

    in_counting_world(tmp_path, story)


def test_what_uses_a_device_since_the_look_is_in_the_way(tmp_path: Path) -> None:
    async def story(w: World, hardware: Counting) -> None:
        before = hardware.looks
        hardware.use(hardware.ids[0], 4711, 10 * GIB)
        with pytest.raises(Unavailable, match="4711"):
            await w.claim("web-1", w.whole(0))
        assert hardware.looks == before

    in_counting_world(tmp_path, story)
