"""`atoll top`: what the instances use now. On a terminal it goes on until Ctrl-C; elsewhere it prints once."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import click

from atoll.cli.session import Session, command
from atoll.model.errors import AtollError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from rich.console import RenderableType

    from atoll.model.records import Usage
    from atoll.model.spec import Resources
    from atoll.model.views import InstanceView, NodeView
    from atoll.sdk.client import Client

METRICS_SHOWN = 6
"""Apps' own metrics that get a column each; `--json` has all."""
HEADING_CHARACTERS_MAX = 18
BARS_COLUMNS = 140
"""On a terminal that is narrower, GPUs and metrics take the place of bars."""


@command(example="atoll top\natoll top --json | jq '.instances[] | [.instance, .usage.memory_bytes]'")
@click.option("--interval", type=click.FloatRange(min=0.5), default=2.0, show_default=True, help="Seconds between two looks.")
@click.option("--once", is_flag=True, help="Print once and end.")
async def top(session: Session, interval: float, once: bool) -> None:
    """Show what the project's instances use, the busiest first, against their limits; with their GPUs and the metrics that their
    specs name, where there are any."""
    async with session.client() as client:
        if session.json:
            session.output.json(_plain(*await _look(client, session.project)))
            return
        if once or not session.output.out.is_terminal:
            for part in tables(*await _look(client, session.project), width=session.output.width):
                session.output.print(part)
            return
        await _live(session, client, interval)


Look = tuple[list["NodeView"], list["InstanceView"], dict[str, "Usage"], dict[str, "Resources"]]


async def _look(client: Client, project: str) -> Look:

    nodes, instances, usage, apps, jobs = await asyncio.gather(
        client.nodes(), client.instances(project), client.usage(project), client.apps(project), client.jobs(project)
    )
    limits: dict[str, Resources] = {f"app/{view.app.name}": view.app.spec.resources for view in apps}
    limits |= {f"job/{view.job.name}": view.job.spec.resources for view in jobs}
    return nodes, instances, {each.instance: each for each in usage}, limits


async def _live(session: Session, client: Client, interval_s: float) -> None:
    from rich.console import Group
    from rich.live import Live
    from rich.text import Text

    with Live(console=session.output.out, auto_refresh=False, screen=True) as live:
        while True:
            try:
                shown: RenderableType = Group(*tables(*await _look(client, session.project), width=session.output.width))
            except AtollError as error:
                shown = Text(f"{error} – still trying", style="yellow")
            live.update(shown, refresh=True)
            await asyncio.sleep(interval_s)


def tables(
    nodes: list[NodeView],
    instances: list[InstanceView],
    usage: dict[str, Usage],
    limits: dict[str, Resources],
    *,
    width: int | None,
) -> list[RenderableType]:
    """Return what is shown, for a terminal of `width` columns or for a pipe."""
    from atoll.cli.instances import phase_word
    from atoll.cli.output import state, table

    metrics = _metrics(usage[view.instance.id] for view in instances if view.instance.id in usage)
    devices = any(view.instance.gpus for view in instances)
    # Where there is more to show than fits, figures go before bars.
    bars = width is None or width >= BARS_COLUMNS or not (devices or metrics)
    rows = []
    for each in sorted(instances, key=lambda view: _used(usage, view.instance.id), reverse=True):
        used = usage.get(each.instance.id)
        most = limits.get(f"{each.instance.owner_kind}/{each.instance.owner}")
        gpu, gpu_memory = _gpu_cells(each, used, bars=bars) if devices else ((), ())
        own = tuple(figure(used.metrics.get(name)) if used else "" for name in metrics)
        rows.append(
            (
                each.instance.id,
                state(phase_word(each)),
                *_cells(used, most, bars=bars),
                *gpu,
                *((*gpu_memory, *own) if bars else (*own, *gpu_memory)),
                used.pids if used else "",
                _bytes(used.disk_bytes) if used else "",
                each.instance.node or "–",
            )
        )
    parts: list[RenderableType] = [_node_table(nodes, width=width)]
    if rows:
        gpu_headings, own = (("GPU?",), ("GPU MEMORY?",)) if devices else ((), ()), tuple(_heading(name) for name in metrics)
        # The last that may be left out go first: a full device matters less than a queue.
        extra = (*gpu_headings[1], *own) if bars else (*own, *gpu_headings[1])
        headings = ("INSTANCE", "STATE", "CPU", "MEMORY", *gpu_headings[0], *extra, "PROCESSES>?", "DISK>?", "NODE?")
        parts += ["", table(headings, rows, width=width)]
    return parts


def _node_table(nodes: list[NodeView], *, width: int | None) -> RenderableType:
    from atoll.cli import nodes as node_lines
    from atoll.cli.output import cores, state, table

    devices = any(view.node.capacity.gpus for view in nodes)
    bars = width is None or width >= BARS_COLUMNS or not devices
    rows = []
    for view in nodes:
        beat, capacity = view.heartbeat, view.node.capacity
        cpu: Any = "–"
        memory: Any = "–"
        if beat:
            words = f"{cores(beat.cpu_milli)}/{capacity.cpu_milli / 1000:g}"
            cpu = _share(beat.cpu_milli, capacity.cpu_milli, words, bars=bars)
            words = f"{_bytes(beat.memory_bytes)}/{_bytes(capacity.memory_bytes)}"
            memory = _share(beat.memory_bytes, capacity.memory_bytes, words, bars=bars)
        gpus = _node_gpus(view, bars=bars) if devices else ()
        rows.append((view.node.name, state(node_lines.word(view)), cpu, memory, *gpus, view.instances))
    headings = ("NODE", "STATE", "CPU", "MEMORY", *(("GPU?", "GPU MEMORY?") if devices else ()), "INSTANCES>")
    return table(headings, rows, width=width)


def _node_gpus(view: NodeView, *, bars: bool) -> tuple[Any, Any]:
    """Return how busy a node's devices are, all together, and how full."""
    devices, samples = view.node.capacity.gpus, view.heartbeat.gpus if view.heartbeat else ()
    if not devices or not samples:
        return "–", "–"
    busy_milli = sum(sample.busy_milli for sample in samples)
    used, whole = sum(sample.memory_bytes for sample in samples), sum(device.memory_bytes for device in devices)
    return (
        _share(busy_milli, 1000 * len(devices), f"{busy_milli / 1000:.2f}/{len(devices)}", bars=bars),
        _share(used, whole, f"{_bytes(used)}/{_bytes(whole)}", bars=bars),
    )


def _gpu_cells(view: InstanceView, used: Usage | None, *, bars: bool) -> tuple[tuple[Any], tuple[Any]]:
    """Return how busy what an instance holds of devices is, and how full. How busy a shared device is, nobody tells apart."""
    from atoll.model.devices import GpuSharing

    grants = view.instance.gpus
    if not grants:
        return ("",), ("",)
    held_milli, held_bytes = sum(grant.milli for grant in grants), sum(grant.memory_bytes for grant in grants)
    if used is None or used.gpu_silent:
        return (f"–/{held_milli / 1000:g}",), ("–",)
    alone = any(grant.sharing is GpuSharing.EXCLUSIVE for grant in grants)
    words = f"{used.gpu_milli / 1000:.2f}/{held_milli / 1000:g}"
    busy = _share(used.gpu_milli, held_milli, words, bars=bars) if alone else f"–/{held_milli / 1000:g}"
    if not held_bytes:
        return (busy,), (_bytes(used.gpu_memory_bytes),)
    words = f"{_bytes(used.gpu_memory_bytes)}/{_bytes(held_bytes)}"
    return (busy,), (_share(used.gpu_memory_bytes, held_bytes, words, bars=bars),)


def _metrics(usages: Iterable[Usage]) -> list[str]:
    """Return the names of apps' own metrics that get a column."""
    import re

    from atoll.model.spec import METRIC_PATTERN

    found = {name for usage in usages for name in usage.metrics if re.fullmatch(METRIC_PATTERN, name)}
    return sorted(found)[:METRICS_SHOWN]


def _heading(name: str) -> str:
    short = f"{rate}/s" if (rate := name.removesuffix("_per_second")) != name else name
    if len(short) > HEADING_CHARACTERS_MAX:
        short = "…" + short[1 - HEADING_CHARACTERS_MAX :]
    return f"{short.upper()}>?"


def figure(value: float | None) -> str:
    """Return a number in three digits and its unit: `12.3k`."""
    if value is None:
        return ""
    for unit in ("", "k", "M", "G", "T"):
        if abs(value) < 999.5:
            return f"{value:.3g}{unit}"
        value /= 1000
    return f"{value:.3g}P"


def _used(usage: dict[str, Usage], id: str) -> tuple[int, int, int]:
    found = usage.get(id)
    return (found.gpu_milli, found.cpu_milli, found.memory_bytes) if found else (0, 0, 0)


def _cells(used: Usage | None, most: Resources | None, *, bars: bool) -> tuple[Any, Any]:
    from atoll.cli.output import cores

    if used is None:
        return "–", "–"
    if most is None:
        return cores(used.cpu_milli), _bytes(used.memory_bytes)
    return (
        _share(used.cpu_milli, most.cpu.milli, f"{cores(used.cpu_milli)}/{most.cpu:g}", bars=bars),
        _share(used.memory_bytes, most.memory, f"{_bytes(used.memory_bytes)}/{_bytes(most.memory)}", bars=bars),
    )


def _share(part: int, whole: int, words: str, *, bars: bool) -> Any:
    from atoll.cli.output import bar

    return bar(part, whole, words) if bars else words


def _bytes(count: int) -> str:
    from atoll.model.units import format_bytes

    return format_bytes(count)


def _plain(nodes: list[NodeView], instances: list[InstanceView], usage: dict[str, Usage], limits: dict[str, Resources]) -> object:
    return {
        "nodes": [{"node": view.node.name, "heartbeat": view.heartbeat, "capacity": view.node.capacity} for view in nodes],
        "instances": [
            {
                "instance": view.instance.id,
                "owner": view.instance.owner,
                "node": view.instance.node,
                "gpus": view.instance.gpus,
                "usage": usage.get(view.instance.id),
                "limits": limits.get(f"{view.instance.owner_kind}/{view.instance.owner}"),
            }
            for view in instances
        ],
    }
