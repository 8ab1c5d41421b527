"""Devices of CDI specs: each goes to one instance at a time, unless the node's operator says that it is shared."""

from __future__ import annotations

import numpy as np

from atoll.scheduling.demand import Demand
from atoll.scheduling.interface import Reason, View
from atoll.scheduling.rules.interface import Still
from atoll.scheduling.snapshot import Bools, Ints

MANY = 1 << 30
"""Room where nothing stands in the way."""


class HeldDevices(Still):
    name = "device-free"

    def wants(self, view: View, group: str, demand: Demand) -> bool:
        return bool(demand.devices)

    def passes(self, view: View, group: str, demand: Demand) -> Bools:
        mask: Bools = self.room(view, group, demand) > 0
        return mask

    def room(self, view: View, group: str, demand: Demand) -> Ints:
        room = np.full(view.size, MANY, dtype=np.int64)
        for name, node in view.nodes.nodes.items():
            alone = {device.name for device in node.capacity.devices if not device.shared} & set(demand.devices)
            row = view.nodes.row_of(name) if alone else None
            if row is not None:
                held = any(alone.intersection(allocation.devices) for _, allocation in view.nodes.ledger.on(name))
                room[row] = 0 if held or any(row in view.rows_with_device(device) for device in alone) else 1
        return room

    def explain(self, view: View, group: str, demand: Demand, failed: Ints) -> Reason:
        return Reason(
            f"whose {', '.join(demand.devices)} another instance has",
            "stop that one, add a node with such a device, or have the operator share it (--cdi-devices KIND:shared)",
        )
