"""How many instances of each release the shares of the requests need, in a rollout that goes by shares. Pure.

All requests of an app need `enough` instances (`replicas - max_unavailable`), so each bears as much as the others of them. A share
moves to a release no faster than its instances become ready, and an instance goes only when its share has moved: both are written
at once, and every ingress takes up both at once. Shares are whole percents: less than one percent is lost in rounding.
"""

from __future__ import annotations

from collections.abc import Mapping


def borne(ready: int, enough: int) -> int:
    """Return which share of the requests, in percent, so many instances bear; one that is ready bears 1 % at least."""
    if ready >= enough:
        return 100 if ready else 0
    return max(1, 100 * ready // enough) if ready > 0 else 0


def needed(share: int, enough: int) -> int:
    """Return how few instances bear `share` percent. What `n` of them bear and the rest of it never need more than `enough`."""
    return enough * (share - 1) // 100 + 1 if share > 0 and enough > 0 else 0


def must_stay(weights: Mapping[int, int], ready_of: Mapping[int, int], enough: int) -> dict[int, int]:
    """Return release → how many of its ready instances must stay, by its weight in percent.

    A release of which nothing is ready gives its share to the others, as at the ingress.
    """
    sharing = {release: weight for release, weight in weights.items() if weight > 0 and ready_of.get(release, 0) > 0}
    whole = sum(sharing.values())
    return {release: needed(-(-100 * weight // whole), enough) for release, weight in sharing.items()}


def may_go(release: int, weights: Mapping[int, int], ready_of: Mapping[int, int], enough: int) -> bool:
    """Whether one ready instance of `release` may go: the rest of them, or if it is the last all others, bear what it bears."""
    left = {**ready_of, release: ready_of.get(release, 0) - 1}
    stay = must_stay(weights, left, enough)
    if left[release] > 0:
        return left[release] >= stay.get(release, 0)
    return all(left[other] >= least for other, least in stay.items())
