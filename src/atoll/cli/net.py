"""`atoll net`: what reaches what, and the fabric between nodes."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import click

from atoll.cli import names
from atoll.cli.net_flows import show_flows, trace
from atoll.cli.session import EXIT_FAILED, Session, command, group
from atoll.model.units import format_bytes

if TYPE_CHECKING:
    from atoll.model.records import Usage


@group(
    example="atoll net check web db --port 5432\natoll net trace web db --port 5432\natoll net top --apps\natoll net nodes\n"
    "atoll net rotate-keys"
)
def net() -> None:
    """Say what reaches what; show the fabric between nodes."""


@command(example="atoll net check web db --port 5432\natoll net check web api --port 80 --to-project shop --json")
@names.argument("source", "apps", metavar="FROM")
@names.argument("target", "apps", metavar="TO")
@click.option("--port", type=click.IntRange(1, 65_535), required=True, help="The port of TO.")
@click.option("--udp", is_flag=True, help="UDP instead of TCP.")
@click.option("--to-project", metavar="NAME", help="TO's project, if another.")
async def check(session: Session, source: str, target: str, port: int, udp: bool, to_project: str | None) -> None:
    """Say whether FROM reaches a port of TO, and if not, which rule or link stops it: apps, jobs or instances.

    Exits 1 when it does not.
    """
    async with session.client() as client:
        view = await client.reach(session.project, source, target, port, protocol="udp" if udp else "tcp", to_project=to_project)
    if session.json:
        session.output.json(view)
    else:
        rows = [(step.what, "yes" if step.ok else "NO", step.detail, step.mend) for step in view.steps]
        session.output.table(("STEP", "OK", "WHY", "MEND"), rows, empty="")
        stops = next((step for step in view.steps if not step.ok), None)
        words = "[green]✓[/] reaches" if stops is None else "[red]✗[/] does not reach"
        session.output.say(f"{view.source} {words} {view.protocol} {view.port} of {view.target}")
    if not view.ok:
        click.get_current_context().exit(EXIT_FAILED)


@command(example="atoll net top\natoll net top --apps\natoll net top --interval 10 --json")
@click.option("--interval", type=click.FloatRange(min=0.1, max=600.0), default=5.0, show_default=True, help="Seconds to look.")
@click.option("--apps", "by_app", is_flag=True, help="By pair of apps, with what was refused.")
async def top(session: Session, interval: float, by_app: bool) -> None:
    """Show what goes over each instance's link, the busiest first: per second of the interval, and since it has the link. With
    --apps: which app sent how much to which other, and what was refused and why; what was counted of an instance goes with it."""
    if by_app:
        await show_flows(session, interval)
        return
    async with session.client() as client:
        before = {usage.instance: usage for usage in await client.usage(session.project)}
        await asyncio.sleep(interval)
        after = await client.usage(session.project)
    shown = sorted(
        ((usage, _rates(before.get(usage.instance), usage, interval)) for usage in after),
        key=lambda one: -(one[1]["sent_bytes_per_s"] + one[1]["received_bytes_per_s"]),
    )
    if session.json:
        session.output.json([{"instance": usage.instance, **rates, **_totals(usage)} for usage, rates in shown])
        return
    rows = [
        (
            usage.instance,
            f"{format_bytes(int(rates['sent_bytes_per_s']))}/s",
            f"{format_bytes(int(rates['received_bytes_per_s']))}/s",
            f"{rates['sent_packets_per_s']:.0f}",
            f"{rates['received_packets_per_s']:.0f}",
            format_bytes(usage.sent_bytes),
            format_bytes(usage.received_bytes),
            usage.connections,
            usage.network_drops + usage.limited_packets,
        )
        for usage, rates in shown
    ]
    columns = (
        "INSTANCE", "SENT>", "RECEIVED>", "PACKETS SENT/S>", "RECEIVED/S>", "SENT IN ALL>", "RECEIVED IN ALL>", "BEGUN>", "DROPS>",
    )  # fmt: skip
    session.output.table(columns, rows, empty="no instance has told of its link yet")


def _totals(usage: Usage) -> dict[str, int]:
    names = ("sent_bytes", "sent_packets", "received_bytes", "received_packets", "network_drops", "connections", "limited_packets")
    return {name: getattr(usage, name) for name in names}


def _rates(before: Usage | None, now: Usage, seconds: float) -> dict[str, float]:
    """Return what was counted per second; all of it is new for an instance that was not there before."""
    earlier = _totals(before) if before is not None else {}
    counted = {name: total for name, total in _totals(now).items() if name.startswith(("sent", "received"))}
    return {f"{name}_per_s": max(0, total - earlier.get(name, 0)) / seconds for name, total in counted.items()}


@command(name="nodes", example="atoll net nodes --json")
async def list_nodes(session: Session) -> None:
    """List the nodes of the fabric: their prefixes, and where others reach them."""
    async with session.client() as client:
        nodes = await client.fabric()
    if session.json:
        session.output.json(nodes)
        return
    rows = [
        (node.name, node.site, node.region, node.prefix, node.endpoint or "–", "yes" if node.public_key else "no") for node in nodes
    ]
    session.output.table(("NODE", "SITE", "REGION", "PREFIX", "ENDPOINT", "WIREGUARD"), rows, empty="no node has joined the fabric")


@command(name="rotate-keys", example="atoll net rotate-keys")
async def rotate_keys(session: Session) -> None:
    """Have every node make a new WireGuard key. Packets between sites may be lost for a second."""
    async with session.client() as client:
        await client.rotate_fabric_keys()
    session.output.say("[green]✓[/] every node that is connected makes a new key now, all others when they are")


for one in (check, trace, top, list_nodes, rotate_keys):
    net.add_command(one)
