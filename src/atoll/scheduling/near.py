"""How far each site is from what `placement.near` names: the base of the rule, the wish and the layouts."""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from atoll.model.spec import Near, NearKind, near_of
from atoll.scheduling.demand import Demand
from atoll.scheduling.geography import LOCAL_MS, UNKNOWN, Floats
from atoll.scheduling.groups import owner_of_group, owners_named
from atoll.scheduling.interface import View
from atoll.scheduling.snapshot import Bools, Ints

FAR_MS = 1_000.0
"""What an unknown distance counts as where sites are compared; nothing counts as farther."""
SHARE_MIN = 0.01
"""A site is within the bound to users where at least this share of the requests comes from within it."""

_near_of = lru_cache(maxsize=4_096)(near_of)


def near(demand: Demand) -> Near | None:
    """Return what the demand wants to be near to."""
    return _near_of(demand.placement.near) if demand.placement.near is not None else None


def wants_users(demand: Demand) -> bool:
    return demand.placement.near == NearKind.USERS


def site_names(view: View) -> list[str]:
    """Return the names of sites, in the order of the ids of the label `site`."""
    return list(view.nodes.values("site"))


def by_row(view: View, by_site: Floats) -> Floats:
    """Spread values by site over the rows."""
    answer: Floats = by_site[view.nodes.label("site")]
    return answer


def beside(view: View, group: str, name: str) -> list[str]:
    """Return the sites that have an instance of the app or job `name`."""
    counts = sum((view.owner_counts(owner) for owner in owners_named(group, name)), np.zeros(view.size, dtype=np.int64))
    names, column = site_names(view), view.nodes.label("site")
    there: Ints = np.unique(column[(counts > 0) & view.nodes.present[: view.size]])
    return [names[id] for id in there.tolist() if id >= 0]


def user_ms(view: View, group: str) -> tuple[Floats, Floats] | None:
    """Return the round trips (places with users, sites) and each place's share; None where no place is known."""
    whereabouts = view.nodes.whereabouts
    users = whereabouts.users(owner_of_group(group))
    if not users.sites:
        return None
    return whereabouts.geography.round_trips_ms(users.sites, site_names(view)), users.shares


def latency_by_site(view: View, group: str, demand: Demand) -> Floats | None:
    """Return the round trip from each site to what `near` names (to users: the mean over their requests; to an app: to the nearest
    instance), `UNKNOWN` where nobody knows; None where there is nothing to be near to."""
    wish = near(demand)
    if wish is None or not site_names(view):
        return None
    geography, sites = view.nodes.whereabouts.geography, site_names(view)
    match wish.kind:
        case NearKind.USERS:
            found = user_ms(view, group)
            if found is None:
                return None
            ms, shares = found
            mean: Floats = shares @ np.minimum(ms, FAR_MS)
            mean[np.isinf(ms).all(axis=0)] = UNKNOWN
            return mean
        case NearKind.APP:
            there = beside(view, group, wish.name)
            return geography.round_trips_ms(there, sites).min(axis=0) if there else None
        case NearKind.SITE:
            answer: Floats = geography.round_trips_ms([wish.name], sites)[0]
            return answer
        case NearKind.POINT:
            return geography.from_point_ms(wish.latitude, wish.longitude, sites)


def bound_ms(demand: Demand) -> float:
    """Return the hard bound, infinite where there is none. Within one site any bound holds."""
    bound = demand.placement.latency_max
    return max(float(bound) * 1000.0, LOCAL_MS) if bound is not None else float("inf")


def sites_within(view: View, group: str, demand: Demand) -> Bools | None:
    """Return which sites the bound on latency allows; None where nobody knows of any user, so that there is nothing to hold."""
    wish = near(demand)
    if wish is not None and wish.kind is NearKind.USERS:
        found = user_ms(view, group)
        if found is None:
            return None
        ms, shares = found
        within: Bools = shares @ (ms <= bound_ms(demand)) >= SHARE_MIN - 1e-12
        return within
    latency = latency_by_site(view, group, demand)
    if latency is None:
        return np.zeros(len(site_names(view)), dtype=np.bool_)
    answer: Bools = latency <= bound_ms(demand)
    return answer
