"""Why devices will not do, in words that name what there is."""

from __future__ import annotations

from collections.abc import Iterable

from atoll.model.devices import MILLI, WALLS, GpuSharing
from atoll.model.spec import Gpu, GpuTopology
from atoll.model.units import format_bytes
from atoll.scheduling.gpu.asks import Ask, Step, ask_of, partitionable
from atoll.scheduling.gpu.choose import most_together
from atoll.scheduling.gpu.devices import Device, Shape, State

NAMES_MAX = 10
"""Models, profiles and the like that are listed."""


def asked_in_words(gpu: Gpu) -> str:
    """Return what is asked for: `0.5 GPUs of model H100, by mps`."""
    many = "s" if gpu.count != 1 else ""
    what = f"MIG partition{many} {gpu.profile}" if gpu.profile else f"GPU{many}"
    parts = [f"{gpu.count:g} {what}"]
    if gpu.vendor:
        parts.append(f"of {gpu.vendor}")
    if gpu.model:
        parts.append(f"of model {gpu.model}")
    if gpu.memory is not None:
        parts.append(f"with {format_bytes(gpu.memory)}")
    if gpu.sharing:
        parts.append(f"by {gpu.sharing}")
    if gpu.driver:
        parts.append(f"with driver {gpu.driver} or newer")
    if gpu.topology is GpuTopology.NVLINK:
        parts.append("all joined by NVLink")
    elif gpu.topology is GpuTopology.NUMA:
        parts.append("on one NUMA node")
    return " ".join(parts)


def wall_in_words(gpu: Gpu) -> str:
    """Return how the devices are given, and how hard the wall to others is."""
    sharing = ask_of(gpu).sharing
    return f"{sharing} ({WALLS[sharing]})"


def why_never(shapes: Iterable[Shape], gpu: Gpu) -> tuple[str, str]:
    """Return why no node with one of these shapes could ever take it, and what would change that."""
    ask, shapes = ask_of(gpu), list(shapes)
    devices = [device for shape in shapes for device in shape.devices]
    steps = [(ask.step(device), device) for device in devices]
    furthest = max(step for step, _ in steps)
    closest = [device for step, device in steps if step is furthest]
    message = f"without {asked_in_words(gpu)}"
    match furthest:
        case Step.VENDOR:
            vendors = _listed(device.vendor for device in devices)
            return message, f"the vendors there are {vendors}: change resources.gpu.vendor, or leave it out"
        case Step.MODEL:
            models = _listed(device.model for device in closest)
            return message, f"the models there are {models}: change resources.gpu.model, or leave it out"
        case Step.HEALTH:
            return (
                f"{message} (there are {len(closest)}, but quarantined)",
                "see why: atoll nodes show NODE; mend or replace the device",
            )
        case Step.DRIVER:
            drivers = _listed(device.driver or "unknown" for device in closest)
            return message, f"the drivers there are {drivers}: update one, or ask for less in resources.gpu.driver"
        case Step.MODE if gpu.profile is not None:
            return f"{message}: no device is in MIG mode", "switch MIG mode on for a device, or ask for count instead of profile"
        case Step.MODE:
            return (
                f"{message}: the devices are in MIG mode, which are given in partitions only",
                f"ask for a profile: {_profiles(closest)}",
            )
        case Step.PROFILE:
            return message, f"the profiles there are {_profiles(closest)}: change resources.gpu.profile"
        case Step.MEMORY:
            largest = format_bytes(_largest(ask, closest))
            return message, f"the largest there is has {largest}: ask for less in resources.gpu.memory"
        case Step.SHARING:
            ways = _listed(way for one in closest for way in one.sharing)
            return message, f"the devices there can be shared by {ways}: change resources.gpu.sharing"
        case Step.DOES:
            return message, _too_many(ask, shapes)


def why_not_now(states: Iterable[State], gpu: Gpu) -> tuple[str, str]:
    """Return how much is free at most on nodes in these states, all of which could take it were they empty."""
    ask, states = ask_of(gpu), list(states)
    devices = [device for state in states for device in state.shape.devices]
    sick = sum(ask.step(device) is Step.HEALTH for device in devices)
    message = f"without {asked_in_words(gpu)} free"
    if sick:
        message += f" ({sick} more quarantined)"
    return message, f"{_most_free(ask, states)}: wait, stop what holds them, or add a node"


def _most_free(ask: Ask, states: list[State]) -> str:
    if ask.gpu.profile is not None:
        names = {
            name
            for state in states
            for index in ask.matching(state.shape)
            if partitionable(state.loads[index])
            for name in state.shape.devices[index].table.by_name
            if state.shape.devices[index].table.starts(state.loads[index].parts, name)
        }
        return f"free is only room for {_listed(names)}" if names else "every partition is taken"
    if ask.sharing is GpuSharing.EXCLUSIVE:
        most = max(sum(state.loads[i].idle for i in ask.matching(state.shape)) for state in states)
        return f"at most {most} are free on one node" if most else "none is free"
    milli = memory = 0
    for state in states:
        for index in ask.matching(state.shape):
            load = state.loads[index]
            if load.sharing in (None, ask.sharing) and load.milli < MILLI:
                left = state.shape.devices[index].memory_bytes - load.memory_bytes
                milli, memory = max((milli, memory), (MILLI - load.milli, left))
    if not milli:
        return f"no device is free, or shared by {ask.sharing} with anything left"
    return f"at most {milli / MILLI:g} of a device with {format_bytes(max(memory, 0))} is free"


def _too_many(ask: Ask, shapes: list[Shape]) -> str:
    most = max(most_together(shape, ask) for shape in shapes)
    match ask.gpu.topology:
        case GpuTopology.NVLINK:
            return f"at most {most} of one node are all joined by NVLink: ask for fewer, or leave topology out"
        case GpuTopology.NUMA:
            return f"at most {most} are on one NUMA node: ask for fewer, or leave topology out"
        case GpuTopology.ANY if ask.gpu.profile is not None:
            return f"a node has room for {most} at most: ask for fewer"
        case GpuTopology.ANY:
            return f"the largest node has {most} of them: ask for fewer"


def _largest(ask: Ask, devices: list[Device]) -> int:
    if ask.gpu.profile is not None:
        return max(device.table.by_name[ask.gpu.profile].memory_bytes for device in devices)
    return max(device.memory_bytes for device in devices)


def _profiles(devices: list[Device]) -> str:
    largest_first = {p.name: (-p.memory_slices, -p.compute_slices, p.name) for d in devices for p in d.table.profiles}
    return ", ".join(sorted(largest_first, key=largest_first.__getitem__, reverse=True)[:NAMES_MAX])


def _listed(names: Iterable[str]) -> str:
    return ", ".join(sorted(set(names))[:NAMES_MAX]) or "none"
