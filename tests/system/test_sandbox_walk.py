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


def test_a_template_s_sandboxes_are_taken_once_each_refilled_and_end_when_nobody_uses_them(tmp_path: Path) -> None:
    with ScratchAtoll("atoll-template-") as atoll:
        archive = docker_archive(tmp_path / "busybox.tar", "busybox:1", program=Path(BOX), target=BOX)
        image = atoll.atoll_json("image", "import", str(archive), "--name", "busybox", "--tag", "1")["image"]
        keep = ("--", BOX, "sleep", "100000")
        atoll.atoll("template", "create", "tools", "--image", image, "--pool", "2", "-e", "A=template", "-e", "B=template", *keep)
        wait_for(lambda: len(pool(atoll)) == 2)
        first = pool(atoll)

        views = [atoll.atoll_json("sandbox", "create", name, "--template", "tools", "-e", f"B={name}") for name in ("one", "two")]
        taken = {view["instance"] for view in views}
        assert len(taken) == 2, "each is given to one alone"
        assert views[0]["instance"] in first, "what was ready was taken"
        said = shell(atoll, "one", 'echo "$A $B $ATOLL_JOB $ATOLL_INSTANCE"')
        assert said == f"template one one {views[0]['instance']}\n"
        with pytest.raises(CommandFailed, match="there already"):
            atoll.atoll("sandbox", "create", "one", "--template", "tools")
        wait_for(lambda: len(pool(atoll)) == 2 and not pool(atoll) & taken)
        with pytest.raises(CommandFailed, match="waits in the pool"):
            atoll.atoll("exec", next(iter(pool(atoll))), "--", BOX, "true")

        atoll.atoll("sandbox", "create", "idle", "--template", "tools", "--idle-limit", "2s")
        atoll.atoll("sandbox", "pause", "two")
        states = {view["job"]["name"]: view for view in atoll.atoll_json("sandbox", "list")}
        assert (states["two"]["paused"], states["one"]["paused"]) == (True, False)
        wait_for(lambda: phase(atoll, "idle") == "failed")
        assert "idle limit" in atoll.atoll("jobs", "show", "idle")

        atoll.atoll("template", "rm", "tools")
        wait_for(lambda: not pool(atoll))
        assert shell(atoll, "one", "echo still here") == "still here\n"


def pool(atoll: ScratchAtoll) -> set[str]:
    """Return the instances that are ready to be taken."""
    views = [view for view in atoll.atoll_json("ps") if view["instance"].get("standby") and view["instance"]["owner"] == "tools"]
    return {view["instance"]["id"] for view in views if (view.get("status") or {}).get("ready")}
