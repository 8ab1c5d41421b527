"""`atoll sim`: replays a trace at simulated speed, through a whole cell or through the scheduler alone, under several policies."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

import click

from atoll.cli.session import Session, command

if TYPE_CHECKING:
    from collections.abc import Callable

    from rich.status import Status

    from atoll.sim.replay_report import Living, Report, Spread
    from atoll.sim.replay_trace import Trace

POLICIES = ("pack", "spread", "pack-fifo", "near")
WHOLE = "through API, controllers, scheduler, failure detection and light agents; a start takes 1 s on its node"
ALONE = "by the scheduler alone: no API, controllers, agents or detection, a failure is known at once"
TELL_S = 30.0
"""Between two words about the progress, where there is no terminal to show it on."""
_FILE = click.Path(path_type=Path, dir_okay=False)


@command(
    example="atoll sim --nodes nodes.csv --work pods.csv --policy pack --policy spread --plots plots/\n"
    "atoll sim --nodes nodes.csv --work pods.csv --sites sites.csv --fail site:ams@3600+600 --json\n"
    "atoll sim --nodes nodes.csv --work huge.csv --planning-only",
    asks_api=False,
)
@click.option("--nodes", type=_FILE, required=True, help="The machines: CSV or JSON, openb's form or ours.")
@click.option("--work", type=_FILE, required=True, help="What arrives and departs: CSV or JSON, openb's form or ours.")
@click.option(
    "--sites", type=_FILE, help="The sites that nodes without one are dealt to; with coordinates, where requests come from."
)
@click.option("--policy", "policies", multiple=True, type=click.Choice(POLICIES), help="May be repeated.  [default: pack, spread]")
@click.option("--fail", "failures", multiple=True, metavar="KIND:NAME@AT[+FOR]", help="A node or site that fails; seconds.")
@click.option("--limit", type=click.IntRange(1), help="Only so many rows of --work.")
@click.option(
    "--hurry", type=click.FloatRange(0.001, 1e6), default=1.0, help="Arrivals come so many times faster; runs last as long."
)
@click.option(
    "--planning-only", is_flag=True, help="Through the scheduler alone: many times as fast, and all that is known is what it plans."
)
@click.option("--plots", type=click.Path(path_type=Path, file_okay=False), help="Write plots into this directory (matplotlib).")
def sim(
    session: Session,
    nodes: Path,
    work: Path,
    sites: Path | None,
    policies: tuple[str, ...],
    failures: tuple[str, ...],
    limit: int | None,
    hurry: float,
    planning_only: bool,
    plots: Path | None,
) -> None:
    """Replay a trace: utilisation, fragmentation, queueing and waits under each policy.

    Work is deployed and removed through the API of a simulated cell. Its own controllers and scheduler make and place the
    instances; what runs on machines that fail is found and replaced as in production. Quiet times are passed over.
    """
    from atoll.sim.replay_plots import draw
    from atoll.sim.replay_trace import load

    trace = load(nodes, work, sites, failures, limit, hurry)
    wanted = tuple(dict.fromkeys(policies or ("pack", "spread")))
    _check(wanted, planning_only)
    reports = []
    for policy in wanted:
        with session.output.err.status(f"{_what(trace)}: {policy}") as status:
            reports.append(_replay(trace, policy, planning_only, status))
    written = draw(reports, plots, title=work.stem) if plots else []
    mode = ALONE if planning_only else WHOLE
    if session.json:
        session.output.json({"includes": mode, "reports": reports, "plots": [str(path) for path in written]})
        return
    session.output.say(f"[dim]{mode}[/]")
    _show(session, reports, round_trips=bool(trace.demand))
    for path in written:
        session.output.err.print(f"wrote {path}", highlight=False)


def _check(policies: tuple[str, ...], planning_only: bool) -> None:
    """Raise Invalid for a policy that a cell has not; before the others take their time."""
    from atoll.model.errors import Invalid
    from atoll.sim import replay_control

    lacking = [policy for policy in policies if policy not in replay_control.POLICIES and not planning_only]
    if lacking:
        text = f"--policy: a cell does not place by '{lacking[0]}': what fits may pass what waits, and room is booked for the first"
        raise Invalid(text, field="policy", mend="add --planning-only, or leave it out")


def _what(trace: Trace) -> str:
    return f"replaying {len(trace.tasks)} pieces of work on {len(trace.nodes)} nodes"


def _replay(trace: Trace, policy: str, planning_only: bool, status: Status) -> Report:
    if planning_only:
        from atoll.sim.replay import replay

        return replay(trace, policy)
    from atoll.sim.replay_control import replay_controlled

    return replay_controlled(trace, policy, _progress(trace, policy, status))


def _progress(trace: Trace, policy: str, status: Status) -> Callable[[float, float], None]:
    """Return what shows how far a replay is, about once a second, and how long the rest will take."""
    from atoll.model.units import format_seconds

    began = shown = told = time.monotonic()

    def show(share: float, at_s: float) -> None:
        nonlocal shown, told
        now = time.monotonic()
        if now - shown < 1.0:
            return
        shown = now
        left = format_seconds(round((now - began) * (1 - share) / share)) if share > 0 else "?"
        text = f"{policy}, {share:.0%}, simulated {format_seconds(round(at_s))}, about {left} left"
        status.update(f"{_what(trace)}: {text}")
        if not status.console.is_terminal and now - told >= TELL_S:
            told = now
            status.console.print(text, highlight=False)

    return show


def _show(session: Session, reports: list[Report], *, round_trips: bool) -> None:
    from atoll.model.units import format_seconds

    living = any(one.living is not None for one in reports)
    replaced = any(one.living is not None and one.living.nodes_failed for one in reports)
    heads = (
        "POLICY",
        "PLACED>",
        "UNPLACED>",
        "ENDED>?",
        "LOST>?",
        "WAIT P50>",
        "WAIT P99>",
        *(("RUNS P50>", "RUNS P99>") if living else ()),
        *(("FOUND>?", "REPLACED P50>", "REPLACED MAX>") if replaced else ()),
        "QUEUE MAX>?",
        "CPU>",
        "MEMORY>?",
        "GPU>",
        "FRAGMENTED>",
        *(("ROUND TRIP>",) if round_trips else ()),
    )
    session.output.table(
        heads,
        [
            (
                one.policy,
                str(one.placed),
                str(one.never),
                str(one.ended),
                str(one.lost),
                format_seconds(one.wait_s_p50),
                format_seconds(one.wait_s_p99),
                *(_times(one.living, replaced) if living else ()),
                str(one.waiting_max),
                f"{one.cpu_mean:.1%}",
                f"{one.memory_mean:.1%}",
                f"{one.gpu_mean:.1%}",
                f"{one.fragmentation_mean:.1%}",
                *((f"{one.latency_ms_mean:.1f}ms",) if round_trips else ()),
            )
            for one in reports
        ],
    )
    session.output.say(f"[dim]{_columns(living, replaced, round_trips)}[/]")
    braked = [one for one in reports if one.living is not None and one.living.braked]
    if braked:
        session.output.say(
            "[yellow]![/] so many nodes fell silent at once that none was given up for up to 10 minutes (the brake), as in a cell "
            "that nobody looks after"
        )


def _columns(living: bool, replaced: bool, round_trips: bool) -> str:
    """Return what the columns mean that are shown."""
    words = [
        "PLACED: placements, also of work that was lost and placed again",
        "UNPLACED: without a node when the replay ended, just after the last arrival, failure or return",
        "ENDED: done by then",
        "LOST: placements undone by failures",
        "WAIT: from arrival or loss to a node",
        *(("RUNS: from arrival to running",) if living else ()),
        *(
            ("FOUND: from a node's failure until it was given up (median)", "REPLACED: from that failure until the work ran again")
            if replaced
            else ()
        ),
        "QUEUE MAX: most that waited at once",
        "CPU, MEMORY, GPU: given out, of nodes that are up, on average",
        "FRAGMENTED: of free GPUs (cores where there are none), what typical work cannot use where it lies, on average",
        *(("ROUND TRIP: from where requests come from to the nearest instance, on average",) if round_trips else ()),
    ]
    return "; ".join(words)


def _times(living: Living | None, replaced: bool) -> tuple[str, ...]:
    from atoll.model.units import format_seconds

    def of(spread: Spread | None, name: str) -> str:
        return format_seconds(getattr(spread, name)) if spread is not None else "–"

    if living is None:
        return ("–",) * (5 if replaced else 2)
    first = of(living.started, "p50_s"), of(living.started, "p99_s")
    if not replaced:
        return first
    return (*first, of(living.found, "p50_s"), of(living.replaced, "p50_s"), of(living.replaced, "max_s"))
