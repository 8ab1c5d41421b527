"""What waking an app adds to the start of its instance: the whole road on a real `atoll up`, and the ingress's part of it alone."""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import tempfile
import time
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import structlog

from atoll.entry.scratch import ScratchAtoll
from atoll.images.minimal import docker_archive
from atoll.ingress.fake import FakeRouting
from atoll.ingress.service import Ingress
from atoll.model.records import Endpoint, Routing
from atoll.model.spec import AppSpec, Port
from atoll.model.traffic import DemandReport
from bench.report import Report, Result, percentile

ROUNDS = 10
CYCLES = 100
STEADY = 20
"""Requests in each cycle after the app woke."""
WAIT_S = 60.0
BUSYBOX = Path("/bin/busybox")
SPEC = """
name = "sleepy"
image = "{image}"
command = ["/bin/busybox", "sh", "-c", "mkdir -p /www; echo hello > /www/index.html; exec httpd -f -p $PORT -h /www"]
ports = [{{ port = 8080 }}]
scale = {{ replicas = 0, max = 1, idle_after = "5s" }}
resources = {{ memory = "32MiB" }}
stop = {{ grace = "1s" }}
"""


def run(arguments: Sequence[str]) -> Report:
    parser = argparse.ArgumentParser(prog="python -m bench wake")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="of the whole road; each sleeps for 5 s")
    parser.add_argument("--cycles", type=int, default=CYCLES, help="of the ingress's part alone")
    options = parser.parse_args(arguments)
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR))
    report = Report("wake")
    added, warm, errors, late = asyncio.run(_ingress_alone(options.cycles))
    report.add(Result("ingress alone: asleep to answered, instant start, p50", percentile(added, 50), "ms", goal="<= 5"))
    report.add(Result("ingress alone: asleep to answered, instant start, p99", percentile(added, 99), "ms", goal="<= 15"))
    report.add(Result("ingress alone: the same request once awake, p50", percentile(warm, 50), "ms"))
    report.add(Result(f"errors in {options.cycles} cycles of sleeping and waking", float(errors), "requests", goal="<= 0"))
    report.add(Result("requests through the activator once awake", float(late), "requests", goal="<= 0"))
    if not BUSYBOX.exists():
        report.add(Result("first request − start of the instance", None, "ms", why="needs the package busybox-static"))
        return report
    rounds = _whole_road(options.rounds)
    for name, what in (("before", "request → instance made"), ("start", "instance made → ready"), ("after", "ready → answered")):
        report.add(Result(f"whole road: {what}, p50", percentile([each[name] for each in rounds], 50), "ms"))
    whole = [each["before"] + each["start"] + each["after"] for each in rounds]
    report.add(Result("whole road: request → answered, p50", percentile(whole, 50), "ms"))
    extra = [each["before"] + each["after"] for each in rounds]
    report.add(Result("first request − start of the instance, p50", percentile(extra, 50), "ms", goal="<= 5"))
    report.add(Result("first request − start of the instance, p99", percentile(extra, 99), "ms", goal="<= 15"))
    report.notes.append(f"ingress alone: a control plane in memory has the instance at once; {options.cycles} cycles, one by one")
    report.notes.append(
        f"whole road: `atoll up`, runc, {options.rounds} rounds; the start: from record to readiness, as its agent has it"
    )
    report.notes.append(
        "ready → answered may be below 0: who waits goes to an instance that takes connections before that was said"
    )
    return report


async def _ingress_alone(cycles: int) -> tuple[list[float], list[float], int, int]:
    """Return milliseconds of first requests, and of later ones; how many failed; how many later ones met the activator."""
    control = FakeRouting()
    server = await asyncio.start_server(_serve, "127.0.0.2", 0)
    port = server.sockets[0].getsockname()[1]
    spec = AppSpec(name="a", image="x", ports=(Port(port=port),))
    asleep = Routing(project="default", app="a", spec=spec, hosts=(("a.localhost", "/", port, False),), wakes=True)

    def routing(cycle: int, *, draining: bool) -> Routing:
        endpoint = Endpoint(instance=f"a-{cycle}", node="n", address="127.0.0.2", draining=draining)
        return Routing(**{f: getattr(asleep, f) for f in asleep.__struct_fields__} | {"endpoints": (endpoint,)})

    added: list[float] = []
    warm: list[float] = []
    errors = late = cycle = 0

    def wake(report: DemandReport) -> None:
        if report.apps and not report.complete:
            control.put(routing(cycle, draining=False))

    with tempfile.TemporaryDirectory() as scratch:
        ingress = Ingress(control, Path(scratch) / "i", port=0, stop_grace_s=0.1)
        control.put(asleep)
        task = asyncio.create_task(ingress.run())
        await asyncio.wait_for(ingress.ready.wait(), WAIT_S)
        control.on_demand = wake
        for cycle in range(cycles):
            took, fine = await _ask(ingress.http_port)
            added.append(took)
            errors += not fine
            await _until(lambda: not ingress.activator.busy)
            held = ingress.activator.held
            for _ in range(STEADY):
                took, fine = await _ask(ingress.http_port)
                warm.append(took)
                errors += not fine
            late += ingress.activator.held - held
            control.on_demand = lambda report: None
            control.put(routing(cycle, draining=True))
            await _until(lambda: f"a-{cycle}" in control.drained_instances)  # noqa: B023  # asked in this round only
            control.put(asleep)
            control.on_demand = wake
            await asyncio.sleep(0.02)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
    server.close()
    return added, warm, errors, late


async def _until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(WAIT_S):
        while not holds():  # noqa: ASYNC110  # what is waited for has no event
            await asyncio.sleep(0.002)


async def _serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        while await reader.readuntil(b"\r\n\r\n"):
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
    except (asyncio.IncompleteReadError, ConnectionError):
        writer.close()


async def _ask(port: int) -> tuple[float, bool]:
    began = time.perf_counter()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"GET / HTTP/1.1\r\nHost: a.localhost\r\nConnection: close\r\n\r\n")
    answer = await asyncio.wait_for(reader.read(), WAIT_S)
    writer.close()
    return (time.perf_counter() - began) * 1000, answer.startswith(b"HTTP/1.1 200 ")


def _whole_road(rounds: int) -> list[dict[str, float]]:
    """Return for each round the milliseconds until the instance was made, until it was ready, and until the answer."""
    found = []
    with ScratchAtoll("atoll-bench-") as atoll, tempfile.TemporaryDirectory() as scratch:
        archive = docker_archive(Path(scratch) / "busybox.tar", "busybox:1", program=BUSYBOX, target="/bin/busybox")
        image = atoll.atoll_json("image", "import", str(archive), "--name", "busybox", "--tag", "1")["image"]
        spec = Path(scratch) / "sleepy.toml"
        spec.write_text(SPEC.format(image=image))
        atoll.atoll("deploy", "-f", str(spec))
        for _ in range(rounds):
            _until_asleep(atoll)
            request = urllib.request.Request(f"http://{atoll.ingress}/", headers={"Host": "sleepy.localhost"})
            asked_at = time.time()
            with urllib.request.urlopen(request, timeout=WAIT_S) as answer:
                answer.read()
            answered_at = time.time()
            view = _ready(atoll)
            made_at, ready_at = float(view["instance"]["created_at"]), float(view["status"]["ready_at"])
            spans = {"before": made_at - asked_at, "start": ready_at - made_at, "after": answered_at - ready_at}
            found.append({name: span * 1000 for name, span in spans.items()})
    return found


def _views(atoll: ScratchAtoll) -> list[dict[str, Any]]:
    url = f"http://{atoll.api}/v1/projects/default/instances?app=sleepy"
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {atoll.token}"})
    with urllib.request.urlopen(request, timeout=WAIT_S) as answer:
        views: list[dict[str, Any]] = json.loads(answer.read())["items"]
    return views


def _ready(atoll: ScratchAtoll) -> dict[str, Any]:
    """Return the instance once the control plane has heard that it is ready, which may be after the request was answered."""
    deadline = time.monotonic() + WAIT_S
    while True:
        (view,) = _views(atoll)
        if view["status"].get("ready_at"):
            return view
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {WAIT_S:.0f} s for the app to be ready")
        time.sleep(0.01)


def _until_asleep(atoll: ScratchAtoll) -> None:
    deadline = time.monotonic() + WAIT_S
    while _views(atoll):
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {WAIT_S:.0f} s for the app to sleep")
        time.sleep(0.3)
