"""`atoll ps`, and how a name on the command line finds its instances."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from atoll.cli import names
from atoll.cli.session import Session, command
from atoll.model.errors import NotFound

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from atoll.model.views import InstanceView
    from atoll.sdk.client import Client


@command(example="atoll ps\natoll ps hello --json | jq -r '.[].instance.id'")
@names.argument("owner", "running", required=False, metavar="[APP|JOB]")
async def ps(session: Session, owner: str | None) -> None:
    """List the instances of the project, or of one app or job."""
    async with session.client() as client:
        views = await (client.instances(session.project) if owner is None else of_owner(client, session.project, owner))
    if session.json:
        session.output.json(views)
        return
    session.output.table(*lines(views), empty="no instances")


COLUMNS = ("INSTANCE", "OWNER?", "RELEASE>?", "STATE", "RESTARTS>?", "NODE", "GPU?", "ADDRESS?", "RUNTIME?", "AGE>?", "NOTE")


def lines(views: Sequence[InstanceView], *, leave_out: Collection[str] = ()) -> tuple[tuple[str, ...], list[tuple[Any, ...]]]:
    """Return headings and lines of a table of instances; the column for GPUs is there only where one has any."""
    if not any(view.instance.gpus for view in views):
        leave_out = {*leave_out, "GPU?"}
    kept = [at for at, heading in enumerate(COLUMNS) if heading not in leave_out]
    rows = [row(view) for view in views]
    return tuple(COLUMNS[at] for at in kept), [tuple(line[at] for at in kept) for line in rows]


def row(view: InstanceView) -> tuple[Any, ...]:
    """Return an instance's line in a table."""
    from atoll.cli.gpus import grants_words
    from atoll.cli.output import age, dim, state

    instance, status = view.instance, view.status
    owner = f"{instance.owner}" if instance.release else f"{instance.owner}[{instance.index}]"
    return (
        instance.id,
        owner,
        instance.release or "",
        state(phase_word(view)),
        status.restarts if status else 0,
        instance.node or "–",
        grants_words(instance.gpus) or "–",
        (status.address if status else None) or "–",
        instance.runtime or "–",
        age(instance.created_at),
        dim(note(view)),
    )


def phase_word(view: InstanceView) -> str:
    """Return the one word that says most about how an instance stands."""
    if view.status is None:
        return "pending"
    if view.status.phase == "running":
        if view.instance.desired == "drain":
            return "draining"
        if view.status.parked:
            return "parked" if view.instance.standby else "waking"
        if view.instance.standby:
            return "standby"
        if view.status.paused:
            return "paused"
        return "ready" if view.status.ready else "running" if view.instance.release == 0 else "starting"
    return str(view.status.phase)


def note(view: InstanceView) -> str:
    """Return why it stands so, in words, where that is not plain."""
    instance, status = view.instance, view.status
    if instance.rejection is not None and instance.node is None:
        return f"{instance.rejection.message}; {instance.rejection.mend}" if instance.rejection.mend else instance.rejection.message
    if status is None:
        return "waits for a node" if instance.node is None else "assigned"
    if status.message:
        return status.message
    if status.exit is not None and status.phase != "running":
        return exit_words(status.exit.code, status.exit.signal, oom=status.exit.oom)
    return instance.reason


def exit_words(code: int, signal: str | None, *, oom: bool) -> str:
    """Return how a process ended, in words."""
    if oom:
        return "killed: out of memory; raise resources.memory"
    if signal:
        return f"killed by {signal}"
    return f"exited with status {code}"


async def of_owner(client: Client, project: str, owner: str) -> list[InstanceView]:
    """Return the instances of an app or job. Raises NotFound when there is neither."""
    found = await client.instances(project, app=owner)
    if found:
        return found
    found = await client.instances(project, job=owner)
    if found:
        return found
    try:
        await client.app(project, owner)
    except NotFound:
        try:
            await client.job(project, owner)
        except NotFound:
            raise _unknown(owner, project) from None
    return []


async def named(client: Client, project: str, name: str) -> list[InstanceView]:
    """Return what `name` stands for: all instances of an app or job, or the one instance with that id. Raises NotFound."""
    try:
        return await of_owner(client, project, name)
    except NotFound:
        try:
            return [await client.instance(project, name)]
        except NotFound:
            raise _unknown(name, project) from None


async def one_running(client: Client, project: str, name: str) -> InstanceView:
    """Return a running instance that `name` stands for, a ready one first. Raises NotFound with what is there instead."""
    views = await named(client, project, name)
    running = [view for view in views if view.status is not None and view.status.phase == "running"]
    running.sort(key=lambda view: (view.instance.standby, not (view.status and view.status.ready), view.instance.id))
    if running:
        return running[0]
    if views:
        stands = ", ".join(f"{view.instance.id} is {phase_word(view)}" for view in views[:3])
        first = views[0].instance
        look = f"atoll {'jobs show' if first.owner_kind == 'job' else 'status'} {first.owner}"
        raise NotFound(f"'{name}' has no running instance: {stands}", mend=f"look why: {look}")
    raise NotFound(f"'{name}' has no instances", mend=f"start some: atoll scale {name} 1")


def _unknown(name: str, project: str) -> NotFound:
    return NotFound(
        f"no app, job or instance '{name}' in project '{project}'", mend="`atoll apps` and `atoll ps` list what there is"
    )
