"""One app on every runtime of a machine, for `make demo`: which answer over the ingress, how soon, and why not the rest."""

from __future__ import annotations

import asyncio
import time
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
from rich.table import Table

from atoll.entry.scratch import CommandFailed, ScratchAtoll
from atoll.model.errors import AtollError
from atoll.model.spec import RuntimeName
from atoll.runtimes.offer import RUNTIMES, isolation_of

HERE = Path(__file__).resolve().parent
ANSWER_S = 60.0
VM = {"cpu": 1, "memory": "128MiB"}
"""An emulated processor at a tenth of a core, which is what examples/hello asks for, would start its interpreter for a minute."""

Get = Callable[[str, str], tuple[int, str]]
"""Asks the ingress for a path of a hostname: status and body."""


class Row(msgspec.Struct, frozen=True):
    """What became of the app on one runtime."""

    runtime: RuntimeName
    cold_start_ms: float | None = None
    """From the record of the instance, when nothing of it is there yet, to the agent's word that it is ready."""
    deployed_ms: float | None = None
    """From the command `atoll deploy` to the first answer over the ingress."""
    answer: str = ""
    why_not: str = ""
    failed: bool = False
    """It should have answered, and did not."""


def answer_of_each(scratch: ScratchAtoll, image: str, get: Get) -> Iterator[Row]:
    """Deploy `image` (of examples/hello; examples/worker for workerd) pinned to each runtime, one after the other.

    A runtime that no node offers is one row that says why, in the words of the probe by which a node decides that.
    """
    offered = {name for node in scratch.atoll_json("nodes") for name in node["node"]["runtimes"]}
    for kind in RUNTIMES:
        if kind.name not in offered:
            yield Row(kind.name, why_not=_why_not(scratch, kind.name))
            continue
        try:
            yield _deploy(scratch, kind.name, image, get)
        except CommandFailed as error:
            lines = (error.stderr or error.stdout).strip().splitlines()
            yield Row(kind.name, why_not=lines[0] if lines else str(error), failed=True)


def _why_not(scratch: ScratchAtoll, name: RuntimeName) -> str:
    kind = next(kind for kind in RUNTIMES if kind.name == name)
    try:
        version = asyncio.run(kind(scratch.data / "tried" / name).probe())
    except AtollError as error:
        return f"{error}; {error.mend}" if error.mend else str(error)
    return f"{version} runs here, but the node did not offer it"


def _deploy(scratch: ScratchAtoll, name: RuntimeName, image: str, get: Get) -> Row:
    app, arguments = _source(scratch, name, image)
    began = time.time()
    scratch.atoll("deploy", *arguments)
    status, body = 0, ""
    while time.time() < began + ANSWER_S + 60:
        status, body = get(f"{app}.localhost", "/")
        if status == 200:
            break
        time.sleep(0.02)
    answered = time.time()
    views: list[dict[str, Any]] = [view for view in scratch.atoll_json("ps") if view["instance"]["owner"] == app]
    if status != 200 or not views:
        return Row(name, why_not=f"the ingress answers {status}: {body[:100]}", failed=True)
    ready_at, created_at = views[0]["status"]["ready_at"], views[0]["instance"]["created_at"]
    return Row(name, (ready_at - created_at) * 1000, (answered - began) * 1000, body.strip().partition("\n")[0])


def _source(scratch: ScratchAtoll, name: RuntimeName, image: str) -> tuple[str, list[str]]:
    """Return the app's name and what `atoll deploy` is given."""
    if name is RuntimeName.WORKERD:
        return "worker", [str(HERE / "worker")]
    spec = tomllib.loads((HERE / "hello" / "atoll.toml").read_text())
    del spec["build"]
    spec |= {"name": f"hello-{name}", "runtime": str(name), "isolation": str(isolation_of(name)), "scale": {"replicas": 1}}
    if spec["isolation"] == "vm":
        spec["resources"] = VM
    place = scratch.data / "apps" / str(name)
    place.mkdir(parents=True)
    (place / "atoll.json").write_bytes(msgspec.json.encode(spec))
    return spec["name"], ["--file", str(place / "atoll.json"), "--image", image]


def runtime_table(rows: list[Row]) -> Table:
    """Return what `make demo` shows of them."""
    table = Table(title="the same app on every runtime", title_justify="left")
    table.add_column("runtime")
    table.add_column("isolation")
    table.add_column("cold start, ms", justify="right")
    table.add_column("deploy to answer, ms", justify="right")
    table.add_column("answer, or why not", overflow="fold")
    for row in rows:
        times = ["–" if number is None else f"{number:,.0f}" for number in (row.cold_start_ms, row.deployed_ms)]
        table.add_row(row.runtime, isolation_of(row.runtime), *times, row.answer or row.why_not)
    return table
