"""What an agent says of its machine and of what runs there: what cannot be is refused at the edge, and names its field."""

from __future__ import annotations

import asyncio
import random
from typing import Any

import pytest
from msgspec.structs import replace

from atoll.model import codec
from atoll.model.devices import GpuDevice
from atoll.model.errors import Conflict, Invalid
from atoll.model.records import Capacity, Heartbeat, Node, Usage
from atoll.sim.loop import run_virtual
from atoll.sim.replay_cell import Cell

GPU = GpuDevice(id="g0", model="T4", memory_bytes=16 << 30)


@pytest.mark.parametrize(
    ("capacity", "more", "field"),
    [
        ({"cpu_milli": -1}, {}, "capacity.cpu_milli"),
        ({"cpu_milli": 10**12}, {}, "capacity.cpu_milli"),
        ({"memory_bytes": -1}, {}, "capacity.memory_bytes"),
        ({"disk_bytes": 1 << 61}, {}, "capacity.disk_bytes"),
        ({"gpus": (GPU, GPU)}, {}, "capacity.gpus.id"),
        ({"gpus": (GpuDevice(id="", model="T4", memory_bytes=1),)}, {}, "capacity.gpus.id"),
        ({"gpus": (GpuDevice(id="g", model="T4", memory_bytes=-1),)}, {}, "capacity.gpus.memory_bytes"),
        ({"gpus": tuple(GpuDevice(id=f"g{number}", model="T4", memory_bytes=1) for number in range(1_025))}, {}, "capacity.gpus"),
        ({}, {"site": "s" * 254}, "site"),
        ({}, {"labels": {"a b": "x"}}, "labels"),
        ({}, {"name": "../x"}, "name"),
    ],
)
def test_a_machine_that_cannot_be_is_refused_and_not_written(capacity: dict[str, Any], more: dict[str, Any], field: str) -> None:
    chance = random.Random(1)

    async def main() -> None:
        async with Cell(chance) as cell:
            amounts = {"cpu_milli": 1000, "memory_bytes": 1 << 30, "disk_bytes": 1 << 30} | capacity
            with pytest.raises(Invalid) as refused:
                await cell.service.control_plane.register_node(Node(**({"name": "n1", "capacity": Capacity(**amounts)} | more)))
            assert refused.value.field == field
            assert not cell.state.records(Node)

    run_virtual(main, chance)


def test_what_an_agent_said_before_does_not_count_when_it_comes_after_what_it_said_then() -> None:
    """Else work is placed on a device that was said to have failed. (Found by the simulator, seed 2664.)"""
    chance = random.Random(1)

    async def main() -> None:
        async with Cell(chance) as cell:
            tell = cell.service.control_plane.register_node
            well = Node(name="n1", capacity=Capacity(cpu_milli=1, memory_bytes=1, disk_bytes=1, gpus=(GPU,)), word=7)
            broken = replace(well, capacity=replace(well.capacity, gpus=(replace(GPU, present=False),)), word=8)
            await tell(well)
            await tell(broken)
            with pytest.raises(Conflict, match="newer word"):
                await tell(well)
            assert cell.state.records(Node)["n1"].record.capacity.gpus[0].present is False
            await tell(replace(well, word=0))  # of an agent from before there were numbers
            await tell(replace(broken, word=7))
            # The same said anew is newer: what was said in between may still be on its way.
            await tell(replace(well, word=9))
            await tell(replace(well, word=11))
            with pytest.raises(Conflict):
                await tell(replace(broken, word=10))

    run_virtual(main, chance)


@pytest.mark.parametrize(
    ("beat", "field"),
    [
        ({"cpu_milli": -1}, "cpu_milli"),
        ({"memory_bytes": 1 << 63}, "memory_bytes"),
    ],
)
def test_a_nodes_use_that_cannot_be_is_refused_the_word_before_it_stays_and_the_node_lives(
    beat: dict[str, Any], field: str
) -> None:
    chance = random.Random(1)

    async def main() -> None:
        async with Cell(chance) as cell:
            good = Heartbeat(node="n1", at=1.0, cpu_milli=5, usage=(Usage(instance="i", cpu_milli=3),))
            await cell.service.control_plane.heartbeat(good)
            heartbeats = cell.service.heartbeats
            said = heartbeats.last_said()["n1"]
            await asyncio.sleep(7)
            with pytest.raises(Invalid) as refused:
                await cell.service.control_plane.heartbeat(Heartbeat(**({"node": "n1", "at": 2.0} | beat)))
            assert refused.value.field == field
            assert heartbeats.latest("n1") == good
            assert heartbeats.last_seen()["n1"] == said + 7
            assert heartbeats.last_said()["n1"] == said, "so that an old figure is not taken for a new one"

    run_virtual(main, chance)


@pytest.mark.parametrize("wrong", [Usage(instance="j", cpu_milli=-5), Usage(instance="j", sent_bytes=-1)])
def test_an_instances_use_that_cannot_be_is_left_out_and_all_else_counts(wrong: Usage) -> None:
    chance = random.Random(1)

    async def main() -> None:
        async with Cell(chance) as cell:
            beat = Heartbeat(node="n1", at=1.0, cpu_milli=5, usage=(Usage(instance="i", cpu_milli=3), wrong, Usage(instance="k")))
            await cell.service.control_plane.heartbeat(beat)
            kept = cell.service.heartbeats.latest("n1")
            assert kept == replace(beat, usage=(beat.usage[0], beat.usage[2]))
            assert cell.service.heartbeats.last_seen()["n1"] == cell.clock.monotonic()

    run_virtual(main, chance)


@pytest.mark.parametrize("number", ["NaN", "1e999", "-Infinity", "1.5", '"many"', "null"])
def test_what_is_no_whole_number_is_no_amount(number: str) -> None:
    body = f'{{"name": "n1", "capacity": {{"cpu_milli": {number}, "memory_bytes": 1, "disk_bytes": 1}}}}'
    with pytest.raises(Invalid):
        codec.decode(body.encode(), Node)
