"""When a rollout is done, when it has failed, and what is said of it: a fold over watch lines."""

from __future__ import annotations

from typing import Any

from msgspec.structs import replace

from atoll.cli.progress import FAILING_S, FAILURES_MAX, NO_PLACE_S, Progress
from atoll.model import codec
from atoll.model.errors import Conflict, NotFound
from atoll.model.records import App, AppPhase, AppStatus, Event, Exit, Instance, OwnerKind, Rejection, Status
from atoll.model.spec import AppSpec
from atoll.model.states import Desired, Phase
from atoll.model.views import AppView, WatchLine

APP = App(project="p", name="web", spec=AppSpec(name="web", image="x"), release=2, replicas=2, created_at=1.0, updated_at=100.0)
VIEW = AppView(app=APP, revision=10)
INSTANCE = Instance(
    id="web-a", project="p", owner_kind=OwnerKind.APP, owner="web", release=2, generation=1, node="n", created_at=100.0
)
STATUS = Status(instance="web-a", project="p", node="n", phase=Phase.RUNNING, ready=True, ready_at=101.0)


class Watched:
    """A rollout that is told of records one after the other."""

    def __init__(self) -> None:
        self.progress = Progress(VIEW)
        self.revision = 10
        self.now = 0.0

    def tell(self, kind: str, name: str, record: Any) -> Event | None:
        self.revision += 1
        plain = None if record is None else codec.to_plain(record)
        return self.progress.apply(WatchLine(revision=self.revision, kind=kind, key=f"p/{name}", record=plain), self.now)

    def instance(self, id: str, **changes: Any) -> None:
        self.tell("instances", id, replace(INSTANCE, id=id, **changes))

    def status(self, id: str, **changes: Any) -> None:
        self.tell("statuses", id, replace(STATUS, instance=id, **changes))

    def error(self) -> str | None:
        verdict = self.progress.verdict(VIEW, self.now)
        return None if verdict is None else str(verdict.error) if verdict.error else "done"


def test_it_is_done_when_all_wanted_are_ready_and_the_old_have_gone() -> None:
    watched = Watched()
    watched.instance("web-old", release=1)
    watched.instance("web-a")
    watched.status("web-a")
    watched.instance("web-b")
    assert watched.error() is None
    watched.status("web-b")
    assert watched.error() is None, "an old instance still has to leave"
    watched.tell("instances", "web-old", None)
    assert watched.error() == "done"


def test_it_is_done_when_the_control_plane_says_so_though_old_ones_still_drain() -> None:
    watched = Watched()
    for id in ("web-a", "web-b"):
        watched.instance(id)
        watched.status(id)
    watched.instance("web-old", release=1, desired=Desired.DRAIN)
    watched.tell("app-statuses", "web", AppStatus(project="p", name="web", phase=AppPhase.RUNNING, release=2, ready=2))
    assert watched.error() == "done"


def test_instances_of_another_app_and_of_an_older_generation_do_not_count() -> None:
    watched = Watched()
    watched.instance("web-x", owner="other")
    watched.instance("web-y", generation=0)
    watched.status("web-x")
    watched.status("web-y")
    assert (watched.progress.ready, watched.error()) == (0, None)


def test_a_failure_of_the_release_before_is_not_this_ones() -> None:
    watched = Watched()
    watched.revision = 1
    watched.tell("app-statuses", "web", AppStatus(project="p", name="web", phase=AppPhase.FAILED, release=1, message="old story"))
    assert watched.error() is None
    watched.revision = 20
    watched.tell("app-statuses", "web", AppStatus(project="p", name="web", phase=AppPhase.FAILED, release=2, message="no progress"))
    assert watched.error() == "no progress"


def test_an_instance_that_fails_again_and_again_ends_the_wait() -> None:
    watched = Watched()
    watched.instance("web-a")
    for number in range(FAILURES_MAX):
        assert watched.error() is None
        exit = Exit(code=1, at=float(number))
        watched.status("web-a", phase=Phase.BACKOFF, ready=False, ready_at=None, exit=exit, phase_at=float(number))
    assert watched.error() is None, "four failures in an instant may be a registry that restarts"
    watched.now += FAILING_S
    assert watched.error() == f"web-a: exited with status 1; tried {FAILURES_MAX} times"
    verdict = watched.progress.verdict(VIEW, watched.now)
    assert getattr(verdict.error if verdict else None, "instance", None) == "web-a"


def test_an_instance_that_once_was_ready_is_left_to_the_control_plane() -> None:
    watched = Watched()
    watched.instance("web-a")
    for number in range(10):
        watched.status("web-a", phase=Phase.BACKOFF, ready=False, restarts=number, phase_at=float(number))
    watched.now += 100
    assert watched.error() is None


def test_running_out_of_memory_is_said_in_words() -> None:
    watched = Watched()
    watched.instance("web-a")
    watched.status("web-a", phase=Phase.FAILED, ready=False, ready_at=None, exit=Exit(code=137, at=1.0, signal="SIGKILL", oom=True))
    assert watched.error() == "web-a: killed: out of memory; raise resources.memory"


def test_an_instance_without_a_place_is_waited_for_a_while() -> None:
    watched = Watched()
    rejection = Rejection(code="full", message="no node has 4 cores free", mend="add a node")
    watched.instance("web-a", node=None, rejection=rejection)
    assert watched.error() is None
    watched.now += NO_PLACE_S
    verdict = watched.progress.verdict(VIEW, watched.now)
    assert watched.error() == "no node takes it: no node has 4 cores free"
    assert verdict is not None
    assert verdict.error is not None
    assert verdict.error.mend == "add a node; web stays, and starts when there is room; or remove it: atoll delete web"
    watched.tell("app-statuses", "web", AppStatus(project="p", name="web", phase=AppPhase.DEPLOYING, release=2, served_release=1))
    verdict = watched.progress.verdict(VIEW, watched.now)
    assert verdict is not None
    assert verdict.error is not None
    assert "release 1 serves until then; or go back: atoll rollback web --to 1" in str(verdict.error.mend)
    watched.tell("app-statuses", "web", AppStatus(project="p", name="web", phase=AppPhase.DEPLOYING, release=2, served_release=2))
    verdict = watched.progress.verdict(VIEW, watched.now)
    assert verdict is not None
    assert verdict.error is not None
    assert "or ask for fewer: atoll scale web N" in str(verdict.error.mend)
    watched.instance("web-a")
    assert watched.error() is None, "it found one"


def test_a_deploy_that_is_overtaken_or_deleted_says_so() -> None:
    watched = Watched()
    watched.tell("apps", "web", replace(APP, release=3))
    verdict = watched.progress.verdict(VIEW, 0.0)
    assert verdict is not None
    assert isinstance(verdict.error, Conflict)
    assert "overtaken by release 3" in str(verdict.error)
    watched.tell("apps", "web", None)
    verdict = watched.progress.verdict(VIEW, 0.0)
    assert verdict is not None
    assert isinstance(verdict.error, NotFound)


def test_a_failure_says_which_release_still_serves() -> None:
    watched = Watched()
    status = AppStatus(project="p", name="web", phase=AppPhase.FAILED, release=2, served_release=1, message="no progress")
    watched.tell("app-statuses", "web", status)
    verdict = watched.progress.verdict(VIEW, 0.0)
    assert verdict is not None
    assert verdict.error is not None
    assert "release 1 still serves" in (verdict.error.mend or "")


def test_only_events_of_this_rollout_are_told() -> None:
    watched = Watched()
    watched.instance("web-a")
    event = Event(id="1", at=101.0, project="p", subject="app/web", code="x", message="m")
    assert watched.tell("events", "1", event) == event
    assert watched.tell("events", "2", replace(event, subject="instance/web-a")) is not None
    assert watched.tell("events", "3", replace(event, subject="instance/else")) is None
    assert watched.tell("events", "4", replace(event, at=99.0)) is None, "from before the deploy"
