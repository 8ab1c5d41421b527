"""What the simulator supposes of a disk that loses its newest writes is what SQLite does with a damaged tail."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from atoll.model.errors import Corrupt
from atoll.model.records import Assignment, Instance, OwnerKind
from atoll.model.spec import AppSpec
from atoll.model.states import Desired, Phase
from atoll.node.record import Entry, SqliteRecord
from atoll.node.transitions import State
from atoll.sim.faults import Life
from atoll.sim.record import Disk, SimRecord
from atoll.sim.story import Story


def assignment(id: str, desired: Desired = Desired.RUN) -> Assignment:
    instance = Instance(
        id=id, project="default", owner_kind=OwnerKind.APP, owner="web", release=1, generation=1, created_at=0.0, desired=desired
    )
    return Assignment(instance=instance, workload=AppSpec(name="web", image="registry.test/app:1"), revision=1)


def writes(record: SqliteRecord | SimRecord, choose: random.Random) -> list[list[Entry]]:
    """Write at random; return what the record held after each write."""
    held = [sorted(record.load(), key=lambda entry: entry.assignment.instance.id)]
    known: set[str] = set()
    for number in range(60):
        id = f"web-{choose.randint(0, 4)}"
        if id not in known or choose.random() < 0.2:
            record.put_assignment(assignment(id, choose.choice(list(Desired))))
            known.add(id)
        elif choose.random() < 0.3:
            record.remove(id)
            known.discard(id)
        else:
            record.put_state(id, State(phase=choose.choice((Phase.RUNNING, Phase.BACKOFF)), run=number))
        held.append(sorted(record.load(), key=lambda entry: entry.assignment.instance.id))
    return held


def used_bytes(log: bytes) -> int:
    """Return how much of a write-ahead log counts: up to the first frame that is left from an earlier round, and has its salt."""
    salt, size = log[16:24], 24 + 4_096
    frames = range(32, len(log) - size + 1, size)
    return next((at for at in frames if log[at + 8 : at + 16] != salt), len(log))


def test_a_cut_or_torn_tail_leaves_the_record_as_it_was_after_some_earlier_write(tmp_path: Path) -> None:
    choose = random.Random(5)
    record = SqliteRecord(tmp_path / "record.db")
    held = writes(record, choose)
    database, log = (tmp_path / "record.db").read_bytes(), (tmp_path / "record.db-wal").read_bytes()
    record.close()
    log = log[: used_bytes(log)]
    found = set()
    for number in range(80):
        cut = choose.randint(0, len(log))
        tail = log[:cut]
        if number % 2 and cut:
            # Torn: the last page came down in part, and the rest is what was there before, or nothing.
            at = choose.randint(max(0, cut - 4_096), cut)
            tail = log[:at] + bytes(cut - at)
        place = tmp_path / f"copy{number}"
        place.mkdir()
        (place / "record.db").write_bytes(database)
        (place / "record.db-wal").write_bytes(tail)
        again = SqliteRecord(place / "record.db")
        entries = sorted(again.load(), key=lambda entry: entry.assignment.instance.id)
        again.close()
        assert entries in held, f"cut at {cut} of {len(log)}"
        found.add(held.index(entries))
    assert len(found) > 10, "the cuts were too much alike to show anything"


def test_a_record_that_is_no_record_is_refused_and_not_taken_for_an_empty_one(tmp_path: Path) -> None:
    record = SqliteRecord(tmp_path / "record.db")
    writes(record, random.Random(6))
    record.close()
    path = tmp_path / "record.db"
    path.write_bytes(bytes(100) + path.read_bytes()[100:])
    with pytest.raises(Corrupt) as refused:
        SqliteRecord(path).load()
    assert refused.value.mend


def test_the_simulated_disk_loses_the_newest_writes_and_only_those() -> None:
    for seed in range(40):
        choose = random.Random(seed)
        disk = Disk(choose, Story(lambda: 0.0))
        life = Life("agent")
        held = writes(SimRecord(disk, life), choose)
        disk.lose_power(forgets=True)
        assert sorted(disk.record.load(), key=lambda entry: entry.assignment.instance.id) in held
