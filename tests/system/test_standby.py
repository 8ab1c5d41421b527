"""A warm pool of one, on a real `atoll up` with real instances: parked, promoted when the one that serves dies, made anew."""

from __future__ import annotations

import os
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from atoll.control.standby import SERVED_MIN_S
from atoll.entry.scratch import ScratchAtoll
from atoll.images.minimal import docker_archive

pytestmark = [
    pytest.mark.system,
    pytest.mark.timeout(240),
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root: makes namespaces, mounts and cgroups"),
    pytest.mark.skipif(not Path("/bin/busybox").exists(), reason="needs the package busybox-static"),
]
SPEC = """
name = "slow"
image = "{image}"
command = ["/bin/busybox", "sh", "-c", "mkdir -p /www; hostname > /www/index.html; sleep 3; exec httpd -f -p $PORT -h /www"]
ports = [{{ port = 8080 }}]
scale = {{ standby = 1 }}
resources = {{ memory = "32MiB" }}
stop = {{ grace = "1s" }}
"""
"""It takes 3 s until it listens, as if it loaded something."""


def test_the_parked_one_serves_when_the_running_one_dies_and_another_is_parked_after_it(tmp_path: Path) -> None:
    with ScratchAtoll("atoll-standby-") as atoll:
        archive = docker_archive(tmp_path / "busybox.tar", "busybox:1", program=Path("/bin/busybox"), target="/bin/busybox")
        image = atoll.atoll_json("image", "import", str(archive), "--name", "busybox", "--tag", "1")["image"]
        (tmp_path / "atoll.toml").write_text(SPEC.format(image=image))
        atoll.atoll("deploy", "-f", str(tmp_path / "atoll.toml"))
        (first,) = ids(atoll, "ready")
        wait_for(lambda: len(ids(atoll, "parked")) == 1, "a parked one")
        (parked,) = ids(atoll, "parked")
        assert "1 of 1, 1 parked" in atoll.atoll("status", "slow")
        assert not answers(status(atoll, parked)["address"]), "it is frozen"
        wait_for(lambda: time.time() - status(atoll, first)["ready_at"] > SERVED_MIN_S, "the first to have served for a while")
        os.kill(status(atoll, first)["pid"], 9)
        wait_for(lambda: ids(atoll, "ready") == [parked], "the parked one to serve", pause_s=0.02)
        events = {event["code"]: event for event in reversed(atoll.atoll_json("events"))}
        assert events["promoted"]["subject"] == events["woken"]["subject"] == f"instance/{parked}"
        assert answers(status(atoll, parked)["address"])
        assert status(atoll, parked).get("restarts", 0) == 0
        wait_for(lambda: len(ids(atoll, "parked")) == 1 and first not in ids(atoll), "another to be parked")
        assert parked not in ids(atoll, "parked")
        atoll.atoll("delete", "slow", "--yes")
        wait_for(lambda: not ids(atoll), "all to be gone")


def ids(atoll: ScratchAtoll, what: str = "") -> list[str]:
    views: list[dict[str, Any]] = atoll.atoll_json("ps")
    return [view["instance"]["id"] for view in views if not what or (view.get("status") or {}).get(what)]


def status(atoll: ScratchAtoll, id: str) -> dict[str, Any]:
    views: list[dict[str, Any]] = atoll.atoll_json("ps")
    return next(view["status"] for view in views if view["instance"]["id"] == id)


def answers(address: str) -> bool:
    try:
        with urllib.request.urlopen(f"http://{address}:8080/", timeout=1) as answer:
            return bool(answer.status == 200)
    except (TimeoutError, urllib.error.URLError):
        return False


def wait_for(holds: Callable[[], bool], what: str, seconds: float = 40.0, pause_s: float = 0.2) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, f"waited {seconds:.0f} s for {what}"
        time.sleep(pause_s)
