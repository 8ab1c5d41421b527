"""The checker of histories: known good ones hold, known bad ones do not, and it agrees with trying every order."""

from __future__ import annotations

import itertools
import random

import pytest

from atoll.sim.linear import NEVER, Operation, Record, Register, Versioned, check


def op(client: str, call: str, argument: object, result: object, began: float, ended: float = NEVER, key: str = "x") -> Operation:
    return Operation(client=client, key=key, call=call, argument=argument, result=result, began=began, ended=ended)


GOOD = {
    "one after another": [op("a", "write", 1, None, 0, 1), op("b", "read", None, 1, 2, 3)],
    "a read beside a write sees the old value": [op("a", "write", 1, None, 0, 5), op("b", "read", None, None, 1, 2)],
    "or the new one": [op("a", "write", 1, None, 0, 5), op("b", "read", None, 1, 1, 2)],
    "a write without an answer was made late": [
        op("a", "write", 1, None, 0),
        op("b", "read", None, None, 1, 2),
        op("b", "read", None, 1, 3, 4),
    ],
    "or never": [op("a", "write", 1, None, 0), op("b", "read", None, None, 1, 2), op("b", "read", None, None, 3, 4)],
    "one of two who compare wins": [op("a", "cas", (None, 1), True, 0, 5), op("b", "cas", (None, 2), False, 1, 4)],
    "keys are apart": [op("a", "write", 1, None, 0, 1), op("b", "read", None, None, 2, 3, key="y")],
}
BAD = {
    "a stale read": [op("a", "write", 1, None, 0, 1), op("b", "read", None, None, 2, 3)],
    "a read of what nobody wrote": [op("a", "write", 1, None, 0, 1), op("b", "read", None, 2, 2, 3)],
    "a lost write": [op("a", "write", 1, None, 0, 1), op("a", "write", 2, None, 2, 3), op("b", "read", None, 1, 4, 5)],
    "reads that go back": [
        op("a", "write", 1, None, 0, 9),
        op("b", "read", None, 1, 1, 2),
        op("c", "read", None, None, 3, 4),
    ],
    "two readers that disagree on the order": [
        op("a", "write", 1, None, 0, 1),
        op("b", "write", 2, None, 0, 1),
        op("c", "read", None, 1, 2, 3),
        op("d", "read", None, 2, 4, 5),
        op("c", "read", None, 1, 6, 7),
    ],
    "both who compare win": [op("a", "cas", (None, 1), True, 0, 5), op("b", "cas", (None, 2), True, 1, 4)],
    "a write that is made twice": [
        op("a", "write", 1, None, 0, 1),
        op("b", "write", 2, None, 2, 3),
        op("c", "read", None, 1, 4, 5),
    ],
    "a comparison that fails for no reason": [op("a", "write", 1, None, 0, 1), op("b", "cas", (1, 2), False, 2, 3)],
}


@pytest.mark.parametrize("name", GOOD)
def test_a_good_history_holds(name: str) -> None:
    verdict = check(GOOD[name], Register())
    assert verdict.holds, verdict.story()


@pytest.mark.parametrize("name", BAD)
def test_a_bad_history_does_not_hold_and_says_where(name: str) -> None:
    verdict = check(BAD[name], Register())
    assert not verdict.holds
    assert "'x' is not linearizable" in verdict.story()
    assert verdict.stuck


def by_brute_force(history: list[Operation]) -> bool:
    """Try every order of every choice of the unanswered."""
    model = Register()
    answered = [each for each in history if each.answered]
    rest = [each for each in history if not each.answered]
    for count in range(len(rest) + 1):
        for extra in itertools.combinations(rest, count):
            for order in itertools.permutations([*answered, *extra]):
                if any(later.ended < earlier.began for earlier, later in itertools.combinations(order, 2)):
                    continue
                state: object = None
                for each in order:
                    after = model.step(state, each)
                    if not after:
                        break
                    state = after[0]
                else:
                    return True
    return False


def test_it_agrees_with_trying_every_order() -> None:
    choose = random.Random(7)
    counts = {True: 0, False: 0}
    for _ in range(1_500):
        history = []
        for number in range(choose.randint(1, 5)):
            began = choose.randint(0, 6)
            ended = NEVER if choose.random() < 0.2 else began + choose.randint(0, 4)
            match choose.choice(("write", "read", "cas")):
                case "write":
                    history.append(op(f"c{number}", "write", choose.randint(1, 2), None, began, ended))
                case "read":
                    history.append(op(f"c{number}", "read", None, choose.choice((None, 1, 2)), began, ended))
                case _:
                    pair = (choose.choice((None, 1, 2)), choose.randint(1, 2))
                    history.append(op(f"c{number}", "cas", pair, choose.random() < 0.5, began, ended))
        expected = by_brute_force(history)
        counts[expected] += 1
        assert check(history, Register()).holds is expected, history
    assert min(counts.values()) > 100


def test_records_are_told_apart_by_their_revisions() -> None:
    first = op("a", "put", "v1", 5, 0, 1)
    assert check([first, op("b", "put-if", ("v2", 5), 7, 2, 3), op("a", "get", None, ("v2", 7), 4, 5)], Record()).holds
    assert check([first, op("b", "put-if", ("v2", 4), None, 2, 3)], Record()).holds
    # A condition that holds was refused; one that does not hold was taken; a revision that went back; a lost write.
    for bad in (
        [first, op("b", "put-if", ("v2", 5), None, 2, 3)],
        [first, op("b", "put-if", ("v2", 4), 7, 2, 3)],
        [first, op("b", "put", "v2", 4, 2, 3)],
        [first, op("b", "put", "v2", 7, 2, 3), op("a", "get", None, ("v1", 5), 4, 5)],
    ):
        assert not check(bad, Record()).holds
    # Without an answer to its put, the revision is whatever it turns out to be.
    lost = op("a", "put", "v1", None, 0)
    assert check([lost, op("b", "get", None, ("v1", 9), 2, 3), op("b", "put-if", ("v2", 9), 11, 4, 5)], Record()).holds
    assert check([lost], Record()).holds
    assert Record.initial == Versioned("", 0)


def test_a_long_history_of_many_clients_is_checked_in_few_steps() -> None:
    choose = random.Random(3)
    at, value, history = 0.0, None, []
    for number in range(3_000):
        at += 1.0
        slack = choose.random() * 3
        if choose.random() < 0.5:
            value = number
            history.append(op(f"c{number % 5}", "write", value, None, at - slack, at + slack))
        else:
            history.append(op(f"c{number % 5}", "read", None, value, at - slack, at + slack))
    assert check(history, Register()).holds
    spoiled = [*history[:2_000], op("z", "read", None, -1, 2_000.5, 2_000.6), *history[2_000:]]
    assert not check(spoiled, Register()).holds
