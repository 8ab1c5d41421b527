"""All that a decision about one app may depend on."""

from __future__ import annotations

from collections.abc import Mapping

from msgspec import Struct

from atoll.control.actions import Seen
from atoll.control.analysis import Verdict
from atoll.control.autoscale import Choice
from atoll.model.records import App, AppStatus
from atoll.model.spec import AppSpec


class AppFacts(Struct, frozen=True, kw_only=True):
    app: App
    revision: int
    status: AppStatus | None
    instances: tuple[Seen, ...]
    specs: Mapping[int, AppSpec] = {}
    """Release → spec, of those that are still held."""
    ingresses: frozenset[str] = frozenset()
    waits_for: tuple[str, ...] = ()
    """Apps that it depends on and that are not ready at their wanted release."""
    stops_after: tuple[str, ...] = ()
    """It is to stop, and these depend on it, are to stop too, and are still there."""
    choice: Choice | None = None
    """What the app's metric asks for, where it scales by one."""
    awake: bool | None = None
    """Of an app that sleeps: whether it is to have instances now. None of any other."""
    foreseen: bool = False
    """Whether that was decided by what is expected of it."""
    verdict: Verdict | None = None
    """What was found of the release that is being rolled out, last."""
    sites: Mapping[str, int] = {}
    """Site → how many instances it should have, where the app is near its users."""

    @property
    def wanted(self) -> int:
        """How many instances there should be."""
        if self.app.deleting or self.awake is False:
            return 0
        if self.choice is not None:
            return self.choice.wanted
        return 1 if self.awake else self.app.wanted(self.status)

    def drain_s(self, seen: Seen) -> float | None:
        if seen.idle:
            return None
        spec = self.specs.get(seen.instance.release, self.app.spec)
        return float(spec.rollout.drain) if spec.port_named(None) is not None else None
