"""One version of skew either way, with the version before out of the history: an upgrade in place and back, and mixed machines.

Slow, and it needs the history: run it by itself before a release, `pytest -m soak tests/system/test_skew.py`.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from busybox_app import BUSYBOX, NEEDS, wait_for
from former import export

from atoll.entry.config import Config
from atoll.entry.scratch import ScratchAtoll, ScratchNode, free_port
from atoll.images.minimal import docker_archive
from atoll.store.etcd.private import PrivateEtcd

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


def test_a_machine_goes_back_by_one_version_and_what_runs_there_is_taken_over(atoll: Versions, old: Path) -> None:
    if "decode_known(assignment" not in (old / "atoll/node/record.py").read_text():
        pytest.skip("the version before takes an agent's record of a newer one for damaged")
    atoll.use(SRC)
    atoll.start()
    image = atoll.import_image()
    atoll.deploy("before", image)
    assert atoll.serves("before")
    ran = began(atoll, "before")
    atoll.atoll("down", "--data", str(atoll.data), "--keep-running")
    atoll.use(old)
    atoll.start()
    wait_for(lambda: atoll.serves("before"), "the app of the newer version to be served", WAIT_S)
    assert began(atoll, "before") == ran, "it was not started again"
    atoll.deploy("after", image)
    atoll.atoll("restart", "before")
    assert atoll.serves("before")
    assert atoll.serves("after")


class Server:
    """One server of a cell, of either version."""

    def __init__(self, directory: Path, name: str, source: Path, etcd: PrivateEtcd) -> None:
        listen = f"127.0.0.1:{free_port()}"
        self.name = name
        self.data = directory / name
        self.data.mkdir()
        config = Config(data=self.data, listen=listen, store=etcd.url, key=directory / "cell-key", node=name)
        kept = {key: value for key, value in os.environ.items() if not key.startswith("ATOLL_")}
        self.environment = {**kept, "PYTHONPATH": str(source), "XDG_CONFIG_HOME": str(directory), "NO_COLOR": "1"}
        self.command = [sys.executable, "-m", "atoll.entry.server", *config.arguments()]
        self.api = listen
        self.running: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        with open(self.data / "log", "ab") as log:
            self.running = subprocess.Popen(self.command, env=self.environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        wait_for(self.answers, f"{self.name} to answer", WAIT_S)

    def kill(self) -> None:
        if self.running is not None:
            self.running.kill()
            self.running.wait(60)
            self.running = None

    def answers(self) -> bool:
        assert self.running is not None
        assert self.running.poll() is None, (self.data / "log").read_text(errors="replace")[-2_000:]
        try:
            return bool(self.atoll("servers"))
        except (subprocess.SubprocessError, OSError):
            return False

    def atoll(self, *arguments: str) -> Any:
        """Run a command of this server's own version at it."""
        token = (self.data / "server" / "admin-token").read_text()
        done = subprocess.run(
            [str(Path(sys.executable).with_name("atoll")), *arguments, "--json"],
            env={**self.environment, "ATOLL_API": self.api, "ATOLL_TOKEN": token},
            capture_output=True,
            text=True,
            timeout=120,
            check=True,
        )
        return json.loads(done.stdout)

    def leads(self) -> bool:
        return any(view["leads"] and self.api in view["server"]["urls"][0] for view in self.atoll("servers"))

    def deploy(self, name: str, more: str = "") -> None:
        file = self.data / f"{name}.toml"
        file.write_text(f'name = "{name}"\nimage = "registry.invalid/{name}:1"\n{more}[[ports]]\nport = 80\n')
        subprocess.run(
            [str(Path(sys.executable).with_name("atoll")), "deploy", "-f", str(file), "--detach"],
            env={**self.environment, "ATOLL_API": self.api, "ATOLL_TOKEN": (self.data / "server" / "admin-token").read_text()},
            capture_output=True,
            timeout=120,
            check=True,
        )

    def sees(self, name: str) -> bool:
        """Whether the leader has made an instance of the app, and this server knows of it."""
        try:
            return len(self.atoll("ps", name)) == 1
        except subprocess.CalledProcessError:
            return False  # it has not heard of the app yet


@pytest.fixture(scope="module")
def coming(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The version to come, as far as specs go: this one with a new field in two of them."""
    source = tmp_path_factory.mktemp("coming") / "src"
    shutil.copytree(SRC, source, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for file, after in (("app.py", "    metrics: Metrics | None = None\n"), ("serving.py", "    http2: bool = False\n")):
        path = source / "atoll/model/spec" / file
        text = path.read_text()
        assert text.count(after) == 1, f"{file} has changed: see where a field fits"
        path.write_text(text.replace(after, f"{after}    to_come: int | None = None\n"))
    return source


@pytest.mark.skipif(shutil.which("etcd") is None, reason="there is no etcd on this machine")
@pytest.mark.parametrize("first", ["older", "newer"])
def test_servers_of_two_versions_lead_one_cell_in_turn(tmp_path: Path, coming: Path, first: str) -> None:
    """What either writes the other acts on, but for an app that uses what only the newer knows: the older one leaves it alone."""
    (tmp_path / "cell-key").touch(mode=0o600)
    (tmp_path / "cell-key").write_bytes(os.urandom(32))
    with PrivateEtcd() as etcd, ExitStack() as stack:
        older, newer = Server(tmp_path, "older", SRC, etcd), Server(tmp_path, "newer", coming, etcd)
        one, other = (older, newer) if first == "older" else (newer, older)
        for server in (one, other):
            stack.callback(server.kill)
            server.start()
        wait_for(one.leads, "the first to lead", WAIT_S)
        other.deploy("a")
        wait_for(lambda: one.sees("a") and other.sees("a"), "an instance that the first made", WAIT_S)
        one.kill()
        wait_for(other.leads, "the other to lead", WAIT_S)
        other.deploy("b")
        wait_for(lambda: other.sees("b") and other.sees("a"), "an instance that the other made", WAIT_S)
        one.start()
        one.deploy("c")
        newer.deploy("d", "to_come = 3\n")
        wait_for(lambda: all(one.sees(name) for name in "abc"), "all of them, at the one that is back", WAIT_S)
        if other is older:
            assert not newer.sees("d"), "the older one leads, and knows better than to run it without what it says"
            older.kill()
        wait_for(lambda: newer.sees("d"), "what uses more, once the newer one leads", WAIT_S)


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
