"""The agent's local record on a disk that fills up, and that forgets its newest writes when power is lost.

It is modelled at the port and not as SQLite, since what the agent can tell is only this: a write was taken or refused, and after a
loss of power the record is as it was after some earlier write. That this is all that a damaged tail of the real file does is held
by `tests/sim/test_sim_record.py`, which cuts real files at every place.
"""

from __future__ import annotations

import random

from atoll.model.errors import Unavailable
from atoll.model.records import Assignment
from atoll.model.states import Desired
from atoll.node.contact import Contact
from atoll.node.record import Entry, MemoryRecord
from atoll.node.transitions import State
from atoll.sim.faults import Life
from atoll.sim.story import Story

UNSYNCED_MAX = 40
"""Writes that may be on their way to the disk at a time."""


class Disk:
    """One machine's disk, as far as the record goes."""

    def __init__(self, choose: random.Random, story: Story) -> None:
        self.record = MemoryRecord()
        self.full = False
        self.forgot = False
        """It has lost writes: what was reported may be done again where nobody can be asked (`docs/simulator.md` says why)."""
        self.stopped: dict[str, Life] = {}
        """Id of what is to stop → the life of the agent that first wrote that down."""
        self.contact = ""
        """What the agent wrote down of when it was heard last."""
        self._choose = choose
        self._story = story
        self._undo: list[tuple[str, Entry | None]] = []

    def note(self, id: str) -> None:
        """Keep what the next write to `id` takes away."""
        if self.full:
            self._story.mark("record: disk full")
            raise Unavailable("cannot write the agent's record: no space left on device")
        self._undo.append((id, self.record.entries.get(id)))
        del self._undo[:-UNSYNCED_MAX]

    def lose_power(self, *, forgets: bool) -> None:
        """What was not on the disk yet is gone, as many of the newest writes as it happens to be."""
        lost = self._choose.randint(0, len(self._undo)) if forgets else 0
        for id, entry in reversed(self._undo[len(self._undo) - lost :]):
            if entry is None:
                self.record.entries.pop(id, None)
            else:
                self.record.entries[id] = entry
        if lost:
            self.forgot = True
            self._story.mark("record: newest writes lost")
        self._undo.clear()


class SimContact(Contact):
    """When the node was heard last, on the disk."""

    def __init__(self, disk: Disk, boot_id: str) -> None:
        super().__init__(boot_id=boot_id)
        self._disk = disk

    def _read(self) -> str:
        return self._disk.contact

    def _write(self, text: str) -> None:
        self._disk.contact = text


class SimRecord:
    """The disk's record, as an agent's life can reach it. Implements `LocalRecord`."""

    def __init__(self, disk: Disk, life: Life) -> None:
        self._disk = disk
        self._life = life

    def load(self) -> list[Entry]:
        self._life.check()
        return self._disk.record.load()

    def put_assignment(self, assignment: Assignment) -> None:
        self._keep(assignment)
        if assignment.instance.desired is Desired.STOP:
            self._disk.stopped.setdefault(assignment.instance.id, self._life)

    def _keep(self, assignment: Assignment) -> None:
        self._write(assignment.instance.id).put_assignment(assignment)

    def put_state(self, id: str, state: State) -> None:
        self._write(id).put_state(id, state)

    def put_secrets(self, id: str, secrets: dict[str, str]) -> None:
        self._write(id).put_secrets(id, secrets)

    def remove(self, id: str) -> None:
        self._write(id).remove(id)
        self._disk.stopped.pop(id, None)

    def close(self) -> None: ...

    def _write(self, id: str) -> MemoryRecord:
        self._life.check()
        self._disk.note(id)
        return self._disk.record
