"""Sandboxes from Python: each is a job of one instance that is made to be worked in; what only they can do is here."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from msgspec.structs import replace

from atoll.model.errors import Conflict, DeadlineExceeded, NotFound
from atoll.model.records import Instance
from atoll.model.spec import Constraint, JobSpec
from atoll.model.states import Phase
from atoll.model.streams import Held
from atoll.model.views import InstanceView, JobView
from atoll.sdk.client import Client

KEEPS_RUNNING = ("sh", "-c", "trap 'exit 0' TERM INT; while :; do sleep 3600 & wait; done")
"""What a sandbox runs when it is given nothing: it needs a shell and `sleep` in the image."""


STEP_S = 0.2


async def sandboxes(client: Client, project: str) -> list[JobView]:
    return [view for view in await client.jobs(project) if view.job.spec.sandbox and view.job.spec.pool is None]


async def templates(client: Client, project: str) -> list[JobView]:
    return [view for view in await client.jobs(project) if view.job.spec.pool is not None]


async def paused_of(client: Client, project: str) -> set[str]:
    """Return the names of the project's sandboxes that stand still."""
    found = await client.instances(project)
    return {each.instance.owner for each in found if each.status is not None and each.status.paused}


async def sandbox_of(client: Client, project: str, name: str) -> JobView:
    """Return a sandbox; an app may have the same name. Raises NotFound for a job or template, too."""
    view = await _job(client, project, name, "sandbox")
    if view.job.spec.pool is not None:
        raise NotFound(f"'{name}' is a template, and no sandbox", mend=f"take one: atoll sandbox create NAME --template {name}")
    if not view.job.spec.sandbox:
        raise NotFound(f"'{name}' is a job, and no sandbox", mend="'atoll sandbox list' lists them")
    return view


async def template_of(client: Client, project: str, name: str) -> JobView:
    """Return a template. Raises NotFound for a sandbox or job, too."""
    view = await _job(client, project, name, "template")
    if view.job.spec.pool is None:
        what = "sandbox" if view.job.spec.sandbox else "job"
        raise NotFound(f"'{name}' is a {what}, and no template", mend="'atoll template list' lists them")
    return view


async def _job(client: Client, project: str, name: str, what: str) -> JobView:
    """Return a job. Where there is none, raise NotFound in the words of who looks for a `what`."""
    try:
        return await client.job(project, name)
    except NotFound:
        await client.instances(project, job=name)  # raises for a project that is not there
        raise NotFound(f"no {what} '{name[:60]}' in project '{project}'", mend=f"'atoll {what} list' lists them") from None


async def instance_of(client: Client, project: str, name: str) -> Instance:
    """Return a sandbox's instance. Raises NotFound, Conflict (it has none that runs)."""
    view = await sandbox_of(client, project, name)
    for found in await client.instances(project, job=name):
        if found.status is not None and found.status.phase.live:
            return found.instance
    if view.status is not None and view.status.phase.final:
        raise _ended(view)
    raise Conflict(f"sandbox '{name}' does not run", mend=f"see why: atoll jobs show {name}")


async def running(
    client: Client, project: str, name: str, *, deadline_s: float, told: Callable[[str], None] | None = None
) -> Instance:
    """Return a sandbox's instance once it runs; `told` hears why it does not yet, whenever that changes.

    Raises Conflict for one that ended, DeadlineExceeded with why it waits.
    """
    why, mend = "", ""
    try:
        async with asyncio.timeout(deadline_s):
            while True:
                view = await client.job(project, name)
                if view.status is not None and view.status.phase.final:
                    raise _ended(view)
                before = why
                for found in await client.instances(project, job=name):
                    if found.status is not None and found.status.phase is Phase.RUNNING:
                        return found.instance
                    why, mend = _waits(found)
                if why and why != before and told is not None:
                    told(why)
                await asyncio.sleep(STEP_S)
    except TimeoutError:
        message = f"sandbox '{name}' does not run after {deadline_s:g} s" + (f": {why}" if why else "")
        goes_on = f"it goes on starting; see: atoll jobs show {name}; or end it: atoll sandbox rm {name}"
        raise DeadlineExceeded(message, mend=f"{mend}; {goes_on}" if mend else goes_on) from None


def _waits(view: InstanceView) -> tuple[str, str]:
    """Return why an instance does not run yet, and what would help."""
    rejection = view.instance.rejection
    if rejection is not None and view.instance.node is None:
        return rejection.message, rejection.mend
    return (view.status.message if view.status is not None else ""), ""


def _ended(view: JobView) -> Conflict:
    name, why = view.job.name, view.status.message if view.status is not None else ""
    return Conflict(f"sandbox '{name}' has ended" + (f": {why}" if why else ""), mend=f"see why: atoll jobs show {name}")


async def remove(client: Client, project: str, name: str, *, deadline_s: float) -> None:
    """End a sandbox and forget it, so that its name is free. Raises NotFound, DeadlineExceeded: it ends, and is forgotten a day
    later."""
    await sandbox_of(client, project, name)
    await client.cancel_job(project, name)
    try:
        async with asyncio.timeout(deadline_s):
            while True:
                try:
                    return await client.delete_job(project, name)
                except Conflict:  # it has not ended yet
                    await asyncio.sleep(STEP_S)
    except TimeoutError:
        raise DeadlineExceeded(f"sandbox '{name}' has not ended within {deadline_s:g} s", mend="say it again later") from None


async def hold(client: Client, project: str, name: str, what: str) -> Held:
    """Pause, resume or snapshot a sandbox."""
    return await client.hold_instance(project, (await instance_of(client, project, name)).id, what)


async def fork(client: Client, project: str, name: str, new: str) -> JobView:
    """Make the sandbox `new`, which goes on where `name` is now: a snapshot of it, and a sandbox from that on the same node.

    Not atomic: if the second fails, the snapshot is left, and collected by its node in time.
    """
    spec = (await sandbox_of(client, project, name)).job.spec
    held = await hold(client, project, name, "snapshot")
    assert held.snapshot is not None  # noqa: S101 - what a snapshot answers
    return await client.create_job(from_snapshot(replace(spec, name=new), held.snapshot.digest, held.node))


def from_snapshot(spec: JobSpec, digest: str, node: str) -> JobSpec:
    """Return the spec of a sandbox that goes on from a snapshot, which is on `node`."""
    kept = tuple(rule for rule in spec.placement.constraints if rule.label != "node")
    there = replace(spec.placement, constraints=(*kept, Constraint(label="node", value=node)))
    return replace(spec, sandbox=True, snapshot=digest, placement=there)
