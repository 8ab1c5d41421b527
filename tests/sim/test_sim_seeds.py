"""The simulator's seeds: all hold, each repeats, rare paths are met, and planted bugs are caught."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable

import pytest
from msgspec.structs import replace

from atoll.sim.__main__ import report
from atoll.sim.faults import Profile
from atoll.sim.marks import EXPECTED
from atoll.sim.mutants import MUTANTS, LeakyMachine, Mutant, WithMachine, catch, gpus_fail, members_fall, rivalry
from atoll.sim.run import run_seed

SEEDS = 300
WORKERS = 2
SEEDS_FOR_A_BUG = 40
"""Seeds within which each planted bug of the fast ones must be caught."""


def simulate(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "atoll.sim", *arguments], capture_output=True, text=True, timeout=280)


@pytest.mark.timeout(300)
def test_300_seeds_hold_and_meet_every_mark() -> None:
    done = simulate("--seeds", str(SEEDS), "--workers", str(WORKERS))
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    how_far = re.compile(rf"[\d,]+ of {SEEDS} seeds, [\d.]+/s, \d+ min left")
    assert [line for line in done.stderr.splitlines() if not how_far.fullmatch(line)] == []
    assert f"{len(EXPECTED)} of {len(EXPECTED)} marks met" in done.stdout
    assert f"{SEEDS} of {SEEDS} seeds held" in done.stdout


def test_one_seed_is_the_same_in_every_process() -> None:
    first, second = simulate("--seed", "11", "--lines", "0"), simulate("--seed", "11", "--lines", "0")
    assert "fingerprint" in first.stdout, first.stderr
    assert first.stdout == second.stdout


def test_a_seed_does_not_depend_on_those_before_it() -> None:
    first = run_seed(12).fingerprint
    run_seed(13)
    assert run_seed(12).fingerprint == first
    assert run_seed(13).fingerprint != first


FAST = [
    mutant
    for mutant in MUTANTS
    if mutant.name
    in ("drain-skipped", "release-changed", "votes-for-anyone", "cache-not-awaited", "request-key-ignored", "shares-unheeded")
]


@pytest.mark.parametrize("mutant", FAST, ids=lambda mutant: mutant.name)
def test_a_planted_bug_is_caught(mutant: Mutant) -> None:
    assert catch(mutant, SEEDS_FOR_A_BUG) is not None


@pytest.mark.soak
@pytest.mark.timeout(7_200)
@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_every_planted_bug_is_caught_within_1000_seeds(mutant: Mutant) -> None:
    assert catch(mutant) is not None


SHAPES: dict[str, Callable[[Profile], Profile]] = {
    "a bad network": lambda p: replace(p, calm=False, lost=0.15, lost_reply=0.15, store_fails=0.08, slow_watch=0.4, latency_s=0.05),
    "bad runtimes": lambda p: replace(
        p, calm=False, runtime_fails=0.2, chaos=("agent-crash", "process-crash", "machine-restart"), chaos_every_s=3.0
    ),
    "nodes that are given up": lambda p: replace(
        p, calm=False, span_s=200.0, chaos=("partition", "machine-restart", "agent-crash"), chaos_every_s=20.0
    ),
    "history that is forgotten": lambda p: replace(
        p, calm=False, slow_watch=0.5, store_fails=0.05, chaos=("compaction", "server-crash", "ingress-cut"), chaos_every_s=2.0
    ),
    "agents that die all the time": lambda p: replace(
        p, calm=False, chaos=("agent-crash", "stop-instance"), chaos_every_s=1.0, latency_s=0.05
    ),
    "GPUs that fail": gpus_fail,
    "members of the store that fall": members_fall,
}
"""Runs with much of one kind of fault; each found bugs that a little of everything did not."""


@pytest.mark.parametrize("kind", SHAPES)
def test_much_of_one_kind_of_fault_does_no_harm(kind: str) -> None:
    for seed in range(5_000, 5_006):
        assert run_seed(seed, shape=SHAPES[kind]).broken == (), f"seed {seed}"


def test_two_leaders_at_once_do_no_harm_but_without_the_fence_they_would() -> None:
    for seed in range(5):
        assert run_seed(seed, shape=rivalry).broken == ()
    fence = next(mutant for mutant in MUTANTS if mutant.name == "fence-dropped")
    assert catch(fence, SEEDS_FOR_A_BUG) is not None


def test_a_failing_seed_says_how_to_see_it_again(capsys: pytest.CaptureFixture[str]) -> None:
    outcome = run_seed(3, WithMachine(LeakyMachine))
    assert outcome.broken
    assert any("BROKEN" in line for line in outcome.story)
    assert any("a process starts" in line for line in outcome.story)
    report(outcome)
    assert "python -m atoll.sim --seed 3" in capsys.readouterr().out
