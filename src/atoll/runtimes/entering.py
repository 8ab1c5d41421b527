"""Starts commands beside an instance by entering it, as the shim does (`native/inside.c`), instead of asking a runtime's tool.

The shim joins the instance's control groups and namespaces, forks there, and puts the filter on. A tool's own start is spared,
which takes runc longer than all the rest. Only for an instance with ids of its own, whose filter is ours to put on.
"""

from __future__ import annotations

from typing import Any

from atoll.runtimes.exec_tool import ExecFiles
from atoll.runtimes.inside import process_file
from atoll.runtimes.native import shim_path
from atoll.runtimes.oci import CAPABILITIES
from atoll.runtimes.oci_container import Container
from atoll.runtimes.seccomp_program import filter_program


class Entering:
    """See `ExecTool`."""

    hands_on = True

    def __init__(self, container: Container) -> None:
        self._container = container

    def encode(self, process: dict[str, Any]) -> bytes:
        return process_file(process, filter_program(frozenset(CAPABILITIES)), make_directory=False)

    def command(self, files: ExecFiles) -> list[str]:
        first = self._container.first
        groups = [str(path) for path in self._container.group.directories if (path / "cgroup.procs").exists()]
        given = [str(files.pid), str(files.process), str(files.log), files.console or "-"]
        return [str(shim_path()), "enter", *given, str(first.pid if first else 0), str(self._container.files.exit), *groups]
