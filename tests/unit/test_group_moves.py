"""Moves between control groups that are told of early, on a hierarchy made of plain files."""

from __future__ import annotations

import os
from pathlib import Path

from atoll.runtimes.cgroup import Cgroups
from atoll.runtimes.moving import foretell, own_procs

V1 = "12:cpu,cpuacct:/atoll/agent\n0::/elsewhere\n"


def test_the_agents_own_group_is_found_in_either_version() -> None:
    v1 = Cgroups(v1={"cpu": Path("/c/cpu"), "memory": Path("/c/memory")}, v2=Path("/c/unified"))
    v2 = Cgroups(v1={}, v2=Path("/c"))
    assert own_procs(v1, V1) == Path("/c/cpu/atoll/agent/cgroup.procs")
    assert own_procs(v2, "0::/system.slice/atoll.service\n") == Path("/c/system.slice/atoll.service/cgroup.procs")
    assert own_procs(v2, "0::/../beyond\n") is None
    assert own_procs(v2, "") is None


def test_nobody_is_moved_to_a_group_in_which_it_is_not(tmp_path: Path) -> None:
    own, group = tmp_path / "cgroup", tmp_path / "cpu/atoll/agent"
    own.write_text(V1)
    cgroups = Cgroups(v1={"cpu": tmp_path / "cpu"}, v2=None)
    foretell(cgroups, own)  # no such group: no error, and nothing is made
    assert not group.exists()
    group.mkdir(parents=True)
    procs = group / "cgroup.procs"
    procs.write_text(f"{os.getpid() + 1}\n")
    foretell(cgroups, own)
    assert procs.read_text() == f"{os.getpid() + 1}\n"
    procs.write_text(f"7\n{os.getpid()}\n")
    foretell(cgroups, own)
    assert procs.read_text() == f"0\n{os.getpid()}\n"
