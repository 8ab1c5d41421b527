"""`atoll sites`: where sites are, and how far from each other."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from atoll.cli import names
from atoll.cli.session import Session, command, group

if TYPE_CHECKING:
    from atoll.model.records import Site
    from atoll.model.views import SiteView

_FILE = click.Path(path_type=Path, dir_okay=False)
NEAREST = 20
"""Other sites that `show` lists."""


@group(example="atoll sites\natoll sites set ams --at 52.31,4.76 --country NL --region weur\natoll sites import sites.csv")
def sites() -> None:
    """Say where sites are: for apps near their users, bounds on latency, and residency."""


@command(name="list", example="atoll sites list --json")
async def list_sites(session: Session) -> None:
    """List the sites: those that are described, and those that nodes or ingresses name."""
    async with session.client() as client:
        views = await client.sites()
    if session.json:
        session.output.json(views)
        return
    rows = [
        (
            view.site.name,
            view.site.region or "–",
            view.site.country or "–",
            _place(view),
            view.nodes,
            len(view.ingresses),
            f"{view.requests_per_s:g}",
            len(view.measured_ms),
        )
        for view in views
    ]
    columns = ("SITE", "REGION", "COUNTRY", "PLACE", "NODES>", "INGRESSES>", "REQUESTS/S>", "MEASURED>?")
    session.output.table(columns, rows, empty="no sites; describe one: atoll sites set NAME --at LATITUDE,LONGITUDE")


@command(example="atoll sites show ams")
@names.argument("name", "sites", metavar="SITE")
async def show(session: Session, name: str) -> None:
    """Show one site, and how far the nearest others are."""
    from rich.markup import escape

    async with session.client() as client:
        view = await client.site(name)
    if session.json:
        session.output.json(view)
        return
    site = view.site
    words = f"region {site.region or 'as its nodes say'}, country {site.country or 'unknown'}, at {_place(view)}"
    session.output.say(f"{site.name}: {words}" + (f" ({escape(site.note)})" if site.note else ""))
    session.output.say(f"{view.nodes} nodes, {len(view.ingresses)} ingresses, {view.requests_per_s:g} requests/s")
    nearest = sorted(view.round_trips_ms.items(), key=lambda item: (item[1], item[0]))[:NEAREST]

    def source(other: str) -> str:
        return "measured" if other in view.measured_ms else "told" if other in site.round_trips_ms else "told or estimated"

    rows = [(other, f"{ms:.1f}ms", source(other)) for other, ms in nearest]
    session.output.table(("OTHER SITE", "ROUND TRIP>", "SOURCE"), rows, empty="no distance to any other site is known")


@command(
    name="set",
    example="atoll sites set ams --at 52.31,4.76 --country NL --region weur",
    fields={"latitude": "at", "longitude": "at", "round_trips_ms": "trips"},
)
@names.argument("name", "sites", metavar="SITE")
@click.option("--at", metavar="LAT,LON", help="Latitude and longitude in degrees.")
@click.option("--country", help="Two letters of ISO 3166-1, such as NL.")
@click.option("--region", help="That of all its nodes, whatever they say themselves.")
@click.option("--rtt", "trips", multiple=True, metavar="SITE=MS", help="A round trip that you know. May be repeated.")
@click.option("--note")
async def set_site(
    session: Session, name: str, at: str | None, country: str | None, region: str | None, trips: tuple[str, ...], note: str | None
) -> None:
    """Describe a site; what is not given stays as it was."""
    from msgspec.structs import replace

    from atoll.model.errors import NotFound
    from atoll.model.records import Site

    async with session.client() as client:
        try:
            before = (await client.site(name)).site
        except NotFound:
            before = Site(name=name)
        changes: dict[str, Any] = {"round_trips_ms": {**before.round_trips_ms, **dict(_trip(trip) for trip in trips)}}
        if at is not None:
            changes["latitude"], changes["longitude"] = _point(at)
        given = {"country": country, "region": region, "note": note}
        changes |= {key: value for key, value in given.items() if value is not None}
        view = await client.put_site(replace(before, **changes))
    if session.json:
        session.output.json(view)
    else:
        session.output.say(
            f"[green]✓[/] site {view.site.name}: {view.site.region or '–'}, {view.site.country or '–'}, {_place(view)}"
        )


@command(name="import", example="atoll sites import sites.csv\natoll sites import pops.json --rtt measured.csv")
@click.argument("file", type=_FILE, required=False)
@click.option("--rtt", "trips", type=_FILE, help="Round trips: a CSV with source, destination and avg_ms (or rtt_ms).")
async def import_sites(session: Session, file: Path | None, trips: Path | None) -> None:
    """Describe many sites at once.

    FILE is a CSV with name, latitude, longitude and, where known, country, region and note; or JSON: a list of such objects, or an
    object of them by name. What it does not say of a site that is there stays as it was.
    """
    from atoll.cli.site_files import merged, read_sites, read_trips
    from atoll.model.errors import Invalid

    if file is None and trips is None:
        raise Invalid("nothing to import", mend="name a file of sites, or --rtt FILE, or both")
    async with session.client() as client:
        there = {view.site.name: view.site for view in await client.sites() if view.described}
        wanted = merged(there, read_sites(file) if file else [], read_trips(trips) if trips else {})
        changed = [site for site in wanted if there.get(site.name) != site]
        for site in changed:
            await client.put_site(site)
    if session.json:
        session.output.json({"read": len(wanted), "changed": [site.name for site in changed]})
    else:
        session.output.say(f"[green]✓[/] {len(wanted)} sites read, {len(changed)} new or changed")


@command(example="atoll sites remove ams")
@names.argument("name", "sites", metavar="SITE")
async def remove(session: Session, name: str) -> None:
    """Forget where a site is; its nodes stay."""
    async with session.client() as client:
        gone: Site = await client.remove_site(name)
    if session.json:
        session.output.json(gone)
    else:
        session.output.say(f"[green]✓[/] nobody knows any more where {gone.name} is")


def _place(view: SiteView) -> str:
    site = view.site
    return f"{site.latitude:.2f},{site.longitude:.2f}" if site.latitude is not None and site.longitude is not None else "–"


def _point(text: str) -> tuple[float, float]:
    from atoll.model.errors import Invalid
    from atoll.model.spec import NearKind, near_of

    try:
        point = near_of(text)
    except Invalid:
        point = None
    if point is None or point.kind is not NearKind.POINT:
        mend = "latitude first, -90 to 90, then longitude: for example 52.31,4.76"
        raise Invalid(f"--at: {text[:60]!r} is no latitude and longitude", field="at", mend=mend)
    return point.latitude, point.longitude


def _trip(text: str) -> tuple[str, float]:
    from atoll.model.errors import Invalid

    name, _, ms = text.partition("=")
    try:
        return name, float(ms.removesuffix("ms"))
    except ValueError:
        raise Invalid(f"--rtt: {text!r} is not SITE=MS", field="rtt", mend="write for example fra=7.5") from None


for _each in (list_sites, show, set_site, import_sites, remove):
    sites.add_command(_each)
