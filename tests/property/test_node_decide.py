"""The instance's state machine against a hostile world: only legal transitions, and it always ends when told to."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from atoll.model.records import Exit, Severity
from atoll.model.spec import AppSpec, Health, HealthKind, JobSpec, Port, Restart, RestartPolicy, Stop, Workload
from atoll.model.states import Desired, Phase, legal
from atoll.model.units import Seconds
from atoll.node.decide import HOLD_S, KILL_REPEAT_S, PASSING_TRIES_MAX, decide
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
    Note,
    Now,
    Park,
    Parked,
    ParkFailed,
    Prepare,
    Prepared,
    PrepareFailed,
    Probe,
    Probed,
    Progressed,
    Reached,
    Recovered,
    Removed,
    Rest,
    Rules,
    Signal,
    State,
    Suspending,
    Wake,
    WakeFailed,
    Wanted,
    Watch,
    Woken,
    rules_of,
)


class Machine:
    """Does what actions say, in an order and with outcomes that Hypothesis chooses, and checks each step."""

    def __init__(self, rules: Rules, draw: st.DrawFn) -> None:
        self.rules, self.draw = rules, draw
        self.state = State(standby=draw(st.booleans()))
        self.standby = self.state.standby
        """What the control plane says."""
        self.resting: int | None = None
        """The run that is being parked or woken."""
        self.off: tuple[int, ...] = ()
        """Its processes that are off their devices."""
        self.frozen = False
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
        assert not self.state.ready or self.state.rest is Rest.AWAKE
        assert self.state.rest is Rest.AWAKE or self.state.phase in (Phase.RUNNING, Phase.STOPPING)
        assert self.state.rest is Rest.AWAKE or self.state.probe_due is None, "what is parked is not probed"
        assert self.state.standby or self.state.rest is not Rest.PARKED, "what is wanted is woken"
        assert set(self.off) <= set(self.state.suspended), "what is off its device is recorded"
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
            case Park() | Wake():
                assert self.watched
                assert self.resting is None
                assert isinstance(action, Park) is (self.state.rest is Rest.PARKING)
                assert action.again or self.frozen is isinstance(action, Wake)
                self.resting = action.run
            case Signal():
                assert self.watched
                assert not self.frozen, "what is frozen hears no signal"
            case Kill():
                self.killed += 1
                self.resting = None
            case Clean():
                self.alive = self.watched = self.frozen = False
                self.probing = self.resting = None
                self.off = ()
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
        options += ["rested", "rested", "rest-failed"] if self.resting is not None else []
        options += ["promoted"] if self.standby else []
        options += ["due", "due", "due"] if self.state.due is not None else []
        options += ["reached"] if self.state.held_until is not None else []
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
                self.alive = self.watched = self.frozen = False
                self.off = ()
                self.feed(Ended(self.draw(exits)))
            case "probed":
                run, self.probing = self.probing, None
                assert run is not None
                self.feed(Probed(run, self.draw(st.sampled_from(["", "refused"]))))
            case "rested":
                self.rest()
            case "rest-failed":
                run, self.resting = self.resting, None
                assert run is not None
                self.frozen = False
                if self.state.rest is Rest.PARKING and self.draw(st.booleans()):
                    self.off = ()
                    self.feed(ParkFailed(run, "it does not stop"))
                    assert self.state.ready
                else:
                    self.feed(WakeFailed(run, "out of memory"))
                    assert self.killed
            case "promoted":
                self.standby = False
                self.feed(Wanted(self.state.desired))
                assert not self.state.standby
                assert self.state.rest is not Rest.PARKED
            case "due":
                assert self.state.due is not None
                self.now = max(self.now, self.state.due)
                self.feed(Due())
            case "reached":
                self.feed(Reached())
                assert self.state.held_until is None
            case "crash-agent":
                self.crash()

    def rest(self) -> None:
        """Come a step further with parking or waking."""
        run = self.resting
        assert run is not None
        if self.state.rest is Rest.WAKING:
            self.resting, self.frozen, self.off = None, False, ()
            self.feed(Woken(run, "woken"))
        elif not self.off and self.draw(st.booleans()):
            self.feed(Suspending(run, (7,)))
            self.off = (7,)
        else:
            self.resting, self.frozen = None, True
            self.feed(Parked(run, "parked"))

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
        self.probing = self.resting = None
        self.alive = launched and not ended
        if not self.alive:
            self.frozen, self.off = False, ()
        elif self.state.rest is Rest.PARKING and self.draw(st.booleans()):
            self.frozen = True  # it was, just before the agent ended
        if self.standby and self.draw(st.booleans()):
            self.standby = False  # promoted meanwhile: the assignment is newer than the state
            self.state = replace(self.state, standby=False)
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
jobs = st.sampled_from([JobSpec(name="sum", image="sum"), JobSpec(name="tools", image="tools", sandbox=True, pool=2)])
workloads: st.SearchStrategy[Workload] = st.one_of(apps, jobs)


@settings(max_examples=500, deadline=None)
@given(st.data(), workloads, st.integers(0, 40), st.sampled_from(["stop", "remove", "drain-stop"]))
def test_only_legal_transitions_and_it_always_ends_when_told_to_stop(
    data: st.DataObject, workload: Workload, steps: int, end: str
) -> None:
    machine = Machine(rules_of(workload), data.draw)
    first = data.draw(st.sampled_from([Desired.RUN, Desired.RUN, Desired.RUN, Desired.DRAIN, Desired.STOP]))
    machine.feed(Wanted(first, machine.standby))
    for _ in range(steps):
        machine.step()
    if end == "drain-stop":
        machine.feed(Wanted(Desired.DRAIN, machine.standby))
        for _ in range(data.draw(st.integers(0, 5))):
            machine.step()
    machine.feed(Removed() if end == "remove" else Wanted(Desired.STOP, machine.standby))
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


def test_what_is_gone_waits_for_the_control_plane_unless_it_is_known_how_it_ended() -> None:
    rules = rules_of(AppSpec(name="web", image="web"))
    for phase in (Phase.PENDING, Phase.PREPARING, Phase.BACKOFF, Phase.STARTING, Phase.RUNNING):
        for present in (False, True):
            state, actions = _after(rules, Recovered(present), state=State(phase=phase))
            assert state.due is not None
            assert state.held_until == 100 + HOLD_S
            assert Prepare() not in actions
            early, actions = _after(rules, Due(), state=state)
            assert (early, actions) == (state, ()), "its time has not come"
            state, _ = _after(rules, Reached(), state=state)
            assert state.due is not None
            assert state.due < 101, "no wait but its own"
    state, _ = _after(rules, Recovered(True, exit=Exit(code=1, at=1)), state=State(phase=Phase.RUNNING))
    assert (state.phase, state.held_until) == (Phase.BACKOFF, None)
    state, actions = _after(rules, Recovered(False), Wanted(Desired.STOP), state=State(phase=Phase.RUNNING))
    assert (state.phase, state.due) == (Phase.STOPPED, None)


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


def _standing(*events: Happening, health: Health | None = None) -> tuple[Rules, State, tuple[Action, ...]]:
    """Return a standby that has started, was found ready, and then saw `events`."""
    rules = rules_of(AppSpec(name="web", image="web", ports=(Port(port=80),), health=health))
    begin = (Wanted(Desired.RUN, True), Prepared(image_digest="", address="10.0.0.1"), Launched(1, 0), Probed(1))
    state, actions = _after(rules, *begin, *events, state=State(standby=True))
    return rules, state, actions


def test_a_standby_is_parked_instead_of_ready_and_woken_when_it_is_promoted() -> None:
    check = Health(kind=HealthKind.HTTP, start=Seconds(30), interval=Seconds(5))
    rules, state, actions = _standing(health=check)
    assert (state.rest, state.ready, state.probe_due, actions) == (Rest.PARKING, False, None, (Park(1),))
    state, actions = _after(rules, Suspending(1, (7, 8)), Parked(1, "parked in 2 s"), state=state)
    assert (state.rest, state.suspended, state.ready) == (Rest.PARKED, (7, 8), False)
    assert actions == (Note("parked", "parked in 2 s"),)
    assert _after(rules, Wanted(Desired.RUN, True), Due(), Probed(1, "frozen"), state=state) == (state, ())
    state, actions = _after(rules, Wanted(Desired.RUN), state=state)
    assert (state.rest, actions) == (Rest.WAKING, (Wake(1),))
    state, actions = _after(rules, Woken(1, "woken in 1 s"), state=state)
    assert (state.rest, state.ready, state.probe_due, state.suspended) == (Rest.AWAKE, False, 100, ())
    state, _ = _after(rules, Probed(1), state=state)
    assert state.ready
    assert state.run == 1


def test_one_that_is_promoted_while_it_is_parked_is_woken_after_that() -> None:
    rules, state, actions = _standing(Wanted(Desired.RUN))
    assert (state.rest, state.standby, actions) == (Rest.PARKING, False, ())
    state, actions = _after(rules, Parked(1, "parked"), state=state)
    assert state.rest is Rest.WAKING
    assert actions[-1] == Wake(1)


def test_what_cannot_be_parked_waits_awake_says_so_once_and_serves_at_once_when_promoted() -> None:
    check = Health(kind=HealthKind.HTTP, interval=Seconds(5))
    rules, state, actions = _standing(ParkFailed(1, "it does not stop"), health=check)
    assert [action.code for action in actions if isinstance(action, Note)] == ["park-failed"]
    assert (state.rest, state.ready, state.probe_due) == (Rest.AWAKE, True, 105)
    state, actions = _after(rules, Probed(1), Probed(1, "slow"), Probed(1), state=state)
    assert (state.rest, actions) == (Rest.AWAKE, ())
    state, actions = _after(rules, Wanted(Desired.RUN), state=state)
    assert (state.ready, actions) == (True, ())


def test_what_cannot_be_woken_is_ended_and_started_again() -> None:
    rules, state, _ = _standing(Suspending(1, (7,)), Parked(1, ""), Wanted(Desired.RUN))
    state, actions = _after(rules, WakeFailed(1, "out of memory"), state=state)
    assert actions == (Kill(), Note("wake-failed", "could not be woken: out of memory", Severity.ERROR))
    assert (state.phase, state.ready, state.kill_due) == (Phase.RUNNING, False, 100 + KILL_REPEAT_S)
    state, _ = _after(rules, Ended(Exit(code=137, at=1, signal="SIGKILL")), state=state)
    assert (state.phase, state.rest, state.suspended) == (Phase.BACKOFF, Rest.AWAKE, ())
    assert "out of memory" in state.message
    state, actions = _after(rules, Due(), state=replace(state, retry_due=100))
    assert actions == (Prepare(),)


def test_a_parked_one_that_is_told_to_stop_is_killed_since_it_hears_no_signal() -> None:
    for events in ((), (Parked(1, ""),), (Parked(1, ""), Wanted(Desired.RUN))):
        rules, state, _ = _standing(*events)
        state, actions = _after(rules, Wanted(Desired.STOP), state=state)
        assert (state.phase, actions, state.kill_due) == (Phase.STOPPING, (Kill(),), 100 + KILL_REPEAT_S)


def test_a_new_agent_goes_on_with_parking_and_waking_and_leaves_what_is_parked() -> None:
    rules, parking, _ = _standing(Suspending(1, (7,)))
    _, parked, _ = _standing(Suspending(1, (7,)), Parked(1, ""))
    _, waking, _ = _standing(Suspending(1, (7,)), Parked(1, ""), Wanted(Desired.RUN))
    found = Recovered(True, pid=1)
    state, actions = _after(rules, found, state=parking.durable)
    assert (state.rest, state.suspended) == (Rest.PARKING, (7,))
    assert actions[:2] == (Watch(), Park(1, again=True))
    state, actions = _after(rules, found, state=parked.durable)
    assert (state.rest, state.ready, actions[0]) == (Rest.PARKED, False, Watch())
    assert not any(isinstance(action, Park | Wake | Probe) for action in actions)
    state, actions = _after(rules, found, state=waking.durable)
    assert actions[:2] == (Watch(), Wake(1, again=True))
    state, actions = _after(rules, found, state=replace(parked.durable, standby=False))
    assert (state.rest, actions[1]) == (Rest.WAKING, Wake(1)), "promoted while no agent was there"


def test_a_crash_while_parked_is_a_crash() -> None:
    rules, state, _ = _standing(Parked(1, ""), Ended(Exit(code=137, at=1, signal="SIGKILL")))
    assert (state.phase, state.rest, state.standby) == (Phase.BACKOFF, Rest.AWAKE, True)
    again = (Prepared(image_digest="", address="10.0.0.1"), Launched(2, 0), Probed(2))
    state, actions = _after(rules, Due(), *again, state=replace(state, retry_due=100))
    assert (state.rest, actions) == (Rest.PARKING, (Park(2),))
