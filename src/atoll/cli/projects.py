"""`atoll projects`: tenants, and what each may have."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from atoll.cli import names
from atoll.cli.session import Session, command, group

if TYPE_CHECKING:
    from rich.text import Text

    from atoll.model.spec import Quota
    from atoll.model.views import QuotaView
    from atoll.sdk.client import Client

NONE = "none"
"""Takes a limit away."""
TRIES_MAX = 5
"""Attempts of one change while others change the same quota."""


@group(example="atoll projects create shop\natoll projects quota shop --cpu 16 --memory 64GiB\natoll deploy -p shop")
def projects() -> None:
    """List and make projects, and limit what each may have: names, secrets and tokens of one stay in it."""


@command(name="list", example="atoll projects list")
async def list_projects(session: Session) -> None:
    """List the projects, with the limits of each."""
    from atoll.cli.output import age

    async with session.client() as client:
        found = await client.projects()
    if session.json:
        session.output.json(found)
        return
    rows = [(project.name, age(project.created_at), _limits(project.quota)) for project in found]
    session.output.table(("PROJECT", "AGE>", "QUOTA?"), rows, empty="no projects")


@command(example="atoll projects create shop")
@click.argument("name")
async def create(session: Session, name: str) -> None:
    """Make a project; one that is there already stays as it is."""
    async with session.client() as client:
        made = await client.put_project(name)
    if session.json:
        session.output.json(made)
    else:
        session.output.say(f"[green]✓[/] project {made.name}")


@command(
    example="atoll projects quota shop\n"
    "atoll projects quota shop --cpu 16 --memory 64GiB --gpu 2 --instances 200\n"
    "atoll projects quota shop --gpu none",
    fields={"requests_per_s": "requests"},
)
@names.argument("name", "projects", metavar="PROJECT")
@click.option("--cpu", metavar="CORES", help="All placed instances together; 'none' for no limit. So are the next three.")
@click.option("--memory", metavar="SIZE")
@click.option("--gpu", metavar="COUNT", help="Whole devices; shares and partitions count as their part of one.")
@click.option("--instances", metavar="COUNT")
@click.option("--requests", metavar="COUNT", help="Requests a second that each ingress lets through; 'none' for no limit.")
@click.option("--weight", type=click.IntRange(1, 1000), help="How much it counts beside others when not all that waits has room.")
@click.option("--host-port-min", type=click.IntRange(1, 65_535), help="The lowest port of nodes that its apps may be published on.")
@click.option("--public-ports", metavar="FIRST-LAST", help="Ports of ingresses that its apps may have; 'none' for none.")
async def quota(
    session: Session,
    name: str,
    cpu: str | None,
    memory: str | None,
    gpu: str | None,
    instances: str | None,
    requests: str | None,
    weight: int | None,
    host_port_min: int | None,
    public_ports: str | None,
) -> None:
    """Show what a project may have and what its instances hold; with options, change that (admin).

    What is not given stays as it was. What runs already is left alone: a quota that is lower than what is held keeps more from
    being placed.
    """
    changes = {
        "cpu": _amount("cpu", cpu),
        "memory": _amount("memory", memory),
        "gpu": _amount("gpu", gpu),
        "instances": _amount("instances", instances),
        "requests_per_s": _amount("requests", requests),
        "weight": weight,
        "host_port_min": host_port_min,
        "public_ports": "" if public_ports == NONE else public_ports,
    }
    changes = {field: value for field, value in changes.items() if value is not None}
    async with session.client() as client:
        if changes:
            await _change(client, name, {field: None if value is NONE else value for field, value in changes.items()})
        view = await client.quota(name)
    if session.json:
        session.output.json(view)
        return
    _show(session, view)


async def _change(client: Client, name: str, given: dict[str, Any]) -> None:
    """Change what is given, and nothing that others change at the same time. Raises StaleRevision where they do not cease to."""
    from msgspec.structs import replace

    from atoll.model.errors import StaleRevision
    from atoll.model.spec import Quota

    for attempt in range(1, TRIES_MAX + 1):
        view = await client.quota(name)
        try:
            await client.set_quota(name, replace(view.quota or Quota(), **given), if_revision=view.revision)
            return
        except StaleRevision:
            if attempt == TRIES_MAX:
                raise


def _amount(option: str, text: str | None) -> Any:
    """Return the value of an option, `NONE` for no limit, None where it was not given. Raises Invalid."""
    from atoll.model.errors import Invalid
    from atoll.model.units import Bytes, Cores

    if text is None or text == NONE:
        return NONE if text is not None else None
    try:
        match option:
            case "cpu":
                return Cores.parse(float(text))
            case "memory":
                return Bytes.parse(int(text) if text.isdigit() else text)
            case _:
                return int(text)
    except ValueError as error:
        what = str(error) if option == "memory" else f"{text[:40]!r} is not a number that it can be"
        raise Invalid(f"--{option}: {what}", field=option, mend="write for example 16, or 'none' for no limit") from None


def _limits(quota: Quota | None) -> str:
    """Return the limits in words."""
    from atoll.model.spec import Quota
    from atoll.model.units import format_bytes

    if quota is None:
        return "–"
    parts = [
        f"cpu {quota.cpu:g}" if quota.cpu is not None else "",
        f"memory {format_bytes(quota.memory)}" if quota.memory is not None else "",
        f"gpu {quota.gpu}" if quota.gpu is not None else "",
        f"instances {quota.instances}" if quota.instances is not None else "",
        f"requests {quota.requests_per_s}/s" if quota.requests_per_s is not None else "",
        f"weight {quota.weight}" if quota.weight != Quota().weight else "",
        f"host ports from {quota.host_port_min}" if quota.host_port_min != Quota().host_port_min else "",
        f"public ports {quota.public_ports}" if quota.public_ports else "",
    ]
    return ", ".join(part for part in parts if part) or "–"


def _show(session: Session, view: QuotaView) -> None:
    from atoll.model.spec import Quota
    from atoll.model.units import format_bytes

    quota, used = view.quota or Quota(), view.used
    rows = [
        _row("cpu", used.cpu_milli, quota.cpu.milli if quota.cpu is not None else None, lambda milli: f"{milli / 1000:g}"),
        _row("memory", used.memory_bytes, quota.memory, format_bytes),
        _row("gpu", used.gpu_milli, quota.gpu * 1000 if quota.gpu is not None else None, lambda milli: f"{milli / 1000:g}"),
        _row("instances", used.instances, quota.instances, str),
        ("requests/s", "–", f"{quota.requests_per_s}" if quota.requests_per_s is not None else NONE, "at each ingress"),
        ("weight", "–", str(quota.weight), "beside others, when not all that waits has room"),
        ("host ports", "–", f"from {quota.host_port_min}", ""),
        ("public ports", "–", quota.public_ports or NONE, "tcp and udp, of every ingress"),
    ]
    session.output.table(("RESOURCE", "USED>", "LIMIT>", ""), rows)
    if view.waiting:
        many = "1 instance waits" if view.waiting == 1 else f"{view.waiting} instances wait"
        session.output.say(f"[yellow]![/] {many} for room in it: scale something down, or raise it")


def _row(name: str, used: int, limit: int | None, words: Any) -> tuple[str, str, str, Text | str]:
    from atoll.cli.output import bar

    if limit is None:
        return name, words(used), NONE, ""
    share = f"{used / limit:.0%}" if limit else "nothing allowed"
    return name, words(used), words(limit), bar(used, limit, share)


for _each in (list_projects, create, quota):
    projects.add_command(_each)
