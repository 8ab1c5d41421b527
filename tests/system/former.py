"""The version before this one, out of the repository's own history: what a machine runs that is not upgraded yet."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

REVISION_VARIABLE = "ATOLL_TEST_FORMER"
"""Names the revision; else it is the newest that is older than this one by `APART_S`."""
APART_S = 12 * 3_600
ROOT = Path(__file__).parents[2]
NATIVE = Path("src/atoll/runtimes/native")


def _git(*arguments: str) -> bytes:
    done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, timeout=120, check=False)
    if done.returncode != 0:
        pytest.skip(f"git knows no version before this one: {done.stderr.decode(errors='replace').strip()[:200]}")
    return done.stdout


def revision() -> str:
    """Return the revision of the version before; skips the test where there is none."""
    given = os.environ.get(REVISION_VARIABLE, "")
    if given:
        return _git("rev-parse", "--verify", f"{given}^{{commit}}").decode().strip()
    now = _git("log", "-1", "--format=%ct").decode().strip()
    found = _git("rev-list", "-1", f"--before={int(now or 0) - APART_S}", "HEAD").decode().strip()
    if not found:
        pytest.skip("the history is not long enough for a version before")
    return found


def export(directory: Path) -> Path:
    """Write the version before into `directory`, build what is native of it, and return where Python finds it."""
    packed = subprocess.Popen(["git", "-C", str(ROOT), "archive", revision(), "src"], stdout=subprocess.PIPE)
    subprocess.run(["tar", "-x", "-C", str(directory)], stdin=packed.stdout, timeout=120, check=True)
    assert packed.wait(60) == 0
    if (directory / NATIVE / "Makefile").exists():
        subprocess.run(["make", "-s", "-C", str(directory / NATIVE)], timeout=120, check=True, capture_output=True)
    return directory / "src"
