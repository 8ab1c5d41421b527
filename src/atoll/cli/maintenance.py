"""`atoll maintenance`: times at which machines are taken out of use."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from atoll.cli.quantities import SPAN, again, moment
from atoll.cli.session import Session, command, group
from atoll.model.errors import Invalid
from atoll.model.units import Seconds

if TYPE_CHECKING:
    from atoll.model.maintenance import Window
    from atoll.model.views import MaintenanceView

COLUMNS = ("MAINTENANCE", "NODES", "STATE", "FROM", "UNTIL", "EVERY?", "NOTE?")


@group(example="atoll maintenance\natoll maintenance add --nodes site=fra --every 'Sun 02:00 UTC' --for 2h")
def maintenance() -> None:
    """Plan when machines are taken out of use; they are emptied before, and used again after."""


@command(
    example="atoll maintenance add --nodes node=n3 --from '2026-12-06 02:00 UTC' --for 2h\n"
    "atoll maintenance add --name fra-weekly --nodes 'site=fra,arch!=arm64' --every 'Sun 02:00 UTC' --for 2h --lead 1h"
)
@click.option("--nodes", required=True, metavar="RULES", help="Which: label=value or label!=value, with commas; '*' for all.")
@click.option("--from", "start", metavar="MOMENT", help="When it begins, once: '2026-12-06 02:00 UTC'.")
@click.option("--every", metavar="TIMES", help="When it begins, again and again: 'Sun 02:00 UTC', or a cron expression.")
@click.option("--for", "length", type=SPAN, required=True, help="How long it takes.")
@click.option("--lead", type=SPAN, default="30m", show_default=True, help="How long before it begins the nodes are emptied.")
@click.option("--leave-volumes", is_flag=True, help="Move apps that write to volumes of the nodes, too, without their data.")
@click.option("--name", metavar="NAME", help="What it is called; else made from the rules.")
@click.option("--note", default="", help="Words for others.")
async def add(
    session: Session,
    nodes: str,
    start: str | None,
    every: str | None,
    length: Seconds,
    lead: Seconds,
    leave_volumes: bool,
    name: str | None,
    note: str,
) -> None:
    """Plan a window of maintenance, or change one by its name.

    From its lead on the nodes are emptied as by a drain, and get nothing new but jobs whose deadline ends before it begins. When it
    begins, what is left is told to go. When it ends, they are used again by themselves.
    """
    from atoll.cli.names import name_from
    from atoll.model.maintenance import MaintenanceSpec, check_maintenance

    if (start is None) == (every is None):
        raise Invalid("--from, --every: give one of them", field="from", mend="--from for once, --every for again and again")
    cron, zone = again(every) if every is not None else (None, "UTC")
    spec = MaintenanceSpec(
        name=name or name_from(nodes),
        nodes=nodes,
        start=moment(start, "--from") if start is not None else None,
        every=cron,
        timezone=zone,
        length=length,
        lead=lead,
        leave_volumes=leave_volumes,
        note=note,
    )
    check_maintenance(spec)
    async with session.client() as client:
        view = await client.put_maintenance(spec)
    if session.json:
        session.output.json(view)
        return
    _show(session, [view])
    if not view.nodes:
        session.output.say("[yellow]![/] no node has these labels now; it counts for those that come")


@command(name="list", example="atoll maintenance list")
async def list_maintenances(session: Session) -> None:
    """List the windows: the one that is in force, or the next."""
    async with session.client() as client:
        views = await client.maintenances()
    if session.json:
        session.output.json(views)
        return
    _show(session, views)


@command(example="atoll maintenance remove fra-weekly")
@click.argument("name")
async def remove(session: Session, name: str) -> None:
    """Forget a window; where it is in force, its nodes are used again at once."""
    async with session.client() as client:
        await client.remove_maintenance(name)
    if session.json:
        session.output.json({"removed": name})
    else:
        session.output.say(f"[green]✓[/] {name} is forgotten")


def _show(session: Session, views: list[MaintenanceView]) -> None:
    session.output.table(COLUMNS, [_row(view) for view in views], empty="no maintenance is planned")


def _row(view: MaintenanceView) -> tuple[Any, ...]:
    import time

    from atoll.cli.output import dim, state
    from atoll.model.evacuation import in_words

    spec, window = view.maintenance.spec, view.window
    return (
        spec.name,
        f"{spec.nodes} ({len(view.nodes)})",
        state(_word(window, time.time())),
        in_words(window.start) if window else "–",
        in_words(window.end) if window else "–",
        f"{spec.every} {spec.timezone}" if spec.every else "",
        dim(spec.note),
    )


def _word(window: Window | None, now: float) -> str:
    if window is None:
        return "over"
    if now >= window.start:
        return "under way"
    return "emptying" if now >= window.drains else "planned"


for _each in (add, list_maintenances, remove):
    maintenance.add_command(_each)
