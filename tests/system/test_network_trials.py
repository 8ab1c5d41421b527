"""`atoll doctor --network`: every feature is measured with and without, and nothing of it is left."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from atoll.network import namespaces
from atoll.network.trials import Trial, measure

pytestmark = [pytest.mark.system, pytest.mark.skipif(os.geteuid() != 0, reason="making network namespaces needs root")]


def trials_there() -> set[str]:
    return {path.name for path in namespaces.DIRECTORY.glob("atoll-trial-*")}


def test_every_feature_is_measured_both_ways_and_nothing_is_left() -> None:
    before, said = trials_there(), []
    trials = {trial.feature: trial for trial in measure(said.append, rounds=1, seconds=0.1)}
    assert trials_there() <= before
    default = Path("/proc/sys/net/ipv4/tcp_congestion_control").read_text().strip()
    measured = ["links: large segments (TSO, GSO)", "machines: checksum and TSO offloads", "machines: two queues"]
    if default != "cubic":
        measured.append("links: cubic for congestion control")
    for name in measured:
        trial = trials[name]
        assert trial.without, trial
        assert trial.with_it, trial
        assert any(name in words and "without" in words for words in said)
    assert trials["machines: vhost-net"].ratio is None


def test_a_trial_says_how_many_times_as_much() -> None:
    assert Trial(feature="x", without=2.0, with_it=3.0, used="on", said="helps").ratio == 1.5
    assert Trial(feature="x", used="–", said="could not be tried").ratio is None
