"""Requests that fail while an app is deployed again, scaled, restarted and moved off its node, on a real `atoll up` under load."""

from __future__ import annotations

import subprocess
import tempfile
import time
import urllib.request
from collections.abc import Iterable
from pathlib import Path

from atoll.entry.scratch import CommandFailed, ScratchAtoll, ScratchNode
from atoll.images.minimal import docker_archive
from atoll.model import codec
from atoll.model.states import Desired
from atoll.model.views import InstanceView
from bench.ingress_peers import compile_answer, counted, wrk_command
from bench.report import Report, Result

CONNECTIONS = 16
LOAD_S = 60.0
WAIT_S = 60.0
PER_S_MIN = 1_000.0
SPEC = """
name = "web"
image = "{image}"
command = ["/bin/answer", "8000", "{body}"]
ports = [{{ port = 8000 }}]
scale = {{ replicas = {replicas} }}
resources = {{ memory = "32MiB", cpu = 0.2 }}
stop = {{ grace = "1s" }}
rollout = {{ drain = "20s" }}
"""


def live(report: Report, load_s: float = LOAD_S) -> None:
    """Add what was counted under `load_s` of load to `report`."""
    what = "failed requests while an app is deployed, scaled, restarted and its node drained"
    try:
        with (
            ScratchAtoll("atoll-bench-") as atoll,
            ScratchNode(atoll, "second"),
            tempfile.TemporaryDirectory(dir="/tmp") as scratch,
        ):
            program = compile_answer(Path(scratch))
            archive = docker_archive(Path(scratch) / "answer.tar", "answer:1", program=program, target="/bin/answer")
            image = atoll.atoll_json("image", "import", str(archive), "--name", "answer", "--tag", "1")["image"]
            spec = Path(scratch) / "web.toml"

            def deploy(body: str, replicas: int) -> None:
                spec.write_text(SPEC.format(image=image, body=body, replicas=replicas))
                atoll.atoll("deploy", "-f", str(spec))

            def drain() -> str:
                """Move the only instance off its node, wherever that is, and return what was moved."""
                node, ids = holder(_views(atoll))
                atoll.atoll("nodes", "drain", node, "--wait")
                after, others = holder(_views(atoll))
                if after == node or set(ids) & set(others):
                    raise RuntimeError(f"{', '.join(ids)} did not leave node '{node}', though it was drained")
                atoll.atoll("nodes", "undrain", node)
                return f" ({', '.join(ids)} on '{node}' → {', '.join(others)} on '{after}')"

            deploy("one", 2)
            _until_served(atoll.ingress)
            port = int(atoll.ingress.rpartition(":")[2])
            command = wrk_command(port, "web.localhost", CONNECTIONS, load_s)
            load = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
            try:
                steps: list[str] = []
                began = time.monotonic()
                for name, step in (
                    ("deploy", lambda: deploy("two", 2)),
                    ("scale up", lambda: atoll.atoll("scale", "web", "4")),
                    ("scale down", lambda: atoll.atoll("scale", "web", "1")),
                    ("restart", lambda: atoll.atoll("restart", "web")),
                    ("drain", drain),
                    ("deploy", lambda: deploy("three", 3)),
                ):
                    told = step()
                    moved = told if name == "drain" else ""
                    steps.append(f"{name} until {time.monotonic() - began:.1f} s{moved}")
                if load.poll() is not None:
                    raise RuntimeError(f"the load of {load_s:g} s ended before all was done: {', '.join(steps)}")
                text, _ = load.communicate(timeout=load_s + WAIT_S)
            finally:
                load.kill()
                load.wait()
            # Returns when its instances are gone: the second node's agent ends without stopping what it runs.
            atoll.atoll("delete", "web", "--yes")
            found = counted(text)
            report.add(Result(what, float(found.failed), "requests", goal="<= 0"))
            report.add(Result("requests/s meanwhile", found.per_s, "1/s", goal=f">= {PER_S_MIN:g}"))
            report.notes.append(f"{found.requests:,} requests in {load_s:g} s on {CONNECTIONS} connections: {', '.join(steps)}")
    except (OSError, RuntimeError, CommandFailed, subprocess.TimeoutExpired) as error:
        report.add(Result(what, None, "requests", goal="<= 0", why=str(error)[:300]))


def holder(views: Iterable[InstanceView]) -> tuple[str, list[str]]:
    """Return the node with most of the instances that are to stay and serve, and those. Raises RuntimeError: there are none."""
    found: dict[str, list[str]] = {}
    for view in views:
        one = view.instance
        if one.node is not None and one.desired is Desired.RUN and view.status is not None and view.status.ready:
            found.setdefault(one.node, []).append(one.id)
    if not found:
        raise RuntimeError("no instance of 'web' serves on any node, so that there is none to be drained")
    return max(found.items(), key=lambda item: len(item[1]))


def _views(atoll: ScratchAtoll) -> list[InstanceView]:
    return [codec.convert(view, InstanceView) for view in atoll.atoll_json("ps", "web")]


def _until_served(ingress: str) -> None:
    deadline = time.monotonic() + WAIT_S
    while True:
        try:
            request = urllib.request.Request(f"http://{ingress}/", headers={"Host": "web.localhost"})
            with urllib.request.urlopen(request, timeout=WAIT_S):
                return
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)
