"""An app that sleeps, on a real `atoll up`: deployed, asleep, woken by a request, and asleep again."""

from __future__ import annotations

import json
import urllib.request
from pathlib import Path

from busybox_app import NEEDS, deployed, wait_for

from atoll.entry.scratch import ScratchAtoll

pytestmark = NEEDS
SPEC = """
name = "sleepy"
image = "{image}"
command = ["/bin/busybox", "sh", "-c", "mkdir -p /www; echo hello > /www/index.html; exec httpd -f -p $PORT -h /www"]
ports = [{{ port = 8080 }}]
scale = {{ replicas = 0, max = 1, idle_after = "5s" }}
resources = {{ memory = "32MiB" }}
stop = {{ grace = "1s" }}
"""


def test_an_app_sleeps_when_nobody_asks_for_it_and_the_next_request_wakes_it(tmp_path: Path) -> None:
    with deployed("atoll-wake-", SPEC, tmp_path) as atoll:
        assert ask(atoll) == (200, b"hello\n")
        for _ in range(2):
            wait_for(lambda: not atoll.atoll_json("ps", "sleepy"), "it to sleep")
            assert "asleep" in atoll.atoll("status", "sleepy")
            assert ask(atoll) == (200, b"hello\n")
            assert len(atoll.atoll_json("ps", "sleepy")) == 1
        codes = [event["code"] for event in atoll.atoll_json("events")]
        assert codes.count("app-woken") >= 2
        assert codes.count("app-asleep") >= 2
        log = (atoll.data / "ingress" / "access.log").read_text().splitlines()
        assert {json.loads(line)["status"] for line in log} == {200}


def ask(atoll: ScratchAtoll) -> tuple[int, bytes]:
    request = urllib.request.Request(f"http://{atoll.ingress}/", headers={"Host": "sleepy.localhost"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        return answer.status, answer.read()
