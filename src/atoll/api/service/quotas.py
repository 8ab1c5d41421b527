"""What projects may have, and what they have of it: counted as the scheduler counts."""

from __future__ import annotations

import asyncio
from typing import Any

from atoll.api.service.context import Context
from atoll.api.service.projects import require_project
from atoll.api.service.specs import spec_of
from atoll.model.records import Instance, Project, Status
from atoll.model.views import QuotaUse, QuotaView
from atoll.scheduling.assembly import holds_room
from atoll.scheduling.demand import demand_of
from atoll.scheduling.ledger import amounts_of
from atoll.scheduling.quotas import CODE as OVER_QUOTA
from atoll.store.index import by_project

INSTANCES_PER_TURN = 1_000
"""Instances that are counted before the event loop gets its turn."""


class Quotas:
    def __init__(self, context: Context) -> None:
        self._context = context

    async def get(self, project: str) -> QuotaView:
        """Return a project's limits, what its placed instances hold, and how many wait for no other reason. Raises NotFound.

        Of very many instances each is counted as it stands when its turn comes.
        """
        require_project(self._context, project)
        state = self._context.state
        amounts: dict[tuple[Any, ...], tuple[int, int, int, int] | None] = {}
        cpu = memory = gpu = count = waiting = 0
        for number, key in enumerate(tuple(state.found(Instance, by_project, project)), start=1):
            if number % INSTANCES_PER_TURN == 0:
                await asyncio.sleep(0)
            one = state.get(Instance, key)
            if one is None:
                continue  # it has gone while others had their turn
            instance = one.record
            if instance.node is None:
                waiting += instance.rejection is not None and instance.rejection.code == OVER_QUOTA
                continue
            status = state.get(Status, key)
            if not holds_room(status.record if status is not None else None):
                continue
            which = (instance.owner_kind, instance.owner, instance.release)
            if which not in amounts:
                spec = spec_of(state, instance)
                amounts[which] = amounts_of(demand_of(spec)) if spec is not None else None
            each = amounts[which]
            if each is not None:
                cpu, memory, gpu, count = cpu + each[0], memory + each[1], gpu + each[3], count + 1
        held = state.get(Project, project)
        return QuotaView(
            project=project,
            quota=held.record.quota if held is not None else None,
            used=QuotaUse(cpu_milli=cpu, memory_bytes=memory, gpu_milli=gpu, instances=count),
            waiting=waiting,
            revision=held.revision if held is not None else 0,
        )
