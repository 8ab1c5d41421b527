"""An app that scales by its own metric, on a real `atoll up` with real instances: asked, grown, shown, shrunk."""

from __future__ import annotations

import urllib.request
from pathlib import Path
from typing import Any

from busybox_app import NEEDS, deployed, wait_for

from atoll.entry.scratch import ScratchAtoll

pytestmark = NEEDS
SPEC = """
name = "queue"
image = "{image}"
command = ["/bin/busybox", "sh", "-c", "mkdir -p /www; echo queue_depth 0 > /www/metrics; exec httpd -f -p $PORT -h /www"]
ports = [{{ port = 8080 }}]
metrics = {{ names = ["tokens_per_second"] }}
scale = {{ replicas = 1, max = 2, metric = "queue_depth", target = 10, down = "1s" }}
resources = {{ memory = "32MiB" }}
stop = {{ grace = "1s" }}
"""


def test_an_app_grows_with_its_queue_is_seen_to_and_shrinks_after_it(tmp_path: Path) -> None:
    with deployed("atoll-scale-", SPEC, tmp_path) as atoll:
        (first,) = instances(atoll)
        say(atoll, first, "queue_depth 15\\ntokens_per_second 321.5")
        wait_for(lambda: len(instances(atoll)) == 2, "a second instance")
        wait_for(lambda: b'name="tokens_per_second"} 321.5' in metrics(atoll), "the metric in /metrics")
        assert b'atoll_app_replicas_wanted{project="default",app="queue"} 2' in metrics(atoll)
        assert "TOKENS/S" in atoll.atoll("top")
        assert "of 1–2, by queue_depth ≤ 10 each" in atoll.atoll("status", "queue")
        say(atoll, first, "queue_depth 0")
        wait_for(lambda: len(instances(atoll)) == 1, "the second instance to go")
        codes = [event["code"] for event in atoll.atoll_json("events")]
        assert codes.count("scaled-up") == codes.count("scaled-down") == 1
        say(atoll, first, "nonsense")
        wait_for(lambda: "metrics-failed" in atoll.atoll("events"), "word of it")


def instances(atoll: ScratchAtoll) -> list[str]:
    views: list[dict[str, Any]] = atoll.atoll_json("ps", "queue")
    return [view["instance"]["id"] for view in views if (view.get("status") or {}).get("ready")]


def say(atoll: ScratchAtoll, instance: str, text: str) -> None:
    atoll.atoll("exec", instance, "--", "/bin/busybox", "sh", "-c", f"printf '{text}\\n' > /www/metrics")


def metrics(atoll: ScratchAtoll) -> bytes:
    request = urllib.request.Request(f"http://{atoll.api}/metrics", headers={"Authorization": f"Bearer {atoll.token}"})
    with urllib.request.urlopen(request, timeout=10) as answer:
        text: bytes = answer.read()
    return text
