"""`placement.latency_max`: no farther than that from what `near` names.

To an app: from its nearest instance. To users: a site serves those who are within the bound, and must have some: at least
`SHARE_MIN` of the requests. While nobody knows of any user the bound holds nobody back.
"""

from __future__ import annotations

import numpy as np

from atoll.model.spec import NearKind
from atoll.scheduling.demand import Demand
from atoll.scheduling.geography import UNKNOWN
from atoll.scheduling.interface import Reason, View
from atoll.scheduling.near import beside, bound_ms, latency_by_site, near, site_names, sites_within, user_ms
from atoll.scheduling.rules.interface import Still
from atoll.scheduling.snapshot import Bools, Ints


class Within(Still):
    name = "latency"

    def wants(self, view: View, group: str, demand: Demand) -> bool:
        return demand.placement.latency_max is not None

    def passes(self, view: View, group: str, demand: Demand) -> Bools:
        within = sites_within(view, group, demand)
        if within is None:
            return np.ones(view.size, dtype=np.bool_)
        # A row without a site is in none.
        mask: Bools = np.append(within, False)[view.nodes.label("site")]
        return mask

    def explain(self, view: View, group: str, demand: Demand, failed: Ints) -> Reason:
        wish, bound = near(demand), f"{bound_ms(demand):g}ms"
        if wish is None:
            return Reason(f"farther away than {bound}")
        whom = {NearKind.USERS: "1% of its users", NearKind.APP: wish.name, NearKind.SITE: f"site {wish.name}"}.get(
            wish.kind, "there"
        )
        if wish.kind is NearKind.APP and not beside(view, group, wish.name):
            return Reason(f"to be within {bound} of {wish.name}, which is nowhere", f"start {wish.name} first")
        names, column = site_names(view), view.nodes.label("site")[failed]
        nearest = self._nearest(view, group, demand)
        unknown = sorted({names[id] for id in np.unique(column[column >= 0]).tolist() if nearest[id] == UNKNOWN})
        if unknown:
            mend = f"say where it is: atoll sites set {unknown[0]} --at LATITUDE,LONGITUDE"
            return Reason(f"on sites of which nobody knows whether {whom} is within {bound}, such as {unknown[0]}", mend)
        best = float(nearest[column].min()) if len(column) else UNKNOWN
        return Reason(
            f"farther than {bound} from {whom}", f"the nearest of these is {best:.0f}ms away; raise the bound, or add nodes nearer"
        )

    def _nearest(self, view: View, group: str, demand: Demand) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
        """Return by site how far it is to the nearest that would count."""
        wish = near(demand)
        if wish is not None and wish.kind is NearKind.USERS:
            found = user_ms(view, group)
            if found is not None:
                ms: np.ndarray[tuple[int], np.dtype[np.float64]] = found[0].min(axis=0)
                return ms
        latency = latency_by_site(view, group, demand)
        return latency if latency is not None else np.full(len(site_names(view)), UNKNOWN)
