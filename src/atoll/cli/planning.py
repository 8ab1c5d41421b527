"""`atoll plan` and `atoll explain`: what the scheduler would do, and why."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from atoll.cli import kept, names
from atoll.cli.session import EXIT_FAILED, Session, command
from atoll.model.errors import NotFound
from atoll.model.units import format_count

if TYPE_CHECKING:
    from atoll.model.records import Rejection
    from atoll.model.views import Explanation
    from atoll.sdk.client import Client

NAMED_MAX = 8
"""Instances that are named where one of them was meant."""


@command(example="atoll plan\natoll plan -f shop.yaml --json | jq .placed")
@click.argument("directory", type=click.Path(path_type=Path), required=False, metavar="[DIR]")
@click.option(
    "--file", "-f", "file", type=click.Path(path_type=Path), help="The spec: TOML, JSON or YAML.  [default: DIR/atoll.toml]"
)
async def plan(session: Session, directory: Path | None, file: Path | None) -> None:
    """Say where the instances of a spec would go if it were deployed now. Nothing is written.

    A spec with kind = "job" is a job's. Exits 1 when not all instances find a node.
    """
    from atoll.cli import spec_file
    from atoll.model.spec import AppSpec, JobSpec

    path = spec_file.find(file or directory or Path())
    data = spec_file.read(path)
    if session.project_given or "project" not in data:
        data["project"] = session.project
    spec: AppSpec | JobSpec
    spec = spec_file.parse(data, JobSpec, path) if data.get("kind") == "job" else spec_file.parse(data, AppSpec, path)
    async with session.client() as client:
        view = await client.plan(spec)
    if session.json:
        session.output.json(view)
    else:
        _summary(session, view.name, view.instances, view.unplaced)
        session.output.table(("NODE", "INSTANCES>"), list(view.placed.items()))
        _details(session, view.explanation, view.rejection)
    if view.unplaced:
        click.get_current_context().exit(EXIT_FAILED)


@command(example="atoll explain hello-k3x9")
@names.argument("instance", "running", metavar="INSTANCE")
async def explain(session: Session, instance: str) -> None:
    """Say what the scheduler would answer for an instance now: the best nodes with their scores, and what the others lack."""
    async with session.client() as client:
        try:
            view = await client.explain(session.project, instance)
        except NotFound:
            raise await _not_an_instance(client, session.project, instance) from None
    if session.json:
        session.output.json(view)
        return
    where = f"is on {view.instance.node}" if view.instance.node else "has no node"
    session.output.say(
        f"{view.instance.id} {where}; of {format_count(view.explanation.nodes, 'node')} {view.explanation.feasible} would take it"
    )
    if view.instance.gpus:
        from atoll.cli.gpus import grants_words

        session.output.say(f"it holds {grants_words(view.instance.gpus)}")
    _details(session, view.explanation, view.explanation.rejection)


async def _not_an_instance(client: Client, project: str, name: str) -> NotFound:
    """Return what to say where an app's or a job's name is given: which instances there are of it."""
    from atoll.cli.instances import named

    ids = [view.instance.id for view in await named(client, project, name)]
    if not ids:
        return NotFound(f"'{name}' has no instances, and an instance is what is explained", mend="'atoll ps' lists them")
    more = f" and {len(ids) - NAMED_MAX} more" if len(ids) > NAMED_MAX else ""
    said = f"'{name}' is no instance; an instance is what is explained, and it has: {', '.join(ids[:NAMED_MAX])}{more}"
    return NotFound(said, mend=f"atoll explain {ids[0]}")


@command(example="atoll defrag\natoll defrag --json | jq '.steps[].frees'")
async def defrag(session: Session) -> None:
    """Say which instances could be moved, and what that would free: nodes, and GPUs. Nothing is moved.

    To carry a step out, cordon the node and stop its instances one by one; each is replaced elsewhere.
    """
    async with session.client() as client:
        view = await client.defrag()
    if session.json:
        session.output.json(view)
        return
    rows = [(step.frees if move is step.moves[0] else "", move) for step in view.steps for move in step.moves]
    cells = [(frees, move.project, move.instance, move.node, move.to) for frees, move in rows]
    session.output.table(("FREES", "PROJECT", "INSTANCE", "FROM", "TO"), cells, empty="no move would free a node or a GPU")
    if view.waiting:
        session.output.say(f"of {view.waiting} that wait, {view.fit_now} have room now, {view.fit_then} would after all moves")


def _summary(session: Session, name: str, instances: int, unplaced: int) -> None:
    session.output.say(placed_words(name, instances, unplaced))


def placed_words(name: str, instances: int, unplaced: int) -> str:
    """Return how many of an app's or job's instances find a node."""
    if instances == 0:
        return f"{name} wants no instance now"
    if instances == 1:
        return f"the one instance of {name} finds {'no' if unplaced else 'a'} node"
    if unplaced == instances:
        return f"none of {instances} instances of {name} finds a node"
    return f"{instances - unplaced if unplaced else 'all'} {'of ' if unplaced else ''}{instances} instances of {name} find a node"


def _details(session: Session, explanation: Explanation, rejection: Rejection | None) -> None:
    from rich.markup import escape

    from atoll.cli.gpus import grants_words

    output = session.output
    gpus = any(candidate.gpus for candidate in explanation.candidates)
    if explanation.candidates:
        scores = list(dict.fromkeys(name for candidate in explanation.candidates for name in candidate.scores))
        far = any(candidate.latency_ms is not None for candidate in explanation.candidates)
        columns = (
            "CANDIDATE",
            *(("SITE", "ROUND TRIP>") if far else ()),
            "TOTAL>",
            *(f"{name.upper()}>" for name in scores),
            "ROOM>",
            *(["GPUS"] if gpus else []),
        )
        rows = [
            (
                one.node,
                *((one.site, f"{one.latency_ms:.1f}ms" if one.latency_ms is not None else "unknown") if far else ()),
                f"{one.total:g}",
                *(f"{one.scores.get(name, 0):g}" for name in scores),
                one.room,
                *([grants_words(one.gpus)] if gpus else []),
            )
            for one in explanation.candidates
        ]
        output.table(columns, rows)
        output.say("[dim]the node with the highest TOTAL is taken first[/]")
    if explanation.layout:
        where = ", ".join(f"{site} {count}" for site, count in explanation.layout.items())
        mean = f", {explanation.layout_ms:.1f}ms on average to its users" if explanation.layout_ms is not None else ""
        output.say(escape(f"near its users: {where}{mean}"))
        if explanation.unserved:
            output.say(escape(f"{explanation.unserved:.1%} of the requests come from places that no site may serve"))
    if explanation.wall:
        output.say(escape(f"GPUs: {explanation.wall}"))
    if explanation.share and rejection is not None:
        output.say(escape(f"{explanation.share}; among equal priorities, projects that hold less go first"))
    if explanation.failed:
        output.table(("FILTER", "NODES TURNED AWAY>"), list(explanation.failed.items()))
    kept.show(output, explanation.kept)
    if rejection is not None:
        output.say(escape(f"{rejection.code}: {rejection.message}"))
        if rejection.mend:
            output.say(escape(f"mend: {rejection.mend}"))
