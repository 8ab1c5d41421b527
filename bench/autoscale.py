"""Cold starts against idle instances on a day of Azure Functions: fixed windows, Knative's rule, the hybrid histogram, and ours."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from bench.autoscale_policies import Outcome, fixed, foresee, foreseeing, hybrid, knative_window_s, total
from bench.autoscale_trace import DATA, App, halves, read_trace
from bench.report import Report, Result

WINDOWS_MIN = (1, 5, 10, 20, 60)
RANGES_MIN = (10, 30, 60, 120, 240)
CONCURRENCY, STABLE_S, GRACE_S = 100.0, 60.0, 30.0
"""Knative's defaults; the last is the longest that it waits before the last instance goes."""
WORTHS_S = (*(round(30 * 1.25**step) for step in range(30)), 60, 300, 600, 1_800, 3_600)
"""Of `idle_after`: what a cold start is worth."""

Curve = list[tuple[int, Outcome]]
"""What a cold start is worth, in seconds → what that costs."""
References = dict[str, list[tuple[str, Outcome]]]


def run(arguments: Sequence[str]) -> Report:
    parser = argparse.ArgumentParser(prog="python -m bench autoscale")
    parser.add_argument("--data", type=Path, default=DATA, help="the directory of the record")
    parser.add_argument("--seed", type=int, default=1, help="of where in its minute a request comes")
    parser.add_argument("--fit", action="store_true", help="fit the weights to the other half, and write them to stderr")
    parser.add_argument("--plot", type=Path, action="append", default=[], help="also a picture: a file .png or .svg")
    options = parser.parse_args(arguments)
    report = Report("autoscale")
    try:
        apps = read_trace(options.data, options.seed)
    except OSError as error:
        report.add(Result("cold starts at the same idle cost", None, "cold starts", why=f"needs the record: {error}"))
        return report
    tuning, reported = halves(apps)
    if options.fit:
        from bench.autoscale_fit import fit

        print("\n".join(str(tuple(row)) for row in fit(tuning)), file=sys.stderr)
    curve, references = measure(reported)
    _compare(report, reported, curve, references)
    for path in options.plot:
        from bench.autoscale_plot import draw

        draw(path, curve, references, requests=sum(app.requests for app in reported))
    return report


def measure(apps: list[App]) -> tuple[Curve, References]:
    """Return what ours costs, by what a cold start is worth in seconds, and what the others do: family → (name, outcome)."""
    foreseen = [foresee(app) for app in apps]
    curve = [(worth, total([foreseeing(each, worth) for each in foreseen])) for worth in WORTHS_S]

    def of_all(policy: Callable[[App], Outcome]) -> Outcome:
        return total([policy(app) for app in apps])

    knative_s = knative_window_s(CONCURRENCY, STABLE_S)
    return curve, {
        "fixed window": [(f"{window} min", of_all(lambda app, s=window * 60.0: fixed(app, s))) for window in WINDOWS_MIN],  # type: ignore[misc]
        "Knative": [
            ("Knative", of_all(lambda app: fixed(app, knative_s))),
            ("Knative, 30 s of grace", of_all(lambda app: fixed(app, knative_s + GRACE_S))),
        ],
        "hybrid histogram": [
            (f"range {minutes} min", of_all(lambda app, m=minutes: hybrid(app, m)))  # type: ignore[misc]
            for minutes in RANGES_MIN
        ],
    }


def _compare(report: Report, apps: list[App], curve: Curve, references: References) -> None:
    requests = sum(app.requests for app in apps)
    for family, points in references.items():
        for name, point in points:
            what = name if name.startswith(family) else f"{family}, {name}"
            goal = "< 1" if family != "hybrid histogram" else None
            no_dearer = [ours for _, ours in curve if ours.idle_s <= point.idle_s]
            cold = min((ours.cold for ours in no_dearer), default=None)
            idle = min((ours.idle_s for _, ours in curve if ours.cold <= point.cold), default=None)
            share = min((ours.share for ours in no_dearer), default=None)
            rows = (
                ("cold starts at no more idle time than", cold, point.cold, "cold starts", 1, goal),
                ("idle at no more cold starts than", idle, point.idle_s, "hours", 3600, goal),
                ("cold share, mean of the apps, at no more idle time than", share, point.share, "%", 0.01, None),
            )
            for text, ours, theirs, unit, per, wanted in rows:
                value = None if ours is None else ours / per
                report.add(Result(f"{text}: {what}", value, unit, reference=theirs / per, goal=wanted))
    for worth, each in sorted(curve):
        report.notes.append(
            f"ours, idle_after = {worth} s: {each.cold} cold starts, {100 * each.cold / requests:.4f} % of requests, "
            f"{100 * each.share:.1f} % on the mean of the apps; {each.idle_s / 3600:.0f} h idle; woken ahead {each.woken} times"
        )
    report.notes.append(
        f"{len(apps)} apps that no weight was fitted on, {requests} requests in a day; every policy learns from the day's "
        "beginning; share of cold starts is of all requests; instances beyond an app's first are left out for all"
    )
