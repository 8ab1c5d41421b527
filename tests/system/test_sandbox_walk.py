"""A sandbox's life on a real `atoll up`: made, worked in, paused, written down, forked, ended."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest

from atoll.entry.scratch import CommandFailed, ScratchAtoll
from atoll.images.minimal import docker_archive

pytestmark = [
    pytest.mark.system,
    pytest.mark.timeout(240),
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root: makes namespaces, mounts and cgroups"),
    pytest.mark.skipif(not Path("/bin/busybox").exists(), reason="needs the package busybox-static"),
]
BOX = "/bin/busybox"


def test_a_sandbox_is_worked_in_paused_written_down_and_forked_and_ends_at_its_limit(tmp_path: Path) -> None:
    with ScratchAtoll("atoll-sandbox-") as atoll:
        (node,) = atoll.atoll_json("nodes")
        if "gvisor" not in node["node"]["runtimes"]:
            pytest.skip("this machine cannot run gvisor: `atoll doctor` says why")
        archive = docker_archive(tmp_path / "busybox.tar", "busybox:1", program=Path(BOX), target=BOX)
        image = atoll.atoll_json("image", "import", str(archive), "--name", "busybox", "--tag", "1")["image"]
        made = ("--image", image, "--isolation", "sandbox", "--", BOX, "sleep", "100000")
        atoll.atoll("sandbox", "create", "try", *made)
        shell(atoll, "try", "echo kept > /kept")

        assert atoll.atoll_json("sandbox", "pause", "try")["paused"] is True
        with pytest.raises(CommandFailed, match="paused"):
            atoll.atoll("sandbox", "exec", "try", "--", BOX, "true")
        assert atoll.atoll_json("sandbox", "resume", "try")["paused"] is False
        assert shell(atoll, "try", "cat /kept") == "kept\n"

        snapshot = atoll.atoll_json("sandbox", "snapshot", "try")["snapshot"]
        assert snapshot["digest"].startswith("sha256:")
        shell(atoll, "try", "echo later > /kept")
        atoll.atoll("sandbox", "create", "back", "--snapshot", snapshot["digest"], "--node", snapshot["node"], *made)
        atoll.atoll("sandbox", "fork", "try", "twin")
        assert shell(atoll, "back", "cat /kept") == "kept\n"
        shell(atoll, "twin", "echo twin > /kept")
        assert shell(atoll, "try", "cat /kept") == "later\n"
        assert {view["job"]["name"] for view in atoll.atoll_json("sandbox", "list")} == {"try", "back", "twin"}

        atoll.atoll("sandbox", "create", "short", "--time-limit", "10s", *made)
        for name in ("try", "back", "twin"):
            atoll.atoll("sandbox", "rm", name)
        assert {view["job"]["name"] for view in atoll.atoll_json("sandbox", "list")} == {"short"}
        wait_for(lambda: phase(atoll, "short") == "failed")
        assert "deadline" in atoll.atoll("jobs", "show", "short")


def shell(atoll: ScratchAtoll, name: str, script: str) -> str:
    return str(atoll.atoll("sandbox", "exec", name, "--", BOX, "sh", "-c", script.replace("cat ", f"{BOX} cat ")))


def phase(atoll: ScratchAtoll, name: str) -> str:
    views = {view["job"]["name"]: view for view in atoll.atoll_json("sandbox", "list")}
    return str((views[name].get("status") or {}).get("phase", "pending"))


def wait_for(holds: Any, seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.2)
