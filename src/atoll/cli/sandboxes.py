"""`atoll sandbox`: an instance to work in, with what only that has: pause, snapshot, fork."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from atoll.cli.copy import copy_sandbox
from atoll.cli.execute import execute_sandbox
from atoll.cli.quantities import SPAN
from atoll.cli.session import Session, command, group
from atoll.model.errors import Invalid

if TYPE_CHECKING:
    from atoll.model.spec import JobSpec
    from atoll.model.streams import Held
    from atoll.model.units import Seconds
    from atoll.model.views import JobView
    from atoll.sdk.client import Client

START_S_MAX = 300.0
END_S_MAX = 120.0


@group(
    example="atoll sandbox create try --image HOST/tools:1 --isolation vm\n"
    "atoll sandbox exec try -- python -V\natoll sandbox fork try other"
)
def sandbox() -> None:
    """Work in an instance of your own, with a time limit."""


@command(
    example="atoll sandbox create try --image HOST/tools:1 --isolation sandbox --time-limit 1h --idle-limit 10m\n"
    "atoll sandbox create try --template tools",
    fields={"deadline": "time_limit"},
)
@click.argument("name", metavar="NAME")
@click.option("--template", metavar="TEMPLATE", help="Take one that is ready; what else can be said is limits and variables.")
@click.option("--file", "-f", "file", type=click.Path(path_type=Path), help="A job's spec to begin with: TOML, JSON or YAML.")
@click.option("--image", metavar="REF", help="The image it is made from.")
@click.option("--isolation", type=click.Choice(["container", "sandbox", "vm"]), help="How much it is kept apart.")
@click.option("--runtime", metavar="RUNTIME", help="What it runs with; else as its isolation says.")
@click.option("--time-limit", type=SPAN, metavar="DURATION", help="It ends after so long, whatever it does (default 1h).")
@click.option(
    "--idle-limit", type=SPAN, metavar="DURATION", help="It ends when no command or copy was under way in it for so long."
)
@click.option("--snapshot", metavar="DIGEST", help="Go on from this snapshot, on the node of --node.")
@click.option("--node", metavar="NODE", help="The node that it must be on.")
@click.option("--env", "-e", multiple=True, metavar="NAME=VALUE", help="Set a variable (not for secrets).")
@click.argument("argv", nargs=-1, type=click.UNPROCESSED, metavar="[-- COMMAND…]")
async def create(
    session: Session,
    name: str,
    template: str | None,
    file: Path | None,
    image: str | None,
    isolation: str | None,
    runtime: str | None,
    time_limit: Seconds | None,
    idle_limit: Seconds | None,
    snapshot: str | None,
    node: str | None,
    env: tuple[str, ...],
    argv: tuple[str, ...],
) -> None:
    """Make a sandbox, and wait until it runs, saying why it does not yet. Without a command it does nothing, and needs a shell in
    the image."""
    made: dict[str, Any] = {"image": image, "isolation": isolation, "runtime": runtime}
    limits = {"deadline": time_limit, "idle_limit": idle_limit}
    if template is None:
        spec = sandbox_spec(session, name, file, made | limits, env, argv, snapshot=snapshot, node=node)
        async with session.client() as client:
            if node:
                await client.node(node)  # one that is not there would be waited for
            await _said(session, client, await client.create_job(spec))
        return
    others = {"file": file, **made, "snapshot": snapshot, "node": node, "command": argv}
    for field, value in others.items():
        if value:
            raise Invalid(f"--template: {field} is as the template says", field=field, mend="leave one of the two out")
    await _take(session, name, template, limits, env)


async def _take(session: Session, name: str, template: str, limits: dict[str, Seconds | None], env: tuple[str, ...]) -> None:
    from atoll.cli.execute import variables
    from atoll.model import codec
    from atoll.model.views import TakeRequest

    said = {key: value for key, value in limits.items() if value is not None}
    wish = codec.convert({"name": name, "env": variables(env), **said}, TakeRequest)
    async with session.client() as client:
        await _said(session, client, await client.take_sandbox(session.project, template, wish))


def sandbox_spec(
    session: Session,
    name: str,
    file: Path | None,
    given: Mapping[str, str | Seconds | None],
    env: tuple[str, ...],
    argv: tuple[str, ...],
    *,
    snapshot: str | None,
    node: str | None,
) -> JobSpec:
    """Return the spec of a sandbox, or of a template of them, from what a person has `given`. Raises Invalid."""
    from atoll.cli import spec_file
    from atoll.cli.execute import variables
    from atoll.model.spec import JobSpec
    from atoll.sdk.sandboxes import KEEPS_RUNNING, from_snapshot

    if snapshot and not node:
        raise Invalid("--snapshot: a snapshot is on one node", field="node", mend="pass --node, as the snapshot said")
    data: dict[str, Any] = spec_file.read(file) if file is not None else {}
    data |= {key: value for key, value in given.items() if value is not None} | {"name": name, "sandbox": True}
    data.setdefault("deadline", "1h")
    if "pool" in data:
        data["pool"] = int(data["pool"])
    if argv or not data.get("command"):
        data["command"] = list(argv or KEEPS_RUNNING)
    if env:
        data["env"] = {**data.get("env", {}), **variables(env)}
    if node:
        rules = [rule for rule in data.get("placement", {}).get("constraints", ()) if rule.get("label") != "node"]
        data["placement"] = {**data.get("placement", {}), "constraints": [*rules, {"label": "node", "value": node}]}
    if session.project_given or "project" not in data:
        data["project"] = session.project
    spec = spec_file.parse(data, JobSpec, file)
    return from_snapshot(spec, snapshot, node) if snapshot and node else spec


async def _said(session: Session, client: Client, view: JobView) -> None:
    """Wait until the sandbox can be worked in, and say so."""
    from rich.markup import escape

    from atoll.sdk.sandboxes import running

    name = view.job.name
    if session.json and view.instance:
        session.output.json(view)
        return

    def waits(why: str) -> None:
        session.output.say(f"{name} waits: {escape(why)}")

    with session.output.err.status(f"{name} starts"):
        instance = await running(client, view.job.project, name, deadline_s=START_S_MAX, told=waits)
    if session.json:
        session.output.json(await client.job(view.job.project, name))
        return
    where = f"on {instance.node}; work in it with: atoll sandbox exec {name} -- COMMAND"
    session.output.say(f"[green]✓[/] sandbox {name} runs {where}")


@command(example="atoll sandbox list", name="list")
async def list_sandboxes(session: Session) -> None:
    """List the project's sandboxes."""
    from atoll.cli.output import short_image
    from atoll.model import codec
    from atoll.sdk.sandboxes import paused_of, sandboxes

    async with session.client() as client:
        views = await sandboxes(client, session.project)
        paused = await paused_of(client, session.project) if views else set()
    if session.json:
        session.output.json([{**codec.to_plain(view), "paused": view.job.name in paused} for view in views])
        return
    rows = [
        (
            view.job.name,
            "paused" if view.job.name in paused else str(view.status.phase) if view.status else "pending",
            short_image(view.job.spec.image),
            view.status.message if view.status else "",
        )
        for view in views
    ]
    session.output.table(("SANDBOX", "STATE", "IMAGE~", "NOTE"), rows, empty="no sandboxes; make one with: atoll sandbox create")


@command(example="atoll sandbox pause try")
@click.argument("name", metavar="SANDBOX")
async def pause(session: Session, name: str) -> None:
    """Have a sandbox stand still: it takes no processor time, and keeps its memory."""
    await _hold(session, name, "pause")


@command(example="atoll sandbox resume try")
@click.argument("name", metavar="SANDBOX")
async def resume(session: Session, name: str) -> None:
    """Let a sandbox go on that was paused."""
    await _hold(session, name, "resume")


@command(example="atoll sandbox snapshot try")
@click.argument("name", metavar="SANDBOX")
async def snapshot(session: Session, name: str) -> None:
    """Write a sandbox down on its node, memory and files; it goes on."""
    await _hold(session, name, "snapshot")


async def _hold(session: Session, name: str, what: str) -> None:
    from atoll.sdk.sandboxes import hold

    async with session.client() as client:
        held = await hold(client, session.project, name, what)
        spec = (await client.job(session.project, name)).job.spec if held.snapshot is not None else None
    if session.json:
        session.output.json(held)
    else:
        session.output.say(f"[green]✓[/] {_words(name, held, spec)}")


def _words(name: str, held: Held, spec: JobSpec | None) -> str:
    if held.snapshot is None or spec is None:
        return f"sandbox {name} {'is paused' if held.paused else 'goes on'}"
    from atoll.model.units import format_bytes

    digest, size = held.snapshot.digest, format_bytes(held.snapshot.stored_bytes)
    return f"{digest} ({size} on {held.node}); go on from it:\n  {how_to_go_on(spec, digest, held.node)}"


def how_to_go_on(spec: JobSpec, digest: str, node: str) -> str:
    """Return the command that makes a sandbox from a snapshot of one with `spec`: what it is made of must be the same."""
    from atoll.model.spec import Isolation, Resources

    words = ["atoll sandbox create NEW", f"--snapshot {digest}", f"--node {node}", f"--image {spec.image}"]
    if spec.isolation is not Isolation.CONTAINER:
        words.append(f"--isolation {spec.isolation}")
    if spec.runtime is not None:
        words.append(f"--runtime {spec.runtime}")
    if spec.resources != Resources():
        words.append("--file SPEC  (with the same resources)")
    return " ".join(words)


@command(example="atoll sandbox snapshots")
@click.option("--node", metavar="NODE", help="Only those on this node.")
async def snapshots(session: Session, node: str | None) -> None:
    """List the project's snapshots. Each is on one node, and the longest unused goes when there are too many."""
    from atoll.cli.output import age
    from atoll.model.units import format_bytes

    async with session.client() as client:
        found = await client.snapshots(session.project, node)
    if session.json:
        session.output.json(found)
        return
    rows = [
        (view.digest, view.of, view.runtime, view.node, format_bytes(view.stored_bytes), age(view.taken_at), age(view.used_at))
        for view in found.snapshots
    ]
    columns = ("SNAPSHOT", "OF", "RUNTIME", "NODE", "SIZE>", "TAKEN>", "USED>")
    session.output.table(columns, rows, empty="no snapshots; take one with: atoll sandbox snapshot SANDBOX")
    if found.silent:
        session.output.say(f"[yellow]did not answer[/]: {', '.join(found.silent)}")


@command(example="atoll sandbox rm-snapshot sha256:4f… --node n1", name="rm-snapshot")
@click.argument("digest", metavar="SNAPSHOT")
@click.option("--node", metavar="NODE", help="The node that it is on; else all are asked.")
async def remove_snapshot(session: Session, digest: str, node: str | None) -> None:
    """Remove a snapshot; the beginning of its digest is enough. Sandboxes that went on from it go on."""
    from atoll.model.errors import NotFound

    wanted = digest.removeprefix("sha256:")
    async with session.client() as client:
        held = (await client.snapshots(session.project, node)).snapshots
        found = [view for view in held if view.digest.removeprefix("sha256:").startswith(wanted)]
        if not found or not wanted:
            raise NotFound(f"no snapshot {digest[:19]}", mend="'atoll sandbox snapshots' lists them")
        if len({view.digest for view in found}) > 1:
            raise Invalid(f"{digest[:19]}: {len(found)} snapshots begin so", field="digest", mend="give more of it")
        for view in found:
            await client.remove_snapshot(session.project, view.digest, view.node)
    if session.json:
        session.output.json({"removed": found[0].digest})
    else:
        session.output.say(f"[green]✓[/] snapshot {found[0].digest[:19]} is removed from {', '.join(view.node for view in found)}")


@command(example="atoll sandbox fork try other")
@click.argument("name", metavar="SANDBOX")
@click.argument("new", metavar="NEW")
async def fork(session: Session, name: str, new: str) -> None:
    """Make a second sandbox that goes on where the first one is now, memory and files; the first one goes on too."""
    from atoll.sdk.sandboxes import fork as forked

    async with session.client() as client:
        await _said(session, client, await forked(client, session.project, name, new))


@command(example="atoll sandbox rm try", name="rm")
@click.argument("name", metavar="SANDBOX")
async def remove(session: Session, name: str) -> None:
    """End a sandbox; all that is in it is lost, and its name is free again."""
    from atoll.sdk.sandboxes import remove as removed

    async with session.client() as client:
        with session.output.err.status(f"{name} ends"):
            await removed(client, session.project, name, deadline_s=END_S_MAX)
    if session.json:
        session.output.json({"removed": name})
    else:
        session.output.say(f"[green]✓[/] sandbox {name} is gone")


_OWN = (create, list_sandboxes, pause, resume, snapshot, snapshots, remove_snapshot, fork, remove)
for _each in (*_OWN, execute_sandbox, copy_sandbox):
    sandbox.add_command(_each)
