"""What goes between apps and what is refused, as nodes count it: `atoll net top --apps` and `atoll net trace`."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import click

from atoll.cli import names
from atoll.cli.session import EXIT_FAILED, Session, command
from atoll.model.units import format_bytes

if TYPE_CHECKING:
    from collections.abc import Iterable

    from atoll.model.fabric import ReachView
    from atoll.model.flows import Flow, Flows, Refusal

REASONS = {
    "egress": "the source's egress rules do not allow it",
    "port": "the target declares no such port",
    "ingress": "the target's ingress rules do not allow it",
    "project": "the address is of another project, or of nobody",
    "closed": "no instance may go there",
    "node": "it is a service of the node itself",
}


NOTHING = "no app has sent another anything in the last ten minutes, of the instances that there are now: counts go with them"


async def show_flows(session: Session, interval_s: float) -> None:
    """Show what every pair of apps sent each other in an interval, and what was refused."""
    async with session.client() as client:
        before = await client.flows(session.project)
        await asyncio.sleep(interval_s)
        after = await client.flows(session.project)
    if session.json:
        session.output.json({"seconds": interval_s, "before": before, "after": after})
        return
    earlier = {(flow.source, flow.target): flow for flow in before.flows}
    rows = []
    for flow in after.flows:
        held = earlier.get((flow.source, flow.target))
        rows.append(
            (
                flow.source,
                flow.target,
                f"{format_bytes(int(_more(flow.bytes, held.bytes if held else 0) / interval_s))}/s",
                f"{_more(flow.packets, held.packets if held else 0) / interval_s:.0f}",
                format_bytes(flow.bytes),
                flow.packets,
                flow.connections,
            )
        )
    columns = ("FROM", "TO", "SENT>", "PACKETS/S>", "SENT IN ALL>", "PACKETS>", "BEGUN>")
    session.output.table(columns, rows, empty=NOTHING)
    if after.refusals:
        refused = [
            (
                each.source,
                each.target or each.address,
                f"{each.protocol} {each.port}",
                each.packets,
                each.node,
                REASONS[each.reason],
            )
            for each in after.refusals
        ]
        session.output.print("")
        session.output.table(("FROM", "TO", "PORT", "REFUSED>", "NODE", "WHY"), refused)
    if not after.complete:
        session.output.say("[yellow]![/] there is more than nodes tell of; these are the busiest")


@command(example="atoll net trace web db --port 5432\natoll net trace web db --port 5432 --for 60 --json")
@names.argument("source", "apps", metavar="FROM")
@names.argument("target", "apps", metavar="TO")
@click.option("--port", type=click.IntRange(1, 65_535), required=True, help="The port of TO.")
@click.option("--udp", is_flag=True, help="UDP instead of TCP.")
@click.option("--interval", type=click.FloatRange(min=0.1, max=60.0), default=5.0, show_default=True, help="Seconds between looks.")
@click.option(
    "--for", "seconds", type=click.FloatRange(min=0.1, max=3600.0), default=30.0, show_default=True, help="Seconds in all."
)
async def trace(session: Session, source: str, target: str, port: int, udp: bool, interval: float, seconds: float) -> None:
    """Say whether FROM reaches a port of TO, as `check` does, and then show what really goes between them and what nodes refuse.

    Nodes count what goes, on all ports together, and what they refuse, by port; nothing is sent for this. Exits 1 when a rule or a
    link stops it.
    """
    protocol = "udp" if udp else "tcp"
    async with session.client() as client:
        view = await client.reach(session.project, source, target, port, protocol=protocol)
        pair = (owner_of(source, view.source), owner_of(target, view.target))
        if not session.json:
            for line in decided(view):
                session.output.say(line)
        first = last = await client.flows(session.project)
        deadline = asyncio.get_running_loop().time() + seconds
        while asyncio.get_running_loop().time() < deadline:
            await asyncio.sleep(min(interval, max(0.0, deadline - asyncio.get_running_loop().time())))
            now = await client.flows(session.project)
            if not session.json:
                session.output.print(passed(pair, last, now, port, protocol))
            last = now
    if session.json:
        session.output.json(
            {
                "reach": view,
                "sent": since(flow_of(first, *pair), flow_of(last, *pair)),
                "answered": since(flow_of(first, *reversed(pair)), flow_of(last, *reversed(pair))),
                "refused": refused_since(first, last, pair, port, protocol),
            }
        )
    if not view.ok:
        click.get_current_context().exit(EXIT_FAILED)


def owner_of(given: str, instance: str) -> str:
    """Return the app or job that is meant by `given`, for which `instance` was found."""
    return instance.rpartition("-")[0] if given == instance else given


def decided(view: ReachView) -> list[str]:
    """Return the decision in words: the first step that stops it, or that none does."""
    from rich.markup import escape

    stops = next((step for step in view.steps if not step.ok), None)
    if stops is None:
        return [f"[green]✓[/] {view.source} may reach {view.protocol} {view.port} of {view.target}"]
    # A mend may hold brackets of its own, as `[[ports]]`.
    mend = [f"[cyan]→ {escape(stops.mend)}[/]"] if stops.mend else []
    return [f"[red]✗[/] {escape(f'{stops.what}: {stops.detail}')}", *mend]


def passed(pair: tuple[str, str], before: Flows, now: Flows, port: int, protocol: str) -> str:
    """Return one line: what went between two apps since `before`, whatever the port, and what was refused on that port."""
    source, target = pair
    there = since(flow_of(before, source, target), flow_of(now, source, target))
    back = since(flow_of(before, target, source), flow_of(now, target, source))
    line = (
        f"{source} → {target}, all ports: {there['packets']} packets, {format_bytes(there['bytes'])}, {there['connections']} begun"
    )
    line += f"; back: {back['packets']} packets, {format_bytes(back['bytes'])}"
    for each in refused_since(before, now, pair, port, protocol):
        line += f"; REFUSED {each['packets']} on node {each['node']}: {REASONS[str(each['reason'])]}"
    return line


def flow_of(flows: Flows, source: str, target: str) -> Flow | None:
    return next((flow for flow in flows.flows if (flow.source, flow.target) == (source, target)), None)


def since(before: Flow | None, now: Flow | None) -> dict[str, int]:
    """Return what was counted between two looks; what began anew counts from there."""
    return {
        name: _more(getattr(now, name) if now is not None else 0, getattr(before, name) if before is not None else 0)
        for name in ("packets", "bytes", "connections")
    }


def refused_since(before: Flows, now: Flows, pair: tuple[str, str], port: int, protocol: str) -> list[dict[str, object]]:
    """Return what was refused between two looks, by reason and node."""
    earlier = {(each.reason, each.node): each.packets for each in _of(before.refusals, pair, port, protocol)}
    found: list[dict[str, object]] = []
    for each in _of(now.refusals, pair, port, protocol):
        more = _more(each.packets, earlier.get((each.reason, each.node), 0))
        if more:
            found.append({"reason": str(each.reason), "node": each.node, "packets": more})
    return found


def _of(refusals: Iterable[Refusal], pair: tuple[str, str], port: int, protocol: str) -> list[Refusal]:
    return [each for each in refusals if (each.source, each.target, each.port, each.protocol) == (*pair, port, protocol)]


def _more(now: int, before: int) -> int:
    return now - before if now >= before else now
