"""`atoll reserve`: machines, or room on each of them, that are kept for one project for a time."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

import click

from atoll.cli.quantities import SPAN, moment
from atoll.cli.session import Session, command, group
from atoll.model.errors import Invalid
from atoll.model.units import Bytes, Cores, Seconds

if TYPE_CHECKING:
    from atoll.model.reservation import ReservationSpec
    from atoll.model.views import ReservationView

A = TypeVar("A", Bytes, Cores)

COLUMNS = ("RESERVATION", "PROJECT", "NODES", "OF EACH", "STATE", "FROM", "UNTIL", "NOTE?")


@group(example="atoll reserve\natoll reserve add -p ml --nodes gpu=h100 --count 4 --for 8h")
def reserve() -> None:
    """Keep machines, or room on each of them, for one project for a time."""


@command(
    example="atoll reserve add -p ml --nodes gpu=h100 --count 4 --from '2026-12-06 02:00 UTC' --for 8h\n"
    "atoll reserve add --name sales -p shop --nodes 'site=fra' --cpu 4 --memory 8GiB --until '2026-12-24 20:00 UTC'",
    fields={"end": ("until", "length")},
)
@click.option("--nodes", required=True, metavar="RULES", help="Which: label=value or label!=value, with commas; '*' for all.")
@click.option("--count", type=click.IntRange(min=1), help="So many of these; else all.")
@click.option("--cpu", type=float, metavar="CORES", help="Of each node. Without --cpu, --memory and --gpu whole nodes are kept.")
@click.option("--memory", metavar="SIZE", help="Of each node.")
@click.option("--gpu", type=click.IntRange(min=1), help="Devices of each node.")
@click.option("--from", "start", metavar="MOMENT", help="When it begins: '2026-12-06 02:00 UTC'; else now.")
@click.option("--until", metavar="MOMENT", help="When it ends.")
@click.option("--for", "length", type=SPAN, help="How long it lasts, instead of --until.")
@click.option("--name", metavar="NAME", help="What it is called; else made from the project and the rules.")
@click.option("--note", default="", help="Words for others.")
async def add(
    session: Session,
    nodes: str,
    count: int | None,
    cpu: float | None,
    memory: str | None,
    gpu: int | None,
    start: str | None,
    until: str | None,
    length: Seconds | None,
    name: str | None,
    note: str,
) -> None:
    """Keep machines, or room on them, for the project of -p, or change a reservation by its name.

    What others run there stays. They get nothing new there but jobs whose deadline ends before it begins.
    """
    import time

    from atoll.cli.names import name_from
    from atoll.model.reservation import ReservationSpec, check_reservation

    if (until is None) == (length is None):
        raise Invalid("--until, --for: give one of them", field="until", mend="--until for a moment, --for for how long")
    begins = moment(start, "--from") if start is not None else None
    end = moment(until, "--until") if until is not None else (begins if begins is not None else time.time()) + float(length or 0)
    spec = ReservationSpec(
        name=name or name_from(f"{session.project} {nodes}"),
        project=session.project,
        nodes=nodes,
        count=count,
        cpu=_amount(Cores, "cpu", cpu) if cpu is not None else None,
        memory=_amount(Bytes, "memory", memory) if memory is not None else None,
        gpu=gpu,
        start=begins,
        end=end,
        note=note,
    )
    check_reservation(spec)
    async with session.client() as client:
        view = await client.put_reservation(spec)
    if session.json:
        session.output.json(view)
        return
    _show(session, [view])
    if not view.nodes:
        session.output.say("[yellow]![/] no node has these labels now; it counts for those that come")


def _amount(kind: type[A], field: str, value: object) -> A:
    try:
        return kind.parse(value)
    except ValueError as error:
        raise Invalid(f"--{field}: {error}", field=field) from None


@command(name="list", example="atoll reserve list")
async def list_reservations(session: Session) -> None:
    """List what is reserved."""
    async with session.client() as client:
        views = await client.reservations()
    if session.json:
        session.output.json(views)
        return
    _show(session, views)


@command(example="atoll reserve remove ml-gpu-h100")
@click.argument("name")
async def remove(session: Session, name: str) -> None:
    """Forget a reservation; others may use its machines at once."""
    async with session.client() as client:
        await client.remove_reservation(name)
    if session.json:
        session.output.json({"removed": name})
    else:
        session.output.say(f"[green]✓[/] {name} is forgotten")


def _show(session: Session, views: list[ReservationView]) -> None:
    session.output.table(COLUMNS, [_row(view) for view in views], empty="nothing is reserved")


def _row(view: ReservationView) -> tuple[Any, ...]:
    import time

    from atoll.cli.output import dim
    from atoll.model.evacuation import in_words

    held = view.reservation
    now = time.time()
    word = "over" if held.spec.end <= now else "in force" if held.start <= now else "planned"
    return (
        held.spec.name,
        held.spec.project,
        f"{held.spec.nodes} ({len(view.nodes)})",
        _of_each(held.spec),
        word,
        in_words(held.start),
        in_words(held.spec.end),
        dim(held.spec.note),
    )


def _of_each(spec: ReservationSpec) -> str:
    from atoll.model.units import format_bytes

    if spec.whole:
        return "all"
    parts = [f"{spec.cpu.milli / 1000:g} cores"] if spec.cpu is not None else []
    parts += [format_bytes(spec.memory)] if spec.memory is not None else []
    parts += [f"{spec.gpu} GPUs" if spec.gpu > 1 else "1 GPU"] if spec.gpu is not None else []
    return ", ".join(parts)


for _each in (add, list_reservations, remove):
    reserve.add_command(_each)
