"""GPUs. In this first form whole devices are counted, and a node's free ones are assumed to be the wrong ones first.

A node with several models never gives more of one than it has, at the price of sometimes refusing what would fit.
"""

from __future__ import annotations

import numpy as np

from atoll.model.devices import GpuDevice
from atoll.model.spec import Gpu
from atoll.model.units import format_bytes
from atoll.scheduling.demand import Demand
from atoll.scheduling.interface import Reason, View
from atoll.scheduling.snapshot import GPU, Bools, Ints


def _matches(asked: Gpu, device: GpuDevice) -> bool:
    if asked.profile is not None:
        return False
    return asked.model in (None, device.model) and (asked.memory or 0) <= device.memory_bytes


def _matching(view: View, demand: Demand) -> Ints:
    """Return how many devices of the kind asked for each row has."""
    counts = np.zeros(view.size, dtype=np.int64)
    asked = demand.gpu
    if asked is not None:
        for row in np.flatnonzero(view.nodes.total[GPU, : view.size]).tolist():
            devices = view.nodes.nodes[view.nodes.names[row]].capacity.gpus if view.nodes.present[row] else ()
            counts[row] = sum(_matches(asked, device) for device in devices)
    return counts


def _in_words(demand: Demand) -> str:
    asked = demand.gpu or Gpu()
    parts = [f"{asked.count:g} GPU{'s' if asked.count > 1 else ''}"]
    if asked.model:
        parts.append(f"of model {asked.model}")
    if asked.memory:
        parts.append(f"with {format_bytes(asked.memory)}")
    if asked.profile:
        parts.append(f"of profile {asked.profile}")
    return " ".join(parts)


class GpuModel:
    """Enough devices of the kind asked for, whoever holds them now."""

    name = "gpu"

    def wants(self, demand: Demand) -> bool:
        return demand.gpu is not None

    def passes(self, view: View, demand: Demand) -> Bools:
        mask: Bools = _matching(view, demand) >= demand.gpus
        return mask

    def explain(self, view: View, demand: Demand, failed: Ints) -> Reason:
        devices = [d for row in failed[:1000].tolist() for d in view.nodes.nodes[view.nodes.names[row]].capacity.gpus]
        asked = _in_words(demand)
        if not devices:
            return Reason(f"without GPU ({asked} asked for)", "remove resources.gpu, or add a node with GPUs")
        models = ", ".join(sorted({device.model for device in devices})[:10])
        return Reason(f"without {asked}", f"the models there are {models}")


class GpuRoom:
    """Free devices."""

    name = "gpu-free"

    def wants(self, demand: Demand) -> bool:
        return demand.gpu is not None

    def room(self, view: View, demand: Demand) -> Ints:
        held = view.nodes.total[GPU, : view.size] - view.free[GPU]
        room: Ints = (_matching(view, demand) - held) // demand.gpus
        return room

    def explain(self, view: View, demand: Demand, failed: Ints) -> Reason:
        return Reason(f"without {_in_words(demand)} free", "stop what holds them, or add a node")
