"""From a scale-up to one more instance that is ready: a parked one that is woken beside a cold start, on a real `atoll up`.

An app that listens at once shows what a start costs in itself; one that takes 3 s until it listens stands for what loads something.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from atoll.entry.scratch import ScratchAtoll
from atoll.images.minimal import docker_archive
from bench.report import Report, Result

ROUNDS = 7
WAIT_S = 60.0
LOADS_S = 3
GOAL = "<= 0.2"
BUSYBOX = Path("/bin/busybox")
SPEC = """
name = "{name}"
image = "{image}"
command = ["/bin/busybox", "sh", "-c", "mkdir -p /www; sleep {loads_s}; exec httpd -f -p $PORT -h /www"]
ports = [{{ port = 8080 }}]
scale = {{ standby = {standby} }}
resources = {{ memory = "32MiB" }}
stop = {{ grace = "1s" }}
"""


def run(arguments: Sequence[str]) -> Report:
    parser = argparse.ArgumentParser(prog="python -m bench standby")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    rounds = parser.parse_args(arguments).rounds
    report = Report("standby")
    if not BUSYBOX.exists():
        report.add(Result("scale-up to ready", None, "ms", why="needs the package busybox-static"))
        return report
    with ScratchAtoll("atoll-bench-") as atoll, tempfile.TemporaryDirectory() as scratch:
        archive = docker_archive(Path(scratch) / "busybox.tar", "busybox:1", program=BUSYBOX, target="/bin/busybox")
        image = atoll.atoll_json("image", "import", str(archive), "--name", "busybox", "--tag", "1")["image"]
        for loads_s in (0, LOADS_S):
            warm, cold = f"warm-{loads_s}", f"cold-{loads_s}"
            for name, standby in ((warm, 1), (cold, 0)):
                spec = Path(scratch) / f"{name}.toml"
                spec.write_text(SPEC.format(name=name, image=image, loads_s=loads_s, standby=standby))
                atoll.atoll("deploy", "-f", str(spec))
            took: dict[str, list[float]] = {warm: [], cold: []}
            for _ in range(rounds):
                for name in (warm, cold):
                    took[name].append(_grow(atoll, name, parked=int(name == warm)) * 1000)
            what = f"scale-up to ready, an app that loads for {loads_s} s"
            report.add(Result(what, statistics.median(took[warm]), "ms", statistics.median(took[cold]), goal=GOAL))
    report.notes.append(f"ours: a parked instance is promoted; reference: a cold start; medians of {rounds} rounds, interleaved")
    return report


def _grow(atoll: ScratchAtoll, app: str, *, parked: int) -> float:
    """Return the seconds from a scale-up's write to the readiness of the instance that it brought; leave things as before."""
    _wait(lambda: _count(atoll, app, "ready") == 1 and _count(atoll, app, "parked") == parked, f"{app} to stand by")
    before = {view["instance"]["id"] for view in _views(atoll, app) if view["status"].get("ready")}
    atoll.atoll("scale", app, "2", "--detach")
    _wait(lambda: _count(atoll, app, "ready") == 2, f"{app} to grow")
    events: list[dict[str, Any]] = atoll.atoll_json("events")
    asked_at = max(event["at"] for event in events if event["code"] == "app-scaled" and event["subject"] == f"app/{app}")
    ready_at = next(
        v["status"]["ready_at"] for v in _views(atoll, app) if v["instance"]["id"] not in before and v["status"].get("ready")
    )
    atoll.atoll("scale", app, "1", "--detach")
    _wait(lambda: len(_views(atoll, app)) == 1 + parked, f"{app} to shrink")
    return float(ready_at) - float(asked_at)


def _views(atoll: ScratchAtoll, app: str) -> list[dict[str, Any]]:
    views: list[dict[str, Any]] = atoll.atoll_json("ps", app)
    return [view | {"status": view.get("status") or {}} for view in views]


def _count(atoll: ScratchAtoll, app: str, what: str) -> int:
    return sum(bool(view["status"].get(what)) for view in _views(atoll, app))


def _wait(holds: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + WAIT_S
    while not holds():
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {WAIT_S:.0f} s for {what}")
        time.sleep(0.1)
