"""The devices of all nodes as a column of state numbers, and what a plan takes of them.

`Inventory` is the snapshot's side: what nodes have and what instances hold of it. `DevicesView` is a plan's copy, which changes.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Sequence

import numpy as np
from msgspec import Struct, structs

from atoll.model.devices import GpuDevice, GpuGrant
from atoll.model.spec import Gpu, GpuTopology
from atoll.scheduling.gpu.asks import ask_of
from atoll.scheduling.gpu.choose import choose, whole_for
from atoll.scheduling.gpu.devices import Shape, State, Taken, shape_key, taken_by
from atoll.scheduling.gpu.states import NONE, Floats, Ints, States

STATES_MIN = 4_096
"""States are thrown away when there are more than this, and more than four for each node."""


class Holding(Struct, frozen=True):
    """What one instance holds of a node's devices. Without grants (an older record) whole devices are counted for it."""

    id: str
    grants: tuple[GpuGrant, ...] = ()
    gpu: Gpu | None = None


class Inventory:
    """Rows are the snapshot's; a row without devices is in state `NONE`."""

    def __init__(self, states_min: int = STATES_MIN) -> None:
        self.states = States()
        self._states_min = states_min
        self.current: Ints = np.zeros(0, dtype=np.int64)
        """Row → the state of its devices."""
        self.bare: Ints = np.zeros(0, dtype=np.int64)
        """Row → the state that they would be in if nothing was given away."""
        self.ids: dict[int, tuple[str, ...]] = {}
        """Row → the devices' ids, of rows that have some."""
        self._shapes: dict[int, Shape] = {}

    def copy(self, like: Inventory | None = None) -> Inventory:
        """Return another that says the same, and changes by itself: with a table of its own, or that of `like`, an earlier copy
        that nobody uses any more, which may know much already."""
        other = Inventory(self._states_min)
        if like is not None and len(like.states) <= max(self._states_min, 4 * len(self.ids)):
            other.states = like.states
        other.current, other.bare = self.current.copy(), self.bare.copy()
        other.ids, other._shapes = self.ids.copy(), self._shapes.copy()
        other._renumber(self.states)
        return other

    def describe(self, row: int, devices: Sequence[GpuDevice]) -> None:
        """Take over what a row has now; nothing is given away of it until `hold` says so."""
        if not devices:
            self.forget(row)
            return
        if row >= len(self.bare):
            more = np.zeros(max(row + 1, 2 * len(self.bare)) - len(self.bare), dtype=np.int64)
            self.bare, self.current = np.append(self.bare, more), np.append(self.current, more)
        shape = self.states.shape(shape_key(devices))
        self.ids[row] = tuple(device.id for device in devices)
        self._shapes[row] = shape
        self.bare[row] = self.current[row] = self.states.number(shape.bare)

    def forget(self, row: int) -> None:
        if self.ids.pop(row, None) is not None:
            del self._shapes[row]
            self.bare[row] = self.current[row] = NONE

    def hold(self, row: int, holdings: Iterable[Holding]) -> None:
        """Say all that is given away of a row's devices."""
        if row in self.ids:
            self.current[row] = self.states.number(self.state_with(row, holdings))

    def state_with(self, row: int, holdings: Iterable[Holding]) -> State:
        """Return the state of a row's devices with just these holdings, in whatever order they come."""
        state = self._shapes[row].bare
        places = {id: index for index, id in enumerate(self.ids[row])}
        older: list[tuple[str, Gpu]] = []
        for holding in holdings:
            if holding.grants:
                state = state.take(taken_by(places, holding.grants))
            elif holding.gpu is not None:
                older.append((holding.id, holding.gpu))
        for _, gpu in sorted(older, key=lambda one: one[0]):
            state = state.take(whole_for(state, gpu))
        return state

    def view(self, size: int) -> DevicesView:
        """Return what a plan over the first `size` rows starts from."""
        if len(self.states) > max(self._states_min, 4 * len(self.ids)):
            self._throw_away()
        return DevicesView(self, size)

    def _throw_away(self) -> None:
        """Keep only the states that rows are in. Views that are about keep the table that they began with."""
        before, self.states = self.states, States()
        self._renumber(before)

    def _renumber(self, before: States) -> None:
        """Number by `states` what the rows have by the numbers of another table."""
        for shape in set(self._shapes.values()):
            self.states.adopt(shape)
        for name in ("current", "bare"):
            column = getattr(self, name)
            used, inverse = np.unique(column, return_inverse=True)
            numbers = np.array([self.states.number(before[number]) for number in used.tolist()], dtype=np.int64)
            setattr(self, name, numbers[inverse])


class DevicesView:
    """The devices while a plan grows. Changing it leaves the inventory as it is."""

    def __init__(self, inventory: Inventory, size: int) -> None:
        self._inventory = inventory
        self._states = inventory.states
        self._size = size
        self._current = inventory.current[:size].copy()
        self._bare = inventory.bare[:size]
        self._given: dict[int, list[Taken]] = {}

    def fork(self) -> DevicesView:
        """Return a view that stands where this one does."""
        other = DevicesView(self._inventory, self._size)
        other._states, other._bare, other._current = self._states, self._bare, self._current.copy()
        other._given = {row: list(parts) for row, parts in self._given.items()}
        return other

    def room(self, gpu: Gpu) -> Ints:
        """Return for every row how many more instances its devices have room for."""
        return self._rooms(self._current, gpu)

    def possible(self, gpu: Gpu) -> Ints:
        """Return the same, were nothing given away."""
        return self._rooms(self._bare, gpu)

    def gains(self, rows: Ints, extra: Ints, gpu: Gpu) -> Floats:
        """Return how good one more instance on each of `rows` is, after `extra` others (see `States.gains`)."""
        gains = np.zeros(len(rows), dtype=np.float64)
        there = rows < len(self._current)
        gains[there] = self._states.gains(self._current[rows[there]], extra[there], gpu)
        return gains

    def shapes(self, rows: Iterable[int]) -> list[Shape]:
        """Return the shapes of `rows`, each once; none of a row without devices."""
        numbers = {int(self._bare[row]) for row in rows if row < len(self._bare)} - {NONE}
        return [self._states[number].shape for number in sorted(numbers)]

    def states(self, rows: Iterable[int]) -> list[State]:
        """Return the states that devices of `rows` are in now, each once; none of a row without devices."""
        numbers = {int(self._current[row]) for row in rows if row < len(self._current)} - {NONE}
        return [self._states[number] for number in sorted(numbers)]

    def preview(self, row: int, gpu: Gpu) -> tuple[GpuGrant, ...] | None:
        """Return what an instance would get on a row now, without giving it; None where it has no room."""
        step = self._states.next(int(self._current[row]), gpu) if row in self._inventory.ids else None
        return None if step is None else tuple(part.grant(self._inventory.ids[row]) for part in step[0])

    def take(self, row: int, gpu: Gpu) -> tuple[GpuGrant, ...]:
        """Give an instance its devices on a row, and return them. Raises LookupError where it has no room."""
        step = self._states.next(int(self._current[row]), gpu)
        if step is None:
            raise LookupError(f"row {row} has no room for {gpu}")
        self._given.setdefault(row, []).extend(step[0])
        self._current[row] = step[1]
        ids = self._inventory.ids[row]
        return tuple(part.grant(ids) for part in step[0])

    def joined(self, row: int, gpu: Gpu, beside: Container[str]) -> tuple[GpuGrant, ...] | None:
        """Return whole devices of a row that are free now and joined by NVLink to each other and to all those in `beside` (by
        id), without giving them; None where there are none."""
        ids = self._inventory.ids.get(row)
        if ids is None or row >= len(self._current):
            return None
        state, ask = self._states[int(self._current[row])], ask_of(structs.replace(gpu, topology=GpuTopology.NVLINK))
        there = [index for index, id in enumerate(ids) if id in beside]
        near = tuple(i for i in ask.matching(state.shape) if all(state.shape.joined(i, other) for other in there))
        parts = choose(state, ask, near)
        return None if parts is None else tuple(part.grant(ids) for part in parts)

    def hold(self, row: int, grants: Iterable[GpuGrant]) -> None:
        """Count exactly these grants on a row, whether there is room or not."""
        ids = self._inventory.ids.get(row)
        if ids is None or row >= len(self._current):
            return
        parts = taken_by({id: index for index, id in enumerate(ids)}, grants)
        self._given.setdefault(row, []).extend(parts)
        self._current[row] = self._states.number(self._states[int(self._current[row])].take(parts))

    def hold_only(self, row: int, holdings: Iterable[Holding]) -> None:
        """Count on a row just `holdings`, and what this plan gave."""
        if row in self._inventory.ids and row < len(self._current):
            state = self._inventory.state_with(row, holdings).take(self._given.get(row, ()))
            self._current[row] = self._states.number(state)

    def grant_with(self, row: int, holdings: Iterable[Holding], gpu: Gpu) -> tuple[GpuGrant, ...] | None:
        """Return what an instance would get on a row where just `holdings`, and what this plan gave, are given away."""
        ids = self._inventory.ids.get(row)
        if ids is None:
            return None
        state = self._inventory.state_with(row, holdings).take(self._given.get(row, ()))
        step = self._states.next(self._states.number(state), gpu)
        return None if step is None else tuple(part.grant(ids) for part in step[0])

    def _rooms(self, column: Ints, gpu: Gpu) -> Ints:
        rooms = np.zeros(self._size, dtype=np.int64)
        if self._inventory.ids:
            rooms[: len(column)] = self._states.rooms(column, gpu)
        return rooms
