"""`atoll jobs`: work that runs to its end."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from atoll.cli import names
from atoll.cli.apps import confirm
from atoll.cli.session import Session, command, group
from atoll.model.errors import AtollError, Invalid

if TYPE_CHECKING:
    from atoll.model.views import JobView
    from atoll.sdk.client import Client

POLL_S = 2.0
"""How often a job is looked at when its watch says nothing."""
RUNS_NAMED = 4
"""Earlier runs of a schedule that are named beside its latest one."""
LAST_LINES_S = 10.0
"""The longest wait for the rest of its log when a job has ended."""


@group(example="atoll jobs run -f job.toml\natoll jobs run --image HOST/tool:1 --name hello -- echo hello\natoll jobs")
def jobs() -> None:
    """Run work that ends: once, as an array of indices, or again and again by a schedule."""


class JobFailed(AtollError):
    """The job ended, and not well."""

    code = "job-failed"


@command(example="atoll jobs run -f job.toml\natoll jobs run --image HOST/tool:1 --name sum -- ./sum --all", name="run")
@click.option("--file", "-f", "file", type=click.Path(path_type=Path), help="The job's spec: TOML, JSON or YAML.")
@click.option("--image", metavar="REF", help="The image to run.")
@click.option("--name", metavar="NAME", help="The job's name; else the spec's.")
@click.option("--env", "-e", multiple=True, metavar="NAME=VALUE", help="Set a variable (not for secrets).")
@click.option("--completions", type=click.IntRange(min=1), help="How many indices must complete.")
@click.option("--parallelism", type=click.IntRange(min=1), help="How many run at a time.")
@click.option("--detach", "-d", is_flag=True, help="Return at once; do not wait for its end.")
@click.argument("argv", nargs=-1, type=click.UNPROCESSED, metavar="[-- COMMAND…]")
async def run(
    session: Session,
    file: Path | None,
    image: str | None,
    name: str | None,
    env: tuple[str, ...],
    completions: int | None,
    parallelism: int | None,
    detach: bool,
    argv: tuple[str, ...],
) -> None:
    """Run a job and follow its log to its end; exits 1 when it fails. Ctrl-C leaves it running.

    A spec with a `schedule` is kept instead, and runs at its times; again with other words it changes the schedule.
    """
    from atoll.cli import spec_file
    from atoll.cli.execute import variables
    from atoll.model.spec import JobSpec

    data = spec_file.read(file) if file is not None else {}
    given: dict[str, Any] = {"image": image, "name": name, "completions": completions, "parallelism": parallelism}
    data |= {key: value for key, value in given.items() if value is not None}
    if argv:
        data["command"] = list(argv)
    if env:
        data["env"] = {**data.get("env", {}), **variables(env)}
    if session.project_given or "project" not in data:
        data["project"] = session.project
    if "name" not in data:
        raise Invalid("name: missing", field="name", mend="pass --name, or a spec with --file")
    spec = spec_file.parse(data, JobSpec, file)
    session.use_project(spec.project)
    async with session.client() as client:
        if spec.schedule is not None:
            _said_schedule(session, await client.put_job(spec))
            return
        view = await client.create_job(spec)
        if not detach:
            view = await _follow(session, client, view)
    if session.json:
        session.output.json(view)
    elif detach:
        session.output.say(f"{spec.name} is started; follow it with: atoll jobs logs -f {spec.name}")
    _finish(session, view, detach=detach)


def _said_schedule(session: Session, view: JobView) -> None:
    if session.json:
        session.output.json(view)
        return
    from atoll.cli.output import clock
    from atoll.model.cron import tick_after

    job = view.job
    following = tick_after(job.spec.schedule or "", job.spec.timezone, time.time())
    if job.suspended:
        session.output.say(f"[green]✓[/] {job.name} is suspended; make runs again with: atoll jobs resume {job.name}")
    else:
        at = f", next at {clock(following)}" if following is not None else ""
        session.output.say(f"[green]✓[/] {job.name} runs at {job.spec.schedule} ({job.spec.timezone}){at}")


@command(example="atoll jobs suspend report")
@names.argument("name", "jobs", metavar="JOB")
async def suspend(session: Session, name: str) -> None:
    """Have a schedule make no runs for now; what runs goes on."""
    async with session.client() as client:
        _said_schedule(session, await client.suspend_job(session.project, name))


@command(example="atoll jobs resume report")
@names.argument("name", "jobs", metavar="JOB")
async def resume(session: Session, name: str) -> None:
    """Have a schedule make runs again; times that came meanwhile are not caught up."""
    async with session.client() as client:
        _said_schedule(session, await client.resume_job(session.project, name))


@command(example="atoll jobs trigger report")
@names.argument("name", "jobs", metavar="JOB")
@click.option("--detach", "-d", is_flag=True, help="Return at once; do not wait for its end.")
async def trigger(session: Session, name: str, detach: bool) -> None:
    """Make a run of a schedule now and follow its log to its end; exits 1 when it fails."""
    async with session.client() as client:
        view = await client.trigger_job(session.project, name)
        if not detach:
            view = await _follow(session, client, view)
    if session.json:
        session.output.json(view)
    elif detach:
        session.output.say(f"{view.job.name} is started; follow it with: atoll jobs logs -f {view.job.name}")
    _finish(session, view, detach=detach)


def _finish(session: Session, view: JobView, *, detach: bool) -> None:
    status = view.status
    if detach or status is None:
        return
    if status.phase != "succeeded":
        why = f": {status.message}" if status.message else ""
        raise JobFailed(f"job {view.job.name} {status.phase}{why}", mend=f"see all of it: atoll jobs show {view.job.name}")
    if not session.json:
        from atoll.model.units import format_seconds

        took = (status.finished_at or 0) - view.job.created_at
        session.output.say(f"[green]✓[/] {view.job.name} succeeded after {format_seconds(max(0.0, took))}")


async def _follow(session: Session, client: Client, view: JobView) -> JobView:
    """Print the job's lines as they come (not with --json) and return it when it has ended."""
    from atoll.cli.logs import print_logs

    name, project = view.job.name, view.job.project
    printer: asyncio.Task[None] | None = None
    if not session.json:
        several = view.job.spec.completions > 1
        printer = asyncio.ensure_future(print_logs(session, client, name, follow=True, prefix=several))
    try:
        while view.status is None or not view.status.phase.final:
            await _change(client, project, name)
            view = await client.job(project, name)
        if printer is not None:
            await asyncio.wait((printer,), timeout=LAST_LINES_S)
    except asyncio.CancelledError:
        session.output.say(f"\n[yellow]interrupted[/]: job {name} goes on; see: atoll jobs show {name}")
        raise
    finally:
        if printer is not None:
            printer.cancel()
            await asyncio.gather(printer, return_exceptions=True)
    return view


async def _change(client: Client, project: str, name: str) -> None:
    """Return when something about the job has changed, or after `POLL_S`."""
    try:
        async with asyncio.timeout(POLL_S):
            seen = False
            async for line in client.watch(("job-statuses", "statuses"), project=project, bookmarks=True):
                if line.kind is None:
                    seen = True
                elif seen and (line.key or "").partition("/")[2].startswith(name):
                    return
    except TimeoutError:
        return


@command(name="list", example="atoll jobs list")
async def list_jobs(session: Session) -> None:
    """List the jobs of the project."""
    async with session.client() as client:
        views = await client.jobs(session.project)
    if session.json:
        session.output.json(views)
        return
    session.output.table(COLUMNS, [_row(view) for view in views], empty=f"no jobs in project '{session.project}'")


COLUMNS = ("JOB", "STATE", "DONE>", "ACTIVE>?", "FAILED TRIES>?", "AGE>?", "TOOK>?", "NOTE")


def _row(view: JobView) -> tuple[Any, ...]:
    from atoll.cli.output import age, dim, state
    from atoll.model.units import format_seconds

    job, status = view.job, view.status
    if job.spec.schedule is not None:
        return _schedule_row(view)
    done = len(status.succeeded) if status else 0
    failures = sum(status.failures.values()) if status else 0
    took = format_seconds(status.finished_at - (status.started_at or job.created_at)) if status and status.finished_at else "–"
    return (
        job.name,
        state("template" if job.spec.pool is not None else str(status.phase) if status else "pending"),
        f"{done}/{job.spec.completions}" if job.spec.pool is None else "–",
        status.active if status else 0,
        failures or "",
        age(job.created_at),
        took,
        dim(status.message if status else ""),
    )


def _schedule_row(view: JobView) -> tuple[Any, ...]:
    from atoll.cli.output import age, clock, dim, state

    job, status = view.job, view.status
    parts = [f"{job.spec.schedule} {job.spec.timezone}"]
    if status is not None:
        parts += [f"next at {clock(status.next_at)}"] if status.next_at else []
        parts += [f"{status.missed} missed"] if status.missed else []
        parts += [f"{status.skipped} skipped"] if status.skipped else []
    word = "suspended" if job.suspended else "scheduled"
    active = status.active if status else 0
    return (job.name, state(word), "–", active, "", age(job.created_at), "–", dim(", ".join(parts)))


@command(example="atoll jobs show sum")
@names.argument("name", "jobs", metavar="JOB")
async def show(session: Session, name: str) -> None:
    """Show one job, its instances and its events."""
    async with session.client() as client:
        view = await client.job(session.project, name)
        runs = [each for each in await client.jobs(session.project) if each.job.parent == name] if view.job.spec.schedule else []
        instances, events = await asyncio.gather(
            client.instances(session.project, job=name), client.events(session.project, subject=f"job/{name}", limit=8)
        )
    if session.json:
        session.output.json({"job": view, "instances": instances, "events": events.items})
        return
    from atoll.cli import events as event_lines
    from atoll.cli import instances as instance_lines

    session.output.table(COLUMNS, [_row(view), *(_row(run) for run in sorted(runs, key=lambda run: -run.job.created_at))])
    if view.job.spec.schedule is None:
        session.output.print("")
        session.output.table(*instance_lines.lines(instances), empty="no instances")
    if events.items:
        session.output.print("")
        session.output.table(event_lines.COLUMNS, [event_lines.row(each) for each in reversed(events.items)])


@command(name="logs", example="atoll jobs logs sum\natoll jobs logs -f sum")
@names.argument("name", "jobs", metavar="JOB")
@click.option("--follow", "-f", is_flag=True, help="Go on until the job has ended.")
@click.option("--tail", "-n", type=click.IntRange(min=0), metavar="N", help="Only the last N lines.")
async def logs(session: Session, name: str, follow: bool, tail: int | None) -> None:
    """Print what a job's instances wrote; of one with a schedule those of its latest run."""
    from atoll.cli.logs import print_logs

    async with session.client() as client:
        view = await client.job(session.project, name)
        if view.job.spec.schedule is not None:
            name = await _latest_run(session, client, view)
        await print_logs(session, client, name, follow=follow, tail=tail)


async def _latest_run(session: Session, client: Client, view: JobView) -> str:
    """Return the latest run of a schedule, and name the others. Raises NotFound: there is none yet."""
    from atoll.cli.output import age
    from atoll.model.errors import NotFound

    job = view.job
    runs = sorted(
        (each for each in await client.jobs(session.project) if each.job.parent == job.name), key=lambda run: -run.job.created_at
    )
    if not runs:
        raise NotFound(
            f"'{job.name}' runs by a schedule, and has had no run yet", mend=f"make one now: atoll jobs trigger {job.name}"
        )
    last, *others = runs
    rest = f"; others: {', '.join(run.job.name for run in others[:RUNS_NAMED])}" if others else ""
    session.output.say(f"[dim]{last.job.name}, the latest run of {job.name}, {age(last.job.created_at)} ago{rest}[/]")
    return last.job.name


@command(example="atoll jobs cancel sum")
@names.argument("name", "jobs", metavar="JOB")
async def cancel(session: Session, name: str) -> None:
    """Stop what runs of a job; it ends as cancelled."""
    async with session.client() as client:
        view = await client.cancel_job(session.project, name)
    if session.json:
        session.output.json(view)
    else:
        session.output.say(f"[green]✓[/] {name} is cancelled")


@command(example="atoll jobs delete sum --yes")
@names.argument("name", "jobs", metavar="JOB")
@click.option("--yes", "-y", is_flag=True, help="Do not ask.")
async def delete(session: Session, name: str, yes: bool) -> None:
    """Delete a job with its instances and their logs."""
    async with session.client() as client:
        await client.job(session.project, name)
        if not yes:
            confirm(f"Delete job '{name}' and its logs?")
        await client.delete_job(session.project, name)
    if session.json:
        session.output.json({"deleted": name})
    else:
        session.output.say(f"[green]✓[/] {name} is deleted")


for _each in (run, list_jobs, show, logs, trigger, suspend, resume, cancel, delete):
    jobs.add_command(_each)
