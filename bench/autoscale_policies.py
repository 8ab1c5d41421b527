"""What each way to let apps sleep costs on a record: cold starts, and seconds in which an instance waits for nothing.

An app is awake or asleep; how many instances it has beyond one while it is awake is not looked at, since no policy here differs in
it. Each gap between two requests costs the part of it in which the app is awake, and one cold start where it ends asleep. The first
request of the day finds every app asleep.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass
from itertools import accumulate

from atoll.control.pressure import DECIDE_S, PANIC_SHARE, Pressure, PressureFacts, PressureMemory, decide_pressure
from atoll.scheduling.forecast import LEAD_S, LINGER_S, MINUTE_S, Forecast, worth_it
from bench.autoscale_trace import DAY_MINUTES, App

EPOCH_MINUTE = 26_000_000
"""The minute of the epoch at which the day begins; any will do that begins an hour."""


@dataclass(frozen=True)
class Outcome:
    cold: int
    """Requests that found the app asleep."""
    idle_s: float
    """How long the app was awake without a request."""
    share: float
    """Of its requests those that found it asleep; of several apps their mean, which those that are asked rarely make up."""
    woken: int = 0
    """How often it was woken ahead of a request, in time or in vain."""


Gap = tuple[float, float, bool]


def fixed(app: App, window_s: float) -> Outcome:
    """Asleep after `window_s` without a request."""
    cold, idle = 1, 0.0
    for begin, end, asked in app.gaps:
        idle += min(end - begin, window_s)
        cold += asked and end - begin > window_s
    return Outcome(cold, idle, cold / app.requests)


def knative_window_s(concurrency: float, stable_s: float) -> float:
    """Return how long after its last request an app goes to zero by the rule that the leader runs, with Knative's target of 70 % of
    `concurrency`, looked at every 2 s: when no average asks for an instance any more."""
    memory, since_s = PressureMemory(), 0.0
    while True:
        since_s += DECIDE_S
        stable, panic = (1.0 if since_s < window_s else 0.0 for window_s in (stable_s, stable_s * PANIC_SHARE))
        asked = Pressure(name="", target=0.7 * concurrency, stable=stable / stable_s, panic=panic / stable_s)
        facts = PressureFacts(current=1, most=1_000, ready=1, stable_s=stable_s, pressures=(asked,), known=True)
        need, memory = decide_pressure(facts, memory, since_s)
        if need.count == 0:
            return since_s


def hybrid(app: App, range_minutes: int, *, head: float = 0.05, tail: float = 0.99, margin: float = 0.1) -> Outcome:
    """The hybrid histogram policy of "Serverless in the Wild" (ATC 2020) with its parameters.

    Idle times are counted by minutes up to the range. An app is unloaded up to the 5th percentile and kept to the 99th, 10 %
    earlier and later, and kept for the whole range where the histogram says little (the coefficient of variation of its bins is
    below 2). Where most idle times are out of range their mean counts, 15 % earlier and later; the paper has ARIMA there.
    """
    bins = [0] * range_minutes
    count = beyond = squares = 0
    cold, idle = 1, 0.0
    far: deque[float] = deque(maxlen=20)
    for begin, end, asked in app.gaps:
        unload, keep = 0.0, MINUTE_S * range_minutes
        mean = count / range_minutes
        if far and beyond > count:
            expected = sum(far) / len(far)
            unload, keep = 0.85 * expected, 1.15 * expected
        elif count and math.sqrt(max(0.0, squares / range_minutes - mean * mean)) >= 2 * mean:
            unload = MINUTE_S * _percentile(bins, head * count) * (1 - margin)
            keep = MINUTE_S * (_percentile(bins, tail * count) + 1) * (1 + margin)
        if unload < MINUTE_S:
            unload = 0.0
        gap = end - begin
        idle += max(0.0, min(gap, keep) - unload)
        cold += asked and (gap > keep or gap < unload)
        minutes = int(gap // MINUTE_S)
        if minutes >= range_minutes:
            beyond += 1
            far.append(gap)
        else:
            squares += 2 * bins[minutes] + 1
            bins[minutes] += 1
            count += 1
    return Outcome(cold, idle, cold / app.requests)


def _percentile(bins: list[int], rank: float) -> int:
    below = 0
    for at, count in enumerate(bins):
        below += count
        if below >= rank - 1e-9:
            return at
    return len(bins) - 1


@dataclass(frozen=True)
class Foreseen:
    """What `Forecast` says of an app in each minute of the day, and what it says it for."""

    app: App
    begins: list[float]
    """The chance of a request as the minute begins."""
    next: list[float]
    """`LEAD_S` before its end, that in the next, should nothing have come until then."""
    gaps: list[Gap]
    """Those that outlast the minute in which they begin."""
    within_s: float
    """All the others together: the app is awake in them whatever is foreseen."""


def foresee(app: App) -> Foreseen:
    """Go through the day as the leader does: each minute is forecast from what came before it."""
    first = _first_activity(app)
    forecast = Forecast()
    begins, ahead = [], []
    for minute in range(DAY_MINUTES):
        forecast.advance(EPOCH_MINUTE + minute)
        begins.append(forecast.chance() if forecast.seen else 0.0)
        early = first[minute] < MINUTE_S - LEAD_S
        if early:
            forecast.note(EPOCH_MINUTE + minute)
        ahead.append(forecast.chance(1) if forecast.seen or early else 0.0)
        if not early and first[minute] < math.inf:
            forecast.note(EPOCH_MINUTE + minute)
    gaps, within_s = [], 0.0
    for begin, end, asked in app.gaps:
        if begin // MINUTE_S == end // MINUTE_S or end - begin <= LINGER_S:
            within_s += end - begin
        else:
            gaps.append((begin, end, asked))
    return Foreseen(app, begins, ahead, gaps, within_s)


def _first_activity(app: App) -> list[float]:
    """Return for each minute at which second of it something is under way first; infinite where nothing is."""
    first = [math.inf] * DAY_MINUTES
    for begin, end in app.busy:
        minute = int(begin // MINUTE_S)
        first[minute] = min(first[minute], begin - minute * MINUTE_S)
        for later in range(minute + 1, min(DAY_MINUTES, int(end // MINUTE_S) + 1)):
            first[later] = 0.0
    return first


def foreseeing(foreseen: Foreseen, cold_start_s: float) -> Outcome:
    """`idle = "predict"` with `idle_after` = `cold_start_s`."""
    awake = [worth_it(chance, cold_start_s) for chance in foreseen.begins]
    early = [worth_it(chance, cold_start_s) for chance in foreseen.next]
    before = [0, *accumulate(awake)]
    # Woken ahead of a minute, at the end of one asleep.
    leads = [0, *accumulate(not now and soon for now, soon in zip(awake, early, strict=True))]
    cold, idle, woken = 1, foreseen.within_s, 0
    for begin, end, asked in foreseen.gaps:
        start, stop = int(begin // MINUTE_S), int(end // MINUTE_S)
        rest = (start + 1) * MINUTE_S - begin
        linger = max(0.0, LINGER_S - rest) if start + 1 < DAY_MINUTES and not awake[start + 1] else 0.0
        idle += rest + linger + MINUTE_S * (before[stop] - before[start + 1]) + LEAD_S * (leads[stop] - leads[start + 1])
        woken += leads[stop] - leads[start + 1]
        if stop >= DAY_MINUTES:
            continue
        within = end - stop * MINUTE_S
        lead = max(0.0, within - (MINUTE_S - LEAD_S)) if early[stop] and not awake[stop] else 0.0
        idle += within if awake[stop] else lead
        woken += lead > 0
        cold += asked and not awake[stop] and lead == 0.0
    return Outcome(cold, idle, cold / foreseen.app.requests, woken)


def total(outcomes: list[Outcome]) -> Outcome:
    """Add up; of shares the mean."""
    return Outcome(
        cold=sum(each.cold for each in outcomes),
        idle_s=sum(each.idle_s for each in outcomes),
        share=sum(each.share for each in outcomes) / len(outcomes),
        woken=sum(each.woken for each in outcomes),
    )
