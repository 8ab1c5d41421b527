"""`resources.devices`: devices of CDI specs, by name. Which of them are free is `rules.devices`' matter."""

from __future__ import annotations

import numpy as np

from atoll.scheduling.demand import Demand
from atoll.scheduling.interface import Reason, View
from atoll.scheduling.snapshot import Bools, Ints

NAMES_SHOWN = 10


class Devices:
    """Nodes that offer every one of them, whoever has it now."""

    name = "device"

    def wants(self, demand: Demand) -> bool:
        return bool(demand.devices)

    def passes(self, view: View, demand: Demand) -> Bools:
        wanted = set(demand.devices)
        mask: Bools = np.zeros(view.size, dtype=np.bool_)
        for name, node in view.nodes.nodes.items():
            if node.capacity.devices and wanted <= {device.name for device in node.capacity.devices}:
                row = view.nodes.row_of(name)
                if row is not None:
                    mask[row] = True
        return mask

    def explain(self, view: View, demand: Demand, failed: Ints) -> Reason:
        there = sorted({device.name for node in view.nodes.nodes.values() for device in node.capacity.devices})
        absent = [name for name in demand.devices if name not in there]
        words = ", ".join(absent or demand.devices)
        known = ", ".join(there[:NAMES_SHOWN]) + (" …" if len(there) > NAMES_SHOWN else "")
        mend = f"nodes offer {known}" if there else "no node offers any: its operator allows them with --cdi-devices"
        return Reason(f"without {words}" if absent else f"without all of {words} together", mend)
