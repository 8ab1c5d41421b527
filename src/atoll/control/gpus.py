"""What becomes of an instance whose device is sick or gone. Pure; apps and jobs ask.

A device that is gone takes its work with it: it is replaced at once. One that is sick still works: what serves on it leaves when
another serves, as in a rollout. A silent driver says nothing of its devices, so what runs on them is left alone.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Sequence

from atoll.control.actions import Ailment, Decision, Seen
from atoll.model.devices import GpuDevice, GpuHealth
from atoll.model.records import Instance, Severity
from atoll.model.states import Desired, Phase

LEAVING_MAX = 8
"""Instances of one owner that are on their way out at a time because their devices are gone: when a rack fails, or a driver is
bad everywhere, it is a stream and no flood."""
AGE_MIN_S = 10.0
"""An instance is replaced only when it has had its node for so long: a release that breaks devices goes through one in so long,
and not through them all."""
EXCUSES_MAX = 2
"""Tries of one index that do not count because of their devices; what breaks a third one counts."""


class Urgency(enum.Enum):
    NOW = enum.auto()
    SERVING = enum.auto()
    """When another serves in its place."""


def ailment_of(instance: Instance, devices: Sequence[GpuDevice]) -> Ailment | None:
    """Return what is wrong with the instance's devices, given those that its node lists."""
    found = [ailment for grant in instance.gpus if (ailment := _ailment(grant.device, devices)) is not None]
    return max(found, key=lambda ailment: (ailment.gone, not ailment.silent), default=None)


def _ailment(id: str, devices: Sequence[GpuDevice]) -> Ailment | None:
    device = next((device for device in devices if device.id == id), None)
    if device is None:
        return Ailment(device=id, why=f"GPU {id} is not there any more", gone=True)
    name = f"{device.model} {id}"
    if not device.present:
        return Ailment(device=id, why=f"{name}: {device.reason or 'it has vanished'}", gone=True)
    if device.health is not GpuHealth.QUARANTINED:
        return None
    return Ailment(device=id, why=f"{name} is quarantined: {device.reason or 'no reason given'}", silent=not device.answers)


def urgency_of(seen: Seen) -> Urgency | None:
    """Return how soon an instance that is meant to run must be replaced for its devices' sake; None for not at all."""
    ailment = seen.ailment
    if ailment is None or seen.ended or seen.instance.desired is not Desired.RUN:
        return None
    if ailment.gone:
        return Urgency.NOW
    if ailment.silent:
        return Urgency.NOW if seen.phase is Phase.BACKOFF else None
    return Urgency.SERVING if seen.ready else Urgency.NOW


def due(instances: Iterable[Seen], decision: Decision, *, serving: bool = False) -> list[Seen]:
    """Return which of an owner's instances may be told to go now, the oldest first; with `serving` those too that serve.

    Wakes for those that are too young; what is over the bound comes up again as each of the others ends.
    """
    wanted = (Urgency.NOW, Urgency.SERVING) if serving else (Urgency.NOW,)
    instances = tuple(instances)
    leaving = sum(seen.instance.excused and not seen.ended for seen in instances)
    found = []
    for seen in instances:
        if urgency_of(seen) not in wanted:
            continue
        since = seen.instance.placed_at or seen.instance.created_at
        if 0 <= decision.now - since < AGE_MIN_S:
            decision.wake(since + AGE_MIN_S)
        else:
            found.append(seen)
    found.sort(key=lambda seen: (seen.instance.created_at, seen.instance.id))
    return found[: max(0, LEAVING_MAX - leaving)]


def tell(decision: Decision, seen: Seen) -> None:
    """Say why the instance is replaced."""
    instance, ailment = seen.instance, seen.ailment
    if ailment is None:
        raise AssertionError("only what holds a sick device is replaced for it")
    subject = f"instance/{instance.id}"
    text = f"is replaced: {ailment.why}"
    decision.tell(instance.project, subject, "gpu-replaced", text, Severity.WARNING, node=instance.node, device=ailment.device)


def excuses_left(seen: Seen, others: Iterable[Seen]) -> bool:
    """Whether a job's try may be laid to its device; `others` are all tries that are known."""
    excused = sum(other.instance.excused and other.instance.index == seen.instance.index for other in others)
    return seen.ailment is not None and excused < EXCUSES_MAX
