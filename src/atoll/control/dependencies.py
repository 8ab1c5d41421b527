"""Apps that depend on others: they start and roll when those are ready, and stop before them. Pure but for the index.

While an app waits to roll it is decided as if it still wanted the release that serves, so it heals and serves on, and no deadline
runs. Once something of the wanted release is there, it goes on whatever becomes of the others: a database that fails later stops
nobody from being replaced.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable

from msgspec import structs

from atoll.control.actions import Decision, WriteAppStatus
from atoll.control.facts import AppFacts
from atoll.control.leaving import leave
from atoll.model.records import App, AppPhase, AppStatus, OwnerKind
from atoll.model.states import Desired
from atoll.store.cache import Delta, State


class Dependencies:
    """Who depends on whom, kept current as apps come and go; keys are `project/name`."""

    def __init__(self, state: State, owns: Callable[[tuple[OwnerKind, str]], bool]) -> None:
        self._state = state
        self._owns = owns
        """Whether an app has instances still."""
        self._on: dict[str, set[str]] = defaultdict(set)
        """App → those that depend on it."""

    def rebuild(self) -> None:
        self._on.clear()
        for key, held in self._state.records(App).items():
            for name in held.record.spec.depends_on:
                self._on[f"{held.record.project}/{name}"].add(key)

    def apply(self, delta: Delta) -> None:
        """Take over what became of an app."""
        for name in delta.old.record.spec.depends_on if delta.old is not None else ():
            self._on[f"{delta.old.record.project}/{name}"].discard(delta.key)  # type: ignore[union-attr]  # it is there
        for name in delta.new.record.spec.depends_on if delta.new is not None else ():
            self._on[f"{delta.new.record.project}/{name}"].add(delta.key)  # type: ignore[union-attr]  # it is there

    def beside(self, key: str) -> list[str]:
        """Return the apps that must be looked at when the one at `key`, or its status, has changed."""
        held = self._state.get(App, key)
        before = [f"{held.record.project}/{name}" for name in held.record.spec.depends_on] if held is not None else []
        return [*self._on.get(key, ()), *before]

    def waits_for(self, app: App) -> tuple[str, ...]:
        """Return what the app depends on and is not ready at its wanted release."""
        return tuple(name for name in app.spec.depends_on if not self._ready(f"{app.project}/{name}"))

    def stops_after(self, key: str, app: App) -> tuple[str, ...]:
        """Return those that depend on an app that is to stop, are to stop too, and are still there."""
        if not _stops(app):
            return ()
        found = []
        for name in self._on.get(key, ()):
            held = self._state.get(App, name)
            if held is not None and _stops(held.record) and self._owns((OwnerKind.APP, name)):
                found.append(held.record.name)
        return tuple(sorted(found))

    def _ready(self, key: str) -> bool:
        app, status = self._state.get(App, key), self._state.get(AppStatus, key)
        if app is None or status is None or app.record.deleting:
            return False
        serves = status.record.phase in (AppPhase.RUNNING, AppPhase.ASLEEP) and status.record.release == app.record.release
        return serves and status.record.served_release == app.record.release


def _stops(app: App) -> bool:
    return app.deleting or (app.replicas == 0 and not app.sleeps)


def in_order(facts: AppFacts, decision: Decision, decide: Callable[[AppFacts, Decision], None]) -> None:
    """Decide about an app, held back where it waits for others; what it waits for is in its status."""
    app = facts.app
    if facts.stops_after and facts.instances:
        for seen in facts.instances:
            if seen.instance.desired is not Desired.RUN:
                leave(decision, seen, drain_s=facts.drain_s(seen), ingresses=facts.ingresses)
        if facts.status is not None:
            text = f"stops when {', '.join(facts.stops_after)} has stopped"
            _write(facts, decision, structs.replace(facts.status, message=text, waits_for=facts.stops_after))
        return
    held = _held(facts)
    if held is None:
        decide(facts, decision)
        return
    decide(structs.replace(facts, app=held), decision)
    written = [action.status for action in decision.actions if isinstance(action, WriteAppStatus)]
    decision.actions[:] = [action for action in decision.actions if not isinstance(action, WriteAppStatus)]
    status = written[-1] if written else facts.status
    if status is not None:
        text = f"release {app.release} waits for {', '.join(facts.waits_for)} to be ready"
        served = facts.status.served_release if facts.status is not None else 0
        status = structs.replace(status, phase=AppPhase.DEPLOYING, message=text, served_release=served, waits_for=facts.waits_for)
        _write(facts, decision, status)


def _held(facts: AppFacts) -> App | None:
    """Return the app as it is to be while it waits; None where it waits for nothing."""
    app, status = facts.app, facts.status
    if not facts.waits_for or _stops(app) or any(seen.instance.release == app.release for seen in facts.instances):
        return None
    served = status.served_release if status is not None else 0
    spec = facts.specs.get(served)
    if served and served != app.release and spec is not None and facts.instances:
        return structs.replace(app, release=served, spec=spec)
    return structs.replace(app, replicas=0) if not facts.instances else None


def _write(facts: AppFacts, decision: Decision, status: AppStatus) -> None:
    if status != facts.status:
        decision.do(WriteAppStatus(status))
