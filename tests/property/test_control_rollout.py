"""Whatever order things happen in, a rollout keeps enough serving, never makes too many, and ends."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import structs

from atoll.control.actions import Ailment, Create, Decision, Remove, RemoveApp, Seen, Tell, Update, WriteAppStatus
from atoll.control.apps import AppFacts, decide_app
from atoll.model.records import App, AppPhase, AppStatus, Exit, Status
from atoll.model.spec import AppSpec, Port, Rollout, Scale
from atoll.model.states import Desired, Phase
from atoll.model.units import Seconds


class Model:
    """One app, a node that does as the dice say, and no store: actions are applied as they are."""

    def __init__(
        self, replicas: int, surge: int, unavailable: int, ports: bool, ingresses: frozenset[str], standby: int = 0
    ) -> None:
        rollout = Rollout(max_surge=surge, max_unavailable=unavailable, deadline=Seconds(100), drain=Seconds(10))
        scale = Scale(replicas=replicas, standby=standby)
        self.spec = AppSpec(name="web", image="x", ports=(Port(port=80),) if ports else (), rollout=rollout, scale=scale)
        self.now = 1000.0
        self.ingresses = ingresses
        self.app = App(
            project="p", name="web", spec=self.spec, release=1, replicas=replicas, created_at=self.now, updated_at=self.now
        )
        self.status: AppStatus | None = None
        self.seen: dict[str, Seen] = {}
        self.gone = False
        self.ids = self._count()
        self.bad: set[int] = set()
        self.made = 0

    def _count(self) -> Iterator[str]:
        number = 0
        while True:
            number += 1
            yield f"{number:06d}"

    def running(self) -> list[Seen]:
        return [seen for seen in self.alive() if not seen.instance.standby]

    def standing(self) -> list[Seen]:
        return [seen for seen in self.alive() if seen.instance.standby]

    def alive(self) -> list[Seen]:
        return [seen for seen in self.seen.values() if seen.instance.desired is Desired.RUN and not seen.ended]

    def rested(self) -> bool:
        """Whether what stands by is parked or awake, and known to be."""
        statuses = [seen.status for seen in self.standing() if seen.status is not None]
        parked = sum(status.parked for status in statuses)
        awake = sum(status.ready for status in statuses)
        return self.status is not None and parked + awake == self.app.standby and self.status.parked == parked

    def crash(self, chance: random.Random) -> None:
        """One that serves ends by itself, and is started again by its node."""
        serving = [seen for seen in self.running() if seen.ready]
        if serving:
            seen = chance.choice(serving)
            assert seen.status is not None
            status = structs.replace(seen.status, phase=Phase.BACKOFF, ready=False, phase_at=self.now)
            self.seen[seen.instance.id] = structs.replace(seen, status=status)

    def lose(self, chance: random.Random) -> None:
        """A node is lost with one instance on it."""
        placed = [seen for seen in self.alive() if seen.instance.node is not None]
        if placed:
            seen = chance.choice(placed)
            self.seen[seen.instance.id] = structs.replace(seen, lost_at=self.now)

    def ready(self) -> int:
        return sum(seen.ready for seen in self.seen.values())

    def ail(self, chance: random.Random) -> None:
        """Something befalls the device of an instance that runs, or it is well again."""
        running = self.alive()
        if running:
            seen = chance.choice(running)
            gone = chance.random() < 0.5
            ailment = Ailment(device="GPU-0", why="it is sick", gone=gone) if chance.random() < 0.8 else None
            self.seen[seen.instance.id] = structs.replace(seen, ailment=ailment)

    def decide(self) -> None:
        if self.gone:
            return
        facts = AppFacts(
            app=self.app,
            revision=1,
            status=self.status,
            instances=tuple(self.seen.values()),
            specs=dict.fromkeys(range(20), self.spec),
            ingresses=self.ingresses,
        )
        decision = Decision(self.now, lambda: next(self.ids))
        ready, running, standing = self.ready(), len(self.running()), len(self.standing())
        warm = [seen for seen in self.standing() if seen.status and seen.status.parked and seen.ailment is None]
        warm = [seen for seen in warm if (seen.instance.release, seen.instance.generation) == self.wanted]
        decide_app(facts, decision)
        made = sum(isinstance(action, Create) and not action.instance.standby for action in decision.actions)
        promoted = sum(
            isinstance(action, Update) and not action.instance.standby and self.stands(action) for action in decision.actions
        )
        if self.status is not None and not self.app.deleting and made:
            failing = sum(seen.ended for seen in facts.instances)
            assert promoted >= len(warm) or failing, "a cold start beside a parked instance"
        for action in decision.actions:
            match action:
                case Create(instance):
                    self.seen[instance.id] = Seen(instance=instance, revision=1)
                    self.made += 1
                case Update(instance, _):
                    old = self.seen[instance.id]
                    self.seen[instance.id] = structs.replace(old, instance=instance, drained=frozenset())
                case Remove(instance, _):
                    del self.seen[instance.id]
                case WriteAppStatus(status):
                    self.status = status
                case RemoveApp():
                    self.gone = True
                case Tell():
                    pass
                case _:
                    raise AssertionError(action)
        self.check(ready, running)
        wanted = self.app.standby if self.app.replicas else 0
        assert len(self.standing()) <= max(standing, wanted), "too many stand by"

    @property
    def wanted(self) -> tuple[int, int]:
        return (self.app.release, self.app.generation)

    def stands(self, action: Update) -> bool:
        return self.seen[action.instance.id].instance.standby

    def check(self, ready_before: int, running_before: int) -> None:
        wanted = 0 if self.app.deleting else self.app.replicas
        least = wanted - self.spec.rollout.max_unavailable
        assert self.ready() >= min(ready_before, least), "a decision took away one that had to serve"
        most = wanted + self.spec.rollout.max_surge
        assert len(self.running()) <= max(running_before, most), "a decision made too many"

    def step(self, chance: random.Random) -> None:
        """Something happens to one instance, or a little time passes."""
        self.now += chance.choice((0.0, 0.1, 1.0))
        for id, seen in self.seen.items():
            # What is bad is up for half a second at most.
            status = seen.status
            if seen.phase is Phase.RUNNING and seen.instance.release in self.bad and status:
                over = self.now >= (status.started_at or 0.0) + 0.5
                status = structs.replace(status, phase=Phase.BACKOFF, ready=False, exit=Exit(code=1, at=self.now))
                self.seen[id] = structs.replace(seen, status=status) if over else seen
        if not self.seen:
            return
        seen = chance.choice(list(self.seen.values()))
        instance, status = seen.instance, seen.status
        if instance.node is None:
            self.seen[instance.id] = structs.replace(seen, instance=structs.replace(instance, node="n"))
            return
        status = status or Status(instance=instance.id, project="p", node="n", phase=Phase.PENDING)
        bad = instance.release in self.bad
        if status.phase.final or seen.lost:
            return
        if instance.desired is Desired.STOP:
            status = structs.replace(status, phase=Phase.STOPPED, ready=False)
        elif instance.desired is Desired.DRAIN and chance.random() < 0.5:
            self.seen[instance.id] = structs.replace(seen, drained=self.ingresses)
            return
        elif status.phase is not Phase.RUNNING:
            restarts = status.restarts + (status.phase is Phase.BACKOFF)
            status = structs.replace(status, phase=Phase.RUNNING, restarts=restarts, started_at=self.now, ready=bad)
            if bad:
                status = structs.replace(status, ready_at=self.now)
        elif bad:
            final = chance.random() < 0.2
            phase = Phase.FAILED if final else Phase.BACKOFF
            status = structs.replace(status, phase=phase, ready=False, exit=Exit(code=1, at=self.now))
        elif instance.standby:
            if not status.parked and not status.ready:
                parks = chance.random() < 0.7  # or else it could not be parked, and waits awake
                status = structs.replace(status, parked=parks, ready=not parks, ready_at=None if parks else self.now)
        elif status.parked:
            status = structs.replace(status, parked=False)
        elif not status.ready:
            status = structs.replace(status, ready=True, ready_at=self.now)
        self.seen[instance.id] = structs.replace(seen, status=structs.replace(status, phase_at=self.now))

    def settle(self, chance: random.Random, steps: int = 1500) -> None:
        for _ in range(steps):
            self.step(chance)
            self.decide()
            if self.settled():
                return

    def settled(self) -> bool:
        app, status = self.app, self.status
        if any(seen.ailment for seen in self.alive()):
            return False
        if app.deleting or status is None or len(self.seen) != app.replicas + app.standby or not self.rested():
            return self.gone
        return (status.release, status.served_release, status.updated) == (app.release, app.release, app.replicas) and (
            status.phase in (AppPhase.RUNNING, AppPhase.STOPPED) and self.ready() == app.replicas
        )


worlds = st.builds(
    Model,
    replicas=st.integers(0, 5),
    surge=st.integers(0, 3),
    unavailable=st.integers(1, 2),
    ports=st.booleans(),
    ingresses=st.sampled_from([frozenset(), frozenset({"g"}), frozenset({"g", "h"})]),
    standby=st.sampled_from([0, 0, 1, 2]),
)
orders = st.lists(
    st.sampled_from(["release", "restart", "scale", "ail", "crash", "lose", "standby", "step", "step", "step"]), max_size=60
)


@given(worlds, orders, st.integers(0, 2**32))
@settings(max_examples=300, deadline=None)
def test_enough_serve_and_never_too_many_whatever_is_asked(model: Model, todo: list[str], seed: int) -> None:
    chance = random.Random(seed)
    for what in todo:
        match what:
            case "release":
                model.app = structs.replace(model.app, release=model.app.release + 1, updated_at=model.now)
            case "restart":
                model.app = structs.replace(model.app, generation=model.app.generation + 1, updated_at=model.now)
            case "scale":
                model.app = structs.replace(model.app, replicas=chance.randint(0, 6), updated_at=model.now)
            case "ail":
                model.ail(chance)
            case "crash":
                model.crash(chance)
            case "lose":
                model.lose(chance)
            case "standby" if model.app.standby:
                scale = Scale(replicas=1, standby=chance.randint(1, 3))
                model.app = structs.replace(model.app, spec=structs.replace(model.app.spec, scale=scale))
            case _:
                for _ in range(5):
                    model.step(chance)
                    model.decide()
        model.decide()
    model.settle(chance)
    assert model.status is not None
    seen, made, status = dict(model.seen), model.made, model.status
    model.decide()
    assert (model.seen, model.made, model.status) == (seen, made, status), "what is as it should be is left alone"
    assert model.status.phase is (AppPhase.RUNNING if model.app.replicas else AppPhase.STOPPED)
    assert model.ready() == model.app.replicas == len(model.running())
    assert len(model.standing()) == model.app.standby
    assert model.rested()
    assert not any(seen.ailment for seen in model.alive()), "what held a sick device has been replaced"
    assert {(s.instance.release, s.instance.generation) for s in model.alive()} <= {model.wanted}
    model.app = structs.replace(model.app, deleting=True)
    model.settle(chance, 300)
    assert model.gone
    assert not model.seen


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize(("surge", "unavailable"), [(1, 0), (2, 0), (0, 1), (2, 1)])
def test_a_release_that_crashes_fails_while_the_old_one_keeps_serving(seed: int, surge: int, unavailable: int) -> None:
    chance = random.Random(seed)
    model = Model(3, surge, unavailable, True, frozenset({"g"}))
    model.decide()
    model.settle(chance, 200)
    assert model.ready() == 3
    model.bad = {2}
    model.app = structs.replace(model.app, release=2, updated_at=model.now)
    made = model.made
    for _ in range(2000):
        model.step(chance)
        model.decide()
        good = sum(seen.ready and seen.instance.release == 1 for seen in model.seen.values())
        assert good >= 3 - unavailable
    assert model.status is not None
    assert model.status.phase is AppPhase.FAILED
    assert "exited with status 1" in model.status.message
    assert model.status.served_release == 1
    assert model.made - made < 60, "a failing release must not be made again and again"
    # Back to what works: a new release of the old spec.
    model.app = structs.replace(model.app, release=3, updated_at=model.now)
    model.settle(chance)
    assert model.status.phase is AppPhase.RUNNING
    assert model.ready() == 3


@pytest.mark.parametrize("seed", range(5))
def test_what_served_before_is_kept_at_its_number_after_a_failed_rollout(seed: int) -> None:
    chance = random.Random(seed)
    model = Model(3, 1, 0, True, frozenset())
    model.decide()
    model.settle(chance, 200)
    model.bad = {2}
    model.app = structs.replace(model.app, release=2, updated_at=model.now)
    model.settle(chance, 1000)
    assert model.status is not None
    assert model.status.phase is AppPhase.FAILED
    victim = next(seen for seen in model.running() if seen.instance.release == 1)
    model.seen[victim.instance.id] = structs.replace(victim, lost_at=model.now)
    model.settle(chance, 600)
    assert sum(seen.ready and seen.instance.release == 1 for seen in model.seen.values()) == 3
