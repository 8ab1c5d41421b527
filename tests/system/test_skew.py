"""One version of skew either way, with the version before out of the history: an upgrade in place and back, and mixed machines.

Slow, and it needs the history: run it by itself before a release, `pytest -m soak tests/system/test_skew.py`.
"""

from __future__ import annotations

import os
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from busybox_app import BUSYBOX, NEEDS, wait_for
from former import export

from atoll.entry.scratch import ScratchAtoll, ScratchNode
from atoll.images.minimal import docker_archive

pytestmark = [*(mark for mark in NEEDS if mark.name != "timeout"), pytest.mark.soak, pytest.mark.timeout(900)]
SPEC = """
name = "{name}"
image = "{image}"
command = ["/bin/busybox", "sh", "-c", "mkdir -p /www; echo {name} > /www/index.html; exec httpd -f -p $PORT -h /www"]
ports = [{{ port = 8080 }}]
resources = {{ memory = "32MiB" }}
stop = {{ grace = "1s" }}
{more}
"""
WAIT_S = 120.0
SRC = Path(__file__).parents[2] / "src"


class Versions(ScratchAtoll):
    """An Atoll of which each part may run either version."""

    def __init__(self) -> None:
        super().__init__("atoll-skew-")

    def use(self, source: Path) -> None:
        """Run what is started from now on by the Python code at `source`."""
        self.environment["PYTHONPATH"] = str(source)

    def import_image(self) -> str:
        archive = docker_archive(self.data / "busybox.tar", "busybox:1", program=BUSYBOX, target=str(BUSYBOX))
        image: str = self.atoll_json("image", "import", str(archive), "--name", "busybox", "--tag", "1")["image"]
        return image

    def deploy(self, name: str, image: str, more: str = "") -> None:
        file = self.data / f"{name}.toml"
        file.write_text(SPEC.format(name=name, image=image, more=more))
        self.atoll("deploy", "-f", str(file))

    def get(self, name: str) -> bytes:
        request = urllib.request.Request(f"http://{self.ingress}/", headers={"Host": f"{name}.localhost"})
        with urllib.request.urlopen(request, timeout=30) as answer:
            text: bytes = answer.read()
        return text

    def instances(self, name: str) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self.atoll_json("ps", name)
        return found

    def serves(self, name: str) -> bool:
        try:
            return self.get(name).decode() == f"{name}\n"
        except OSError:
            return False


@pytest.fixture(scope="module")
def old(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(tmp_path_factory.mktemp("former"))


@pytest.fixture
def atoll() -> Iterator[Versions]:
    made = Versions()
    try:
        yield made
        made.use(SRC)
        made.stop()
    finally:
        made.remove()


def began(atoll: Versions, name: str) -> list[tuple[str, int, float]]:
    return [(one["instance"]["id"], one["status"].get("restarts", 0), one["status"]["started_at"]) for one in atoll.instances(name)]


def test_a_machine_is_upgraded_in_place_and_what_runs_there_is_taken_over(atoll: Versions, old: Path) -> None:
    atoll.use(old)
    atoll.start()
    image = atoll.import_image()
    atoll.deploy("before", image)
    assert atoll.serves("before")
    ran = began(atoll, "before")
    atoll.atoll("down", "--data", str(atoll.data), "--keep-running")
    atoll.use(SRC)
    atoll.start()
    wait_for(lambda: atoll.serves("before"), "the app of the version before to be served", WAIT_S)
    assert began(atoll, "before") == ran, "it was not started again"
    assert atoll.atoll("exec", ran[0][0], "--", "/bin/busybox", "echo", "hello") == "hello\n"
    atoll.deploy("after", image)
    atoll.atoll("restart", "before")
    assert atoll.serves("before")
    assert atoll.serves("after")
    assert [one["status"].get("ready") for one in atoll.instances("before")] == [True]


@pytest.mark.parametrize("newer", ["server", "agent"])
def test_machines_of_both_versions_work_together(atoll: Versions, old: Path, newer: str) -> None:
    server, agent = (SRC, old) if newer == "server" else (old, SRC)
    if newer == "server" and "def decode_known" not in (old / "atoll/model/codec.py").read_text():
        pytest.skip("the version before refuses a server's fields that it does not know")
    atoll.use(server)
    atoll.start()
    image = atoll.import_image()
    node = ScratchNode(atoll, "other")
    node.begin_with(_arguments(agent, node), {**atoll.environment, "PYTHONPATH": str(agent)})
    with node:
        wait_for(lambda: any(one["node"]["name"] == "other" for one in atoll.atoll_json("nodes", "list")), "the node", WAIT_S)
        there = '[[placement.constraints]]\nlabel = "node"\noperator = "="\nvalue = "other"'
        atoll.deploy("there", image, there)
        (one,) = atoll.instances("there")
        assert one["instance"]["node"] == "other"
        assert atoll.atoll("exec", one["instance"]["id"], "--", "/bin/busybox", "echo", "hello") == "hello\n"
        atoll.atoll("restart", "there")
        assert [each["status"].get("ready") for each in atoll.instances("there")] == [True]
        atoll.atoll("delete", "there", "--yes")


def _arguments(source: Path, node: ScratchNode) -> list[str]:
    """Return the agent's options as its own version writes them."""
    given = {name: str(getattr(node.config, name)) for name in ("data", "api", "node", "subnet")}
    text = f"from pathlib import Path; from atoll.entry.config import Config; c = {given!r}; c['data'] = Path(c['data']);"
    done = subprocess.run(
        [sys.executable, "-c", f"{text} print('\\n'.join(Config(**c).arguments()))"],
        env={**os.environ, "PYTHONPATH": str(source)},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    return done.stdout.split()
