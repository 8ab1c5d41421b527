"""What a rollout looks like from outside: a pure fold over watch lines, which ends in a verdict."""

from __future__ import annotations

from msgspec import Struct

from atoll.model import codec
from atoll.model.errors import AtollError, Conflict, NotFound, Unsupported
from atoll.model.records import App, AppPhase, AppStatus, Event, Instance, Status
from atoll.model.rollouts import RolloutPhase
from atoll.model.states import Desired, Phase
from atoll.model.views import AppView, InstanceView, WatchLine

KINDS = ("apps", "app-statuses", "instances", "statuses", "events")
FAILURES_MAX = 4
FAILING_S = 3.0
"""An instance that was never ready and has failed `FAILURES_MAX` times over at least so long will not get better by waiting."""
NO_PLACE_S = 10.0
"""How long an instance may be without a place before the rollout counts as stuck."""


class RolloutFailed(AtollError):
    """The rollout did not end well; the message says why, `instance` is where to read its log."""

    code = "rollout-failed"

    def __init__(self, message: str, *, mend: str | None = None, instance: str | None = None) -> None:
        super().__init__(message, mend=mend)
        self.instance = instance


class Verdict(Struct, frozen=True):
    """`error` None: it is done."""

    error: AtollError | None = None


class Progress:
    """Follows one app from the answer to the write that changed it."""

    def __init__(self, view: AppView) -> None:
        self.app = view.app
        self.revision = view.revision
        self.status: AppStatus | None = None
        self.gone = False
        self._status_revision = 0
        self._instances: dict[str, tuple[Instance, int]] = {}
        self._statuses: dict[str, Status] = {}
        self._rejected_since: dict[str, float] = {}
        self._failures: dict[str, tuple[int, float]] = {}
        """Instance → how often it was seen to fail, and when first."""

    def apply(self, line: WatchLine, now: float) -> Event | None:
        """Take one line; return the event in it, if it tells of this rollout."""
        key = (line.key or "").partition("/")[2]
        match line.kind:
            case "apps" if key == self.app.name:
                if line.record is None:
                    self.gone = True
                elif line.revision > self.revision:
                    self.app, self.revision = codec.convert_known(line.record, App), line.revision
            case "app-statuses" if key == self.app.name and line.record is not None:
                self.status, self._status_revision = codec.convert_known(line.record, AppStatus), line.revision
            case "instances":
                self._take_instance(key, line, now)
            case "statuses":
                self._take_status(key, line, now)
            case "events" if line.record is not None:
                event = codec.convert_known(line.record, Event)
                if event.at >= self.app.updated_at and self._concerns(event):
                    return event
            case _:
                pass
        return None

    def _take_instance(self, id: str, line: WatchLine, now: float) -> None:
        if line.record is None:
            self._instances.pop(id, None)
            self._rejected_since.pop(id, None)
            return
        instance = codec.convert_known(line.record, Instance)
        if instance.owner != self.app.name or instance.owner_kind != "app":
            return
        self._instances[id] = (instance, line.revision)
        if instance.rejection is not None and instance.node is None:
            self._rejected_since.setdefault(id, now)
        else:
            self._rejected_since.pop(id, None)

    def _take_status(self, id: str, line: WatchLine, now: float) -> None:
        if line.record is None:
            self._statuses.pop(id, None)
            return
        if not id.startswith(self.app.name):
            return
        status, before = codec.convert_known(line.record, Status), self._statuses.get(id)
        self._statuses[id] = status
        # The agent reports the newest word only, so that what was tried in between may go unseen: the time tells.
        if status.phase is Phase.BACKOFF and (before is None or (before.phase, before.phase_at) != (status.phase, status.phase_at)):
            times, first = self._failures.get(id, (0, now))
            self._failures[id] = (times + 1, first)

    def _concerns(self, event: Event) -> bool:
        kind, _, name = event.subject.partition("/")
        return (kind == "app" and name == self.app.name) or (kind == "instance" and name in self._instances)

    @property
    def wanted(self) -> list[InstanceView]:
        """The instances of the release and generation that should run, without those that stand by."""
        views = (view for view in self._views() if not view.instance.standby)
        return [view for view in views if self._is_wanted(view.instance) and view.instance.desired is Desired.RUN]

    @property
    def old(self) -> list[InstanceView]:
        return [view for view in self._views() if not self._is_wanted(view.instance) or view.instance.desired is not Desired.RUN]

    def _views(self) -> list[InstanceView]:
        return [
            InstanceView(instance=instance, status=self._statuses.get(id), revision=revision)
            for id, (instance, revision) in sorted(self._instances.items())
        ]

    def _is_wanted(self, instance: Instance) -> bool:
        return instance.release == self.app.release and instance.generation == self.app.generation

    @property
    def waits(self) -> bool:
        """Whether the rollout goes on only when a person says so."""
        rollout = self.status.rollout if self.status is not None else None
        return rollout is not None and rollout.release == self.app.release and rollout.phase is RolloutPhase.WAITING

    @property
    def ready(self) -> int:
        return sum(1 for view in self.wanted if view.status is not None and view.status.ready)

    def verdict(self, view: AppView, now: float) -> Verdict | None:
        """Return how it ended, or None while it goes on."""
        if self.gone or self.app.deleting:
            return Verdict(NotFound(f"app '{self.app.name}' was deleted meanwhile"))
        if (self.app.release, self.app.generation) != (view.app.release, view.app.generation):
            return Verdict(
                Conflict(
                    f"release {view.app.release} was overtaken by release {self.app.release}",
                    mend=f"see who deployed it: atoll releases {self.app.name}",
                )
            )
        wanted = self.wanted
        count = self.app.wanted(self.status)
        if self.app.sleeps and count == 0 and (self.status is None or self.status.release != self.app.release):
            count = 1  # a deploy wakes it
        if self.app.sleeps and count == 0 and self.status is not None and self.status.served_release != self.app.release:
            return Verdict(self._failure("it was never ready before it was put to sleep"))
        if self.ready >= count and len(wanted) == count:
            settled = self.status is not None and self.status.phase in (AppPhase.RUNNING, AppPhase.STOPPED, AppPhase.ASLEEP)
            if settled or not self.old:
                return Verdict()
        if self.waits:
            return Verdict()
        if self.status is not None and self.status.phase is AppPhase.FAILED and self._status_revision > view.revision:
            return Verdict(self._failure(self.status.message or "the rollout made no progress before its deadline"))
        for each in wanted:
            if (error := self._hopeless(each, now)) is not None:
                return Verdict(error)
        return None

    def _hopeless(self, view: InstanceView, now: float) -> AtollError | None:
        instance, status = view.instance, view.status
        if instance.rejection is not None and now - self._rejected_since.get(instance.id, now) >= NO_PLACE_S:
            mend = instance.rejection.mend or "`atoll nodes` shows what is free"
            return Unsupported(f"no node takes it: {instance.rejection.message}", mend=f"{mend}; {self._stays()}")
        if status is None or status.ready_at is not None:
            return None
        seen, first = self._failures.get(instance.id, (0, now))
        times = max(seen, status.restarts)
        if status.phase is Phase.FAILED or (times >= FAILURES_MAX and now - first >= FAILING_S):
            return self._failure(f"{instance.id}: {_ended(status, times)}", instance.id)
        return None

    def _stays(self) -> str:
        """Return what becomes of a release that finds no place, and how to be rid of it."""
        previous, name = self.status.served_release if self.status is not None else 0, self.app.name
        if previous and previous != self.app.release:
            back = f"atoll rollback {name} --to {previous}"
            return f"it starts when there is room, and release {previous} serves until then; or go back: {back}"
        if previous:
            return f"it starts when there is room; or ask for fewer: atoll scale {name} N"
        return f"{name} stays, and starts when there is room; or remove it: atoll delete {name}"

    def _failure(self, message: str, instance: str | None = None) -> RolloutFailed:
        return RolloutFailed(message, mend=self._mend(), instance=instance or self._worst())

    def _mend(self) -> str:
        previous = self.status.served_release if self.status is not None else 0
        name = self.app.name
        if previous and previous != self.app.release:
            return f"release {previous} still serves; correct it and deploy again, or: atoll rollback {name} --to {previous}"
        return f"correct it and deploy again; `atoll status {name}` shows all, `atoll delete {name}` ends the tries"

    def _worst(self) -> str | None:
        """Return the instance whose log says most about a failure."""
        tried = [view for view in self.wanted if view.status is not None and not view.status.ready]
        tried.sort(key=lambda view: (view.status.exit is None, -view.status.restarts) if view.status else (True, 0))
        return tried[0].instance.id if tried else None


def _ended(status: Status, times: int) -> str:
    from atoll.cli.instances import exit_words

    tries = f"; tried {times} times" if times > 1 else ""
    if status.exit is not None:
        return exit_words(status.exit.code, status.exit.signal, oom=status.exit.oom) + tries
    return (status.message.partition("; next start")[0] or "failed") + tries
