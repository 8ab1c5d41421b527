"""The agent's record on a real disk that others have filled."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from atoll.model.errors import Unavailable
from atoll.model.records import Assignment, Exit, Instance, OwnerKind
from atoll.model.spec import AppSpec
from atoll.model.states import Desired, Phase
from atoll.node.record import SqliteRecord
from atoll.node.record_room import kept
from atoll.node.transitions import State

INSTANCES = 50
ENDED = State(
    phase=Phase.STOPPED, desired=Desired.STOP, run=1, exit=Exit(code=137, at=2.0, signal="SIGKILL"), message="ended by SIGKILL"
)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    if os.geteuid() != 0:
        pytest.skip("mounting a small disk needs root")
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "atoll-test", str(disk)], capture_output=True, text=True)
    if mounted.returncode != 0:
        pytest.skip(f"cannot mount a tmpfs here: {mounted.stderr.strip()}")
    yield disk
    subprocess.run(["umount", "--lazy", str(disk)], check=True)  # records are open, as after kill -9


def fill(disk: Path) -> Path:
    """Take all that is free; return what is to be removed."""
    file = disk / "others"
    with file.open("ab", buffering=0) as others:
        while True:
            try:
                others.write(bytes(4_096))
            except OSError:
                return file


def begun(disk: Path) -> SqliteRecord:
    """Return a record of instances that run."""
    record = SqliteRecord(disk / "record.db")
    for number in range(INSTANCES):
        instance = Instance(id=f"web-{number}", project="default", owner_kind=OwnerKind.APP, owner="web", created_at=1.0)
        record.put_assignment(Assignment(instance=instance, workload=AppSpec(name="web", image="web"), revision=3))
        record.put_state(f"web-{number}", State(phase=Phase.RUNNING, run=1))
    return record


def end_all(record: SqliteRecord) -> None:
    for round in range(20):  # more writes than one log has room for
        for number in range(INSTANCES):
            record.put_state(f"web-{number}", State(phase=Phase.STOPPING, run=round))
    for number in range(INSTANCES):
        record.put_state(f"web-{number}", ENDED)


@pytest.mark.system
def test_ends_are_recorded_on_a_disk_that_is_full(disk: Path) -> None:
    record = begun(disk)
    fill(disk)
    end_all(record)
    # As after kill -9: the first was never closed.
    again = SqliteRecord(disk / "record.db")
    assert [entry.state for entry in again.load()] == [ENDED] * INSTANCES
    again.remove("web-1")
    assert len(again.load()) == INSTANCES - 1


@pytest.mark.system
def test_a_record_that_was_closed_has_its_room_again_though_the_disk_was_filled_meanwhile(disk: Path) -> None:
    begun(disk).close()
    fill(disk)
    record = SqliteRecord(disk / "record.db")
    fill(disk)
    end_all(record)
    assert [entry.state for entry in record.load()] == [ENDED] * INSTANCES


@pytest.mark.system
def test_a_disk_without_any_room_is_no_damage_and_what_was_recorded_is_there_when_it_has_some(disk: Path) -> None:
    begun(disk).close()
    kept(disk / "record.db").unlink()
    others = fill(disk)
    with pytest.raises(Unavailable, match=r"record\.db") as refused:
        SqliteRecord(disk / "record.db").put_state("web-1", ENDED)
    assert refused.value.mend == "free some disk space"
    others.unlink()
    assert len(SqliteRecord(disk / "record.db").load()) == INSTANCES
