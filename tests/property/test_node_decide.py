"""The instance's state machine against a hostile world: only legal transitions, and it always ends when told to."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from atoll.model.records import Exit
from atoll.model.spec import AppSpec, Health, HealthKind, JobSpec, Port, Restart, RestartPolicy, Stop, Workload
from atoll.model.states import Desired, Phase, legal
from atoll.model.units import Seconds
from atoll.node.decide import KILL_REPEAT_S, PASSING_TRIES_MAX, decide
from atoll.node.transitions import (
    Action,
    CancelPrepare,
    Clean,
    Due,
    Ended,
    Erase,
    Happening,
    Kill,
    Launch,
    Launched,
    LaunchFailed,
    Now,
    Prepare,
    Prepared,
    PrepareFailed,
    Probe,
    Probed,
    Progressed,
    Recovered,
    Removed,
    Rules,
    Signal,
    State,
    Wanted,
    Watch,
    rules_of,
)


class Machine:
    """Does what actions say, in an order and with outcomes that Hypothesis chooses, and checks each step."""

    def __init__(self, rules: Rules, draw: st.DrawFn) -> None:
        self.rules, self.draw = rules, draw
        self.state = State()
        self.now = 1_000.0
        self.preparing = self.launching = self.alive = self.watched = False
        self.probing: int | None = None
        self.erased = False
        self.killed = 0

    def feed(self, event: Happening) -> None:
        before = self.state
        self.state, actions = decide(self.rules, before, event, Now(self.now + 1e9, self.now))
        assert legal(before.phase, self.state.phase)
        assert not before.phase.final or self.state.phase is before.phase
        assert not self.state.ready or self.state.phase is Phase.RUNNING
        assert not self.erased or not actions
        for action in actions:
            self.act(action)
        if self.state.phase.final:
            assert self.state.due is None

    def act(self, action: Action) -> None:
        match action:
            case Prepare():
                assert not self.preparing
                assert not self.alive, "a second process beside the first"
                self.preparing = True
            case CancelPrepare():
                self.preparing = False
            case Launch():
                assert not self.alive
                self.launching = True
            case Watch():
                assert self.alive
                self.watched = True
            case Signal():
                assert self.watched
            case Kill():
                self.killed += 1
            case Clean():
                self.alive = self.watched = False
                self.probing = None
            case Probe():
                self.probing = action.run
            case Erase():
                assert not self.alive
                self.erased = True

    def step(self) -> None:
        options: list[str] = ["pass", "crash-agent"]
        options += ["prepared", "prepared", "prepared", "prepare-failed", "progressed"] if self.preparing else []
        options += ["launched", "launched", "launched", "launch-failed"] if self.launching else []
        options += ["ended"] if self.alive and self.watched else []
        options += ["probed", "probed", "probed"] if self.probing is not None else []
        options += ["due", "due", "due"] if self.state.due is not None else []
        self.do(self.draw(st.sampled_from(options)))

    def do(self, what: str) -> None:
        match what:
            case "pass":
                self.now += self.draw(st.floats(0, 100))
            case "prepared":
                self.preparing = False
                self.feed(Prepared(image_digest="sha256:1", address="10.0.0.1"))
            case "prepare-failed":
                self.preparing = False
                self.feed(PrepareFailed("no image", passing=self.draw(st.booleans())))
            case "progressed":
                self.feed(Progressed("half"))
            case "launched":
                self.launching, self.alive = False, True
                self.feed(Launched(1, self.now))
            case "launch-failed":
                self.launching = False
                self.feed(LaunchFailed("no such command"))
            case "ended":
                self.alive = self.watched = False
                self.feed(Ended(self.draw(exits)))
            case "probed":
                run, self.probing = self.probing, None
                assert run is not None
                self.feed(Probed(run, self.draw(st.sampled_from(["", "refused"]))))
            case "due":
                assert self.state.due is not None
                self.now = max(self.now, self.state.due)
                self.feed(Due())
            case "crash-agent":
                self.crash()

    def crash(self) -> None:
        """A new agent has the record only; what was started may have started or not, and ended or not."""
        if self.erased:
            return  # nothing is recorded any more
        self.state = self.state.durable
        launched = self.alive or (self.launching and self.draw(st.booleans()))
        ended = launched and self.draw(st.booleans())
        known = not ended or self.draw(st.booleans())
        present = launched or self.launching or self.preparing
        self.preparing = self.launching = self.watched = False
        self.probing = None
        self.alive = launched and not ended
        exit = self.draw(exits) if ended and known else None
        event = Recovered(present and known, pid=1 if self.alive else None, exit=exit)
        self.feed(event)


exits = st.builds(
    Exit, code=st.sampled_from([0, 1, 137]), at=st.just(0.0), signal=st.sampled_from([None, "SIGKILL"]), oom=st.booleans()
)
health = st.sampled_from(
    [
        None,
        Health(kind=HealthKind.HTTP, start=Seconds(0), interval=Seconds(1), retries=1),
        Health(kind=HealthKind.EXEC, command=("true",), interval=Seconds(1), retries=2),
    ]
)
apps = st.builds(
    AppSpec,
    name=st.just("web"),
    image=st.just("web"),
    ports=st.sampled_from([(), (Port(port=80),)]),
    restart=st.builds(Restart, policy=st.sampled_from(RestartPolicy)),
    health=health,
    stop=st.builds(Stop, grace=st.sampled_from([Seconds(0), Seconds(10)])),
)
jobs = st.just(JobSpec(name="sum", image="sum"))
workloads: st.SearchStrategy[Workload] = st.one_of(apps, jobs)


@settings(max_examples=500, deadline=None)
@given(st.data(), workloads, st.integers(0, 40), st.sampled_from(["stop", "remove", "drain-stop"]))
def test_only_legal_transitions_and_it_always_ends_when_told_to_stop(
    data: st.DataObject, workload: Workload, steps: int, end: str
) -> None:
    machine = Machine(rules_of(workload), data.draw)
    machine.feed(Wanted(data.draw(st.sampled_from([Desired.RUN, Desired.RUN, Desired.RUN, Desired.DRAIN, Desired.STOP]))))
    for _ in range(steps):
        machine.step()
    if end == "drain-stop":
        machine.feed(Wanted(Desired.DRAIN))
        for _ in range(data.draw(st.integers(0, 5))):
            machine.step()
    machine.feed(Removed() if end == "remove" else Wanted(Desired.STOP))
    for _ in range(data.draw(st.integers(0, 8))):
        machine.step()
    for _ in range(20):
        if machine.state.phase.final:
            break
        if machine.launching:
            machine.do("launched")
        elif machine.alive and machine.killed:
            machine.do("ended")
        else:
            machine.do("due")
    assert machine.state.phase.final
    assert not machine.preparing
    assert not machine.alive
    assert machine.erased is (end == "remove")
    machine.feed(Wanted(Desired.RUN))
    assert machine.state.phase.final


@settings(max_examples=100, deadline=None)
@given(st.floats(0.01, 10), st.floats(1, 10), st.floats(0.1, 100), st.integers(1, 60))
def test_the_back_off_grows_to_its_bound_and_a_long_run_resets_it(
    delay: float, factor: float, delay_max: float, crashes: int
) -> None:
    restart = Restart(delay=Seconds(delay), factor=factor, delay_max=Seconds(delay_max), reset=Seconds(50))
    rules = rules_of(AppSpec(name="web", image="web", restart=restart))
    state, now, waits = State(), 0.0, []

    def run_for(seconds: float) -> float:
        nonlocal state, now
        for event in (Prepared(image_digest="", address=None), Launched(1, now)):
            state, _ = decide(rules, state, event, Now(now, now))
        now += seconds
        state, _ = decide(rules, state, Ended(Exit(code=1, at=now)), Now(now, now))
        assert state.retry_due is not None
        wait = state.retry_due - now
        now = state.retry_due
        state, _ = decide(rules, state, Due(), Now(now, now))
        return wait

    state, _ = decide(rules, state, Wanted(Desired.RUN), Now(now, now))
    waits = [run_for(1.0) for _ in range(crashes)]
    for n, wait in enumerate(waits):
        assert abs(wait - min(delay_max, delay * factor**n)) < 1e-6 * max(1.0, now)
    assert abs(run_for(51.0) - min(delay_max, delay)) < 1e-6 * max(1.0, now)


def test_a_job_gives_up_after_bounded_tries_at_a_passing_failure() -> None:
    rules = rules_of(JobSpec(name="sum", image="sum"))
    state, _ = decide(rules, State(), Wanted(Desired.RUN), Now(0, 0))
    for attempt in range(PASSING_TRIES_MAX):
        assert state.phase is Phase.PREPARING, attempt
        state, _ = decide(rules, state, PrepareFailed("hangs", passing=True), Now(0, 0))
        if state.retry_due is not None:
            state, _ = decide(rules, state, Due(), Now(0, state.retry_due))
    assert state.phase is Phase.FAILED


def test_a_process_that_survives_sigkill_is_killed_again() -> None:
    rules = rules_of(AppSpec(name="web", image="web", stop=Stop(grace=Seconds(3))))
    state = State()
    for event in (Wanted(Desired.RUN), Prepared(image_digest="", address=None), Launched(1, 0), Wanted(Desired.STOP)):
        state, actions = decide(rules, state, event, Now(0, 0))
    assert actions == (Signal("SIGTERM"),)
    state, actions = decide(rules, state, Due(), Now(3, 3))
    assert actions == (Kill(),)
    assert state.due == 3 + KILL_REPEAT_S
    state, actions = decide(rules, state, Due(), Now(8, 8))
    assert actions == (Kill(),)
    assert state.phase is Phase.STOPPING


def test_the_image_s_stop_signal_counts_unless_the_spec_names_one() -> None:
    for spec_signal, sent in (("SIGTERM", "SIGQUIT"), ("SIGINT", "SIGINT")):
        rules = rules_of(AppSpec(name="web", image="web", stop=Stop(signal=spec_signal)))
        state = State()
        prepared = Prepared(image_digest="", address=None, stop_signal="SIGQUIT")
        for event in (Wanted(Desired.RUN), prepared, Launched(1, 0), Wanted(Desired.STOP)):
            state, actions = decide(rules, state, event, Now(0, 0))
        assert actions == (Signal(sent),)


def test_an_answer_of_an_earlier_run_s_probe_does_not_count() -> None:
    rules = rules_of(AppSpec(name="web", image="web", ports=(Port(port=80),)))
    state = State()
    for event in (Wanted(Desired.RUN), Prepared(image_digest="", address="10.0.0.1"), Launched(1, 0)):
        state, _ = decide(rules, state, event, Now(0, 0))
    assert not state.ready
    assert not decide(rules, state, Probed(run=0), Now(1, 1))[0].ready
    assert decide(rules, state, Probed(run=1), Now(1, 1))[0].ready


def test_failures_within_the_start_period_do_not_count() -> None:
    check = Health(kind=HealthKind.HTTP, start=Seconds(30), interval=Seconds(5), retries=2)
    rules = rules_of(AppSpec(name="web", image="web", ports=(Port(port=80),), health=check))
    state = State()
    for event in (Wanted(Desired.RUN), Prepared(image_digest="", address="10.0.0.1"), Launched(1, 0)):
        state, _ = decide(rules, state, event, Now(0, 0))
    for at in range(1, 30):
        state, actions = decide(rules, state, Probed(1, "refused"), Now(at, at))
        assert not actions
    state, actions = decide(rules, state, Probed(1, "refused"), Now(31, 31))
    assert not actions
    state, actions = decide(rules, state, Probed(1, "refused"), Now(36, 36))
    assert actions[0] == Signal("SIGTERM")
    assert state.phase is Phase.RUNNING
    assert state.ending
    state, actions = decide(rules, state, Ended(Exit(code=0, at=37)), Now(37, 37))
    assert state.phase is Phase.BACKOFF
    assert "failed its health check 2 times: refused" in state.message


def _after(rules: Rules, *events: Happening, state: State | None = None) -> tuple[State, tuple[Action, ...]]:
    actions: tuple[Action, ...] = ()
    state = state or State()
    for event in events:
        state, actions = decide(rules, state, event, Now(100, 100))
    return state, actions


def test_told_to_stop_while_it_is_ended_for_its_health_it_gets_no_second_signal_and_no_new_start() -> None:
    check = Health(kind=HealthKind.HTTP, start=Seconds(0), retries=1)
    rules = rules_of(AppSpec(name="web", image="web", ports=(Port(port=80),), health=check))
    begin = (Wanted(Desired.RUN), Prepared(image_digest="", address="10.0.0.1"), Launched(1, 0))
    state, actions = _after(rules, *begin, Probed(1, "refused"))
    assert actions[0] == Signal("SIGTERM")
    due = state.kill_due
    state, actions = _after(rules, Wanted(Desired.STOP), state=state)
    assert (state.phase, state.kill_due, actions) == (Phase.STOPPING, due, ())
    state, _ = _after(rules, Ended(Exit(code=143, at=1, signal="SIGTERM")), state=state)
    assert state.phase is Phase.STOPPED


def test_a_wish_that_is_newer_than_the_state_is_kept_by_a_new_agent() -> None:
    rules = rules_of(AppSpec(name="web", image="web"))
    for phase in (Phase.PENDING, Phase.PREPARING, Phase.BACKOFF):
        state, actions = _after(rules, Recovered(False), state=State(phase=phase, desired=Desired.STOP))
        assert (state.phase, actions) == (Phase.STOPPED, (Clean(all=True),))
    live = State(phase=Phase.STARTING, desired=Desired.STOP)
    state, actions = _after(rules, Recovered(True, pid=7), state=live)
    assert state.phase is Phase.STOPPING
    assert actions == (Watch(), Signal("SIGTERM"))


def test_a_start_that_fails_while_draining_is_not_tried_again() -> None:
    rules = rules_of(AppSpec(name="web", image="web"))
    begin = (Wanted(Desired.RUN), Prepared(image_digest="", address=None), Wanted(Desired.DRAIN))
    state, actions = _after(rules, *begin, LaunchFailed("no such command"))
    assert state.phase is Phase.STOPPED
    assert actions[0] == Clean(all=True)


def test_what_comes_too_late_changes_nothing() -> None:
    rules = rules_of(AppSpec(name="web", image="web"))
    stopped = State(phase=Phase.STOPPED, desired=Desired.STOP)
    late = (
        Prepared(image_digest="", address=None),
        PrepareFailed("late"),
        Progressed("late"),
        Launched(1, 0),
        LaunchFailed("late"),
        Ended(None),
        Probed(0),
        Due(),
        Wanted(Desired.RUN),
    )
    for event in late:
        assert _after(rules, event, state=stopped) == (stopped, ())
