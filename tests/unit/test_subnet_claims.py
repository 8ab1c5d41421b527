"""Two agents of one machine never give out the same addresses: the second is told to take a subnet of its own."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from atoll.model.errors import Conflict, Retry
from atoll.network.checks import check_network
from atoll.network.claims import held_by, hold_subnet


@pytest.mark.parametrize("other", ["10.64.0.0/20", "10.64.0.0/16", "10.64.8.0/24"])
def test_a_subnet_that_overlaps_anothers_is_refused_with_one_that_does_not(tmp_path: Path, other: str) -> None:
    held = hold_subnet("10.64.0.0/20", "process 7 (/var/lib/a)", tmp_path)
    try:
        with pytest.raises(Conflict) as caught:
            hold_subnet(other, "process 8", tmp_path)
        assert f"the subnet {other} is used by process 7 (/var/lib/a)" in str(caught.value)
        assert "a second cell on one machine needs addresses of its own: give it --subnet 10." in (caught.value.mend or "")
        assert caught.value.retry is Retry.NEVER, "or it would be tried again and again"
        proposed = (caught.value.mend or "").rpartition(" ")[2]
        os.close(hold_subnet(proposed, "process 8", tmp_path))
        os.close(hold_subnet("10.64.16.0/20", "process 8", tmp_path))
    finally:
        os.close(held)


def test_a_subnet_is_free_again_when_its_holder_has_gone_and_leaves_no_file(tmp_path: Path) -> None:
    os.close(hold_subnet("10.64.0.0/20", "one", tmp_path))
    os.close(hold_subnet("10.64.0.0/16", "another", tmp_path))
    os.close(hold_subnet("10.80.0.0/16", "a third", tmp_path))
    assert [path.name.partition("-")[2] for path in tmp_path.iterdir() if path.name != ".lock"] == ["10.80.0.0-16"]


def test_what_is_no_claim_stops_nobody(tmp_path: Path) -> None:
    space = Path("/proc/thread-self/ns/net").stat().st_ino
    (tmp_path / f"{space}-nonsense").write_text("x")
    (tmp_path / "1-10.64.0.0-20").write_text("of another network namespace")
    os.close(hold_subnet("10.64.0.0/20", "one", tmp_path))


def test_the_subnet_of_a_data_directory_is_what_its_agent_holds_now(tmp_path: Path) -> None:
    held = hold_subnet("10.64.0.0/20", "process 7 (/var/lib/a)", tmp_path)
    assert held_by("(/var/lib/a)", tmp_path) == "10.64.0.0/20"
    assert held_by("(/var/lib/b)", tmp_path) is None
    found = next(check for check in check_network("10.64.0.0/16", held="10.64.0.0/20") if check.name == "instances' subnet")
    assert (found.ok, found.detail) == (True, "10.64.0.0/20, held by the agent that runs")
    os.close(held)
    assert held_by("(/var/lib/a)", tmp_path) is None
