"""Every state that devices of nodes are in, by number, with what is known of each: room, what the next instance gets, its loss.

A fleet of equal nodes is in few states. Columns of state numbers make questions about a hundred thousand nodes a look-up.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from atoll.model.spec import Gpu
from atoll.scheduling.gpu.asks import Ask, ask_of
from atoll.scheduling.gpu.choose import choose, room
from atoll.scheduling.gpu.devices import EMPTY, Shape, ShapeKey, State, Taken
from atoll.scheduling.gpu.usable import nearness, usable

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

ASKS_MAX = 128
"""Different demands for which answers are kept."""
NONE = 0
"""The number of the state of a node without devices."""
_UNKNOWN = -1
_NEAR_WEIGHT = 0.5
"""A set of devices that is joined by NVLink is worth half a device more than one that is not."""


class Asked:
    """What is known about one demand, by state."""

    def __init__(self, ask: Ask) -> None:
        self.ask = ask
        self.matching: dict[Shape, tuple[int, ...]] = {}
        self.next: dict[int, tuple[tuple[Taken, ...], int] | None] = {}
        """State → what the next instance gets and the state after it; None where it is full."""
        self.rooms: Ints = np.full(0, _UNKNOWN, dtype=np.int64)
        self.gains: dict[int, float] = {}
        """State → how good the next instance is there."""


class States:
    """Grows only; `Inventory` makes a new one when most of it is of no use any more."""

    def __init__(self) -> None:
        self._states: list[State] = []
        self._numbers: dict[State, int] = {}
        self._usable: list[float | None] = []
        self._shapes: dict[ShapeKey, Shape] = {}
        self._asked: dict[Gpu, Asked] = {}
        self.adopt(EMPTY)
        self.number(EMPTY.bare)

    def __len__(self) -> int:
        return len(self._states)

    def __getitem__(self, number: int) -> State:
        return self._states[number]

    def shape(self, key: ShapeKey) -> Shape:
        """Return the shape of this key; equal keys have one shape."""
        known = self._shapes.get(key)
        if known is None:
            known = self._shapes[key] = Shape(*key)
        return known

    def adopt(self, shape: Shape) -> None:
        """Know a shape that another table made."""
        self._shapes.setdefault((shape.devices, shape.nearness), shape)

    def number(self, state: State) -> int:
        known = self._numbers.get(state)
        if known is None:
            known = self._numbers[state] = len(self._states)
            self._states.append(state)
            self._usable.append(None)
        return known

    def next(self, number: int, gpu: Gpu) -> tuple[tuple[Taken, ...], int] | None:
        """Return what an instance gets of devices in this state, and the state after it; None where it does not fit."""
        asked = self._asked_of(gpu)
        if number not in asked.next:
            state = self._states[number]
            chosen = choose(state, asked.ask, self._matching(asked, state.shape))
            asked.next[number] = None if chosen is None else (chosen, self.number(state.take(chosen)))
        return asked.next[number]

    def rooms(self, numbers: Ints, gpu: Gpu) -> Ints:
        """Return for each state how many instances fit, one after the other."""
        asked = self._asked_of(gpu)
        if len(asked.rooms) < len(self._states):
            more = max(len(self._states), 2 * len(asked.rooms)) - len(asked.rooms)
            asked.rooms = np.append(asked.rooms, np.full(more, _UNKNOWN, dtype=np.int64))
        got = asked.rooms[numbers]
        unknown = np.unique(numbers[got == _UNKNOWN])
        if len(unknown):
            for number in unknown.tolist():
                asked.rooms[number] = self._room(asked, number)
            got = asked.rooms[numbers]
        answer: Ints = got
        return answer

    def gains(self, numbers: Ints, extra: Ints, gpu: Gpu) -> Floats:
        """Return how good one more instance is in each state after `extra` others: minus what is then lost to the next ones.

        In devices, so that about minus 8 is the worst on a node of eight. Where nothing fits it means nothing.
        """
        if not len(numbers):
            return np.zeros(0, dtype=np.float64)
        asked, levels = self._asked_of(gpu), int(extra.max()) + 1
        seen = np.zeros(len(self._states), dtype=np.bool_)
        seen[numbers] = True
        distinct = np.flatnonzero(seen)
        table = np.zeros((len(distinct), levels), dtype=np.float64)
        for place, number in enumerate(distinct.tolist()):
            for level in range(levels):
                step = self.next(number, gpu)
                if step is None:
                    break
                table[place, level] = self._gain(asked, number, *step)
                number = step[1]
        at = np.zeros(len(seen), dtype=np.int64)
        at[distinct] = np.arange(len(distinct))
        answer: Floats = table[at[numbers], extra]
        return answer

    def _gain(self, asked: Asked, number: int, chosen: tuple[Taken, ...], after: int) -> float:
        known = asked.gains.get(number)
        if known is None:
            near = nearness(self._states[number], [part.place for part in chosen]) if len(chosen) > 1 else 0.0
            known = asked.gains[number] = _NEAR_WEIGHT * near + self.usable(after) - self.usable(number)
        return known

    def usable(self, number: int) -> float:
        known = self._usable[number]
        if known is None:
            known = self._usable[number] = usable(self._states[number])
        return known

    def _room(self, asked: Asked, number: int) -> int:
        state = self._states[number]
        matching = self._matching(asked, state.shape)
        if not matching:
            return 0
        known = room(state, asked.ask, matching)
        if known is not None:
            return known
        count, at = 0, number
        while (step := self.next(at, asked.ask.gpu)) is not None:
            count, at = count + 1, step[1]
        return count

    def _matching(self, asked: Asked, shape: Shape) -> tuple[int, ...]:
        known = asked.matching.get(shape)
        if known is None:
            known = asked.matching[shape] = asked.ask.matching(shape)
        return known

    def _asked_of(self, gpu: Gpu) -> Asked:
        known = self._asked.get(gpu)
        if known is None:
            if len(self._asked) >= ASKS_MAX:
                del self._asked[next(iter(self._asked))]
            known = self._asked[gpu] = Asked(ask_of(gpu))
        return known
