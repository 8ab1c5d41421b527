"""Traces to replay: nodes, sites and work from CSV or JSON, in the openb form or a simple one of our own.

    nodes   name,cpu_milli,memory_mib[,gpus,model,site,region]          openb: sn,cpu_milli,memory_mib,gpu,model
    work    name,arrive_s,run_s,cpu_milli,memory_mib[,gpus,model,owner]  openb: name,cpu_milli,memory_mib,num_gpu,gpu_milli,…
    sites   name[,region,country,latitude,longitude,demand]             demand: how much of all requests comes from there

JSON is a list of objects with the same names. `gpus` may be a fraction; `model` may name several, as `A|B`. Work without
`run_s` never ends. An openb list without times arrives one a second, in its order.
"""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct

from atoll.model import codec
from atoll.model.devices import GpuDevice
from atoll.model.errors import Invalid
from atoll.model.records import Capacity, Node, Site
from atoll.model.spec import Constraint, Gpu, Operator, Placement, RuntimeName
from atoll.scheduling.demand import Demand

FILE_BYTES_MAX = 256 << 20
ROWS_MAX = 2_000_000
NUMBER_MAX = 1e15
MODEL_LABEL = "gpu-model"
_GPU_BYTES = 80 << 30
_FAILURE = re.compile(r"(node|site):([^@]+)@([0-9.]+)(?:\+([0-9.]+))?")


class Task(Struct, frozen=True, kw_only=True):
    """One instance of a trace. Times in seconds from the trace's begin."""

    name: str
    owner: str
    arrive_s: float
    run_s: float
    """How long it runs once it is placed; infinite where it never ends."""
    demand: Demand


class Failure(Struct, frozen=True, kw_only=True):
    """A node, or all nodes of a site, that are away from `at_s` for `for_s`."""

    kind: str
    name: str
    at_s: float
    for_s: float = math.inf


class Trace(Struct, frozen=True, kw_only=True):
    nodes: tuple[Node, ...]
    tasks: tuple[Task, ...]
    failures: tuple[Failure, ...] = ()
    sites: tuple[Site, ...] = ()
    demand: dict[str, float] = {}
    """Site → how much of the requests comes from there; empty where sites have no coordinates."""


def load(
    nodes: Path, work: Path, sites: Path | None = None, failures: Sequence[str] = (), limit: int | None = None, hurry: float = 1.0
) -> Trace:
    """Read a trace, with arrivals `hurry` times as fast as written.

    Raises NotFound, or Invalid with the file, the row and what is wrong with it.
    """
    places = _sites(sites)
    machines = tuple(_node(_Row(nodes, number, row), places, number) for number, row in enumerate(_rows(nodes)))
    if not machines:
        raise Invalid(f"{nodes}: no node in it")
    if len({node.name for node in machines}) < len(machines):
        raise Invalid(f"{nodes}: a node's name is there twice")
    tasks = [_task(_Row(work, number, row), number, hurry) for number, row in enumerate(_rows(work)[:limit])]
    if len({task.name for task in tasks}) < len(tasks):
        raise Invalid(f"{work}: a name is there twice")
    known = {node.name for node in machines}, {node.site for node in machines}
    breaks = tuple(_failure(text, *known) for text in failures)
    known_sites, demand = _places(sites)
    ordered = tuple(sorted(tasks, key=lambda task: (task.arrive_s, task.name)))
    return Trace(nodes=machines, tasks=ordered, failures=breaks, sites=known_sites, demand=demand)


class _Row:
    """One row, with errors that name it."""

    def __init__(self, path: Path, number: int, row: Mapping[str, Any]) -> None:
        self._where = f"{path}: row {number + 1}"
        self._row = row

    def text(self, *names: str, default: str | None = None) -> str:
        for name in names:
            value = self._row.get(name)
            if value not in (None, ""):
                return str(value)
        if default is None:
            raise Invalid(f"{self._where}: {names[0]} is missing", field=names[0])
        return default

    def number(self, *names: str, default: float | None = None) -> float:
        text = self.text(*names, default="" if default is not None else None)
        if text == "" and default is not None:
            return default
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not 0 <= value <= NUMBER_MAX:
            raise Invalid(f"{self._where}: {names[0]} is {text!r}; a number of 0 or more is wanted", field=names[0])
        return value

    def degrees(self, name: str, most: float) -> float:
        text = self.text(name)
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not -most <= value <= most:
            raise Invalid(f"{self._where}: {name} is {text!r}; degrees from -{most:g} to {most:g} are wanted", field=name)
        return value

    def has(self, name: str) -> bool:
        return self._row.get(name) not in (None, "")


def _rows(path: Path) -> list[Mapping[str, Any]]:
    text = codec.read_text(path, FILE_BYTES_MAX)
    if path.suffix == ".json":
        try:
            rows = msgspec.json.decode(text, type=list[dict[str, Any]])
        except (msgspec.DecodeError, RecursionError) as error:
            raise Invalid(f"{path}: {error}", mend="a list of objects is wanted") from None
    else:
        rows = list(csv.DictReader(io.StringIO(text)))
    if len(rows) > ROWS_MAX:
        raise Invalid(f"{path} has {len(rows)} rows; at most {ROWS_MAX} are read")
    return list(rows)


def _sites(path: Path | None) -> list[tuple[str, str]]:
    if path is None:
        return [("local", "local")]
    rows = [_Row(path, number, row) for number, row in enumerate(_rows(path))]
    if not rows:
        raise Invalid(f"{path}: no site in it")
    return [(row.text("name", "site"), row.text("region", default="local")) for row in rows]


def _places(path: Path | None) -> tuple[tuple[Site, ...], dict[str, float]]:
    """Return the sites with coordinates, and where requests come from: `demand`, or alike where nobody says."""
    rows = [_Row(path, number, row) for number, row in enumerate(_rows(path))] if path is not None else []
    sites, demand = [], {}
    for row in rows:
        if not row.has("latitude") or not row.has("longitude"):
            continue
        name = row.text("name", "site")
        latitude, longitude = row.degrees("latitude", 90.0), row.degrees("longitude", 180.0)
        sites.append(Site(name=name, country=row.text("country", default=""), latitude=latitude, longitude=longitude))
        demand[name] = row.number("demand", default=1.0)
    return tuple(sites), demand


def _node(row: _Row, sites: list[tuple[str, str]], number: int) -> Node:
    """A node without a site of its own is dealt to the listed ones in turn."""
    site, region = sites[number % len(sites)]
    gpus, model = int(row.number("gpus", "gpu", default=0)), row.text("model", default="")
    if gpus > 1024:
        raise Invalid(f"a node with {gpus} GPUs is not believed", field="gpus")
    memory_bytes = int(row.number("memory_mib") * (1 << 20))
    devices = tuple(GpuDevice(id=str(index), model=model or "gpu", memory_bytes=_GPU_BYTES) for index in range(gpus))
    site = row.text("site", default=site)
    return Node(
        name=row.text("name", "sn"),
        site=site,
        region=row.text("region", default=dict(sites).get(site, region)),
        capacity=Capacity(cpu_milli=int(row.number("cpu_milli")), memory_bytes=memory_bytes, disk_bytes=1 << 50, gpus=devices),
        labels={MODEL_LABEL: model} if model else {},
        runtimes=(RuntimeName.RUNC,),
    )


def _task(row: _Row, number: int, hurry: float) -> Task:
    name = row.text("name")
    if row.has("arrive_s"):
        arrive_s, run_s = row.number("arrive_s"), row.number("run_s", default=math.inf)
    else:
        arrive_s = row.number("creation_time", default=float(number))
        ends_s = row.number("deletion_time", default=math.inf)
        # How long it ran there, not when it ended: here it may begin later.
        run_s = max(1.0, ends_s - row.number("scheduled_time", default=arrive_s))
    if row.has("num_gpu"):
        count = row.number("num_gpu")
        milli = row.number("gpu_milli", default=1000.0)
        gpus = milli / 1000.0 if count == 1 else count
    else:
        gpus = row.number("gpus", default=0)
    if gpus > 64:
        raise Invalid(f"{name}: {gpus:g} GPUs; at most 64 are taken", field="gpus")
    models = tuple(part for part in row.text("gpu_spec", "model", default="").split("|") if part)
    constraints = (Constraint(label=MODEL_LABEL, operator=Operator.IN, value=models),) if models and gpus else ()
    demand = Demand(
        cpu_milli=int(row.number("cpu_milli")),
        memory_bytes=int(row.number("memory_mib", default=0) * (1 << 20)),
        gpu=Gpu(count=gpus) if gpus > 0 else None,
        placement=Placement(constraints=constraints),
    )
    return Task(name=name, owner=row.text("owner", default=name), arrive_s=arrive_s / hurry, run_s=run_s, demand=demand)


def _failure(text: str, nodes: set[str], sites: set[str]) -> Failure:
    match = _FAILURE.fullmatch(text)
    if match is None:
        raise Invalid(f"{text!r} is no failure", mend="write for example node:n1@3600+600 or site:s1@3600+600 (seconds)")
    kind, name, at, length = match.groups()
    if name not in (nodes if kind == "node" else sites):
        raise Invalid(f"{text!r}: there is no {kind} {name}")
    return Failure(kind=kind, name=name, at_s=float(at), for_s=float(length) if length else math.inf)
