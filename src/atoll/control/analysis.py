"""Whether a new release does well enough, by what the ingress counted of it and of the old one in the same time. Pure.

It fails when it is beyond a bound of its own and worse than the old release is at the same time: what both suffer from alike is no
fault of the new one, and going back would mend nothing. Then there is no verdict, and the rollout waits.
"""

from __future__ import annotations

import enum
import math

from msgspec import Struct

from atoll.model.spec import Analysis
from atoll.model.traffic import Counts
from atoll.model.units import format_seconds

CHANCE_Z = 1.645
"""A share of errors counts as larger than the other when by chance alone it would be so in 5 of 100 cases: the one-sided test of
two proportions (NIST/SEMATECH e-Handbook of Statistical Methods, 7.3.3)."""
SLOWER = 1.2
"""A 99th percentile counts as larger than the other by this factor: within it lie the classes of the histogram."""
P99 = 0.99


class Outcome(enum.StrEnum):
    NONE = "none"
    PASSED = "passed"
    FAILED = "failed"


class Verdict(Struct, frozen=True, kw_only=True):
    outcome: Outcome
    words: str
    """With the numbers that it comes from."""
    at: float = 0.0
    """When it was given, in seconds since the epoch: each counts once."""


def decide_analysis(rules: Analysis, new: Counts, old: Counts) -> Verdict:
    """Return what `new` requests to the release say, beside `old` ones to the release that it is to replace."""
    if new.requests < rules.requests_min:
        return Verdict(outcome=Outcome.NONE, words=f"{new.requests} of the {rules.requests_min} requests that a verdict needs")
    comparable = old.requests >= rules.requests_min
    said: list[str] = []
    beyond = shared = False
    if rules.error_rate_max is not None:
        rate, most = new.error_rate, rules.error_rate_max
        text = f"{new.errors} of {new.requests} requests failed ({percent(rate)}, at most {percent(most)})"
        if rate > most:
            worse = not comparable or _more_errors(new, old)
            beyond, shared = beyond or worse, shared or not worse
        said.append(text + (f", of the old release {percent(old.error_rate)}" if comparable else ""))
    p99, before = new.quantile_s(P99), old.quantile_s(P99)
    if rules.latency_p99_max is not None and p99 is not None:
        text = f"p99 {seconds(p99)} (at most {format_seconds(rules.latency_p99_max)})"
        if p99 > rules.latency_p99_max:
            worse = not comparable or before is None or p99 > SLOWER * before
            beyond, shared = beyond or worse, shared or not worse
        said.append(text + (f", of the old release {seconds(before)}" if comparable and before is not None else ""))
    words = "; ".join(said)
    if beyond:
        return Verdict(outcome=Outcome.FAILED, words=words)
    if shared:
        return Verdict(outcome=Outcome.NONE, words=f"{words}: both releases suffer alike")
    return Verdict(outcome=Outcome.PASSED, words=words)


def _more_errors(new: Counts, old: Counts) -> bool:
    both = (new.errors + old.errors) / (new.requests + old.requests)
    spread = math.sqrt(both * (1 - both) * (1 / new.requests + 1 / old.requests))
    return new.error_rate - old.error_rate > CHANCE_Z * spread


def percent(share: float) -> str:
    return f"{100 * share:.3g} %"


def seconds(value: float) -> str:
    """Return a latency in words: milliseconds below ten seconds."""
    return f"{1000 * value:.0f} ms" if value < 10 else f"{value:.1f} s"
