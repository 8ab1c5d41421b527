"""When a runtime's tool is tried by running something with it."""

from __future__ import annotations

from pathlib import Path

import pytest

from atoll.model.errors import Unsupported
from atoll.runtimes.cgroup import Cgroups
from atoll.runtimes.crun import hide_unified
from atoll.runtimes.oci_probe import once_per_boot


def test_a_tool_that_works_is_tried_once_and_one_that_changed_again(tmp_path: Path) -> None:
    tool, calls = tmp_path / "tool", []
    tool.write_text("#!/bin/sh\n")
    tool.chmod(0o755)

    def probe() -> str:
        calls.append(1)
        return "1.0"

    for _ in range(3):
        assert once_per_boot(tmp_path / "runtime", str(tool), probe) == "1.0"
    assert len(calls) == 1
    tool.write_text("#!/bin/sh\n# newer\n")
    assert once_per_boot(tmp_path / "runtime", str(tool), probe) == "1.0"
    assert len(calls) == 2
    (tmp_path / "runtime/probe.json").write_text("{damaged")
    assert once_per_boot(tmp_path / "runtime", str(tool), probe) == "1.0"
    assert len(calls) == 3


def test_a_tool_that_does_not_work_is_tried_again(tmp_path: Path) -> None:
    calls = []

    def probe() -> str:
        calls.append(1)
        raise Unsupported("no")

    for _ in range(2):
        with pytest.raises(Unsupported):
            once_per_boot(tmp_path, "no-such-tool-here", probe)
    assert len(calls) == 2


def test_only_mixed_control_groups_are_hidden_from_crun() -> None:
    unified = Path("/sys/fs/cgroup/unified")
    assert hide_unified(Cgroups(v1={}, v2=Path("/sys/fs/cgroup"))) == []
    assert hide_unified(Cgroups(v1={"cpu": Path("/sys/fs/cgroup/cpu")}, v2=None)) == []
    assert f"-{unified}" in hide_unified(Cgroups(v1={"cpu": Path("/sys/fs/cgroup/cpu")}, v2=unified))
