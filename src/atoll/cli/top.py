"""`atoll top`: what the instances use now. On a terminal it goes on until Ctrl-C; elsewhere it prints once."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import click

from atoll.cli.session import Session, command
from atoll.model.errors import AtollError

if TYPE_CHECKING:
    from rich.console import RenderableType

    from atoll.model.records import Usage
    from atoll.model.spec import Resources
    from atoll.model.views import InstanceView, NodeView
    from atoll.sdk.client import Client


@command(example="atoll top\natoll top --json | jq '.instances[] | [.instance, .usage.memory_bytes]'")
@click.option("--interval", type=click.FloatRange(min=0.5), default=2.0, show_default=True, help="Seconds between two looks.")
@click.option("--once", is_flag=True, help="Print once and end.")
async def top(session: Session, interval: float, once: bool) -> None:
    """Show what the project's instances use, the busiest first, against their limits."""
    async with session.client() as client:
        if session.json:
            session.output.json(_plain(*await _look(client, session.project)))
            return
        if once or not session.output.out.is_terminal:
            for part in _tables(*await _look(client, session.project), width=session.output.width):
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
                shown: RenderableType = Group(*_tables(*await _look(client, session.project), width=session.output.width))
            except AtollError as error:
                shown = Text(f"{error} – still trying", style="yellow")
            live.update(shown, refresh=True)
            await asyncio.sleep(interval_s)


def _tables(
    nodes: list[NodeView],
    instances: list[InstanceView],
    usage: dict[str, Usage],
    limits: dict[str, Resources],
    *,
    width: int | None,
) -> list[RenderableType]:
    from atoll.cli import nodes as node_lines
    from atoll.cli.instances import phase_word
    from atoll.cli.output import bar, cores, state, table
    from atoll.model.units import format_bytes

    node_rows = []
    for view in nodes:
        beat, capacity = view.heartbeat, view.node.capacity
        cpu: Any = (
            bar(beat.cpu_milli, capacity.cpu_milli, f"{cores(beat.cpu_milli)}/{capacity.cpu_milli / 1000:g}") if beat else "–"
        )
        memory: Any = "–"
        if beat:
            words = f"{format_bytes(beat.memory_bytes)}/{format_bytes(capacity.memory_bytes)}"
            memory = bar(beat.memory_bytes, capacity.memory_bytes, words)
        node_rows.append((view.node.name, state(node_lines.word(view)), cpu, memory, view.instances))
    rows = []
    for each in sorted(instances, key=lambda view: _used(usage, view.instance.id), reverse=True):
        used = usage.get(each.instance.id)
        most = limits.get(f"{each.instance.owner_kind}/{each.instance.owner}")
        rows.append((each.instance.id, state(phase_word(each)), *_cells(used, most), each.instance.node or "–"))
    parts: list[RenderableType] = [table(("NODE", "STATE", "CPU", "MEMORY", "INSTANCES>"), node_rows, width=width)]
    if rows:
        parts += ["", table(("INSTANCE", "STATE", "CPU", "MEMORY", "PROCESSES>?", "DISK>?", "NODE?"), rows, width=width)]
    return parts


def _used(usage: dict[str, Usage], id: str) -> tuple[int, int]:
    found = usage.get(id)
    return (found.cpu_milli, found.memory_bytes) if found else (0, 0)


def _cells(used: Usage | None, most: Resources | None) -> tuple[Any, ...]:
    from atoll.cli.output import bar, cores
    from atoll.model.units import format_bytes

    if used is None:
        return "–", "–", "", ""
    if most is None:
        return cores(used.cpu_milli), format_bytes(used.memory_bytes), used.pids, format_bytes(used.disk_bytes)
    return (
        bar(used.cpu_milli, most.cpu.milli, f"{cores(used.cpu_milli)}/{most.cpu:g}"),
        bar(used.memory_bytes, most.memory, f"{format_bytes(used.memory_bytes)}/{format_bytes(most.memory)}"),
        used.pids,
        format_bytes(used.disk_bytes),
    )


def _plain(nodes: list[NodeView], instances: list[InstanceView], usage: dict[str, Usage], limits: dict[str, Resources]) -> object:
    return {
        "nodes": [{"node": view.node.name, "heartbeat": view.heartbeat, "capacity": view.node.capacity} for view in nodes],
        "instances": [
            {
                "instance": view.instance.id,
                "owner": view.instance.owner,
                "node": view.instance.node,
                "usage": usage.get(view.instance.id),
                "limits": limits.get(f"{view.instance.owner_kind}/{view.instance.owner}"),
            }
            for view in instances
        ],
    }
