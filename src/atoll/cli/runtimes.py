"""`atoll runtimes`: what each runtime can do, made from the code, and which of the cell's nodes offer it."""

from __future__ import annotations

from typing import Any

import click

from atoll.cli.session import Session, command
from atoll.model.errors import Invalid
from atoll.model.ports.runtime import Feature
from atoll.model.spec import RuntimeName


@command(example="atoll runtimes\natoll runtimes --runtime gvisor --needs snapshot")
@click.option("--runtime", metavar="NAME", help="Show this one alone.")
@click.option("--needs", metavar="FEATURE", help="Fail unless the runtime (or any, without --runtime) has this feature.")
async def runtimes(session: Session, runtime: str | None, needs: str | None) -> None:
    """Show what each runtime can do, and which nodes offer it."""
    from atoll.runtimes.offer import FEATURES, having, isolation_of, require

    names = [RuntimeName(_one_of(runtime, RuntimeName, "runtime"))] if runtime else list(RuntimeName)
    if needs:
        feature = Feature(_one_of(needs, Feature, "feature"))
        names = [name for name in names if runtime or name in having(feature)]
        for name in names or FEATURES:
            require(name, feature)
    async with session.client() as client:
        views = await client.nodes()
    rows = [
        {
            "runtime": name,
            "isolation": isolation_of(name),
            "features": sorted(FEATURES.get(name, ())),
            "nodes": [view.node.name for view in views if name in view.node.runtimes],
        }
        for name in names
        if name in FEATURES or runtime
    ]
    if session.json:
        session.output.json(rows)
        return
    columns = ("RUNTIME", "ISOLATION", *(feature.upper() for feature in Feature), "NODES")
    session.output.table(columns, [_row(row) for row in rows])


def _row(row: dict[str, Any]) -> tuple[Any, ...]:
    marks = ("yes" if feature in row["features"] else "–" for feature in Feature)
    return (row["runtime"], row["isolation"], *marks, " ".join(row["nodes"]) or "none")


def _one_of(given: str, kind: type[RuntimeName] | type[Feature], what: str) -> str:
    names = [str(name) for name in kind]
    if given not in names:
        raise Invalid(f"there is no {what} {given!r}", mend=f"one of: {', '.join(names)}")
    return given
