"""What must serve at every moment of a run without faults: of an app in all, and of each release for its share of the requests."""

from __future__ import annotations

import asyncio
import math
from collections import Counter, defaultdict
from collections.abc import Mapping
from typing import Any

from atoll.model.records import App, AppStatus, Instance, OwnerKind, Status
from atoll.model.rollouts import RolloutStatus
from atoll.model.states import Desired
from atoll.sim.story import Story

SETTLED_S = 1.0
"""How long a number of ready instances must last until it may not be fallen below."""


class Serving:
    """Told of each revision by `Rules`, whose records it reads.

    What has been reached counts once it has lasted for `SETTLED_S`: who decides may not have heard of it before. A smaller wish and
    a smaller share count at once.
    """

    def __init__(self, story: Story, records: Mapping[type[Any], Mapping[str, Any]]) -> None:
        self._story = story
        self._records = records
        self.least_ready: dict[str, int] = {}
        """App → ready instances below which a calm run never falls."""
        self._least_of: dict[str, dict[int, int]] = {}
        """The same of each release that has a share of the requests."""
        self._lasts: dict[str, dict[int, tuple[int, float]]] = {}
        """App → release, or 0 for all that serve → how many are ready, and since when it is so many."""
        self._weights: dict[str, dict[int, int]] = {}

    def check(self) -> None:
        ready = self._ready()
        for name, app in self._records[App].items():
            self._check_app(name, app, ready[name])
        for name in [name for name in self.least_ready if name not in self._records[App]]:
            for kept in (self.least_ready, self._least_of, self._weights, self._lasts):
                kept.pop(name, None)

    def _ready(self) -> Mapping[str, Counter[int]]:
        """Return app → release → how many of its instances are ready and are to run."""
        found: dict[str, Counter[int]] = defaultdict(Counter)
        for key, instance in self._records[Instance].items():
            said: Status | None = self._records[Status].get(key)
            runs = instance.desired is Desired.RUN and not instance.standby and instance.owner_kind is OwnerKind.APP
            if runs and said is not None and said.ready:
                found[f"{instance.project}/{instance.owner}"][instance.release] += 1
        return found

    def _check_app(self, name: str, app: App, ready: Counter[int]) -> None:
        status: AppStatus | None = self._records[AppStatus].get(name)
        rollout = status.rollout if status is not None else None
        weights = {release: weight for release, weight in rollout.weights.items() if weight > 0} if rollout is not None else {}
        serving = sum(ready[release] for release in weights)
        if not serving and not _holds_back(rollout):
            serving = ready.total()  # where nothing else serves, what has no share does
        promised = 0 if app.deleting else max(0, app.replicas - app.spec.rollout.max_unavailable)
        lasting = self._lasting(name, {**ready, 0: serving})
        least = min(max(self.least_ready.get(name, 0), lasting.get(0, 0)), promised)
        if serving < least:
            self._story.breaks(f"{serving} instances of {name} serve; without faults {least} must")
        self.least_ready[name] = least
        self._check_shares(name, weights, ready, lasting, least)

    def _check_shares(
        self, name: str, weights: dict[int, int], ready: Counter[int], lasting: Mapping[int, int], least: int
    ) -> None:
        before, self._weights[name] = self._weights.get(name, {}), weights
        reached = self._least_of.get(name, {})
        self._least_of[name] = {}
        for release, weight in weights.items():
            asks = _asks(weight, least)
            must = min(max(reached.get(release, 0), lasting.get(release, 0)), asks)
            if before and weight > before.get(release, 0):
                must = asks
            self._least_of[name][release] = must
            if ready[release] < must and not (ready[release] == 0 and _others_bear(weights, ready, least)):
                self._story.breaks(
                    f"{ready[release]} instances of {name}, release {release}, serve {weight} % of the requests, for which "
                    f"{must} must without faults"
                )

    def _lasting(self, name: str, ready: Mapping[int, int]) -> dict[int, int]:
        """Return how many were ready until now, where that had lasted."""
        now = asyncio.get_running_loop().time()
        before = self._lasts.get(name, {})
        lasts = {of: before.get(of, (0, now)) for of in {*before, *ready}}
        changed = {of: (ready.get(of, 0), now) for of, (count, _) in lasts.items() if count != ready.get(of, 0)}
        self._lasts[name] = {**lasts, **changed}
        return {of: count for of, (count, since) in lasts.items() if now - since >= SETTLED_S}


def _asks(percent: float, least: int) -> int:
    """Return how many of `least` a share needs; shares are whole percents, so what one percent needs is not asked for."""
    return math.floor(least * (percent - 1) / 100 + 1e-9) + 1 if least else 0


def _others_bear(weights: Mapping[int, int], ready: Counter[int], least: int) -> bool:
    """Whether what is ready bears all requests, where a release has nothing ready and gives its share to the others."""
    whole = sum(weight for release, weight in weights.items() if ready[release])
    return all(ready[release] >= _asks(100 * weight / whole, least) for release, weight in weights.items() if ready[release])


def _holds_back(rollout: RolloutStatus | None) -> bool:
    """Whether a release gets no request, come what may."""
    return rollout is not None and rollout.phase.under_way and rollout.weight == 0
