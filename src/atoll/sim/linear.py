"""Whether a history of concurrent operations is linearizable: as if each had happened at one moment between call and answer.

The search is that of Wing and Gong ("Testing and Verifying Concurrent Objects", 1993) with Lowe's cache of what has been tried
("Testing for linearizability", 2017); histories are cut by key first, since linearizability is local (Herlihy and Wing, 1990).
Nothing here knows of the simulator: the chaos tests check histories of real clients with it.

    history = [Operation(client="a", key="x", call="write", argument=1, result=None, began=0.0, ended=1.5), …]
    verdict = check(history, Register())
    assert verdict.holds, verdict.story()
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Hashable, Iterable, Sequence
from typing import Any, Generic, Protocol, TypeVar

from msgspec import Struct

from atoll.model.errors import TooLarge

S = TypeVar("S", bound=Hashable)

NEVER = math.inf
"""`ended` of an operation without an answer: it may have happened at any time since it began, or not at all."""
TRIES_MAX = 2_000_000
"""Steps of the search for one key; beyond it nothing is said (a history of a few clients takes some hundred)."""
SHOWN_MAX = 40
"""Operations of a story that failed."""


class Operation(Struct, frozen=True, kw_only=True):
    """What one client did to one key. Times are of one clock, that of whoever records the history."""

    client: str
    key: str
    call: str
    argument: Any = None
    result: Any = None
    """The answer; without one (`ended` is NEVER) it means nothing."""
    began: float
    ended: float = NEVER

    @property
    def answered(self) -> bool:
        return self.ended != NEVER


class Model(Protocol[S]):
    """What the object under test does when nobody else is there. States are immutable and hashable."""

    @property
    def initial(self) -> S: ...

    def step(self, state: S, operation: Operation) -> Sequence[S]:
        """Return the states that may follow; none where the object could not have given that answer."""
        ...


class Verdict(Struct, Generic[S], frozen=True, kw_only=True):
    holds: bool
    key: str = ""
    """The first key whose history does not hold."""
    done: tuple[Operation, ...] = ()
    """The longest beginning that can be explained, in its order."""
    stuck: tuple[Operation, ...] = ()
    """Of these, one must come next, and none can."""
    state: S | None = None
    """What the object would hold by then."""

    def story(self) -> str:
        """Tell in words what cannot have been."""
        if self.holds:
            return "linearizable"
        lines = [f"the history of {self.key!r} is not linearizable; as far as this it is:"]
        lines += [f"  {_in_words(each)}" for each in self.done[-SHOWN_MAX:]]
        lines += [f"then it holds {self.state!r}, and none of these can come next:"]
        lines += [f"  {_in_words(each)}" for each in self.stuck[:SHOWN_MAX]]
        return "\n".join(lines)


def _in_words(operation: Operation) -> str:
    what = f"{operation.began:.3f}–{operation.ended:.3f} {operation.client} {operation.call}({operation.argument!r})"
    return what + (f" → {operation.result!r}" if operation.answered else ", no answer")


def check(history: Iterable[Operation], model: Model[S]) -> Verdict[S]:
    """Return whether `history` is linearizable, key by key.

    Raises TooLarge when that cannot be found out within `TRIES_MAX` steps.
    """
    by_key: dict[str, list[Operation]] = defaultdict(list)
    for operation in history:
        by_key[operation.key].append(operation)
    for key in sorted(by_key):
        verdict = _check_key(key, by_key[key], model)
        if not verdict.holds:
            return verdict
    return Verdict(holds=True)


class _Choice(Generic[S]):
    """A point of the search: what may come next, and where it leads."""

    __slots__ = ("branches", "mask", "state")

    def __init__(self, mask: int, state: S, branches: list[tuple[int, S]]) -> None:
        self.mask = mask
        self.state = state
        self.branches = branches


def _check_key(key: str, history: list[Operation], model: Model[S]) -> Verdict[S]:
    operations = sorted(history, key=lambda each: (each.began, each.ended))
    needed = sum(1 << index for index, each in enumerate(operations) if each.answered)
    tried: set[tuple[int, S]] = set()
    path: list[int] = []
    best: tuple[int, tuple[int, ...], int, S] = (-1, (), 0, model.initial)
    choices = [_Choice(0, model.initial, _branches(operations, 0, model.initial, model))]
    steps = 0
    while choices:
        choice = choices[-1]
        if choice.mask & needed == needed:
            return Verdict(holds=True)
        if len(path) > best[0]:
            best = (len(path), tuple(path), choice.mask, choice.state)
        if not choice.branches:
            choices.pop()
            if path:
                path.pop()
            continue
        index, state = choice.branches.pop()
        mask = choice.mask | 1 << index
        steps += 1
        if steps > TRIES_MAX:
            raise TooLarge(f"the history of {key!r} is too tangled to be checked: {len(operations)} operations")
        if (mask, state) in tried:
            continue
        tried.add((mask, state))
        path.append(index)
        choices.append(_Choice(mask, state, _branches(operations, mask, state, model)))
    _, done, mask, reached = best
    stuck = tuple(operations[index] for index in _open(operations, mask) if operations[index].answered)
    return Verdict(holds=False, key=key, done=tuple(operations[index] for index in done), stuck=stuck, state=reached)


def _open(operations: list[Operation], mask: int) -> list[int]:
    """Return what may come next: all that has begun before anything that is left has ended."""
    found: list[int] = []
    first_end = NEVER
    for index, operation in enumerate(operations):
        if operation.began > first_end:
            break
        if not mask >> index & 1:
            found.append(index)
            first_end = min(first_end, operation.ended)
    return [index for index in found if operations[index].began <= first_end]


def _branches(operations: list[Operation], mask: int, state: S, model: Model[S]) -> list[tuple[int, S]]:
    found = [(index, after) for index in _open(operations, mask) for after in model.step(state, operations[index])]
    # The one that began first is tried first: most histories are nearly in order.
    found.reverse()
    return found


class Register:
    """One value: `write(v)`, `read() → v`, `cas((old, new)) → whether it was old`."""

    def __init__(self, initial: Hashable = None) -> None:
        self.initial: Hashable = initial

    def step(self, state: Hashable, operation: Operation) -> Sequence[Hashable]:
        match operation.call:
            case "write":
                return (operation.argument,)
            case "read":
                return (state,) if not operation.answered or operation.result == state else ()
            case "cas":
                old, new = operation.argument
                if operation.answered and operation.result is not (state == old):
                    return ()
                return (new,) if state == old else (state,)
        raise ValueError(f"a register knows no {operation.call}")


class Versioned(Struct, frozen=True):
    """What a record holds, and the revision that wrote it; 0 while it is not there, None when nobody was told."""

    value: str = ""
    revision: int | None = 0


class Record:
    """A record of the API: `put(value) → revision`, `put((value, revision)) → revision, or None for a stale one`,
    `get() → (value, revision)`."""

    initial = Versioned()

    def step(self, state: Versioned, operation: Operation) -> Sequence[Versioned]:
        match operation.call:
            case "put":
                return self._put(state, operation.argument, operation)
            case "put-if":
                value, expected = operation.argument
                possible = state.revision in (expected, None)
                if operation.answered and operation.result is None:
                    return () if state.revision == expected else (state,)
                if not possible:
                    return () if operation.answered else (state,)
                return self._put(state, value, operation)
            case "get":
                if not operation.answered:
                    return (state,)
                value, revision = operation.result
                return (Versioned(value, revision),) if value == state.value and state.revision in (revision, None) else ()
        raise ValueError(f"a record knows no {operation.call}")

    @staticmethod
    def _put(state: Versioned, value: str, operation: Operation) -> Sequence[Versioned]:
        if not operation.answered:
            return (Versioned(value, None),)
        revision: int = operation.result
        return (Versioned(value, revision),) if state.revision is None or revision > state.revision else ()
