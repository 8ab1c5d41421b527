"""Following a rollout live: a table that changes on a terminal, one line per change elsewhere; both on stderr."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING

from atoll.cli import instances as lines
from atoll.cli.output import state, table
from atoll.cli.progress import KINDS, Progress, RolloutFailed, Verdict
from atoll.cli.session import Session
from atoll.model.errors import AtollError, NotFound
from atoll.model.rollouts import RolloutPhase
from atoll.model.streams import LogOptions
from atoll.model.units import format_seconds

if TYPE_CHECKING:
    from rich.console import Group

    from atoll.model.records import Event
    from atoll.model.views import AppView
    from atoll.sdk.client import Client

TICK_S = 0.25
"""How often is looked for what only time tells, such as an instance that finds no place."""
LOG_LINES = 20
"""Last lines of an instance that are shown when a rollout fails."""
GONE_S = 300.0
"""The longest wait for an app's last instance to end."""
REFUSED_S = 2.0
"""So long after a change of its routing every ingress has said what of it it leaves out."""
ROWS_MAX = 12
"""Instances in the live view; the rest are counted."""


async def follow_rollout(session: Session, client: Client, view: AppView) -> float:
    """Follow until all wanted instances are ready; return the seconds it took.

    Raises why it cannot come to that, after the last log lines were printed. An interrupt leaves the deployment running.
    """
    began = time.monotonic()
    progress = Progress(view)
    shown = _View(session, progress, began)
    try:
        with shown:
            verdict = await _until_verdict(client, view, progress, shown)
    except asyncio.CancelledError:
        session.output.say(f"\n[yellow]interrupted[/]: the rollout of {view.app.name} goes on; see: atoll status {view.app.name}")
        raise
    if verdict.error is not None:
        await _show_last_lines(session, client, verdict.error)
        raise verdict.error
    return time.monotonic() - began


async def _until_verdict(client: Client, view: AppView, progress: Progress, shown: _View) -> Verdict:
    decided: asyncio.Future[Verdict] = asyncio.get_running_loop().create_future()
    listed = False

    def look() -> None:
        shown.draw()
        verdict = progress.verdict(view, time.monotonic())
        if verdict is not None and not decided.done():
            decided.set_result(verdict)

    async def read() -> None:
        nonlocal listed
        known: list[Event] = []
        async for line in client.watch(KINDS, project=view.app.project, bookmarks=True):
            event = progress.apply(line, time.monotonic())
            if event is not None and not listed:
                known.append(event)
            elif event is not None:
                shown.tell(event)
            if line.kind is None and not listed:
                listed = True
                verdict = progress.verdict(view, time.monotonic())
                # Where all is as asked for, it was so before: what has happened since the last change is no news.
                if verdict is None or verdict.error is not None:
                    for event in known:
                        shown.tell(event)
            if listed:
                look()

    async def tick() -> None:
        while True:  # no deadline: the rollout's own (`rollout.deadline`) makes the control plane call it failed
            await asyncio.sleep(TICK_S)
            if listed:
                look()

    tasks = (asyncio.ensure_future(read()), asyncio.ensure_future(tick()))
    try:
        await asyncio.wait((*tasks, decided), return_when=asyncio.FIRST_COMPLETED)
        for task in tasks:
            if task.done():
                task.result()  # raises what ended it
        return decided.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


class _View:
    """Draws the progress."""

    def __init__(self, session: Session, progress: Progress, began: float) -> None:
        from rich.live import Live

        self._output = session.output
        self._progress = progress
        self._began = began
        self._live = (
            Live(console=session.output.err, get_renderable=self._render, refresh_per_second=8, transient=True)
            if session.output.err.is_terminal
            else None
        )
        self._told: set[str] = set()

    def __enter__(self) -> None:
        if self._live is not None:
            self._live.start()

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()

    def tell(self, event: Event) -> None:
        from rich.markup import escape

        if self._live is None and event.subject.startswith("instance/"):
            return  # its states are printed
        colour = {"error": "red", "warning": "yellow"}.get(event.severity, "dim")
        subject = event.subject.partition("/")[2]
        self._output.say(f"[dim]{self._elapsed():>6}[/] [{colour}]{escape(subject)}: {escape(event.message)}[/]")

    def draw(self) -> None:
        """Without a terminal, print a line for each state that an instance is in for the first time; a terminal redraws."""
        if self._live is not None:
            return
        for view in self._progress.wanted:
            word, note = lines.phase_word(view), lines.note(view).partition("; next start")[0]
            if word in ("preparing", "starting", "ready") and not note.startswith("image:"):
                note = ""  # what the try before died of
            gist = view.instance.id + word + "".join(c for c in note if not c.isdigit() and c != ".")  # counted bytes are no news
            if gist not in self._told:
                self._told.add(gist)
                said = f"{word} ({note})" if note else word
                self._output.err.print(f"{self._elapsed():>6} {view.instance.id} {said}", markup=False, soft_wrap=True)

    def _render(self) -> Group:
        from rich.console import Group
        from rich.spinner import Spinner

        progress = self._progress
        wanted, old = progress.wanted, progress.old
        title = (
            f" {progress.app.name} release {progress.app.release}: {progress.ready} of {progress.app.wanted(progress.status)} ready"
        )
        if old:
            title += f", {len(old)} old to leave"
        rows = [
            (f"  {view.instance.id}", state(lines.phase_word(view)), view.instance.node or "–", lines.note(view)) for view in wanted
        ]
        rest = [(f"  … {len(rows) - ROWS_MAX} more", "", "", "")] if len(rows) > ROWS_MAX else []
        spinner = Spinner("dots", f"{title} [dim]{self._elapsed()}[/]", style="cyan")
        return Group(
            spinner,
            table(("  INSTANCE", "STATE", "NODE?", "NOTE"), [*rows[:ROWS_MAX], *rest], width=self._output.err.width)
            if rows
            else "",
        )

    def _elapsed(self) -> str:
        return format_seconds(time.monotonic() - self._began)


async def _show_last_lines(session: Session, client: Client, error: AtollError) -> None:
    from rich.markup import escape

    if not isinstance(error, RolloutFailed) or error.instance is None:
        return
    try:
        async with asyncio.timeout(5.0):
            said = [line.text async for line in client.logs(session.project, error.instance, LogOptions(tail=LOG_LINES))]
    except (AtollError, TimeoutError) as why:
        session.output.say(f"[dim]its log cannot be read: {escape(str(why) or 'no answer within 5 s')}[/]")
        return
    if said:
        session.output.say(f"[dim]last lines of {error.instance}:[/]")
    for text in said:
        session.output.err.print(f"  │ {text}", markup=False, soft_wrap=True)


def show_result(session: Session, view: AppView, took_s: float) -> None:
    """Print the URL of an app that serves, or with --json the app."""
    from rich.markup import escape

    if session.json:
        session.output.json(view)
        return
    app = view.app
    wanted = app.wanted(view.status)
    rollout = view.status.rollout if view.status is not None else None
    if rollout is not None and rollout.release == app.release and rollout.phase is RolloutPhase.WAITING:
        share = f" with {rollout.weight} % of the requests" if rollout.weight is not None else ""
        session.output.say(f"[yellow]◐[/] {app.name} release {app.release}{share} {escape(rollout.message)}")
        session.output.say(f"[dim]see: atoll rollout status {app.name}[/]")
        show_refused(session, view)
        return
    what = f"{wanted} ready" if wanted else "no instances wanted"
    session.output.say(f"[green]✓[/] {app.name} release {app.release}: {what} after {format_seconds(took_s)}")
    for url in view.urls:
        session.output.print(url)
    show_refused(session, view)


def show_refused(session: Session, view: AppView) -> None:
    """Say what ingresses leave out of the app's routing; the rest is served, so that it is no failure."""
    from rich.markup import escape

    for ingress, words in view.refused.items():
        session.output.say(f"[yellow]![/] ingress {ingress} leaves out a part of {view.app.name}'s routing: {escape(words)}")


async def heard_from_ingresses(client: Client, app: str, project: str, took_s: float) -> AppView:
    """Return the app as it stands after a rollout of `took_s`.

    Of one that asks for public ports that is once an ingress says that it cannot have one, or had `REFUSED_S` to say it.
    """
    view = await client.app(project, app)
    rules = view.app.spec.ingress
    deadline = time.monotonic() + REFUSED_S - took_s
    while rules is not None and rules.ports and not view.refused and time.monotonic() < deadline:
        await asyncio.sleep(TICK_S)
        view = await client.app(project, app)
    return view


async def until_gone(session: Session, client: Client, app: str) -> None:
    """Wait until the app and its last instance are gone."""
    delay = 0.05
    with session.output.err.status(f"{app}: instances are drained and stopped"):
        try:
            async with asyncio.timeout(GONE_S):
                while True:
                    try:
                        await client.app(session.project, app)
                    except NotFound:
                        if not await client.instances(session.project, app=app):
                            return
                    await asyncio.sleep(delay)
                    delay = min(delay * 1.5, 1.0)
        except TimeoutError:
            raise NotFound(
                f"{app} still has instances after {GONE_S:.0f} s", mend=f"the deletion goes on; see: atoll ps {app}"
            ) from None
