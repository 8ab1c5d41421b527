"""`atoll rollout`: what people see of it, and what they ask for, against an API in memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from msgspec import structs
from test_cli_commands import Atoll

from atoll.cli.progress import Progress, Verdict
from atoll.model import codec
from atoll.model.records import App, AppPhase, AppStatus
from atoll.model.rollouts import RolloutPhase, RolloutStatus
from atoll.model.spec import Analysis, CanaryStep, Rollout, Strategy
from atoll.model.units import Seconds
from atoll.model.views import AppView, ReleaseView, WatchLine

RULES = Rollout(
    strategy=Strategy.CANARY,
    steps=(CanaryStep(weight=5, pause=Seconds(60)), CanaryStep(weight=50)),
    analysis=Analysis(error_rate_max=0.01),
)
WAITS = RolloutStatus(
    release=2,
    stable=1,
    strategy=Strategy.CANARY,
    phase=RolloutPhase.WAITING,
    step=1,
    weight=50,
    since=1.0,
    passes=3,
    verdict="0 of 512 requests failed (0 %, at most 1 %)",
    message="waits for a person: resume, promote or abort it",
)
RELEASES = (
    ReleaseView(release=2, weight=50, instances=1, ready=1, requests=512, errors=256, per_second=8.5, latency_p99_s=0.041),
    ReleaseView(release=1, weight=50, instances=2, ready=2, requests=500, errors=0, per_second=8.3, latency_p99_s=12.3),
)


@pytest.fixture
def atoll(tmp_path: Path) -> Atoll:
    made = Atoll(tmp_path)
    made.deploy()
    set_rollout(made, WAITS)
    made.api.release_views["default/web"] = RELEASES
    return made


def set_rollout(atoll: Atoll, status: RolloutStatus) -> None:
    app: App = atoll.api.get("apps", "default/web")[0]
    spec = structs.replace(app.spec, rollout=RULES)
    atoll.api.put("apps", "default/web", structs.replace(app, spec=spec, release=2))
    said: AppStatus = atoll.api.get("app-statuses", "default/web")[0]
    atoll.api.put("app-statuses", "default/web", structs.replace(said, release=2, served_release=1, rollout=status))


def test_a_rollout_is_shown_with_its_steps_and_both_releases_side_by_side(atoll: Atoll) -> None:
    out = atoll.run("rollout", "status", "web").stdout
    for words in (
        "release 2 in place of 1 (canary)",
        "waiting waits for a person",
        "✓ 5 % 1m00s   ▶ 50 % until resumed   ○ 100 %",
        "3 good and 0 bad intervals",
        "0 of 512 requests failed",
        "██████████░░░░░░░░░░  50 %",
        "atoll rollout promote web",
    ):
        assert words in out
    new, before = (line.split() for line in out.splitlines() if "█" in line)
    assert (new[0], new[1], before[0], before[1]) == ("2", "new", "1", "before")
    assert "50.0" in new
    assert "12.3" in before


def test_status_shows_the_releases_and_json_has_their_numbers(atoll: Atoll) -> None:
    assert "SHARE OF REQUESTS" in atoll.run("status", "web").stdout
    assert [each["errors"] for each in atoll.json("status", "web")["releases"]] == [256, 0]
    assert atoll.json("rollout", "status", "web")["status"]["weight"] == 50


@pytest.mark.parametrize(
    ("wish", "asked"),
    [
        ("pause", {"paused": True}),
        ("resume", {"step": 1}),
        ("promote", {"promoted": True}),
        ("abort", {"aborted": True}),
        ("undo", {"aborted": True}),
    ],
)
def test_each_wish_is_written_down(atoll: Atoll, wish: str, asked: dict[str, Any]) -> None:
    assert "web" in atoll.run("rollout", wish, "web").stderr
    order = atoll.api.get("apps", "default/web")[0].order
    assert {name: getattr(order, name) for name in asked} == asked
    assert order.release == 2


def test_watching_a_rollout_that_went_back_fails_and_says_why(atoll: Atoll) -> None:
    why = "its analysis failed: 256 of 512 requests failed"
    set_rollout(atoll, structs.replace(WAITS, phase=RolloutPhase.REVERTED, weight=None, message=why))
    result = atoll.run("rollout", "status", "web", "--watch", code=1)
    assert "taken back" in result.stdout
    assert why in result.stderr
    assert "atoll rollout resume web" in result.stderr


@pytest.mark.parametrize(
    ("phase", "status", "ended"),
    [
        (AppPhase.DEPLOYING, structs.replace(WAITS, phase=RolloutPhase.PROGRESSING), None),
        (AppPhase.DEPLOYING, WAITS, "done"),
        (AppPhase.FAILED, structs.replace(WAITS, phase=RolloutPhase.REVERTED), "failed"),
    ],
)
def test_a_deploy_is_followed_until_a_person_is_asked_or_it_went_back(
    atoll: Atoll, phase: AppPhase, status: RolloutStatus, ended: str | None
) -> None:
    app: App = atoll.api.get("apps", "default/web")[0]
    view = AppView(app=app, revision=10)
    progress = Progress(view)
    said = AppStatus(project="default", name="web", phase=phase, release=2, served_release=1, message="why", rollout=status)
    progress.apply(WatchLine(revision=11, kind="app-statuses", key="default/web", record=codec.to_plain(said)), 1.0)
    verdict = progress.verdict(view, 1.0)
    match ended:
        case None:
            assert verdict is None
        case "done":
            assert verdict == Verdict()
        case _:
            assert verdict is not None
            assert "why" in str(verdict.error)
