"""`atoll sim`: replays a trace through the real scheduler at simulated speed, several policies side by side."""

from __future__ import annotations

from pathlib import Path

import click

from atoll.cli.session import Session, command

POLICIES = ("pack", "spread", "pack-fifo", "near")
_FILE = click.Path(path_type=Path, dir_okay=False)


@command(
    example="atoll sim --nodes nodes.csv --work pods.csv --policy pack --policy spread --plots plots/\n"
    "atoll sim --nodes nodes.csv --work pods.csv --sites sites.csv --fail site:ams@3600+600 --json"
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
    plots: Path | None,
) -> None:
    """Replay a trace through the real scheduler: utilisation, fragmentation, queueing and waits under each policy."""
    from atoll.model.units import format_seconds
    from atoll.sim.replay import replay
    from atoll.sim.replay_plots import draw
    from atoll.sim.replay_trace import load

    trace = load(nodes, work, sites, failures, limit, hurry)
    reports = []
    for policy in dict.fromkeys(policies or ("pack", "spread")):
        with session.output.err.status(f"replaying {len(trace.tasks)} instances on {len(trace.nodes)} nodes: {policy}"):
            reports.append(replay(trace, policy))
    written = draw(reports, plots, title=work.stem) if plots else []
    if session.json:
        session.output.json({"reports": reports, "plots": [str(path) for path in written]})
        return
    heads = (
        "POLICY",
        "PLACED>",
        "NEVER>",
        "ENDED>?",
        "LOST>?",
        "WAIT P50>",
        "WAIT P99>",
        "QUEUE MAX>?",
        "CPU>",
        "MEMORY>?",
        "GPU>",
        "FRAGMENTED>",
        *(("ROUND TRIP>",) if trace.demand else ()),
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
                str(one.waiting_max),
                f"{one.cpu_mean:.1%}",
                f"{one.memory_mean:.1%}",
                f"{one.gpu_mean:.1%}",
                f"{one.fragmentation_mean:.1%}",
                *((f"{one.latency_ms_mean:.1f}ms",) if trace.demand else ()),
            )
            for one in reports
        ],
    )
    for path in written:
        session.output.err.print(f"wrote {path}", highlight=False)
