"""GPUs: devices of the kind asked for, and room on them. Which ones is `scheduling.gpu`'s matter."""

from __future__ import annotations

from atoll.model.spec import Gpu
from atoll.scheduling.demand import Demand
from atoll.scheduling.gpu.words import asked_in_words, why_never, why_not_now
from atoll.scheduling.interface import Reason, View
from atoll.scheduling.snapshot import Bools, Ints

ROWS_MAX = 1_000
"""Nodes that the words about what there is look at."""


class GpuModel:
    """Devices of the kind asked for, as many and as near to each other as asked, whoever holds them now."""

    name = "gpu"

    def wants(self, demand: Demand) -> bool:
        return demand.gpu is not None

    def passes(self, view: View, demand: Demand) -> Bools:
        mask: Bools = view.devices.possible(_gpu(demand)) > 0
        return mask

    def explain(self, view: View, demand: Demand, failed: Ints) -> Reason:
        shapes = view.devices.shapes(failed[:ROWS_MAX].tolist())
        if not shapes:
            return Reason(
                f"without GPU ({asked_in_words(_gpu(demand))} asked for)", "remove resources.gpu, or add a node with GPUs"
            )
        return Reason(*why_never(shapes, _gpu(demand)))


class GpuRoom:
    """Room on the devices."""

    name = "gpu-free"

    def wants(self, demand: Demand) -> bool:
        return demand.gpu is not None

    def room(self, view: View, demand: Demand) -> Ints:
        return view.devices.room(_gpu(demand))

    def explain(self, view: View, demand: Demand, failed: Ints) -> Reason:
        return Reason(*why_not_now(view.devices.states(failed[:ROWS_MAX].tolist()), _gpu(demand)))


def _gpu(demand: Demand) -> Gpu:
    return demand.gpu or Gpu()
