"""`python -m atoll.sim`: run seeds, print how many held and what they met; for one that failed, how to see it again."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections import Counter

from atoll.sim.run import Outcome, run_seed

SHOWN_MARKS_MAX = 200


def main() -> int:
    """Return 0 when every seed held, 1 otherwise."""
    parser = argparse.ArgumentParser(prog="python -m atoll.sim", description="Run Atoll on a virtual clock with faults from seeds.")
    parser.add_argument("--seeds", type=int, default=200, help="how many seeds to run")
    parser.add_argument("--first", type=int, default=0, help="the first of them")
    parser.add_argument("--seed", type=int, help="run only this one, and tell its story")
    parser.add_argument("--lines", type=int, default=120, help="how many of the story's last lines to print")
    options = parser.parse_args()
    if options.seed is not None:
        outcome = run_seed(options.seed)
        print("\n".join(outcome.story[max(0, len(outcome.story) - options.lines) :]))
        report(outcome)
        return 1 if outcome.broken else 0
    began = time.perf_counter()
    marks: Counter[str] = Counter()
    failed: list[Outcome] = []
    virtual_s = 0.0
    for seed in range(options.first, options.first + options.seeds):
        outcome = run_seed(seed)
        marks.update(outcome.marks)
        virtual_s += outcome.virtual_s
        if outcome.broken:
            failed.append(outcome)
            report(outcome)
    spent_s = time.perf_counter() - began
    print("\nmet so often:")
    for name, count in sorted(marks.items())[:SHOWN_MARKS_MAX]:
        print(f"  {count:8d}  {name}")
    print(
        f"\n{options.seeds - len(failed)} of {options.seeds} seeds held; {options.seeds / spent_s:.1f} seeds/s, "
        f"{virtual_s / 3600:.1f} h of virtual time in {spent_s:.1f} s"
    )
    return 1 if failed else 0


def report(outcome: Outcome) -> None:
    """Say how one seed ended."""
    if outcome.broken:
        print(f"seed {outcome.seed} FAILED (fingerprint {outcome.fingerprint}):")
        for promise in outcome.broken:
            print(f"  {promise}")
        print(f"  see it again: python -m atoll.sim --seed {outcome.seed}")
    else:
        print(f"seed {outcome.seed} held (fingerprint {outcome.fingerprint}, {outcome.virtual_s:.0f} s of virtual time)")


if __name__ == "__main__":
    if os.environ.get("PYTHONHASHSEED") != "0":
        # Sets of text are iterated in the order of their hashes, which must be the same in every run.
        os.execve(sys.executable, [sys.executable, "-m", "atoll.sim", *sys.argv[1:]], {**os.environ, "PYTHONHASHSEED": "0"})  # noqa: S606
    sys.exit(main())
