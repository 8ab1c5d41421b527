"""Images that are on a node before an app comes to it: two real agents, the cell's registry, real containers."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from atoll.entry.scratch import ScratchAtoll, ScratchNode

BUSYBOX = Path("/bin/busybox")
pytestmark = [
    pytest.mark.system,
    pytest.mark.skipif(os.geteuid() != 0, reason="Atoll runs instances as root"),
    pytest.mark.skipif(not BUSYBOX.exists(), reason="needs busybox-static"),
    pytest.mark.timeout(180),
]


@pytest.fixture
def scratch() -> Iterator[ScratchAtoll]:
    with ScratchAtoll("atoll-prefetch-") as scratch:
        scratch.environment["XDG_CACHE_HOME"] = str(scratch.data / "cache")
        yield scratch


def built(scratch: ScratchAtoll, directory: Path, name: str, content: Path | bytes) -> str:
    directory.mkdir()
    if isinstance(content, Path):
        shutil.copy(content, directory / name)
    else:
        (directory / name).write_bytes(content)
    spec = {"name": directory.name, "build": {"base": "scratch", "workdir": "/", "files": [name]}}
    (directory / "atoll.json").write_text(json.dumps(spec))
    return str(scratch.atoll_json("build", "--file", str(directory / "atoll.json"))["image"])


def until(holds: Callable[[], Any], seconds: float, otherwise: str) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, f"{otherwise} within {seconds:g} s"
        time.sleep(0.1)


def test_an_app_finds_its_image_and_its_weights_on_the_node_that_it_moves_to(scratch: ScratchAtoll, tmp_path: Path) -> None:
    server = built(scratch, tmp_path / "server", "busybox", BUSYBOX)
    weights = built(scratch, tmp_path / "weights", "weights.bin", os.urandom(3 << 20))
    (home,) = (view["node"]["name"] for view in scratch.atoll_json("nodes", "list"))
    spec = {
        "name": "web",
        "image": server,
        "command": ["/busybox", "httpd", "-f", "-p", "8000", "-h", "/models"],
        "ports": [{"port": 8000}],
        "volumes": [{"name": "weights", "path": "/models", "image": weights}],
        "resources": {"cpu": 0.1, "memory": "32MiB"},
        "stop": {"grace": "1s", "signal": "SIGKILL"},
    }
    (tmp_path / "web.json").write_text(json.dumps(spec))
    scratch.atoll("deploy", "--file", str(tmp_path / "web.json"))
    with ScratchNode(scratch, "other") as other:
        wanted = {image.partition("@")[2] for image in (server, weights)}

        def other_has() -> set[str]:
            views = {view["node"]["name"]: view for view in scratch.atoll_json("nodes", "list")}
            return set(((views.get("other") or {}).get("heartbeat") or {}).get("images", ()))

        until(lambda: wanted <= other_has(), 60, f"the other node has not what it was to fetch: {other.log[-2000:]}")
        shown = scratch.atoll("nodes", "show", "other")
        assert "IMAGE FOR LATER" in shown
        assert other.log.count("image ready") == 2

        scratch.atoll("nodes", "cordon", home)
        scratch.atoll("restart", "web")

        def moved() -> bool:
            views = scratch.atoll_json("ps")
            return [(view["instance"]["node"], (view.get("status") or {}).get("ready")) for view in views] == [("other", True)]

        until(moved, 60, f"it has not moved: {other.log[-2000:]}")
        assert other.log.count("image ready") == 2, "both were there, and nothing was pulled for the start"
        scratch.atoll("delete", "web", "--yes")
        until(lambda: scratch.atoll_json("ps") == [], 30, "it was not removed")
