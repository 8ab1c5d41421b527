"""A day of invocations as times at which each app has something to do: counts by minute, spread over their minutes from a seed."""

from __future__ import annotations

import csv
import random
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

DAY_S = 86_400.0
DAY_MINUTES = 1_440
RUN_MAX_S = 60.0
"""An invocation counts as under way for its median time, at most so long: the record has times of hours that cannot be."""
SPREAD_MAX = 120
"""Invocations of one minute that are spread over it; of more, this many stand for all."""
DATA = Path(__file__).parents[2] / "shared" / "data" / "invocations_azure2019_sample1000"


@dataclass(frozen=True)
class App:
    name: str
    requests: int
    busy: list[tuple[float, float]]
    """When something was under way, in seconds of the day, in order and apart."""

    @cached_property
    def gaps(self) -> list[tuple[float, float, bool]]:
        """From when to when nothing was under way, and whether a request ended it; the last is ended by the day."""
        ends = [*(begin for begin, _ in self.busy[1:]), DAY_S]
        last = len(ends) - 1
        return [(end, until, at < last) for at, ((_, end), until) in enumerate(zip(self.busy, ends, strict=True))]


def read_trace(directory: Path, seed: int) -> list[App]:
    """Return the apps that were asked at all. Raises OSError where the record is not there."""
    with (directory / "1000_run.csv").open(newline="") as file:
        run_s = {row["HashFunction"]: float(row["percentile_Average_50"]) / 1000 for row in csv.DictReader(file)}
    apps = []
    with (directory / "1000_inv.csv").open(newline="") as file:
        rows = csv.reader(file)
        next(rows)
        for row in rows:
            counts = [int(each) for each in row[3:]]
            # Each app has a seed of its own, so that a part of them is the same part alone.
            chance = random.Random(f"{seed}/{row[0]}")
            busy = _busy(counts, min(RUN_MAX_S, run_s.get(row[0], 0.0)), chance)
            if busy:
                apps.append(App(row[0], sum(counts), busy))
    return sorted(apps, key=lambda app: app.name)


def halves(apps: list[App]) -> tuple[list[App], list[App]]:
    """Return one half to tune on, and one to report; their names, which are hashes, decide."""
    return [app for app in apps if int(app.name[:8], 16) % 2 == 0], [app for app in apps if int(app.name[:8], 16) % 2 == 1]


def _busy(counts: list[int], run_s: float, chance: random.Random) -> list[tuple[float, float]]:
    busy: list[tuple[float, float]] = []
    for minute, count in enumerate(counts):
        for second in sorted(chance.random() * 60 for _ in range(min(count, SPREAD_MAX))):
            begin = minute * 60 + second
            end = min(DAY_S, begin + run_s)
            if busy and begin <= busy[-1][1]:
                busy[-1] = (busy[-1][0], max(busy[-1][1], end))
            else:
                busy.append((begin, end))
    return busy
