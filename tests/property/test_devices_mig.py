"""Partitions under random requests: the fake keeps the hardware's rules, and a node loses and takes nothing, whatever happens."""

from __future__ import annotations

import asyncio
import itertools
import json
import random
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from atoll.devices.fake import MODELS, FakeHardware
from atoll.devices.fake_mig import MigBoard, mig_models, profiles_of
from atoll.devices.ledger import FILE
from atoll.devices.node import NodeDevices
from atoll.devices.watch import Patience
from atoll.model.devices import COMPUTE_SLICES, MEMORY_SLICES, GpuGrant, GpuHealth, GpuSharing
from atoll.model.errors import AtollError, Conflict, Invalid
from atoll.model.spec import Gpu, RuntimeName
from atoll.sim.clock import VirtualClock
from atoll.sim.loop import run_virtual

H100 = profiles_of("H100-80GB", MODELS["H100-80GB"].memory_bytes)
PLACES = [(kind.name, start) for kind in H100 for start in kind.starts]


@pytest.mark.parametrize("model", mig_models())
def test_every_profile_of_the_table_fits_an_empty_device_wherever_it_may_begin(model: str) -> None:
    for kind in profiles_of(model, MODELS[model].memory_bytes):
        assert kind.starts
        for start in kind.starts:
            made = MigBoard("GPU-0", profiles_of(model, MODELS[model].memory_bytes)).make(kind.name, start)
            assert made.start + made.size <= MEMORY_SLICES
        assert kind.memory_bytes <= MODELS[model].memory_bytes


@pytest.mark.parametrize("model", mig_models())
def test_as_many_of_a_kind_fit_as_the_table_says_and_not_one_more(model: str) -> None:
    kinds = profiles_of(model, MODELS[model].memory_bytes)
    for kind in kinds:
        board = MigBoard("GPU-0", kinds)
        made = 0
        for start in kind.starts:
            try:
                board.make(kind.name, start)
            except Conflict:
                continue
            made += 1
        assert made == kind.most


@given(st.lists(st.tuples(st.sampled_from(PLACES), st.booleans()), max_size=40))
def test_the_fake_says_yes_exactly_where_the_hardware_would(steps: list[tuple[tuple[str, int], bool]]) -> None:
    """Against a model that knows only sets: slices taken, compute spent, one `+me`."""
    kinds = {kind.name: kind for kind in H100}
    board, there = MigBoard("GPU-0", H100), {}
    for (name, start), remove in steps:
        if remove:
            board.remove(start)
            there.pop(start, None)
            continue
        kind = kinds[name]
        wanted = set(range(start, start + kind.memory_slices))
        taken = {slice for at, other in there.items() for slice in range(at, at + kinds[other].memory_slices)}
        compute = sum(kinds[other].compute_slices for other in there.values())
        media = any(other.endswith("+me") for other in there.values())
        fits = (
            not wanted & taken
            and compute + kind.compute_slices <= COMPUTE_SLICES
            and list(there.values()).count(name) < kind.most
            and not (media and name.endswith("+me"))
        )
        if there.get(start) == name:
            assert board.make(name, start).profile == name  # the same again is the same
        elif fits:
            board.make(name, start)
            there[start] = name
        else:
            with pytest.raises(Conflict):
                board.make(name, start)
        assert {partition.start: partition.profile for partition in board.partitions()} == there
    assert len({partition.id for partition in board.partitions()}) == len(there)


@given(st.sampled_from(H100), st.integers(0, 8))
def test_a_start_that_is_none_is_refused_with_those_that_are(kind: object, start: int) -> None:
    profile = next(one for one in H100 if one is kind)
    if start in profile.starts:
        return
    with pytest.raises(Invalid) as refused:
        MigBoard("GPU-0", H100).make(profile.name, start)
    assert all(str(good) in (refused.value.mend or "") for good in profile.starts)


class Steps:
    """A node over a faulty driver: instances come and go, strangers make partitions, and the agent is killed at any moment."""

    def __init__(self, choose: random.Random, directory: Path) -> None:
        self.choose, self.directory = choose, directory
        self.clock = VirtualClock(asyncio.get_running_loop())
        self.hardware = FakeHardware(count=2, mig=True, clock=self.clock)
        self.devices = self.begin()
        self.held: dict[str, tuple[GpuGrant, ...]] = {}
        self.foreign: set[tuple[str, str, int]] = set()
        self.numbers = itertools.count(1)

    def begin(self) -> NodeDevices:
        self.devices = NodeDevices([self.hardware], directory=self.directory, clock=self.clock, boot="b")
        return self.devices

    def grants(self) -> tuple[GpuGrant, ...]:
        kinds = {kind.name: kind for kind in H100}
        many = self.choose.choice([1, 1, 1, 2, 3])
        chosen = [(self.choose.choice(self.hardware.ids), *self.choose.choice(PLACES)) for _ in range(many)]
        return tuple(
            GpuGrant(device=device, sharing=GpuSharing.MIG, profile=name, start=start, size=kinds[name].memory_slices)
            for device, name, start in dict.fromkeys(chosen)
        )

    async def claim(self) -> None:
        instance, grants = f"i-{next(self.numbers)}", self.grants()
        try:
            claim = await self.devices.claim(instance, grants, Gpu(), RuntimeName.RUNC)
        except AtollError:
            return
        assert [(partition.profile, partition.start) for partition in claim.partitions] == [
            (grant.profile, grant.start) for grant in grants
        ]
        assert all(partition.id for partition in claim.partitions)
        self.held[instance] = grants

    async def half_made(self) -> None:
        self.hardware.half_make_next_partition(self.choose.randint(1, 3))
        await self.claim()
        self.hardware.half_make_next_partition(0)

    async def release(self) -> None:
        if self.held:
            instance = self.choose.choice(sorted(self.held))
            del self.held[instance]
            await self.devices.release(instance)

    async def stranger(self) -> None:
        device, (name, start) = self.choose.choice(self.hardware.ids), self.choose.choice(PLACES)
        ours = {(grant.device, grant.start) for grants in self.held.values() for grant in grants}
        # what was begun and is not known to have been made is taken for ours if it appears: see `ledger`
        file = self.directory / FILE
        if file.exists():
            ours |= {(made["device"], made["start"]) for made in json.loads(file.read_bytes())["made"] if not made["id"]}
        if (device, start) in ours or any(p.start == start for p in await self.hardware.partitions(device)):
            return
        try:
            self.hardware.partition_by_hand(device, name, start)
        except AtollError:
            return
        self.foreign.add((device, name, start))

    async def hang(self) -> None:
        self.hardware.hang(self.choose.choice([1.0, 20.0, 300.0]), honest=self.choose.random() < 0.5)
        await self.choose.choice([self.claim, self.release])()
        self.hardware.answer()

    async def kill(self) -> None:
        """The agent dies at some moment of a claim; the next one is told what the control plane knows."""
        instance, grants = f"i-{next(self.numbers)}", self.grants()
        claim = asyncio.ensure_future(self.devices.claim(instance, grants, Gpu(), RuntimeName.RUNC))
        for _ in range(self.choose.randint(0, 60)):
            await asyncio.sleep(0)
        dead = self.devices
        claim.cancel()
        await asyncio.gather(claim, return_exceptions=True)
        await dead.close()
        await self.begin().recover(lambda: self.held)

    async def run(self, steps: int) -> None:
        await self.devices.inventory()
        happenings = [self.claim] * 3 + [self.release, self.stranger, self.half_made, self.hang, self.kill]
        for _ in range(steps):
            await self.choose.choice(happenings)()
        await asyncio.sleep(10 * Patience().look_s)
        devices = await self.devices.inventory()
        for device in devices:
            assert device.health is GpuHealth.OK
            there = {(device.id, p.profile, p.start) for p in await self.hardware.partitions(device.id)}
            ours = {
                (grant.device, grant.profile, grant.start)
                for grants in self.held.values()
                for grant in grants
                if grant.device == device.id
            }
            strange = {place for place in self.foreign if place[0] == device.id}
            assert there == ours | strange
            assert {(device.id, p.profile, p.start) for p in device.foreign} == strange
        await self.devices.close()


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 1 << 32))
def test_whatever_happens_partitions_are_those_of_the_holders_and_of_strangers(seed: int) -> None:
    with tempfile.TemporaryDirectory() as directory:
        choose = random.Random(seed)

        async def life() -> None:
            await Steps(choose, Path(directory)).run(25)

        run_virtual(life, choose, shuffle=0.2)
