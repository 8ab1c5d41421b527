"""How the suite is shared out among processes: a file of tests whole, and all suites of the runtimes to one process."""

from __future__ import annotations

from typing import Any

import pytest

RUNTIMES = "tests/contract/test_runtime"


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    from xdist.scheduler import LoadFileScheduling

    class Files(LoadFileScheduling):  # type: ignore[misc]
        def _split_scope(self, nodeid: str) -> str:
            """runsc tells sandboxes apart by their ids on the whole machine, and the suites all use the same few."""
            return RUNTIMES if nodeid.startswith(RUNTIMES) else str(super()._split_scope(nodeid))

    return Files(config, log) if config.getvalue("dist") == "loadfile" else None
