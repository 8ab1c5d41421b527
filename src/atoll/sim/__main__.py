"""`python -m atoll.sim`: run seeds, print how many held and what they met; for one that failed, how to see it again."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import partial
from multiprocessing import get_context

from msgspec.structs import replace

from atoll.sim import marks
from atoll.sim.mutants import MUTANTS, SEEDS_MAX, catch
from atoll.sim.run import Outcome, run_seed

SHOWN_MARKS_MAX = 400
PROGRESS_S = 30.0
"""How often a long run says how far it is, on stderr."""
CHUNK = 4
"""Seeds that a worker takes at a time."""


def main() -> int:
    """Return 0 when every seed held (and, of enough of them, every mark was met; or every planted bug was caught), 1 otherwise."""
    parser = argparse.ArgumentParser(prog="python -m atoll.sim", description="Run Atoll on a virtual clock with faults from seeds.")
    parser.add_argument(
        "--seeds", type=int, help=f"how many seeds to run: {marks.SEEDS_ENOUGH}, or until a bug is caught {SEEDS_MAX}"
    )
    parser.add_argument("--first", type=int, default=0, help="the first of them")
    parser.add_argument("--seed", type=int, help="run only this one, and tell its story")
    parser.add_argument("--lines", type=int, default=120, help="how many of the story's last lines to print")
    parser.add_argument("--workers", type=int, default=1, help="processes to run them in")
    parser.add_argument("--mutants", action="store_true", help="plant bugs, one at a time, and say which seed caught each")
    parser.add_argument("--mutant", choices=[mutant.name for mutant in MUTANTS], help="plant only this one")
    options = parser.parse_args()
    if options.mutants or options.mutant:
        names = [options.mutant] if options.mutant else [mutant.name for mutant in MUTANTS]
        return mutants(names, options.seeds or SEEDS_MAX, options.workers, options.lines)
    if options.seed is not None:
        outcome = run_seed(options.seed)
        print("\n".join(outcome.story[max(0, len(outcome.story) - options.lines) :]))
        report(outcome)
        return 1 if outcome.broken else 0
    return seeds(range(options.first, options.first + (options.seeds or marks.SEEDS_ENOUGH)), options.workers)


def seeds(numbers: range, workers: int) -> int:
    """Run them all, report those that fail as they do, and print the marks."""
    began = time.perf_counter()
    met: Counter[str] = Counter()
    failed = 0
    virtual_s, said = 0.0, began
    with _mapping(workers) as mapped:
        for done, outcome in enumerate(mapped(_briefly, numbers), start=1):
            if (now := time.perf_counter()) >= said + PROGRESS_S:
                said = now
                rate = done / (now - began)
                left_s = (len(numbers) - done) / rate
                print(f"{done:,} of {len(numbers):,} seeds, {rate:.1f}/s, {left_s / 60:.0f} min left", file=sys.stderr, flush=True)
            met.update(outcome.marks)
            virtual_s += outcome.virtual_s
            if outcome.broken:
                failed += 1
                report(outcome)
    spent_s = time.perf_counter() - began
    print("\nmet so often:")
    for name, count in sorted(met.items())[:SHOWN_MARKS_MAX]:
        print(f"  {count:8d}  {name}")
    expected, unmet = marks.expected(len(numbers)), marks.missing(met, len(numbers))
    print(f"\n{len(expected) - len(unmet)} of {len(expected)} marks met" + "".join(f"\n  not met: {name}" for name in unmet))
    print(
        f"{len(numbers) - failed} of {len(numbers)} seeds held; {len(numbers) / spent_s:.1f} seeds/s in {workers} "
        f"process{'es' if workers > 1 else ''}, {virtual_s / 3600:.1f} h of virtual time in {spent_s:.1f} s"
    )
    return 1 if failed or (unmet and len(numbers) >= marks.SEEDS_ENOUGH) else 0


def mutants(names: list[str], count: int, workers: int, lines: int) -> int:
    """Plant each bug until a seed notices; print caught/planted."""
    caught = 0
    whats = {mutant.name: mutant.what for mutant in MUTANTS}
    with _mapping(workers, chunk=1) as mapped:
        for name, outcome in zip(names, mapped(partial(_catch, seeds=count), names), strict=True):
            if outcome is None:
                print(f"NOT CAUGHT  {name}: {whats[name]}; {count} seeds did not notice", flush=True)
                continue
            caught += 1
            if len(names) == 1:
                print("\n".join(outcome.story[max(0, len(outcome.story) - lines) :]))
            print(f"caught  {name}: {whats[name]}; by seed {outcome.seed}: {outcome.broken[0][:160].splitlines()[0]}", flush=True)
    print(f"\n{caught}/{len(names)} planted bugs caught")
    return 0 if caught == len(names) else 1


def _catch(name: str, seeds: int) -> Outcome | None:
    return catch(next(mutant for mutant in MUTANTS if mutant.name == name), seeds)


def _briefly(seed: int) -> Outcome:
    """Leave out the story, which the seed alone brings back."""
    return replace(run_seed(seed, told=False), story=())


@contextmanager
def _mapping(workers: int, chunk: int = CHUNK) -> Iterator[type[map]]:  # type: ignore[type-arg]
    """Give `map`, or one that does its work in processes."""
    if workers <= 1:
        yield map
        return
    with ProcessPoolExecutor(workers, mp_context=get_context("fork")) as pool:

        def mapped(function: object, items: Iterable[object]) -> Iterator[object]:
            return pool.map(function, items, chunksize=chunk)  # type: ignore[arg-type]

        yield mapped  # type: ignore[misc]


def report(outcome: Outcome) -> None:
    """Say how one seed ended."""
    if outcome.broken:
        print(f"seed {outcome.seed} FAILED (fingerprint {outcome.fingerprint}):")
        for promise in outcome.broken:
            print(f"  {promise}")
        print(f"  see it again: python -m atoll.sim --seed {outcome.seed}", flush=True)
    else:
        print(f"seed {outcome.seed} held (fingerprint {outcome.fingerprint}, {outcome.virtual_s:.0f} s of virtual time)")


if __name__ == "__main__":
    if os.environ.get("PYTHONHASHSEED") != "0":
        # Sets of text are iterated in the order of their hashes, which must be the same in every run.
        os.execve(sys.executable, [sys.executable, "-m", "atoll.sim", *sys.argv[1:]], {**os.environ, "PYTHONHASHSEED": "0"})  # noqa: S606
    sys.exit(main())
