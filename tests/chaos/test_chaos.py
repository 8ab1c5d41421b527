"""Five machines as network namespaces, a real cluster of etcd, servers, agents, runc and Envoy: killed, paused, cut off, filled up.

Each scenario runs in a world of its own (`chaos_world.py`) and prints its figures; the long ones are marked `soak`.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import chaos_world
import pytest

from atoll.ingress import envoy
from atoll.model.errors import AtollError
from atoll.runtimes.runc import probe_runc

pytestmark = [pytest.mark.system, pytest.mark.timeout(600)]
START_S = 120.0
"""For all parts to serve, on a busy machine."""


def _lacking() -> str:
    if why := chaos_world.missing():
        return why
    try:
        probe_runc()
        envoy.find_binary()
    except AtollError as error:
        return f"{error}; {error.mend}"
    return ""


@pytest.fixture(scope="module", autouse=True)
def _able() -> None:
    if why := _lacking():
        pytest.skip(why)


def suffer(data: Path, scenario: str, seconds: float, *, longest: float = 240.0) -> dict[str, Any]:
    """Return the figures of a scenario that kept its promises."""
    done = chaos_world.run(data, scenario, str(seconds), seconds=START_S + longest)
    assert done.returncode == 0, done.stdout
    figures: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    print(done.stdout)  # with -s: the figures, and what the runbook's commands showed
    return figures


def test_deaths_pauses_and_cuts_lose_no_request_and_no_write(tmp_path: Path) -> None:
    figures = suffer(tmp_path, "short", 8)
    assert figures["requests_failed"] == 0
    assert figures["operations"] > 50
    assert figures["converged_s"] <= 30


def test_a_world_whose_beginner_is_killed_leaves_nothing_behind(tmp_path: Path) -> None:
    beginner = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import chaos_world, pathlib; "
    beginner += f"chaos_world.run(pathlib.Path({str(tmp_path)!r}), 'short', '60', seconds=60)"
    begun = subprocess.Popen([sys.executable, "-c", beginner], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        _until(lambda: len(chaos_world.processes("etcd", str(tmp_path))) >= 3)
    finally:
        begun.send_signal(signal.SIGKILL)
        begun.wait()
    _until(lambda: not chaos_world.processes(str(tmp_path)))
    chaos_world.sweep()
    assert not list(tmp_path.iterdir()), "what lay in memory went with it"
    assert not list(Path("/sys/fs/cgroup").glob(f"**/{chaos_world.GROUP_PREFIX}{begun.pid}"))
    assert str(tmp_path) not in Path("/proc/mounts").read_text()


@pytest.mark.soak
def test_a_site_cut_off_for_a_minute_serves_and_heals_and_is_at_rest_within_30_s(tmp_path: Path) -> None:
    figures = suffer(tmp_path, "site", 60)
    assert figures["requests_failed"] == 0
    assert figures["converged_s"] <= 30


@pytest.mark.soak
def test_a_minute_without_any_control_plane_fails_no_request_and_crashed_instances_run_again(tmp_path: Path) -> None:
    figures = suffer(tmp_path, "down", 60)
    assert figures["requests_failed"] == 0


@pytest.mark.soak
def test_servers_upgraded_one_after_the_other_fail_no_call_and_no_request(tmp_path: Path) -> None:
    figures = suffer(tmp_path, "upgrade", 60)
    assert figures["calls_failed"] == figures["requests_failed"] == 0


@pytest.mark.soak
def test_full_disks_of_a_node_and_of_a_member_of_etcd_stop_neither(tmp_path: Path) -> None:
    figures = suffer(tmp_path, "disk", 20)
    assert figures["requests_failed"] == 0


@pytest.mark.soak
def test_three_minutes_of_faults_drawn_at_random_lose_no_request_and_no_write(tmp_path: Path) -> None:
    figures = suffer(tmp_path, "storm", 180, longest=360)
    assert figures["requests_failed"] == 0
    assert figures["converged_s"] <= 30


@pytest.mark.soak
def test_what_the_runbook_says_helps(tmp_path: Path) -> None:
    figures = suffer(tmp_path, "runbook", 0, longest=420)
    assert figures["requests_failed"] == 0


def _until(holds: Any, seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.05)
