"""What an agent may say of its machine: amounts that can be, words that can be shown. Checked once, where it comes in."""

from __future__ import annotations

from msgspec.structs import replace

from atoll.model.errors import Invalid
from atoll.model.labels import check_labels, check_taints
from atoll.model.records import Capacity, Heartbeat, Node, Usage

CPU_MILLI_MAX = 10**9
"""A million cores."""
BYTES_MAX = 1 << 60
DEVICES_MAX = 1_024
"""GPUs, and other devices."""
CHARACTERS_MAX = 253
PORTS_MAX = 65_536 * 2
COUNT_MAX = 1 << 62
"""Bytes, packets and the like of one instance."""

_COUNTS = tuple(name for name in Usage.__struct_fields__ if name not in ("instance", "gpu_silent", "metrics"))


def checked(node: Node) -> Node:
    """Return what is kept of what an agent says. Raises Invalid, naming the field."""
    for field in ("site", "region", "arch", "version", "address"):
        if len(getattr(node, field)) > CHARACTERS_MAX:
            raise Invalid(f"{field}: more than {CHARACTERS_MAX} characters", field=field)
    if len(node.ports_taken) > PORTS_MAX:
        raise Invalid(f"ports_taken: more than {PORTS_MAX}", field="ports_taken")
    _check_capacity(node.capacity)
    check_labels(node.labels)
    return replace(node, taints=check_taints(node.taints))


def possible(heartbeat: Heartbeat) -> tuple[Heartbeat, dict[str, str]]:
    """Return the heartbeat without the use of those instances of which an amount cannot be, and of each of these which one.

    Raises Invalid where an amount of the node itself cannot be.
    """
    for field in ("cpu_milli", "memory_bytes"):
        _check(getattr(heartbeat, field), COUNT_MAX, field)
    wrong: dict[str, str] = {}
    for usage in heartbeat.usage:
        for field in _COUNTS:
            if not 0 <= getattr(usage, field) <= COUNT_MAX:
                wrong[usage.instance] = field
    if not wrong:  # nearly always, and there are very many
        return heartbeat, wrong
    return replace(heartbeat, usage=tuple(usage for usage in heartbeat.usage if usage.instance not in wrong)), wrong


def _check_capacity(capacity: Capacity) -> None:
    _check(capacity.cpu_milli, CPU_MILLI_MAX, "capacity.cpu_milli")
    for field in ("memory_bytes", "disk_bytes"):
        _check(getattr(capacity, field), BYTES_MAX, f"capacity.{field}")
    if len(capacity.gpus) > DEVICES_MAX or len(capacity.devices) > DEVICES_MAX:
        raise Invalid(f"capacity: more than {DEVICES_MAX} devices", field="capacity.gpus")
    for device in capacity.gpus:
        _check(device.memory_bytes, BYTES_MAX, "capacity.gpus.memory_bytes")
        if not 0 < len(device.id) <= CHARACTERS_MAX or len(device.model) > CHARACTERS_MAX:
            raise Invalid(f"capacity.gpus: {device.id[:60]!r} is no name of a device", field="capacity.gpus.id")
    if len({device.id for device in capacity.gpus}) < len(capacity.gpus):
        raise Invalid("capacity.gpus: two devices have one name", field="capacity.gpus.id")


def _check(amount: int, most: int, field: str) -> None:
    if not 0 <= amount <= most:
        mend = "it is what the agent measured: see its log and `atoll doctor` there"
        raise Invalid(f"{field}: {amount} cannot be; 0 to {most} can", field=field, mend=mend)
