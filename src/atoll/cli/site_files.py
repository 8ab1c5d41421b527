"""Files of sites, and of round trips between them."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import msgspec
from msgspec.structs import replace

from atoll.model import codec
from atoll.model.errors import Invalid
from atoll.model.records import Site

FILE_BYTES_MAX = 32 << 20
ROWS_MAX = 4_000_000
SITES_MAX = 2_000
_NAMES = {
    "name": ("name", "site"),
    "latitude": ("latitude", "lat"),
    "longitude": ("longitude", "lng", "lon"),
    "country": ("country", "cca2"),
    "region": ("region",),
    "note": ("note", "place", "title"),
}
"""Field → what files call it."""
_NUMBERS = ("latitude", "longitude")


def read_sites(path: Path) -> list[dict[str, Any]]:
    """Return what a file says of each site, by fields of `Site`; what is empty is left out.

    Raises NotFound, Invalid with the row.
    """
    rows = _rows(path)
    if len(rows) > SITES_MAX:
        raise Invalid(f"{path}: {len(rows)} sites; at most {SITES_MAX}")
    found: dict[str, dict[str, Any]] = {}
    for number, row in enumerate(rows, 1):
        site: dict[str, Any] = {}
        for field, names in _NAMES.items():
            value = next((row[name] for name in names if row.get(name) not in (None, "")), None)
            if value is not None:
                site[field] = _number(path, number, field, value) if field in _NUMBERS else str(value)
        if "name" not in site:
            raise Invalid(f"{path}: row {number}: name is missing", field="name")
        if site["name"] in found:
            raise Invalid(f"{path}: row {number}: {site['name']} is there twice", field="name")
        found[site["name"]] = site
    return list(found.values())


def read_trips(path: Path) -> dict[str, dict[str, float]]:
    """Return site → other site → round trip in ms. Raises NotFound, Invalid with the row."""
    trips: dict[str, dict[str, float]] = {}
    for number, row in enumerate(_rows(path), 1):
        try:
            source, target = row["source"], row["destination"]
        except KeyError as error:
            raise Invalid(f"{path}: no column {error}", mend="wanted are source, destination and avg_ms or rtt_ms") from None
        value = next((row[name] for name in ("avg_ms", "rtt_ms", "ms") if row.get(name)), None)
        ms = _number(path, number, "avg_ms", value)
        if source != target:
            trips.setdefault(source, {})[target] = ms
    return trips


def merged(there: Mapping[str, Site], told: Iterable[Mapping[str, Any]], trips: Mapping[str, Mapping[str, float]]) -> list[Site]:
    """Return the sites that files speak of, by name, with what was known of them before."""
    sites = {site["name"]: replace(there.get(site["name"], Site(name=site["name"])), **site) for site in told}
    for name, row in trips.items():
        site = sites.get(name) or there.get(name) or Site(name=name)
        sites[name] = replace(site, round_trips_ms={**site.round_trips_ms, **row})
    return [sites[name] for name in sorted(sites)]


def _rows(path: Path) -> list[Mapping[str, Any]]:
    text = codec.read_text(path, FILE_BYTES_MAX)
    if path.suffix != ".json":
        rows: list[Mapping[str, Any]] = list(csv.DictReader(io.StringIO(text)))
    else:
        try:
            data = msgspec.json.decode(text, type=list[dict[str, Any]] | dict[str, dict[str, Any]])
        except (msgspec.DecodeError, RecursionError) as error:
            raise Invalid(f"{path}: {error}", mend="a list of objects, or an object of objects, is wanted") from None
        rows = [{"name": name, **row} for name, row in data.items()] if isinstance(data, dict) else list(data)
    if len(rows) > ROWS_MAX:
        raise Invalid(f"{path}: at most {ROWS_MAX} rows")
    return rows


def _number(path: Path, number: int, field: str, value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        raise Invalid(f"{path}: row {number}: {field} is {value!r}, no number", field=field) from None
