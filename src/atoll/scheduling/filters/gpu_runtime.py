"""A runtime that hands on this node's GPUs: gVisor's proxy knows some drivers only, a virtual machine needs an IOMMU."""

from __future__ import annotations

from atoll.scheduling.demand import Demand
from atoll.scheduling.interface import Reason, View
from atoll.scheduling.snapshot import Bools, Ints

ROWS_MAX = 1_000
REASONS_MAX = 3
"""Different reasons that are told."""


class GpuRuntimes:
    """As nodes said when they registered (`Capacity.gpu_refusals`)."""

    name = "gpu-runtime"

    def wants(self, demand: Demand) -> bool:
        return demand.gpu is not None

    def passes(self, view: View, demand: Demand) -> Bools:
        return view.nodes.offers_any(demand.runtimes, gpu=True)

    def explain(self, view: View, demand: Demand, failed: Ints) -> Reason:
        nodes = [view.nodes.nodes[view.nodes.names[row]] for row in failed[:ROWS_MAX].tolist()]
        refusals = [(runtime, node.capacity.gpu_refusals.get(runtime, "")) for node in nodes for runtime in demand.runtimes]
        reasons = list(dict.fromkeys(f"{runtime}: {why}" for runtime, why in refusals if why))
        words = "; ".join(reasons[:REASONS_MAX]) + ("; …" if len(reasons) > REASONS_MAX else "")
        able = sorted({name for node in nodes for name in node.runtimes if name not in node.capacity.gpu_refusals})
        mend = f"these nodes hand them on with {', '.join(able)}: change isolation or runtime" if able else "see atoll doctor there"
        return Reason(f"whose GPUs cannot be handed on with {' or '.join(demand.runtimes)} ({words})", mend)
