"""An app that scales by its requests under way, on a real `atoll up` under load: from one to more and back; no request fails."""

from __future__ import annotations

import json
import os
import threading
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path

import pytest

from atoll.entry.scratch import ScratchAtoll
from atoll.images.minimal import docker_archive

pytestmark = [
    pytest.mark.system,
    pytest.mark.timeout(300),
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root: makes namespaces, mounts and cgroups"),
    pytest.mark.skipif(not Path("/bin/busybox").exists(), reason="needs the package busybox-static"),
]
SERVE = """
mkdir -p /www/cgi-bin
printf '#!/bin/busybox sh\\nsleep 0.5\\nprintf \"Content-Type: text/plain\\\\r\\\\n\\\\r\\\\nhello\"\\n' > /www/cgi-bin/slow
chmod 755 /www/cgi-bin/slow
exec httpd -f -p $PORT -h /www
"""
SPEC = """
name = "busy"
image = "{image}"
command = ["/bin/busybox", "sh", "-c", '''{serve}''']
ports = [{{ port = 8080 }}]
scale = {{ replicas = 1, max = 3, concurrency = 2, stable = "6s" }}
resources = {{ memory = "32MiB", cpu = 0.2 }}
stop = {{ grace = "1s" }}
"""
WAIT_S = 90.0


class Clients:
    """So many ask at a time, again and again, each request on a connection of its own."""

    def __init__(self, address: str) -> None:
        self._address = address
        self._stops: list[threading.Event] = []
        self._threads: list[threading.Thread] = []
        self.answered = 0
        self.failed: list[str] = []

    def set(self, count: int) -> None:
        while len(self._stops) > count:
            self._stops.pop().set()
        while len(self._stops) < count:
            stop = threading.Event()
            thread = threading.Thread(target=self._ask, args=(stop,))
            self._stops.append(stop)
            self._threads.append(thread)
            thread.start()

    def close(self) -> None:
        self.set(0)
        for thread in self._threads:
            thread.join(WAIT_S)

    def _ask(self, stop: threading.Event) -> None:
        while not stop.is_set():
            request = urllib.request.Request(f"http://{self._address}/cgi-bin/slow", headers={"Host": "busy.localhost"})
            try:
                with urllib.request.urlopen(request, timeout=60) as answer:
                    body = answer.read()
                if body == b"hello":
                    self.answered += 1
                else:
                    self.failed.append(repr(body[:100]))
            except OSError as error:
                self.failed.append(repr(error))


def test_an_app_grows_with_its_requests_and_shrinks_after_them_and_none_fails(tmp_path: Path) -> None:
    with ScratchAtoll("atoll-busy-") as atoll:
        archive = docker_archive(tmp_path / "busybox.tar", "busybox:1", program=Path("/bin/busybox"), target="/bin/busybox")
        image = atoll.atoll_json("image", "import", str(archive), "--name", "busybox", "--tag", "1")["image"]
        (tmp_path / "atoll.toml").write_text(SPEC.format(image=image, serve=SERVE))
        atoll.atoll("deploy", "-f", str(tmp_path / "atoll.toml"))
        assert "of 1–3, by requests under way ≤ 2 each" in atoll.atoll("status", "busy")
        clients = Clients(atoll.ingress)
        try:
            clients.set(1)
            wait_for(lambda: clients.answered + len(clients.failed) > 2, "answers")
            clients.set(6)
            wait_for(lambda: ready(atoll) == 3, "three instances")
            before = clients.answered
            wait_for(lambda: clients.answered > before + 20, "answers of all")
            clients.set(1)
            wait_for(lambda: len(atoll.atoll_json("ps", "busy")) == 1, "one instance again")
            before = clients.answered
            wait_for(lambda: clients.answered > before + 2, "answers of the one that is left")
        finally:
            clients.close()
        assert clients.failed == []
        told = {event["code"]: event["message"] for event in atoll.atoll_json("events") if event["code"].startswith("scaled-")}
        assert set(told) == {"scaled-up", "scaled-down"}
        assert "requests under way on average" in told["scaled-up"]
        log = (atoll.data / "ingress" / "access.log").read_text().splitlines()
        assert {json.loads(line)["status"] for line in log} == {200}


def ready(atoll: ScratchAtoll) -> int:
    return sum((view.get("status") or {}).get("ready", False) for view in atoll.atoll_json("ps", "busy"))


def wait_for(holds: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + WAIT_S
    while not holds():
        assert time.monotonic() < deadline, f"waited {WAIT_S:.0f} s for {what}"
        time.sleep(0.2)
