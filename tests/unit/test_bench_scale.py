"""What `bench scale` says of a run: what failed at its take-overs, and whether its processes went before others."""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from bench import precedence
from bench.report import Report
from bench.scale import Bench, Drivers, Server, TooSlow, Watched
from bench.scale_user import Api

from atoll.sim.loop import run_virtual

ROOT = Path(__file__).parents[2]
RUN = """
import json, os, subprocess, sys
from bench import scale
notes = scale.run(sys.argv[1:]).notes
child = [sys.executable, "-c", "import os; print(os.getpriority(os.PRIO_PROCESS, 0))"]
print(json.dumps([notes, os.getpriority(os.PRIO_PROCESS, 0), int(subprocess.check_output(child))]))
"""
FAILED = "deploy an app while the leader dies: 503"


class StillServer(Server):
    """Answers as soon as it is started; nothing runs."""

    async def start(self) -> float:
        self.used = Watched(os.getpid())
        return 0.1

    @property
    def token(self) -> str:
        return "t"


class StillDrivers(Drivers):
    """All agents are always where they are waited for. With `broken`, they stay away from then on."""

    def __init__(self, broken: int) -> None:
        self._left = broken

    async def ask(self, word: str = "look") -> dict[str, Any]:
        return {"instances": 0}

    async def until(self, what: str, **least: int) -> dict[str, Any]:
        self._left -= 1
        if not self._left:
            raise TooSlow(what)
        return {}


class RefusingApi(Api):
    """Refuses the first `refusals` deployments, and has a node for all others at once."""

    refusals = 1

    async def call(self, what: str, method: str, path: str, body: bytes = b"", *, fine: Sequence[int] = ()) -> Any:
        if method == "PUT" and self.refusals:
            self.refusals -= 1
            self.failed[FAILED] += 1
            return None
        return {"items": [{"instance": {"node": "n0"}, "health": "ready"}]}


def bench_of(tmp_path: Path, takeovers: int, *, broken: int = 0) -> Bench:
    chosen = argparse.Namespace(apps=1, nodes=1, takeovers=takeovers, spread=False, py_spy=None)
    bench = Bench(chosen, Report("scale"), tmp_path, RefusingApi)
    bench.total = 1
    bench.first, bench.second = (StillServer(tmp_path, number, "etcd://", None) for number in (1, 2))
    bench.drivers = StillDrivers(broken)
    bench.api = RefusingApi("http://127.0.0.1:1", "t", Counter())
    return bench


def test_calls_that_failed_at_any_take_over_are_told_and_not_those_of_the_last_alone(tmp_path: Path) -> None:
    bench = bench_of(tmp_path, 3)
    run_virtual(bench.take_overs, random.Random(0))
    assert [note for note in bench.report.notes if "take-over" in note] == [
        f"failed calls at the take-overs, all together: { {FAILED: 3} }"
    ]


def test_calls_that_failed_are_told_where_a_take_over_has_no_end(tmp_path: Path) -> None:
    bench = bench_of(tmp_path, 3, broken=2)
    with pytest.raises(TooSlow):
        run_virtual(bench.take_overs, random.Random(0))
    assert bench.report.notes == [f"failed calls at the take-overs, all together: { {FAILED: 2} }"]


def run_without_etcd(tmp_path: Path, *options: str) -> tuple[list[str], int, int]:
    """Return the report's notes, how nice the run was, and what it started: in a session of its own, which has its precedence."""
    command, env = [sys.executable, "-c", RUN, *options], {"PATH": str(tmp_path)}
    ran = subprocess.run(command, cwd=ROOT, env=env, start_new_session=True, capture_output=True, text=True, timeout=60, check=True)
    notes, nice, of_child = json.loads(ran.stdout)
    return notes, nice, of_child


def test_a_run_with_precedence_says_so_and_all_that_it_starts_has_it(tmp_path: Path) -> None:
    notes, nice, of_child = run_without_etcd(tmp_path, "--precedence")
    if nice != precedence.NICE:
        pytest.skip("this user may not raise a process's priority")
    assert of_child == nice
    assert any(note.startswith("at a precedence before all else that ran (nice -19") for note in notes)


def test_a_run_without_precedence_has_none_and_one_that_did_not_get_it_says_so(tmp_path: Path) -> None:
    notes, nice, _ = run_without_etcd(tmp_path)
    assert nice == os.getpriority(os.PRIO_PROCESS, 0)
    assert not any("precedence" in note for note in notes)
    assert precedence.told() == f"no precedence: it was asked for and not granted (nice {nice}); it needs root"
