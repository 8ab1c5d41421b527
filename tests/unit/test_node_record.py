"""The agent's local record: both implementations keep the same, and a damaged file is said to be one."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from atoll.model.errors import Corrupt
from atoll.model.records import Assignment, Exit, Instance, OwnerKind
from atoll.model.spec import AppSpec, JobSpec
from atoll.model.states import Desired, Phase
from atoll.node.record import LocalRecord, MemoryRecord, SqliteRecord
from atoll.node.record_room import kept
from atoll.node.transitions import State


def assignment(id: str) -> Assignment:
    instance = Instance(id=id, project="default", owner_kind=OwnerKind.APP, owner="web", created_at=1.0)
    workload = AppSpec(name="web", image="web") if id != "job" else JobSpec(name="sum", image="sum")
    return Assignment(instance=instance, workload=workload, revision=3)


@pytest.fixture(params=["memory", "sqlite"])
def reopen(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[], LocalRecord]:
    memory = MemoryRecord()
    return lambda: memory if request.param == "memory" else SqliteRecord(tmp_path / "record.db")


def test_what_was_recorded_is_there_after_reopening(reopen: Callable[[], LocalRecord]) -> None:
    record = reopen()
    state = State(phase=Phase.RUNNING, desired=Desired.DRAIN, pid=4, run=2, exit=Exit(code=137, at=2.0, oom=True), ready=True)
    for id in ("a", "b", "job"):
        record.put_assignment(assignment(id))
    record.put_state("a", state)
    record.put_secrets("a", {"KEY": "value"})
    record.put_assignment(assignment("a"))
    record.remove("b")
    record.remove("unknown")
    record.close()
    found = {entry.assignment.instance.id: entry for entry in reopen().load()}
    assert sorted(found) == ["a", "job"]
    assert found["a"].state == state
    assert found["a"].secrets == {"KEY": "value"}
    assert found["job"].state == State()
    assert found["job"].assignment == assignment("job")


def test_a_record_is_there_after_kill_9(tmp_path: Path) -> None:
    """A second connection sees what the first wrote and never closed."""
    first = SqliteRecord(tmp_path / "record.db")
    first.put_assignment(assignment("a"))
    assert len(SqliteRecord(tmp_path / "record.db").load()) == 1


def test_an_agent_that_goes_back_a_version_reads_of_a_newer_record_what_it_knows(tmp_path: Path) -> None:
    """Even a spec, which refuses unknown fields where people write it: what runs is adopted, and not taken for damage."""
    record = SqliteRecord(tmp_path / "record.db")
    record.put_assignment(assignment("a"))
    record.put_state("a", State(phase=Phase.RUNNING, pid=4))
    record.close()
    with closing(sqlite3.connect(tmp_path / "record.db")) as database, database:
        for table, place in (("assignment", "$.workload.to_come"), ("assignment", "$.to_come"), ("state", "$.to_come")):
            database.execute(f"UPDATE {table} SET body = CAST(json_set(CAST(body AS TEXT), ?, 'x') AS BLOB)", (place,))
    (entry,) = SqliteRecord(tmp_path / "record.db").load()
    assert (entry.assignment, entry.state) == (assignment("a"), State(phase=Phase.RUNNING, pid=4))


@pytest.mark.parametrize("damage", [b"not a database at all" * 100, None])
def test_a_damaged_record_is_named_with_the_mend(tmp_path: Path, damage: bytes | None) -> None:
    path = tmp_path / "record.db"
    record = SqliteRecord(path)
    for number in range(200):
        record.put_assignment(assignment(f"web-{number}"))
    record.close()
    content = path.read_bytes()
    path.write_bytes(damage if damage is not None else content[:4096] + b"\xff" * (len(content) - 4096))
    with pytest.raises(Corrupt, match=r"record\.db is damaged") as caught:
        SqliteRecord(path).load()
    assert caught.value.mend is not None


def test_only_root_reads_the_record(tmp_path: Path) -> None:
    SqliteRecord(tmp_path / "record.db").put_assignment(assignment("a"))
    assert {path.stat().st_mode & 0o077 for path in tmp_path.iterdir()} == {0}


def test_a_record_is_closed_where_no_file_can_be_made_for_its_room(tmp_path: Path) -> None:
    record = SqliteRecord(tmp_path / "record.db")
    record.put_assignment(assignment("a"))
    room = kept(tmp_path / "record.db")
    room.mkdir()  # as where no inode is left
    record.close()
    room.rmdir()
    assert len(SqliteRecord(tmp_path / "record.db").load()) == 1
