"""`atoll nodes drain`: everything off a machine, and a look at how far it has come."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Any

import click

from atoll.cli import names
from atoll.cli.quantities import SPAN
from atoll.cli.session import Session, command
from atoll.model.errors import AtollError, DeadlineExceeded
from atoll.model.units import Seconds

if TYPE_CHECKING:
    from rich.console import Group

    from atoll.model.views import DrainView
    from atoll.sdk.client import Client

POLL_S = 0.5
AFTER_DEADLINE_S = 900.0
"""How long the stop of what was forced is waited for: above the longest usual grace."""
ROWS_MAX = 20
ORDER = ("stopping", "draining", "replacing", "waits", "runs", "kept", "stays")


class NotDrained(AtollError):
    """Something stays on the node."""

    code = "not-drained"


@command(example="atoll nodes drain node-3 --wait\natoll nodes drain node-3 --deadline 10m --leave-volumes")
@names.argument("name", "nodes", metavar="NODE")
@click.option("--deadline", type=SPAN, default="1h", show_default=True, help="How long budgets and jobs are waited for.")
@click.option("--leave-volumes", is_flag=True, help="Move apps that write to volumes of the node, too: they begin with empty ones.")
@click.option("--wait", "-w", is_flag=True, help="Follow it until the node is empty; exits 1 when something stays.")
async def drain(session: Session, name: str, deadline: Seconds, leave_volumes: bool, wait: bool) -> None:
    """Take everything off a node, and put nothing new there.

    Apps keep within their budgets ([disruption] in their specs) and are replaced elsewhere first where that is possible. Jobs are
    waited for; at the deadline they are tried again elsewhere, and that does not count as a failure. What writes to volumes of the
    node stays, unless you agree to leave them behind.

    The cell works it off by itself: Ctrl-C, or the end of this command, changes nothing. `atoll nodes undrain` undoes it.
    """
    from atoll.model.views import DrainRequest

    async with session.client() as client:
        await client.drain(name, DrainRequest(deadline=deadline, leave_volumes=leave_volumes))
        if wait:
            await _follow(session, client, name)
        view = await client.drain_of(name)
    if session.json:
        session.output.json(view)
    elif view.done:
        session.output.say(f"[green]✓[/] {name} is empty" + (f" but for {view.kept} that stay" if view.kept else ""))
    else:
        session.output.say(f"{name}: {view.left} of {view.total} are to leave still; see: atoll nodes show {name}")
    if wait and view.kept:
        kept = ", ".join(item.instance for item in view.items if item.state == "kept") or f"{view.kept} instances"
        mend = f"move them without their data: atoll nodes drain {name} --leave-volumes; or stop the app"
        raise NotDrained(f"{name} is not empty: {kept} write to its volumes", mend=mend)


@command(example="atoll nodes undrain node-3")
@names.argument("name", "nodes", metavar="NODE")
async def undrain(session: Session, name: str) -> None:
    """Undo a drain: the node is used again. What has left it does not come back by itself."""
    async with session.client() as client:
        view = await client.undrain(name)
    if session.json:
        session.output.json(view)
    elif view.policy is not None and view.policy.cordoned:
        session.output.say(f"[green]✓[/] {name} is not drained any more; it is still cordoned: atoll nodes uncordon {name}")
    else:
        session.output.say(f"[green]✓[/] {name} is used again")


async def _follow(session: Session, client: Client, name: str) -> None:
    """Show how the node is emptied until it is. Raises NotDrained when the drain is undone meanwhile, and DeadlineExceeded."""
    from rich.live import Live

    terminal = session.output.err.is_terminal
    live = Live(console=session.output.err, refresh_per_second=8, transient=True) if terminal else None
    told: dict[str, str] = {}
    try:
        if live is not None:
            live.start()
        while True:  # bounded by the drain's own deadline, below
            view = await client.drain_of(name)
            if live is not None:
                live.update(_render(view, session.output.err.width))
            elif not session.json:
                _tell(session, view, told)
            if view.done:
                return
            if view.evacuation is None:
                raise NotDrained(f"the drain of {name} was undone", mend=f"begin again: atoll nodes drain {name}")
            if time.time() > view.evacuation.deadline + AFTER_DEADLINE_S:
                raise DeadlineExceeded(f"{view.left} instances are still on {name}", mend=f"see: atoll nodes show {name}")
            await asyncio.sleep(POLL_S)
    except asyncio.CancelledError:
        session.output.say(f"\n[yellow]interrupted[/]: {name} is drained on; undo it with: atoll nodes undrain {name}")
        raise
    finally:
        if live is not None:
            live.stop()


def _tell(session: Session, view: DrainView, told: dict[str, str]) -> None:
    """Without a terminal: a line for each instance whose state is new, and for each that has gone."""
    for item in view.items:
        if told.get(item.instance) != item.state:
            told[item.instance] = item.state
            said = f"{item.instance} {item.state}" + (f" ({item.why})" if item.why else "")
            session.output.err.print(said, markup=False, soft_wrap=True)
    for gone in told.keys() - {item.instance for item in view.items}:
        if told[gone] != "gone":
            told[gone] = "gone"
            session.output.err.print(f"{gone} gone", markup=False)


def _render(view: DrainView, width: int) -> Group:
    from rich.console import Group
    from rich.spinner import Spinner
    from rich.text import Text

    from atoll.cli.output import BAR_CELLS, table

    gone = max(0, view.total - view.left - view.kept)
    full = round(BAR_CELLS * gone / view.total) if view.total else BAR_CELLS
    bar = Text.assemble(("━" * full, "green"), ("━" * (BAR_CELLS - full), "bright_black"))
    text = Text.assemble(f" {view.node}: ", bar, f" {gone} of {view.total} gone", (f", {_deadline(view)}", "dim"))
    spinner = Spinner("dots", text, style="cyan")
    return Group(spinner, table(COLUMNS, rows(view), width=width) if view.items else "")


def _deadline(view: DrainView) -> str:
    from atoll.model.evacuation import in_words

    return f"the rest goes at {in_words(view.evacuation.deadline)}" if view.evacuation is not None else "nothing is to leave"


COLUMNS = ("INSTANCE", "OF", "STATE", "NOTE")


def rows(view: DrainView) -> list[tuple[Any, ...]]:
    """Return a row for each instance that is there still, those that leave first; the rest of many is counted."""
    from atoll.cli.output import dim, state

    items = sorted(view.items, key=lambda item: (ORDER.index(item.state), item.instance))
    found: list[tuple[Any, ...]] = [
        (item.instance, f"{item.kind}/{item.owner}", state(item.state), dim(item.why)) for item in items[:ROWS_MAX]
    ]
    return found + ([(f"… {len(items) - ROWS_MAX} more", "", "", "")] if len(items) > ROWS_MAX else [])
