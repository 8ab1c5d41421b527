"""`placement.residency`: only at sites in these countries, groups of countries or regions. What nobody has placed is in none."""

from __future__ import annotations

import numpy as np

from atoll.model.records import Site
from atoll.model.spec import AREAS, COUNTRIES
from atoll.scheduling.demand import Demand
from atoll.scheduling.interface import Reason, View
from atoll.scheduling.snapshot import Bools, Ints


class Residency:
    name = "residency"

    def wants(self, demand: Demand) -> bool:
        return bool(demand.placement.residency)

    def passes(self, view: View, demand: Demand) -> Bools:
        """A region is that of the site's record, never what a node says of itself."""
        sites = view.nodes.whereabouts.geography.sites
        by_site = [resides(sites.get(name), demand.placement.residency) for name in view.nodes.values("site")]
        mask: Bools = np.array([*by_site, False], dtype=np.bool_)[view.nodes.label("site")]
        return mask

    def explain(self, view: View, demand: Demand, failed: Ints) -> Reason:
        sites = view.nodes.whereabouts.geography.sites
        there = {view.nodes.nodes[view.nodes.names[row]].site for row in failed[:1000].tolist()}
        nowhere = sorted(name for name in there if name not in sites or not (sites[name].country or sites[name].region))
        asked = ", ".join(demand.placement.residency)
        if nowhere:
            mend = f"say where site {nowhere[0]} is: atoll sites set {nowhere[0]} --country CODE"
            return Reason(f"not known to be in {asked}", mend)
        known = sorted({sites[name].country or sites[name].region for name in there})
        return Reason(f"not in {asked}", f"there are sites in {', '.join(known[:10])}; add nodes in {asked}")


def resides(site: Site | None, names: tuple[str, ...]) -> bool:
    """Return whether a site is in one of the countries, groups of countries or regions."""
    if site is None:
        return False
    for name in names:
        if name in AREAS:
            if site.country in AREAS[name]:
                return True
        elif name in COUNTRIES:
            if site.country == name:
                return True
        elif site.region == name:
            return True
    return False
