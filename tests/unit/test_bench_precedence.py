"""A benchmark notes what precedence its processes had, not what was asked for."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from bench import precedence

ROOT = Path(__file__).parents[2]
RUN = """
import json, os, subprocess, sys, threading
from bench import precedence
mark, user = sys.argv[1:]
wait = [sys.executable, "-c", "import sys, threading; threading.Thread(target=sys.stdin.read).start(); print(1, flush=True)", mark]
with subprocess.Popen(wait, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True) as other:
    other.stdout.read(1)
    if user == "before":
        precedence.take()
    if user:
        os.setuid(65534)
    precedence.take((mark,))
    threads = [int(thread) for thread in os.listdir(f"/proc/{other.pid}/task")]
    nice = [os.getpriority(os.PRIO_PROCESS, thread) for thread in threads]
    print(json.dumps({"told": precedence.told(), "other": sorted(nice)}))
"""


def run(tmp_path: Path, user: str) -> dict[str, Any]:
    """Return what is told of a run in a session of its own, and how nice another process of it is, thread by thread."""
    command = [sys.executable, "-c", RUN, f"marked-{tmp_path.name}-{os.getpid()}", user]
    done = subprocess.run(command, cwd=ROOT, start_new_session=True, capture_output=True, text=True, timeout=60, check=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.fixture(autouse=True)
def _needs_root() -> None:
    if os.geteuid() != 0:
        pytest.skip("raising a process's priority needs root")


def test_every_thread_of_what_is_marked_is_raised_and_that_is_told(tmp_path: Path) -> None:
    found = run(tmp_path, "")
    if found["told"].startswith("no precedence"):
        pytest.skip("this machine lets not even root raise a priority")
    assert found["other"] == [precedence.NICE] * 2
    assert found["told"].startswith(f"at a precedence before all else that ran (nice {precedence.NICE}")
    assert "not granted" not in found["told"]


def test_what_was_not_granted_is_told(tmp_path: Path) -> None:
    nice = os.getpriority(os.PRIO_PROCESS, 0)
    found = run(tmp_path, "nobody")
    assert found["other"] == [nice] * 2
    assert found["told"] == f"no precedence: it was asked for and not granted (nice {nice}); it needs root"


def test_that_it_was_not_granted_to_some_of_the_processes_is_told(tmp_path: Path) -> None:
    found = run(tmp_path, "before")
    if found["told"].startswith("no precedence"):
        pytest.skip("this machine lets not even root raise a priority")
    assert "; not so 1 of its processes, to which it was not granted" in found["told"]
