"""`atoll rollout`: how a new release takes the place of the old one, and a hand on it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

import click

from atoll.cli import names
from atoll.cli.session import Session, command, group

if TYPE_CHECKING:
    from rich.console import Group, RenderableType
    from rich.text import Text

    from atoll.model.rollouts import RolloutStatus
    from atoll.model.views import AppView, ReleaseView, RolloutView
    from atoll.sdk.client import Client

WATCH_S = 1.0
SHARE_CELLS = 20
NEW, OLD, OTHER = "cyan", "bright_black", "yellow"
"""Colours of the releases, as much as they say: the new one, the one that it replaces, any other."""


@group(example="atoll rollout status web --watch\natoll rollout promote web")
def rollout() -> None:
    """Show how a new release replaces the old one; pause, resume, promote, abort or undo it."""


@command(example="atoll rollout status web\natoll rollout status web --watch   # until it has ended; status 1 if it went back")
@names.argument("app", "apps")
@click.option("--watch", "-w", is_flag=True, help="Go on until it has ended or waits for a person.")
async def status(session: Session, app: str, watch: bool) -> None:
    """Show the releases of an app side by side: share of the requests, instances, errors, latency."""
    from atoll.cli.progress import RolloutFailed
    from atoll.model.rollouts import RolloutPhase

    async with session.client() as client:
        view = await _watch(session, client, app) if watch else await client.rollout(session.project, app)
    if session.json:
        session.output.json(view)
    else:
        session.output.print(picture(view, time.time()))
    if watch and view.status is not None and view.status.phase is RolloutPhase.REVERTED:
        raise RolloutFailed(
            f"release {view.status.release} was taken back: {view.status.message}",
            mend=f"correct it and deploy again; {_retry(app)}",
        )


async def _watch(session: Session, client: Client, app: str) -> RolloutView:
    """Follow the rollout on stderr; without a terminal nothing is shown until the end."""
    from rich.live import Live

    from atoll.model.rollouts import RolloutPhase

    err = session.output.err
    live = Live(console=err, refresh_per_second=4, transient=True) if err.is_terminal else None
    if live is not None:
        live.start()
    try:
        while True:  # no deadline: whoever watches decides how long
            view = await client.rollout(session.project, app)
            if live is not None:
                live.update(picture(view, time.time()))
            if view.status is None or not view.status.phase.under_way or view.status.phase is RolloutPhase.WAITING:
                return view
            await asyncio.sleep(WATCH_S)
    finally:
        if live is not None:
            live.stop()


def _wish(name: str, help: str, done: str) -> click.Command:
    """Return the command that asks for one thing."""

    async def ask(session: Session, app: str) -> None:
        async with session.client() as client:
            call: Callable[[str, str], Awaitable[AppView]] = getattr(client, f"{name}_rollout")
            view = await call(session.project, app)
        if session.json:
            session.output.json(view)
        else:
            session.output.say(f"[green]✓[/] {done.format(app=app, release=view.app.release)}; see: atoll rollout status {app}")

    ask.__doc__ = help
    return command(name=name, example=f"atoll rollout {name} web")(names.argument("app", "apps")(ask))


for _command in (
    status,
    _wish(
        "pause", "Have a rollout stay where it is. A release that its analysis finds bad is taken back all the same.", "{app} stays"
    ),
    _wish(
        "resume",
        "Go on: after a pause, past a step that waits for a person, or from the beginning after a revert.",
        "release {release} of {app} goes on",
    ),
    _wish(
        "promote", "Give the new release all requests, past all steps and waits.", "release {release} of {app} gets all requests"
    ),
    _wish("abort", "Give the release before all requests again, at once.", "{app} goes back to the release before"),
    _wish(
        "undo",
        "Go back to what served before: at once while it is still there, else as atoll rollback does.",
        "{app} goes back to the release before",
    ),
):
    rollout.add_command(_command)


def picture(view: RolloutView, now: float) -> Group:
    """Return the rollout as people see it; `now` is in seconds since the epoch."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    from atoll.cli.output import state

    app, found = view.app, view.status
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim")
    grid.add_column(overflow="fold")
    grid.add_row("app", Text(f"{app.project}/{app.name}"))
    grid.add_row("rollout", Text(_headline(view)))
    if found is not None:
        word = str(found.phase)
        grid.add_row("state", state(word, _state_note(view, found, now)))
        if found.strategy == "canary" and found.phase != "reverted":
            grid.add_row("steps", _steps(view, found))
        if found.phase != "reverted" and (analysis := _analysis(view, found)) is not None:
            grid.add_row("analysis", analysis)
    elif view.app_status is not None:
        grid.add_row("state", state(str(view.app_status.phase), view.app_status.message))
    if view.preview is not None:
        grid.add_row("preview", Text(view.preview))
    parts: list[RenderableType] = [grid]
    if view.releases:
        parts += ["", releases(view)]
    if (hint := _hint(view)) is not None:
        parts += ["", Text(hint, style="dim")]
    return Group(*parts)


def releases(view: RolloutView) -> RenderableType:
    """Return the table of the releases, the newest first."""
    from atoll.cli.output import table

    rows = [_row(view, each) for each in view.releases]
    return table(("RELEASE", "SHARE OF REQUESTS", "READY>", "REQ/S>", "ERRORS>", "P50>", "P99>"), rows)


def _row(view: RolloutView, each: ReleaseView) -> tuple[Any, ...]:
    from rich.text import Text

    found = view.status
    serving = found.serving if found is not None else view.app.release
    role, colour = "", OTHER
    if each.release == view.app.release:
        taken_back = found is not None and found.phase == "reverted"
        role, colour = ("taken back", OTHER) if taken_back else ("new" if len(view.releases) > 1 else "", NEW)
    elif found is not None and each.release == found.stable:
        role, colour = "before", NEW if serving == found.stable else OLD
    share = _share(view, each)
    full = round(share * SHARE_CELLS) or (1 if share else 0)
    bar = Text.assemble(("█" * full, colour), ("░" * (SHARE_CELLS - full), "bright_black"), f" {100 * share:3.0f} %")
    if not each.requests:
        return (Text(f"{each.release} {role}".rstrip()), bar, f"{each.ready}/{each.instances}", "–", "–", "–", "–")
    rate = each.errors / each.requests
    errors = Text(f"{100 * rate:.1f} %", style="red" if rate >= 0.01 else "")
    return (
        Text(f"{each.release} {role}".rstrip()),
        bar,
        f"{each.ready}/{each.instances}",
        f"{each.per_second:.1f}",
        errors,
        _latency(each.latency_p50_s),
        _latency(each.latency_p99_s),
    )


def _share(view: RolloutView, each: ReleaseView) -> float:
    """Return a release's share of the requests, where it has no weight by its ready instances."""
    if each.weight is not None:
        return each.weight / 100
    ready = sum(one.ready for one in view.releases)
    return each.ready / ready if ready else 0.0


def _latency(seconds: float | None) -> str:
    if seconds is None:
        return "–"
    return f"{1000 * seconds:.0f} ms" if seconds < 10 else f"{seconds:.1f} s"


def _headline(view: RolloutView) -> str:
    app, found = view.app, view.status
    if found is None or found.stable == found.release:
        return f"release {app.release} ({app.spec.rollout.strategy})"
    return f"release {found.release} in place of {found.stable} ({found.strategy})"


def _state_note(view: RolloutView, found: RolloutStatus, now: float) -> str:
    from atoll.model.units import format_seconds

    rules = view.app.spec.rollout
    if found.message:
        return found.message
    steps = rules.steps
    if found.phase == "progressing" and found.strategy == "canary" and found.since and found.step < len(steps):
        pause = steps[found.step].pause
        if pause is not None:
            left = max(0.0, found.since + pause - now)
            return f"{found.weight} % of the requests for another {format_seconds(round(left))}"
    if found.phase == "keeping":
        left = max(0.0, found.since + rules.keep_old - now)
        return f"release {found.stable} is kept for another {format_seconds(round(left))}"
    return ""


def _steps(view: RolloutView, found: RolloutStatus) -> Text:
    from rich.text import Text

    from atoll.model.units import format_seconds

    text = Text()
    over = len(view.app.spec.rollout.steps) if found.phase in ("promoting", "complete") else found.step
    for index, step in enumerate(view.app.spec.rollout.steps):
        pause = "until resumed" if step.pause is None else format_seconds(step.pause)
        mark, style = ("✓", "green") if index < over else ("▶", "bold cyan") if index == over else ("○", "dim")
        text.append(f"{mark} {step.weight} % {pause}   ", style=style)
    done = found.phase == "complete"
    last = ("✓", "green") if done else ("▶", "bold cyan") if found.phase == "promoting" else ("○", "dim")
    return text.append(f"{last[0]} 100 %", style=last[1])


def _analysis(view: RolloutView, found: RolloutStatus) -> Text | None:
    from rich.text import Text

    rules = view.app.spec.rollout.analysis
    if rules is None:
        return None
    counted = f"{found.passes} good and {found.failures} bad intervals of this step, {rules.failures_max} forgiven"
    return Text(counted + (f"\n{found.verdict}" if found.verdict else "\nno verdict yet"), style="red" if found.failures else "")


def _retry(app: str) -> str:
    return f"try the same again: atoll rollout resume {app}"


def _hint(view: RolloutView) -> str | None:
    found, app = view.status, view.app.name
    if found is None:
        return None
    if found.phase == "reverted":
        return f"Correct it and deploy again, or {_retry(app)}"
    if found.phase == "waiting":
        return f"Go on: atoll rollout resume {app} · all at once: atoll rollout promote {app} · back: atoll rollout abort {app}"
    if found.phase.under_way:
        return f"Stay: atoll rollout pause {app} · all at once: atoll rollout promote {app} · back: atoll rollout abort {app}"
    if found.phase == "keeping":
        return f"Back at once: atoll rollout undo {app}"
    return None
