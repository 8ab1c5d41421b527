"""When an app that sleeps will be asked for next: the chance of a request in a minute, learnt from its own past. Pure.

A minute has a request or has none. Five ways to look at the past each say how often a minute like this one had one: how long it has
been quiet; the last six minutes; the minute of the hour; whether there was one 5, 10, 15, 20, 30 and 60 minutes ago; whether there
was one about one, two and three hours ago. A logistic mixture weighs them, as context-mixing compressors do with the bits of a file
(M. Mahoney, "Adaptive Weighing of Context Models for Lossless Data Compression", 2005). A chance is what a keep-alive policy needs:
an idle minute costs the same whenever it is, so it is worth its price exactly where the chance of a request is high enough
(`worth_it`). The histogram of idle times ("Serverless in the Wild", USENIX ATC 2020) is the first of the five alone, and keeps
an instance for one stretch only.

The weights (`bench autoscale --fit`) were fitted on half of the apps of a day of Azure Functions (Azure Public Dataset 2019,
CC-BY 4.0); what an app's own past says is learnt as it goes. Days before are seen by a sixth look that no weight was fitted
for, since that record has one day: it counts for what it has been worth to the app itself.
"""

from __future__ import annotations

import math
from array import array

MINUTE_S = 60.0
LEAD_S = 10.0
"""An instance is woken so long before the minute in which a request is expected."""
LINGER_S = 5.0
"""It stays at least so long after a request, and to the end of its minute."""
AGE_EXACT, AGE_STEP, AGE_MAX = 120, 15, 1_439
"""Minutes of quiet that are told apart; beyond it, and by how many; and the most."""
AGE_CELLS = AGE_EXACT + (AGE_MAX - AGE_EXACT) // AGE_STEP + 1
LAGS = (5, 10, 15, 20, 30, 60)
HOURS = (60, 120, 180)
DAYS = (1_440, 2_880, 4_320)
BITS = DAYS[-1] + 2
"""Minutes that are remembered one by one."""
BASES = (0, AGE_CELLS, AGE_CELLS + 64, AGE_CELLS + 124, AGE_CELLS + 188)
DAY_BASE = AGE_CELLS + 196
CELLS = DAY_BASE + 4
"""Numbers that are kept of an app, twice: some 3 KiB."""
COUNT_MAX = 60.0
"""What is older than so many minutes like this one counts ever less."""
PRIOR = 3.0
"""What is believed beforehand counts as so many minutes."""
DAY_PRIOR = 1.5
QUIET = 0.8
"""Beforehand the chance of a request after n quiet minutes is this, divided by n + 1."""
CHANCE_MIN = 1e-4
SEEN_MAX = 1_440
SILENT_MAX = 2_880
"""Silent minutes that are gone through one by one when nobody has asked for long; what lies beyond is passed over."""
AGES = (2, 11, 41)
"""From how many quiet minutes on another row of weights holds."""
WEIGHTS: tuple[tuple[float, ...], ...] = (
    (-0.283, 0.757, 0.217, 0.374, -0.119, 0.436, 0.0, -1.147, 0.916),
    (-0.215, 0.34, 0.289, 0.591, 0.132, 0.242, 0.167, -3.304, 3.406),
    (0.022, 0.418, 0.302, 0.412, 0.22, 0.876, 0.229, -4.637, 4.628),
    (0.338, 0.114, 0.272, 0.284, 0.165, 0.32, 0.257, -4.489, 3.971),
)
"""Of the five looks, of one, of the quiet minutes (logarithm), of how often there was a request, of how well the quiet is known."""


class Forecast:
    """One app's past. Minutes are counted from the epoch, and only go forward; the clock may not."""

    __slots__ = ("_age", "_bits", "_counts", "_minute", "_noted", "_seen", "_shares")

    def __init__(self) -> None:
        self._counts = array("f", bytes(4 * CELLS))
        self._shares = array("f", bytes(4 * CELLS))
        self._bits = 0
        """The past, the last minute lowest."""
        self._minute = 0
        self._noted = False
        self._age = 0
        """Quiet minutes before this one, and one."""
        self._seen = 0

    @property
    def seen(self) -> int:
        """In how many minutes there was a request, this one left out."""
        return self._seen

    def note(self, minute: int) -> None:
        """There is a request in `minute`; one that has passed is taken for the one that goes on."""
        self.advance(minute)
        self._minute = self._minute or minute
        self._noted = True

    def advance(self, minute: int) -> None:
        """`minute` goes on: what came before it is over. One that was before changes nothing."""
        if self._minute == 0:
            return
        if minute - self._minute > SILENT_MAX:
            self._close()
            passed = minute - self._minute - SILENT_MAX
            self._minute += passed
            self._bits = (self._bits << min(passed, BITS)) & ((1 << BITS) - 1)
            self._age += passed
        while self._minute < minute:
            self._close()

    def chance(self, ahead: int = 0) -> float:
        """Return the chance of a request in the minute that goes on; with `ahead` 1 in the next, should this one have no more."""
        if ahead == 0:
            return 1.0 if self._noted else self._chance(self._minute, self._age, self._bits)
        age = 1 if self._noted else self._age + 1
        return self._chance(self._minute + 1, age, self._bits << 1 | self._noted) if self._seen or self._noted else 0.0

    def inputs(self) -> tuple[int, list[float]]:
        """Return the row of weights that holds in the minute that goes on, and what they are for; the fit needs it."""
        cells = _cells(self._minute, self._age, self._bits)
        return self._inputs(cells, self._age)

    def _close(self) -> None:
        """End the minute that goes on, and learn from it."""
        active = self._noted
        if self._seen:
            learn = _cells(self._minute, self._age, self._bits)
            for cell in (*learn, DAY_BASE + _days(self._bits)):
                count = min(self._counts[cell] + 1.0, COUNT_MAX)
                self._counts[cell] = count
                self._shares[cell] += (active - self._shares[cell]) / count
        self._bits = (self._bits << 1 | active) & ((1 << BITS) - 1)
        self._age = 1 if active else self._age + 1
        self._seen += active
        self._minute += 1
        self._noted = False

    def _chance(self, minute: int, age: int, bits: int) -> float:
        if not self._seen and not self._noted:
            return 0.0
        row, inputs = self._inputs(_cells(minute, age, bits), age)
        mixed = 1.0 / (1.0 + math.exp(-max(-15.0, min(15.0, _product(WEIGHTS[row], inputs)))))
        days = _days(bits)
        if not days:
            return mixed
        cell = DAY_BASE + days
        return max(mixed, self._shares[cell] * self._counts[cell] / (self._counts[cell] + DAY_PRIOR))

    def _inputs(self, cells: tuple[int, ...], age: int) -> tuple[int, list[float]]:
        quiet = cells[0]
        known = self._counts[quiet]
        first = (self._shares[quiet] * known + PRIOR * QUIET / (age + 1)) / (known + PRIOR)
        looks = [_stretch(first)]
        for cell in cells[1:]:
            count = self._counts[cell]
            looks.append(_stretch((self._shares[cell] * count + PRIOR * first) / (count + PRIOR)))
        row = sum(age >= each for each in AGES)
        seen = min(self._seen, SEEN_MAX)
        return row, [*looks, 1.0, math.log(min(age, AGE_MAX)), 0.1 * math.log1p(seen), 0.1 * math.log1p(known)]


def worth_it(chance: float, cold_start_s: float) -> bool:
    """Whether to be awake for a minute in which a request comes with `chance`, where one cold start is worth `cold_start_s` of an
    idle instance: an idle minute costs all of itself, one with a request half, and none of it is won where no request comes."""
    return chance * cold_start_s > MINUTE_S - chance * MINUTE_S / 2


def awake_at(forecast: Forecast, now_s: float, cold_start_s: float) -> tuple[bool, float]:
    """Return whether the app is to be awake at `now_s` (seconds since the epoch), and when to ask again unless something comes."""
    minute = int(now_s // MINUTE_S)
    forecast.advance(minute)
    ends_s = (minute + 1) * MINUTE_S
    if worth_it(forecast.chance(), cold_start_s):
        return True, ends_s
    if now_s < ends_s - LEAD_S:
        return False, ends_s - LEAD_S
    return worth_it(forecast.chance(1), cold_start_s), ends_s


def _cells(minute: int, age: int, bits: int) -> tuple[int, int, int, int, int]:
    """Return where each look keeps what it has learnt of minutes like this one."""
    age = min(age, AGE_MAX)
    quiet = age if age <= AGE_EXACT else AGE_EXACT + (age - AGE_EXACT) // AGE_STEP
    lags = 0
    for lag in LAGS:
        lags = lags << 1 | (bits >> (lag - 1) & 1)
    hours = 0
    for hour in HOURS:
        hours = hours << 1 | (bits >> (hour - 2) & 7 != 0)
    return BASES[0] + quiet, BASES[1] + (bits & 63), BASES[2] + minute % 60, BASES[3] + lags, BASES[4] + hours


def _days(bits: int) -> int:
    """Return on how many of the last three days there was a request at about this minute."""
    return sum(bits >> (day - 2) & 7 != 0 for day in DAYS)


def _stretch(chance: float) -> float:
    chance = max(CHANCE_MIN, min(1.0 - CHANCE_MIN, chance))
    return math.log(chance / (1.0 - chance))


def _product(weights: tuple[float, ...], inputs: list[float]) -> float:
    return sum(weight * each for weight, each in zip(weights, inputs, strict=True))
