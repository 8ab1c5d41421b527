"""A node's GPUs in words: what they are, who holds how much of each, and how they fare."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

from atoll.model.devices import MILLI, GpuDevice, GpuGrant, GpuHealth, GpuSharing

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from rich.text import Text

    from atoll.model.records import Capacity
    from atoll.model.views import GpuHolder, GpuHolding, NodeView

ID_CHARS = 12
"""Of a device's id in a table: enough to tell devices apart, and all of a PCI address."""

COLUMNS = ("GPU", "MODEL", "STATE", "HELD", "MEMORY", "BUSY>?", "TEMP>?", "DRIVER?", "HELD BY")


def count(view: NodeView) -> str:
    """Return how many of a node's devices something holds, of how many it has and can use: `3/8`; nothing without any."""
    devices = view.node.capacity.gpus
    if not devices:
        return ""
    held = {holding.device for holding in view.gpus}
    usable = sum(device.health is not GpuHealth.QUARANTINED for device in devices)
    sick = len(devices) - usable
    return f"{sum(device.id in held for device in devices)}/{len(devices)}" + (f" ({sick} out)" if sick else "")


def summary(devices: Sequence[GpuDevice]) -> str:
    """Return a node's devices on one line: `8 × NVIDIA H100 80GB HBM3 with 80.0GiB`."""
    from atoll.model.units import format_bytes

    kinds = Counter((device.model, device.memory_bytes) for device in devices)
    return ", ".join(f"{n} × {model} with {format_bytes(memory_bytes)}" for (model, memory_bytes), n in kinds.items()) or "none"


def rows(view: NodeView) -> list[tuple[Any, ...]]:
    """Return a line for each device, those that something holds and the node does not list any more at the end."""
    from atoll.cli.output import state

    samples = {sample.device: sample for sample in view.heartbeat.gpus} if view.heartbeat else {}
    held = {holding.device: holding for holding in view.gpus}
    listed = {device.id for device in view.node.capacity.gpus}
    found = []
    for device in view.node.capacity.gpus:
        sample = samples.get(device.id)
        holding = held.get(device.id)
        found.append(
            (
                short(device.id),
                device.model + (" (MIG)" if device.mig else ""),
                state(word(device)),
                _held(device, holding),
                _memory(device, sample.memory_bytes if sample else None),
                f"{sample.busy_milli / 10:.0f} %" if sample else "–",
                f"{sample.temperature_c} °C" if sample and sample.temperature_c else "–",
                device.driver + (f", CUDA {device.cuda}" if device.cuda else "") or "–",
                _names(holding.holders if holding else ()),
            )
        )
    for id in sorted(held.keys() - listed):
        found.append((short(id), "–", state("gone"), "–", "–", "–", "–", "–", _names(held[id].holders)))
    return found


def notes(capacity: Capacity) -> list[str]:
    """Return what a table has no room for: why a device is not well, what partitions it offers, and whose it has beside; and
    which runtimes cannot hand a node's devices on."""
    found = []
    for device in capacity.gpus:
        if device.reason:
            found.append(f"{short(device.id)} {word(device)}: {device.reason}")
        if device.mig:
            offers = ", ".join(f"{profile.name} (up to {profile.most})" for profile in device.profiles)
            found.append(f"{short(device.id)} can be partitioned as {offers or 'nothing: it names no profile'}")
        if device.foreign:
            theirs = ", ".join(f"{each.profile} at {each.start}" for each in device.foreign)
            found.append(f"{short(device.id)} has partitions that Atoll did not make and leaves alone: {theirs}")
    return [*found, *(f"not with {runtime}: {why}" for runtime, why in sorted(capacity.gpu_refusals.items()))]


def short(id: str) -> str:
    return id[:ID_CHARS]


def word(device: GpuDevice) -> str:
    """Return the one word for how a device stands."""
    if not device.present:
        return "gone"
    return str(device.health) if device.answers else "silent"


def grant_words(grant: GpuGrant) -> str:
    """Return how much of a device a grant is: `whole`, `50 %`, `1g.10gb at 2`."""
    if grant.sharing is GpuSharing.MIG:
        return f"{grant.profile} at {grant.start}"
    return "whole" if grant.sharing is GpuSharing.EXCLUSIVE else f"{grant.milli / MILLI:.0%}"


def grants_words(grants: Iterable[GpuGrant]) -> str:
    """Return an instance's devices for a line about it."""
    return ", ".join(
        short(grant.device) + ("" if grant.sharing is GpuSharing.EXCLUSIVE else f" {grant_words(grant)}") for grant in grants
    )


def _held(device: GpuDevice, holding: GpuHolding | None) -> str:
    if holding is None:
        return "free"
    if device.mig:
        return f"{sum(holder.grant.size for holder in holding.holders)}/{device.memory_slices} slices"
    if any(holder.grant.sharing is GpuSharing.EXCLUSIVE for holder in holding.holders):
        return "whole"
    return f"{holding.milli / MILLI:.0%}"


def _memory(device: GpuDevice, used_bytes: int | None) -> Text | str:
    from atoll.cli.output import bar
    from atoll.model.units import format_bytes

    if used_bytes is None:
        return format_bytes(device.memory_bytes)
    return bar(used_bytes, device.memory_bytes, f"{format_bytes(used_bytes)}/{format_bytes(device.memory_bytes)}")


def _names(holders: Sequence[GpuHolder]) -> str:
    words = []
    for holder in holders:
        name = holder.instance or "another project's"
        words.append(name if holder.grant.sharing is GpuSharing.EXCLUSIVE else f"{name} ({grant_words(holder.grant)})")
    return ", ".join(words) or "–"
