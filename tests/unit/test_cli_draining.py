"""`atoll nodes drain`, `undrain` and `atoll maintenance`: what they ask for, and what they show."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from atoll.cli.main import cli
from atoll.cli.quantities import again, moment
from atoll.cli.session import Session
from atoll.model.errors import Invalid
from atoll.model.evacuation import Evacuation
from atoll.model.maintenance import MaintenanceSpec
from atoll.model.records import Capacity, Node, OwnerKind
from atoll.model.views import DrainItem, DrainState, DrainView
from atoll.sdk.fake import FakeApi

FAR = 4_000_000_000.0


@pytest.fixture
def api() -> FakeApi:
    made = FakeApi()
    capacity = Capacity(cpu_milli=2000, memory_bytes=4 << 30, disk_bytes=50 << 30)
    made.put("nodes", "n1", Node(name="n1", site="fra", capacity=capacity))
    return made


def call(api: FakeApi, directory: Path, *arguments: str) -> Result:
    environment = {"ATOLL_API": "http://fake", "ATOLL_TOKEN": "t", "XDG_CONFIG_HOME": str(directory), "NO_COLOR": "1"}
    return CliRunner().invoke(
        cli, list(arguments), obj=Session(dial=lambda _: api), env=environment | {"COLUMNS": "200"}, catch_exceptions=False
    )


def progress(*states: DrainState, total: int = 2, evacuated: bool = True) -> DrainView:
    items = tuple(
        DrainItem(instance=f"web-{index}", project="default", kind=OwnerKind.APP, owner="web", state=state, why=f"because {state}")
        for index, state in enumerate(states)
    )
    kept = sum(state is DrainState.KEPT for state in states)
    evacuation = Evacuation(why="it is being drained", since=0.0, deadline=FAR) if evacuated else None
    left = len(items) - kept
    return DrainView(node="n1", evacuation=evacuation, items=items, left=left, kept=kept, total=total, done=evacuated and left == 0)


def test_a_drain_is_followed_to_its_end_with_a_line_for_each_change(api: FakeApi, tmp_path: Path) -> None:
    api.drain_views["n1"] = [
        progress(DrainState.WAITS, DrainState.REPLACING),
        progress(DrainState.WAITS, DrainState.DRAINING),
        progress(DrainState.DRAINING),
        progress(),
    ]
    done = call(api, tmp_path, "node", "drain", "n1", "--deadline", "10m", "--wait")
    assert done.exit_code == 0
    assert done.stderr.splitlines() == [
        "web-0 waits (because waits)",
        "web-1 replacing (because replacing)",
        "web-1 draining (because draining)",
        "web-0 draining (because draining)",
        "web-1 gone",
        "web-0 gone",
        "✓ n1 is empty",
    ]
    policy, _ = api.get("node-policies", "n1")
    assert policy.drain.deadline - policy.drain.since == 600
    assert policy.drain.leave_volumes is False


def test_without_waiting_it_says_what_is_left_and_where_to_look(api: FakeApi, tmp_path: Path) -> None:
    api.drain_views["n1"] = [progress(DrainState.WAITS, DrainState.REPLACING)]
    done = call(api, tmp_path, "nodes", "drain", "n1")
    assert done.exit_code == 0
    assert done.stderr == "n1: 2 of 2 are to leave still; see: atoll nodes show n1\n"


def test_what_stays_for_its_volumes_is_named_and_makes_the_wait_fail(api: FakeApi, tmp_path: Path) -> None:
    api.drain_views["n1"] = [progress(DrainState.KEPT)]
    done = call(api, tmp_path, "nodes", "drain", "n1", "--wait")
    assert done.exit_code == 1
    assert "n1 is not empty: web-0 write to its volumes" in done.stderr
    assert "--leave-volumes" in done.stderr


def test_a_drain_that_someone_else_undoes_ends_the_wait(api: FakeApi, tmp_path: Path) -> None:
    api.drain_views["n1"] = [progress(DrainState.WAITS), progress(DrainState.STAYS, evacuated=False)]
    done = call(api, tmp_path, "nodes", "drain", "n1", "--wait")
    assert done.exit_code == 1
    assert "the drain of n1 was undone" in done.stderr


def test_a_drained_node_is_shown_as_such_and_undrain_makes_it_ready(api: FakeApi, tmp_path: Path) -> None:
    call(api, tmp_path, "nodes", "drain", "n1")
    listed = call(api, tmp_path, "nodes").stdout
    assert "◐ drained it is empty; use it again: atoll nodes undrain n1" in listed
    assert "being drained" not in listed
    api.drain_views["n1"] = [progress(DrainState.KEPT)]
    shown = call(api, tmp_path, "nodes", "show", "n1").stdout
    assert "◐ drained" in shown
    assert "web-0" in shown
    assert "because kept" in shown
    assert call(api, tmp_path, "nodes", "undrain", "n1").stderr == "✓ n1 is used again\n"
    assert "● ready" in call(api, tmp_path, "nodes").stdout


def test_a_window_is_planned_listed_and_removed(api: FakeApi, tmp_path: Path) -> None:
    made = call(api, tmp_path, "maintenance", "add", "--nodes", "site=fra", "--every", "Sun 02:00 UTC", "--for", "2h")
    assert made.exit_code == 0
    assert "site-fra" in made.stdout
    maintenance, _ = api.get("maintenances", "site-fra")
    expected = MaintenanceSpec(name="site-fra", nodes="site=fra", every="0 2 * * SUN", length=maintenance.spec.length)
    assert maintenance.spec == expected
    assert (maintenance.spec.length, maintenance.spec.lead) == (7200, 1800)
    call(api, tmp_path, "maintenance", "add", "--name", "far", "--nodes", "*", "--from", "2100-01-03 02:00 UTC", "--for", "2h")
    assert "far * (1) ○ planned 2100-01-03 02:00 UTC" in " ".join(call(api, tmp_path, "maintenance").stdout.split())
    assert call(api, tmp_path, "maintenance", "remove", "site-fra").exit_code == 0
    assert call(api, tmp_path, "maintenance", "remove", "far").exit_code == 0
    assert "no maintenance is planned" in call(api, tmp_path, "maintenance", "list").stderr


def test_a_node_in_its_window_is_shown_with_the_time_that_it_ends(api: FakeApi, tmp_path: Path) -> None:
    start = str(int(api.now))
    call(api, tmp_path, "maintenance", "add", "--name", "now", "--nodes", "*", "--from", "2023-11-14 22:00 UTC", "--for", "2h")
    assert start == "1700000000"
    lines = call(api, tmp_path, "nodes").stdout
    assert "◐ maintenance maintenance now until 2023-11-15 00:00 UTC" in " ".join(lines.split())


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--nodes", "site=fra", "--for", "2h"), "give one of them"),
        (("--nodes", "fra", "--for", "2h", "--every", "02:00"), "no rule on a label"),
        (("--nodes", "*", "--for", "2h", "--every", "some day"), "when it comes again"),
        (("--nodes", "*", "--for", "2h", "--from", "tomorrow"), "no moment"),
        (("--nodes", "*", "--for", "0s", "--every", "02:00"), "--for: must be above 0"),
        (("--nodes", "*", "--for", "long", "--every", "02:00"), "not a duration"),
    ],
)
def test_a_window_that_cannot_be_is_refused_with_a_mend(
    api: FakeApi, tmp_path: Path, arguments: tuple[str, ...], said: str
) -> None:
    done = call(api, tmp_path, "maintenance", "add", *arguments)
    assert done.exit_code == 2
    assert said in done.stderr


@pytest.mark.parametrize(
    ("text", "means"),
    [
        ("Sun 02:00 UTC", ("0 2 * * SUN", "UTC")),
        ("02:00", ("0 2 * * *", "UTC")),
        ("Monday,thu 22:30 Europe/Berlin", ("30 22 * * MON,THU", "Europe/Berlin")),
        ("0 2 * * SUN", ("0 2 * * SUN", "UTC")),
        ("*/5 * * * * Europe/Berlin", ("*/5 * * * *", "Europe/Berlin")),
        ("@daily", ("@daily", "UTC")),
    ],
)
def test_times_that_come_again_are_read_as_people_write_them(text: str, means: tuple[str, str]) -> None:
    assert again(text) == means


def test_a_moment_is_read_with_its_zone() -> None:
    same = ("2026-12-06 02:00 UTC", "2026-12-06T02:00:00Z", "2026-12-06 03:00 Europe/Berlin")
    assert len({moment(text, "--from") for text in same}) == 1
    for bad in ("", "soon", "2026-13-01 02:00 UTC", "2026-12-06 02:00 Mars/Olympus"):
        with pytest.raises(Invalid):
            moment(bad, "--from")
