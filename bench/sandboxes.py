"""Sandboxes on a real `atoll up`: one that is taken out of a template's pool beside one that is made, each to its first command.

Taking is one call of the API over one connection: what its client sees, and what the server takes for it without HTTP (the same
service over SQLite with synced writes, in this process). The first command is `echo` through the server and the node.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from atoll.api.service import KINDS, SYSTEM, Service
from atoll.entry.scratch import ScratchAtoll
from atoll.images.minimal import docker_archive
from atoll.model import codec, keys
from atoll.model.ports.clock import SystemClock
from atoll.model.records import Instance, OwnerKind, Status
from atoll.model.spec import Isolation, JobSpec, Resources, RuntimeName
from atoll.model.states import Phase
from atoll.model.streams import ExecOptions, Kind
from atoll.model.units import Bytes, Cores, Seconds
from atoll.model.views import TakeRequest
from atoll.sdk.client import Client
from atoll.sdk.sandboxes import remove, running
from atoll.store.cache import State
from atoll.store.sqlite import SqliteStore
from bench import precedence
from bench.report import Report, Result, percentile

BUSYBOX = Path("/bin/busybox")
SAMPLES = 20
POOL = 3
CORES = Cores(0.25)
"""Of each sandbox: with the tenth that one gets unasked, it stands still for most of a period once it has run a command."""
WAIT_S = 120.0
OFFER_S = 30.0
REST_S = 0.3
"""Before what is timed: what was asked for before has been done, and a stream is open ahead again."""
GOAL_MS = 10
"""From the call that takes one to its first command's output, whatever the runtime."""
KINDS_OF = {"runc": Isolation.CONTAINER, "gvisor": Isolation.SANDBOX, "qemu": Isolation.VM}


def run(arguments: Sequence[str]) -> Report:
    parser = argparse.ArgumentParser(prog="python -m bench sandboxes")
    parser.add_argument("--samples", type=int, default=SAMPLES)
    parser.add_argument("--of", action="append", choices=KINDS_OF, help="only this runtime; may be repeated")
    precedence.offer(parser)
    options = parser.parse_args(arguments)
    report = Report("sandboxes", notes=[f"load of the machine before it {os.getloadavg()[0]:.1f}; {options.samples} samples each"])
    report.notes.append(f"{CORES:g} of a core each")
    report.notes.append("made: the call that makes a sandbox until it runs; taken: the call that takes one, which runs already")
    if options.precedence:
        precedence.take()
    _run(report, options)
    if options.precedence:
        report.notes.append(precedence.told())
    return report


def _run(report: Report, options: argparse.Namespace) -> None:
    asyncio.run(_server_side(report, options.samples))
    if not BUSYBOX.exists():
        report.add(Result("sandbox taken, as its client sees it", None, "ms", why="needs the package busybox-static"))
        return
    with ScratchAtoll("atoll-bench-") as atoll, tempfile.TemporaryDirectory() as scratch:
        archive = docker_archive(Path(scratch) / "busybox.tar", "busybox:1", program=BUSYBOX, target="/bin/busybox")
        image = atoll.atoll_json("image", "import", str(archive), "--name", "busybox", "--tag", "1")["image"]
        offered = _offered(atoll)
        for name in options.of or KINDS_OF:
            if name not in offered:
                report.add(
                    Result(f"{name}: taken to first command", None, "ms", why="`atoll doctor` says why it does not run here")
                )
                continue
            asyncio.run(_measure(report, atoll, name, image, options.samples, ahead=options.precedence))


def _offered(atoll: ScratchAtoll) -> list[str]:
    """Return the runtimes of the node, once it has tried them all: on a busy machine that may end after `atoll up` has."""
    deadline = time.monotonic() + OFFER_S
    while True:
        (node,) = atoll.atoll_json("nodes")
        offered: list[str] = node["node"].get("runtimes", [])
        if offered or time.monotonic() > deadline:
            return offered
        time.sleep(REST_S)


async def _server_side(report: Report, samples: int) -> None:
    """Take sandboxes of which the store says that they run."""
    clock, chance = SystemClock(), random.Random(1)
    with tempfile.TemporaryDirectory(prefix="atoll-bench-") as directory:
        store = await SqliteStore.open(Path(directory) / "state.db", clock)
        async with (
            State(store, KINDS) as state,
            Service(store, state, clock, chance, bytes(range(32)), "localhost") as service,
        ):
            spec = JobSpec(name="tools", image="host.example/tools:1", sandbox=True, pool=POOL)
            await service.jobs.put(SYSTEM, spec)
            for at in range(samples):
                own = {"project": "default", "owner_kind": OwnerKind.JOB, "owner": "tools", "node": "n", "standby": True}
                instance = codec.convert({"id": f"tools-{at}", "created_at": 1.0, **own}, Instance)
                status = Status(instance=instance.id, project="default", node="n", phase=Phase.RUNNING, ready=True)
                await store.put(keys.instance("default", instance.id), codec.encode(instance))
                await store.put(keys.status("default", instance.id), codec.encode(status))
            await state.reach(await store.revision())
            took = []
            for at in range(samples):
                began = time.perf_counter()
                view = await service.pools.take("default", "tools", TakeRequest(name=f"box-{at}"))
                took.append((time.perf_counter() - began) * 1000)
                if not view.instance:
                    raise RuntimeError("nothing was taken")
        await store.close()
    report.add(Result("sandbox taken, in the server (one synced write), p50", percentile(took, 50), "ms"))
    report.add(Result("sandbox taken, in the server (one synced write), p99", percentile(took, 99), "ms"))


async def _measure(report: Report, atoll: ScratchAtoll, name: str, image: str, samples: int, *, ahead: bool) -> None:
    async with Client.connect(f"http://{atoll.api}", atoll.token) as client:
        spec = JobSpec(
            name=f"{name}-tools",
            image=image,
            command=("/bin/busybox", "sleep", "100000"),
            isolation=KINDS_OF[name],
            runtime=RuntimeName(name),
            sandbox=True,
            deadline=Seconds(3600),
            resources=Resources(cpu=CORES, memory=Bytes(64 << 20)),
        )
        await client.put_job(_pooled(spec, POOL))
        taken: list[float] = []
        first: list[float] = []
        later: list[float] = []
        made: list[float] = []
        for at in range(samples + 1):
            await _full(client, spec.name)
            if ahead:
                precedence.take((str(atoll.data), spec.name))
            await asyncio.sleep(REST_S)
            took_ms, first_ms, next_ms = await _take(client, spec.name, f"{name}-taken-{at}")
            await _full(client, spec.name)
            made_ms = await _make(client, spec, f"{name}-made-{at}")
            if at:
                taken.append(took_ms)
                first.append(first_ms)
                later.append(next_ms)
                made.append(made_ms)
        await client.delete_job("default", spec.name)
    report.results += rows(name, taken, first, made)
    report.add(Result(f"{name}: a further command to its output, p50", percentile(later, 50), "ms"))


def rows(name: str, taken: Sequence[float], first: Sequence[float], made: Sequence[float]) -> list[Result]:
    """Return a runtime's rows, of ms. The goal is about the time to the first command, of which taking is a part without one."""
    what = f"{name}: taken to its first command's output"
    return [
        Result(f"{what}, p50", percentile(first, 50), "ms", None, f"<= {GOAL_MS}"),
        Result(f"{what}, p99", percentile(first, 99), "ms"),
        Result(f"{what}, beside made to the same, p50", percentile(first, 50), "ms", percentile(made, 50)),
        Result(f"{name}: of it the taking, as its client sees it, p50", percentile(taken, 50), "ms"),
        Result(f"{name}: of it the taking, as its client sees it, p99", percentile(taken, 99), "ms"),
    ]


def _pooled(spec: JobSpec, pool: int) -> JobSpec:
    plain: dict[str, Any] = codec.to_plain(spec)
    return codec.convert({**plain, "pool": pool}, JobSpec)


async def _full(client: Client, template: str) -> None:
    async with asyncio.timeout(WAIT_S):
        while True:
            views = await client.instances("default", job=template)
            if sum(view.status is not None and view.status.ready for view in views) == POOL:
                return
            await asyncio.sleep(0.05)


async def _take(client: Client, template: str, name: str) -> tuple[float, float, float]:
    began = time.perf_counter()
    view = await client.take_sandbox("default", template, TakeRequest(name=name))
    took_ms = (time.perf_counter() - began) * 1000
    if not view.instance:
        raise RuntimeError("the pool had none")
    first_ms = (await _command(client, view.instance) - began) * 1000
    await asyncio.sleep(REST_S)
    began = time.perf_counter()
    next_ms = (await _command(client, view.instance) - began) * 1000
    await remove(client, "default", name, deadline_s=WAIT_S)
    return took_ms, first_ms, next_ms


async def _make(client: Client, spec: JobSpec, name: str) -> float:
    began = time.perf_counter()
    await client.create_job(codec.convert({**codec.to_plain(spec), "name": name}, JobSpec))
    instance = await running(client, "default", name, deadline_s=WAIT_S)
    took_ms = (await _command(client, instance.id) - began) * 1000
    await remove(client, "default", name, deadline_s=WAIT_S)
    return took_ms


async def _command(client: Client, instance: str) -> float:
    """Run `echo`, and return when its output came: how long its stream then takes to close keeps nobody waiting for it."""
    command = await client.exec("default", instance, ExecOptions(argv=("/bin/busybox", "echo", "hello")))
    try:
        async with asyncio.timeout(WAIT_S):
            async for kind, payload in command:
                if kind is Kind.STDOUT and payload == b"hello\n":
                    return time.perf_counter()
        raise RuntimeError("the command said something else")
    finally:
        await command.close()
