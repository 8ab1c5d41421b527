"""Whatever order things happen in, a rollout by shares keeps enough serving, gives away 100 percent, and ends at one release."""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import structs
from test_control_rollout import Model

from atoll.control.actions import Create, Decision, Remove, Seen, Tell, Update, WriteAppStatus
from atoll.control.analysis import Outcome, Verdict
from atoll.control.apps import AppFacts, decide_app
from atoll.model.evacuation import Evacuation
from atoll.model.records import AppPhase
from atoll.model.rollouts import RolloutOrder, RolloutPhase, RolloutStatus
from atoll.model.spec import Analysis, CanaryStep, Rollout, Strategy
from atoll.model.states import Desired
from atoll.model.units import Seconds

FAILURES_MAX = 1


class Shared(Model):
    """A model whose releases are given shares of the requests, or a set beside the old one."""

    def __init__(self, replicas: int, surge: int, unavailable: int, strategy: Strategy, reverts: bool | None) -> None:
        super().__init__(replicas, surge, unavailable, True, frozenset({"g"}))
        steps = (CanaryStep(weight=10, pause=Seconds(2)), CanaryStep(weight=50), CanaryStep(weight=70, pause=Seconds(1)))
        rules = Rollout(
            strategy=strategy,
            steps=steps if strategy is Strategy.CANARY else (),
            max_surge=surge,
            max_unavailable=unavailable,
            deadline=Seconds(1000),
            drain=Seconds(10),
            analysis=Analysis(error_rate_max=0.01, failures_max=FAILURES_MAX),
            auto_revert=reverts,
            keep_old=Seconds(5),
        )
        self.spec = structs.replace(self.spec, rollout=rules)
        self.app = structs.replace(self.app, spec=self.spec)
        self.verdict: Verdict | None = None

    @property
    def rollout(self) -> RolloutStatus | None:
        return self.status.rollout if self.status is not None else None

    @property
    def going(self) -> bool:
        found = self.rollout
        return found is not None and found.release == self.app.release and found.phase.under_way

    def judge(self, outcome: Outcome) -> None:
        self.verdict = Verdict(outcome=outcome, words="so many of so many", at=self.now)

    def order(self, **more: Any) -> None:
        before = self.app.order
        if before is None or before.release != self.app.release:
            before = RolloutOrder(release=self.app.release)
        self.app = structs.replace(self.app, order=structs.replace(before, **more), updated_at=self.now)

    def sharing(self, weights: dict[int, int]) -> int:
        """Return how many ready instances have a share of the requests."""
        return sum(seen.ready and (not weights or weights.get(seen.instance.release, 0) > 0) for seen in self.running())

    def decide(self) -> None:
        before = self.rollout
        facts = AppFacts(
            app=self.app,
            revision=1,
            status=self.status,
            instances=tuple(self.seen.values()),
            specs=dict.fromkeys(range(50), self.spec),
            ingresses=self.ingresses,
            verdict=self.verdict,
        )
        decision = Decision(self.now, lambda: next(self.ids))
        running, seen_before = len(self.running()), dict(self.seen)
        decide_app(facts, decision)
        for action in decision.actions:
            match action:
                case WriteAppStatus(status):
                    self.status = status
                case _:
                    pass
        weights = self.rollout.weights if self.rollout is not None else {}
        assert not weights or sum(weights.values()) == 100
        assert all(0 <= weight <= 100 for weight in weights.values())
        ready = self.sharing(weights)
        for action in decision.actions:
            match action:
                case Create(instance):
                    self.seen[instance.id] = Seen(instance=instance, revision=1)
                    self.made += 1
                case Update(instance, _):
                    self.seen[instance.id] = structs.replace(self.seen[instance.id], instance=instance, drained=frozenset())
                case Remove(instance, _):
                    del self.seen[instance.id]
                case Tell() | WriteAppStatus():
                    pass
                case _:
                    raise AssertionError(action)
        rules, wanted = self.spec.rollout, self.app.replicas
        least = wanted - rules.max_unavailable
        assert self.sharing(weights) >= min(ready, least), (self.rollout, seen_before)
        doubled = rules.strategy is Strategy.BLUE_GREEN
        # One for what a drained node takes from a release that has none to spare.
        one_more = any(seen.evacuation for seen in seen_before.values())
        most = max(wanted + rules.max_surge, 2 * wanted if doubled else 0) + one_more
        assert len(self.running()) <= max(running, most), "a decision made too many"
        self._check_verdict(before)

    def _check_verdict(self, before: RolloutStatus | None) -> None:
        after, verdict = self.rollout, self.verdict
        if before is None or after is None or verdict is None or verdict.at <= before.analysed_at or verdict.at < before.since:
            return
        same = (before.release, before.attempt, before.step) == (after.release, after.attempt, after.step)
        one_too_many = verdict.outcome is Outcome.FAILED and before.failures >= FAILURES_MAX
        judged = before.phase.under_way or before.phase is RolloutPhase.KEEPING
        if same and one_too_many and judged and self.spec.rollout.reverts and before.release == self.app.release:
            assert after.phase is RolloutPhase.REVERTED
            assert after.weights.get(after.release, 0) <= before.weights.get(after.release, 100)
            assert sum(after.weights.values()) == 100


worlds = st.builds(
    Shared,
    replicas=st.integers(1, 6),
    surge=st.integers(1, 6),
    unavailable=st.integers(0, 2),
    strategy=st.sampled_from([Strategy.CANARY, Strategy.CANARY, Strategy.BLUE_GREEN, Strategy.ROLLING]),
    reverts=st.sampled_from([None, True, False]),
)
orders = st.lists(
    st.sampled_from(
        [
            *("release", "scale", "good", "bad", "pause", "resume", "promote", "abort", "retry", "crash", "lose"),
            *("step", "step", "step", "step"),
        ]
    ),
    max_size=50,
)


def do(model: Shared, what: str, chance: random.Random) -> None:
    match what:
        case "release":
            model.app = structs.replace(model.app, release=model.app.release + 1, order=None, updated_at=model.now)
        case "scale":
            model.app = structs.replace(model.app, replicas=chance.randint(1, 6), updated_at=model.now)
        case "good":
            model.judge(Outcome.PASSED)
        case "bad":
            model.judge(Outcome.FAILED)
        case "pause" if model.going:
            model.order(paused=True)
        case "resume" if model.going and model.rollout is not None:
            model.order(paused=False, step=model.rollout.step + 1)
        case "promote" if model.going:
            model.order(promoted=True, paused=False)
        case "abort" if model.going:
            model.order(aborted=True)
        case "retry" if model.rollout is not None and model.rollout.phase is RolloutPhase.REVERTED:
            attempt = model.rollout.attempt + 1
            order = RolloutOrder(release=model.app.release, attempt=attempt)
            model.app = structs.replace(model.app, order=order, updated_at=model.now)
        case "crash":
            model.crash(chance)
        case "lose":
            model.lose(chance)
        case _:
            for _ in range(5):
                model.step(chance)
                model.decide()
    model.decide()


def settle(model: Shared, chance: random.Random, release: int) -> None:
    """Let things happen until only `release` is left, whole and ready."""
    for _ in range(4000):
        model.step(chance)
        model.decide()
        there = [seen.instance.release for seen in model.seen.values()]
        whole = there == [release] * model.app.replicas and model.ready() == model.app.replicas
        if whole and model.status is not None and model.status.served_release == release and not model.going:
            return
    raise AssertionError((model.status, model.seen))


@given(worlds, orders, st.integers(0, 2**32))
@settings(max_examples=80, deadline=None)
def test_shares_are_whole_enough_serve_and_a_promoted_rollout_ends_at_the_new_release(
    model: Shared, todo: list[str], seed: int
) -> None:
    chance = random.Random(seed)
    for what in ("step", *todo):
        do(model, what, chance)
    model.verdict = None
    order = RolloutOrder(release=model.app.release, attempt=99, promoted=True)
    model.app = structs.replace(model.app, order=order, updated_at=model.now)
    settle(model, chance, model.app.release)
    model.decide()
    assert model.status is not None
    assert (model.status.phase, model.status.served_release) == (AppPhase.RUNNING, model.app.release)
    assert {seen.instance.desired for seen in model.seen.values()} == {Desired.RUN}


@given(worlds.filter(lambda model: model.spec.rollout.reverts), orders, st.integers(0, 2**32))
@settings(max_examples=40, deadline=None)
def test_a_failed_analysis_always_ends_at_the_old_release_with_all_requests(model: Shared, todo: list[str], seed: int) -> None:
    chance = random.Random(seed)
    for what in ("step", *todo):
        do(model, what, chance)
    model.verdict = None
    first = structs.replace(model.app, order=RolloutOrder(release=model.app.release, attempt=98, promoted=True))
    model.app = structs.replace(first, updated_at=model.now)
    settle(model, chance, model.app.release)
    good = model.app.release
    model.app = structs.replace(model.app, release=good + 1, order=None, updated_at=model.now)
    model.decide()
    for _ in range(3000):
        found = model.rollout
        assert found is not None
        if found.phase is RolloutPhase.REVERTED or not model.going:
            break
        model.judge(Outcome.FAILED)
        model.step(chance)
        model.decide()
    assert model.rollout is not None
    if model.rollout.phase is not RolloutPhase.REVERTED:
        assert model.spec.rollout.strategy is Strategy.ROLLING or not model.rollout.since, "it went through before it was judged"
        return
    settle(model, chance, good)
    assert model.status is not None
    assert model.rollout.weights == {good: 100}
    assert model.status.served_release == good
    assert model.status.phase is AppPhase.FAILED
    made = model.made
    for _ in range(50):
        model.step(chance)
        model.decide()
    assert model.made == made, "it is not tried again by itself"


class Calm(Shared):
    """One whose instances never end by themselves: what serves is too little only where a decision made it so."""

    def drain(self, chance: random.Random) -> None:
        """A node with one instance on it is to be empty, in good time."""
        placed = [seen for seen in self.alive() if seen.instance.node is not None]
        if placed:
            seen = chance.choice(placed)
            evacuation = Evacuation(why="it is being drained", since=self.now, deadline=self.now + 10_000)
            self.seen[seen.instance.id] = structs.replace(seen, evacuation=evacuation)

    def short(self) -> str:
        """Return which release has too few instances for its share of the requests, or nothing."""
        enough = max(0, self.app.replicas - self.spec.rollout.max_unavailable)
        weights = self.rollout.weights if self.rollout is not None else {}
        ready = Counter(seen.instance.release for seen in self.running() if seen.ready)
        sharing = {release: weight for release, weight in weights.items() if weight and ready[release]}
        for release, weight in sharing.items():
            if 100 * ready[release] <= (100 * weight / sum(sharing.values()) - 1) * enough:
                return f"{ready[release]} of release {release} for {weight} %, {enough} are enough for all"
        return "" if sharing or not weights or not enough else f"none of {weights}"


calm = st.builds(
    Calm,
    replicas=st.integers(1, 6),
    surge=st.integers(1, 6),
    unavailable=st.integers(0, 2),
    strategy=st.sampled_from([Strategy.CANARY, Strategy.CANARY, Strategy.BLUE_GREEN]),
    reverts=st.sampled_from([None, True, False]),
)
steers = st.lists(
    st.sampled_from(
        [
            *("release", "back", "good", "bad", "pause", "resume", "promote", "abort", "drain", "drain"),
            *("step", "step", "step", "step", "step"),
        ]
    ),
    max_size=60,
)


@given(calm, steers, st.integers(0, 2**32))
@settings(max_examples=150, deadline=None)
def test_at_every_moment_each_release_has_the_instances_for_its_share_of_the_requests(
    model: Calm, todo: list[str], seed: int
) -> None:
    chance = random.Random(seed)
    model.decide()
    settle(model, chance, 1)
    for what in todo:
        match what:
            case "drain":
                model.drain(chance)
            case "back" if model.rollout is not None and model.rollout.stable:
                model.app = structs.replace(model.app, release=model.rollout.stable, order=None, updated_at=model.now)
            case "release" | "good" | "bad" | "pause" | "resume" | "promote" | "abort":
                do(model, what, chance)
            case _:
                for _ in range(10):
                    model.step(chance)
                    model.decide()
                    assert not model.short(), (model.short(), model.rollout)
        model.decide()
        assert not model.short(), (what, model.short(), model.rollout)
    model.verdict = None
    order = RolloutOrder(release=model.app.release, attempt=99, promoted=True)
    model.app = structs.replace(model.app, order=order, updated_at=model.now)
    settle(model, chance, model.app.release)
