"""Quotas of projects: what all placed instances of one may hold together. Counted in the rows of the resource columns."""

from __future__ import annotations

from collections.abc import Iterator

from atoll.model.devices import MILLI
from atoll.model.records import Rejection
from atoll.model.spec import Quota
from atoll.model.units import format_bytes
from atoll.scheduling.demand import Demand
from atoll.scheduling.groups import project_of_group
from atoll.scheduling.interface import View
from atoll.scheduling.snapshot import CPU, GPU, MEMORY, amounts_of

CODE = "over-quota"


def room(view: View, group: str, demand: Demand, count: int) -> int:
    """Return how many of up to `count` instances the quota of their project lets be placed."""
    project = project_of_group(group)
    if project in view.nodes.unread:
        return 0
    quota = view.nodes.quotas.get(project)
    if quota is None:
        return count
    return max(0, min([count, *(left // each for _, left, each in _left(view, group, demand, quota))]))


def over(view: View, group: str, demand: Demand, together: int = 1) -> Rejection:
    """Return why the quota lets no more of the class be placed, or no `together` of it at once."""
    project = project_of_group(group)
    if project in view.nodes.unread:
        return Rejection(
            code=CODE,
            message=f"the quota of project '{project}' is of a newer version, or damaged: nothing new is placed",
            mend="update all servers, or have an admin set the quota again at one that is new",
        )
    quota = view.nodes.quotas[project]
    name, left, each = min(_left(view, group, demand, quota), key=lambda part: part[1] // part[2])
    who = f"these {together} ask" if together > 1 else "this asks"
    asked, free = _words(name, each * together), _words(name, max(0, left))
    return Rejection(
        code=CODE,
        message=f"project '{project}' has {free} of its quota of {name} left, and {who} for {asked}",
        mend="scale something down (a rollout needs quota for max_surge too), or have an admin raise the quota",
    )


def _left(view: View, group: str, demand: Demand, quota: Quota) -> Iterator[tuple[str, int, int]]:
    """Yield what is limited, how much of it is left, and how much each instance asks for (more than 0)."""
    used = view.project_use(project_of_group(group))
    amounts = amounts_of(demand)
    parts = (
        ("cpu", quota.cpu.milli if quota.cpu is not None else None, used[CPU], amounts[CPU]),
        ("memory", int(quota.memory) if quota.memory is not None else None, used[MEMORY], amounts[MEMORY]),
        ("gpu", quota.gpu * MILLI if quota.gpu is not None else None, used[GPU], amounts[GPU]),
        ("instances", quota.instances, used[-1], 1),
    )
    for name, most, held, each in parts:
        if most is not None and each > 0:
            yield name, most - held, each


def _words(name: str, amount: int) -> str:
    if name == "memory":
        return format_bytes(amount)
    if name == "gpu":
        return f"{amount / MILLI:g}"
    return f"{amount / 1000:g} cores" if name == "cpu" else str(amount)
