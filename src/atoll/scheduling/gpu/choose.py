"""Which devices of one node an instance gets. Pure: a state and what is asked in, parts out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import combinations, islice
from math import comb

from msgspec import structs

from atoll.model.devices import MILLI, GpuSharing
from atoll.model.spec import Gpu, GpuTopology
from atoll.scheduling.gpu.asks import Ask, Step, ask_of, partitionable
from atoll.scheduling.gpu.devices import Shape, State, Taken, partition
from atoll.scheduling.gpu.mig import with_part

SETS_MAX = 3_000
"""Sets of devices that are compared; where there are more (16 devices and up), sets are grown from each device instead."""
CLIQUE_STEPS_MAX = 50_000
"""Steps of the search for devices that are all joined."""


def choose(state: State, ask: Ask, matching: tuple[int, ...]) -> tuple[Taken, ...] | None:
    """Return what the next instance gets of the devices at `matching`; None where they have no room for it."""
    if ask.gpu.profile is not None:
        return _partitions(state, ask, matching)
    if ask.sharing is GpuSharing.EXCLUSIVE:
        return _whole(state, ask, matching)
    return _share(state, ask, matching)


def room(state: State, ask: Ask, matching: tuple[int, ...]) -> int | None:
    """Return how many instances `choose` would find room for, one after the other; None where only trying can tell."""
    devices, loads, topology = state.shape.devices, state.loads, ask.gpu.topology
    if ask.gpu.profile is not None or topology is GpuTopology.NVLINK:
        return None
    if ask.sharing is not GpuSharing.EXCLUSIVE:
        return sum(ask.times(devices[index], loads[index]) for index in matching)
    idle = [index for index in matching if loads[index].idle]
    if topology is GpuTopology.NUMA:
        return sum(len(near) // ask.count for near in _by_numa(state.shape, idle))
    return len(idle) // ask.count


def most_together(shape: Shape, ask: Ask) -> int:
    """Return the largest count of whole devices or partitions that a node of this shape could give one instance."""
    most = 0
    matching = ask.matching(shape)
    for count in range(1, ask.count):
        if choose(shape.bare, structs.replace(ask, count=count), matching) is None:
            break
        most = count
    return most


def whole_for(state: State, gpu: Gpu) -> tuple[Taken, ...]:
    """Return the whole devices to count for an instance of which it is not known what it holds: what it asked for, rounded up.

    Of those that it could have the least used ones, and where these are not enough the others.
    """
    ask, devices = ask_of(gpu), state.shape.devices

    def unlikely(index: int) -> tuple[bool, bool, bool, int]:
        load = state.loads[index]
        return (ask.step(devices[index]) is not Step.DOES, load.sharing is GpuSharing.EXCLUSIVE, not load.idle, index)

    places = sorted(range(len(devices)), key=unlikely)[: ask.count]
    return tuple(Taken(index, GpuSharing.EXCLUSIVE, MILLI, devices[index].memory_bytes) for index in places)


def _share(state: State, ask: Ask, matching: tuple[int, ...]) -> tuple[Taken, ...] | None:
    """The fullest device that is shared already; else an idle one: the smallest, and the worst connected."""
    shape, loads = state.shape, state.loads
    open = [index for index in matching if ask.times(shape.devices[index], loads[index])]
    if not open:
        return None
    shared = [index for index in open if not loads[index].idle]
    if shared:

        def left(index: int) -> tuple[int, int, int]:
            load = loads[index]
            return (MILLI - load.milli, shape.devices[index].memory_bytes - load.memory_bytes, index)

        best = min(shared, key=left)
    else:
        beside = _idle(state)
        best = min(open, key=lambda index: (shape.devices[index].memory_bytes, _near(shape, index, beside), index))
    return (Taken(best, ask.sharing, ask.milli, ask.memory_bytes(shape.devices[best])),)


def _partitions(state: State, ask: Ask, matching: tuple[int, ...]) -> tuple[Taken, ...] | None:
    """One by one, each on the device and at the start that cost least of what could still be made."""
    profile = ask.gpu.profile or ""
    chosen: list[Taken] = []
    layouts = {index: state.loads[index].parts for index in matching if partitionable(state.loads[index])}
    for _ in range(ask.count):
        best: tuple[float, int, int] | None = None
        for index, layout in layouts.items():
            table = state.shape.devices[index].table
            start = table.best_start(layout, profile)
            if start is not None:
                cost = table.worth(layout) - table.worth(with_part(layout, table.part(profile, start)))
                # Rounded, so that what is equal stays equal however it was added up.
                best = min(best or (round(cost, 9), index, start), (round(cost, 9), index, start))
        if best is None:
            return None
        _, index, start = best
        device = state.shape.devices[index]
        chosen.append(partition(device, index, profile, start))
        layouts[index] = with_part(layouts[index], device.table.part(profile, start))
    return tuple(chosen)


def _whole(state: State, ask: Ask, matching: tuple[int, ...]) -> tuple[Taken, ...] | None:
    """The set that is best connected in itself, and of such the one with the fewest links to what stays idle."""
    idle = [index for index in matching if state.loads[index].idle]
    if len(idle) < ask.count:
        return None
    shape, beside = state.shape, _idle(state)
    groups = [idle]
    if ask.gpu.topology is GpuTopology.NUMA:
        fitting = [near for near in _by_numa(shape, idle) if len(near) >= ask.count]
        least = min(map(len, fitting), default=0)
        groups = [near for near in fitting if len(near) == least]
    joined = ask.gpu.topology is GpuTopology.NVLINK
    sets = (chosen for group in groups for chosen in _sets(shape, group, ask.count, joined))
    best = min(sets, key=lambda chosen: _cost(shape, chosen, beside), default=None)
    if best is None:
        return None
    return tuple(Taken(index, GpuSharing.EXCLUSIVE, MILLI, shape.devices[index].memory_bytes) for index in best)


def _cost(shape: Shape, chosen: tuple[int, ...], idle: Sequence[int]) -> tuple[object, ...]:
    """Smallest is best: of one model, near each other, no larger than needed, far from what stays idle."""
    inside = [shape.nearness[one][other] for one, other in combinations(chosen, 2)]
    crossing = sum(shape.nearness[one][other] for one in chosen for other in idle if other not in chosen)
    models = len({shape.devices[index].model for index in chosen})
    memory = sum(shape.devices[index].memory_bytes for index in chosen)
    return (models, -min(inside, default=0), -sum(inside), memory, crossing, chosen)


def _sets(shape: Shape, group: Sequence[int], count: int, joined: bool) -> Iterator[tuple[int, ...]]:
    if joined:
        yield from islice(_cliques(shape, group, count), SETS_MAX)
    elif comb(len(group), count) <= SETS_MAX:
        yield from combinations(group, count)
    else:
        yield from (_grown(shape, group, seed, count) for seed in group)


def _grown(shape: Shape, group: Sequence[int], seed: int, count: int) -> tuple[int, ...]:
    chosen = [seed]
    while len(chosen) < count:
        rest = (index for index in group if index not in chosen)
        chosen.append(max(rest, key=lambda index: (_near(shape, index, chosen), -index)))
    return tuple(sorted(chosen))


def _cliques(shape: Shape, group: Sequence[int], count: int) -> Iterator[tuple[int, ...]]:
    """Yield sets of `count` devices that are all joined by NVLink, in order, until the search has taken too long."""
    steps = 0
    stack: list[tuple[tuple[int, ...], list[int]]] = [((), list(group))]
    while stack and steps < CLIQUE_STEPS_MAX:
        steps += 1
        chosen, rest = stack.pop()
        if len(chosen) == count:
            yield chosen
            continue
        for place in range(len(rest) - (count - len(chosen)), -1, -1):
            index = rest[place]
            stack.append(((*chosen, index), [other for other in rest[place + 1 :] if shape.joined(index, other)]))


def _by_numa(shape: Shape, group: Sequence[int]) -> list[list[int]]:
    near: dict[int, list[int]] = {}
    for index in group:
        near.setdefault(shape.devices[index].numa, []).append(index)
    return list(near.values())


def _idle(state: State) -> list[int]:
    devices = state.shape.devices
    return [i for i, load in enumerate(state.loads) if load.idle and devices[i].offered and not devices[i].mig]


def _near(shape: Shape, index: int, others: Sequence[int]) -> int:
    row = shape.nearness[index]
    return sum(row[other] for other in others)
