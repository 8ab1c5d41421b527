"""What ingresses have requests for, of apps that sleep, and how many, of apps that scale by them: in memory only. Each server is
told; the one that leads decides by it."""

from __future__ import annotations

from collections.abc import Callable

from msgspec import UNSET

from atoll.api.service.context import Context
from atoll.api.service.speakers import Speakers
from atoll.model.errors import NotFound, TooLarge
from atoll.model.records import App, Ingress
from atoll.model.spec import Idle
from atoll.model.traffic import DEMAND_APPS_MAX, DemandReport, Load
from atoll.scheduling.forecast import MINUTE_S, Forecast

FORECASTS_MAX = 10_000
"""Apps whose past is kept, some 4 KiB each; one beyond them sleeps after `idle_after`."""


class Demands:
    """See `control.sleeping.Demand`. Only apps that are there and sleep are kept, and ingresses that have registered."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self.changed: Callable[[str], None] = lambda app: None
        self.last: dict[str, float] = {}
        self.heard: dict[str, float] = {}
        self.forecasts: dict[str, Forecast] = {}
        self.loads: dict[str, dict[str, Load]] = {}
        self._speakers = Speakers()

    def note(self, report: DemandReport) -> None:
        """Take a report over. Safe to repeat. Raises NotFound for an ingress that has not registered, TooLarge."""
        if len(report.apps) > DEMAND_APPS_MAX:
            raise TooLarge(f"apps: {len(report.apps)} in one report; at most {DEMAND_APPS_MAX}", field="apps")
        if len(report.loads) > DEMAND_APPS_MAX:
            raise TooLarge(f"loads: {len(report.loads)} in one report; at most {DEMAND_APPS_MAX}", field="loads")
        state = self._context.state
        if state.get(Ingress, report.ingress) is None:
            raise NotFound(f"no ingress '{report.ingress[:60]}'", mend="register it first")
        now = self._context.clock.monotonic()
        for app in report.apps:
            held = state.get(App, app)
            if held is None or not held.record.sleeps:
                continue
            self.last[app] = now
            self._learn(held.record)
            self.changed(app)
        if report.loads and self._speakers.hears(report.ingress, report.started, now):
            self._add(report)
        if report.complete:
            self.heard[report.ingress] = now
            for gone in [name for name in self.heard if state.get(Ingress, name) is None]:
                del self.heard[gone]
            if len(self.last) > DEMAND_APPS_MAX:
                for gone in [app for app in self.last if state.get(App, app) is None]:
                    del self.last[gone]

    def _learn(self, app: App) -> None:
        """Note that there is a request now, for an app that sleeps by what is expected of it; of `FORECASTS_MAX` at most."""
        scale, key = app.spec.scale, f"{app.project}/{app.name}"
        if scale is UNSET or scale.idle is not Idle.PREDICT:
            self.forecasts.pop(key, None)
            return
        if key not in self.forecasts:
            for gone in [each for each in self.forecasts if self._context.state.get(App, each) is None]:
                del self.forecasts[gone]
            if len(self.forecasts) >= FORECASTS_MAX:
                return
            self.forecasts[key] = Forecast()
        self.forecasts[key].note(int(self._context.clock.now() // MINUTE_S))

    def _add(self, report: DemandReport) -> None:
        state = self._context.state
        loads = self.loads.setdefault(report.ingress, {})
        for each in report.loads:
            before = loads.get(each.app)
            fresh = Load(report.started, report.uptime_s, each.requests, each.request_s)
            late = before is not None and fresh.started == before.started and fresh.uptime_s < before.uptime_s
            if not late and state.get(App, each.app) is not None:
                loads[each.app] = fresh
        if len(loads) > 2 * len(report.loads):
            for gone in [app for app in loads if state.get(App, app) is None]:
                del loads[gone]
        if len(self.loads) > len(state.records(Ingress)):
            for gone in [name for name in self.loads if state.get(Ingress, name) is None]:
                del self.loads[gone]
            self._speakers.keep(self.loads)
