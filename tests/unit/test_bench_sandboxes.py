"""What `bench sandboxes` sets its goal beside."""

from __future__ import annotations

from bench.sandboxes import rows


def test_the_goal_is_the_time_to_the_first_command_however_quick_the_taking_is() -> None:
    found = rows("runc", taken=[1.0] * 3, first=[50.0] * 3, made=[400.0] * 3)
    goals = {row.what: (row.ours, row.holds) for row in found if row.goal is not None}
    assert goals == {"runc: taken to its first command's output, p50": (50.0, False)}
    assert rows("runc", taken=[1.0], first=[9.0], made=[400.0])[0].holds
