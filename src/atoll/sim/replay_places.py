"""Where a replay's instances are, and how far from those who ask."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
from msgspec.structs import replace

from atoll.model.records import OwnerKind
from atoll.model.spec import NearKind
from atoll.scheduling.demand import Demand, Pending
from atoll.scheduling.geography import Geography
from atoll.scheduling.groups import owner_of_group
from atoll.scheduling.interface import View
from atoll.scheduling.layout import lay_out, sites_of
from atoll.scheduling.near import FAR_MS
from atoll.scheduling.snapshot import Snapshot
from atoll.sim.replay_trace import Trace

OWNERS_MAX = 50
"""Owners whose round trips are looked at, those with most instances."""


def near_group(owner: str) -> str:
    """Return the group of an owner's instances where they are placed near its users."""
    return f"{OwnerKind.APP}/sim/{owner.replace('/', '-')}/1/1"


class Places:
    """Every owner has the same users: the trace says where requests come from, not to whom."""

    def __init__(self, trace: Trace, snapshot: Snapshot) -> None:
        self.users = {site: demand for site, demand in trace.demand.items() if demand > 0}
        self._snapshot = snapshot
        snapshot.set_geography(Geography(trace.sites))
        self._site_of = {node.name: node.site for node in trace.nodes}
        sites = sorted({*self._site_of.values()})
        self._ms = snapshot.whereabouts.geography.round_trips_ms(list(self.users), sites)
        self._column = {site: column for column, site in enumerate(sites)}
        self._at: dict[str, Counter[str]] = {}
        """Owner → site → instances that run there."""
        self._near: dict[Demand, Demand] = {}

    def near(self, demand: Demand) -> Demand:
        """Return the demand with the wish to be near its users."""
        if demand not in self._near:
            self._near[demand] = replace(demand, placement=replace(demand.placement, near=NearKind.USERS))
        return self._near[demand]

    def lay_out(self, pending: Sequence[Pending]) -> None:
        """As the leader would, before it places anything: a layout for what runs and what waits of each owner."""
        whereabouts, view = self._snapshot.whereabouts, View(self._snapshot)
        demands = {item.group: item.demand for item in pending}
        for group, count in Counter(item.group for item in pending).items():
            owner, current = owner_of_group(group), sites_of(view, group)
            before = whereabouts.layouts.get(owner)
            if before is not None and before.count >= sum(current.values()) + count:
                continue
            whereabouts.traffic = {**whereabouts.traffic, owner: self.users}
            layout = lay_out(view, group, demands[group], sum(current.values()) + count, current)
            if layout is not None:
                whereabouts.layouts[owner] = layout

    def count(self, owner: str, node: str, by: int) -> None:
        """Count an instance that has come to a node (1), or has left it (-1)."""
        if self.users:
            sites, site = self._at.setdefault(owner, Counter()), self._site_of[node]
            sites[site] += by
            if not sites[site]:
                del sites[site]

    def latency_ms(self) -> float:
        """Return the round trip from users to the nearest instance of each owner, weighted by demand and by instances."""
        owners = sorted(((sum(sites.values()), owner) for owner, sites in self._at.items() if sites), reverse=True)[:OWNERS_MAX]
        if not owners:
            return 0.0
        shares = np.array(list(self.users.values()))
        total = 0.0
        for count, owner in owners:
            columns = [self._column[site] for site in self._at[owner]]
            nearest = np.minimum(self._ms[:, columns].min(axis=1), FAR_MS)
            total += count * float(shares @ nearest / shares.sum())
        return total / sum(count for count, _ in owners)
