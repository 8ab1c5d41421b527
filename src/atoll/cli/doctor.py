"""`atoll doctor`: what this machine can and cannot run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click
from msgspec import structs

from atoll.cli.session import EXIT_FAILED, Session, command

if TYPE_CHECKING:
    from atoll.entry.findings import Finding


_EXAMPLES = (
    "sudo atoll doctor",
    "sudo atoll doctor --network",
    "atoll doctor --json | jq -r '.findings[] | select(.level != \"ok\") | .mend'",
)


@command(example="\n".join(_EXAMPLES))
@click.option("--data", type=click.Path(path_type=Path), help="The data directory; else ATOLL_DATA.  [default: /var/lib/atoll]")
@click.option("--ingress", metavar="HOST:PORT", help="Where apps would be served.  [default: 127.0.0.1:8080]")
@click.option("--subnet", metavar="CIDR", help="Addresses of instances.  [default: what the cell gives, of 10.64.0.0/10]")
@click.option("--network", is_flag=True, help="Measure what each feature of the network is worth on this machine: some 20 s.")
def doctor(session: Session, data: Path | None, ingress: str | None, subnet: str | None, network: bool) -> None:
    """Say what this machine can and cannot run, and how to mend each. Changes nothing; best run as root. With --network, measure
    the network's features instead, each with and without, in namespaces that are made for it.

    Exits 1 when something is missing that containers cannot do without.
    """
    if network:
        _measure(session)
        return
    import os

    from atoll.entry.config import Config
    from atoll.entry.doctor import can_run, examine, running

    api = (session.api_given or "").removeprefix("http://").rstrip("/")
    place = os.environ.get("ATOLL_DATA")  # as `atoll up` says for the other commands
    data = data or (Path(place) if place else None)
    given = {"data": data.absolute() if data else None, "ingress": ingress, "subnet": subnet, "api": api or None}
    with session.output.err.status("looking at this machine"):
        config = Config(**{name: value for name, value in given.items() if value is not None})  # type: ignore[arg-type]
        findings = examine(config)
    able = can_run(findings)
    if session.json:
        session.output.json({"can_run": able, "findings": findings})
    else:
        _show(session, findings)
        _conclude(session, findings, running(config), able=able)
    if not able:
        click.get_current_context().exit(EXIT_FAILED)


def _measure(session: Session) -> None:
    import os

    from atoll.model.errors import Unsupported
    from atoll.network.trials import measure

    if os.geteuid() != 0:
        raise Unsupported("measuring makes network namespaces, which needs root", mend="run it with sudo")
    with session.output.err.status("measuring") as status:
        trials = measure(lambda words: status.update(f"measuring: {words}"))
    if session.json:
        session.output.json([{**structs.asdict(trial), "ratio": trial.ratio} for trial in trials])
        return
    rows = [
        (
            trial.feature,
            "" if trial.without is None else f"{trial.without:.1f}",
            "" if trial.with_it is None else f"{trial.with_it:.1f}",
            "" if trial.ratio is None else f"{trial.ratio:.2f}",
            trial.used,
            trial.said,
        )
        for trial in trials
    ]
    session.output.table(("FEATURE", "WITHOUT>", "WITH>", "RATIO>", "USED", "MEASURED"), rows)
    session.output.say("[dim]Gbit/s of TCP on this machine, medians of runs in turn; what else runs here makes them smaller[/]")


def _show(session: Session, findings: list[Finding]) -> None:
    from rich.text import Text

    from atoll.cli.output import dim, state

    rows = []
    area = ""
    for finding in findings:
        words = Text(finding.found)
        if finding.level != "ok":
            words.append(f" – {finding.why}" if finding.why else "", style="dim")
            words.append(f"\n→ {finding.mend}" if finding.mend else "", style="cyan")
        level = state(str(finding.level))
        if finding.level == "missing" and not finding.core:
            level = dim("○ missing")
        rows.append((dim(finding.area if finding.area != area else ""), finding.name, level, words))
        area = finding.area
    session.output.table(("AREA", "PART", "STATE", "FOUND"), rows)


def _conclude(session: Session, findings: list[Finding], process: int | None, *, able: bool) -> None:
    lacking = [finding.name for finding in findings if finding.core and finding.level == "missing"]
    session.output.print("")
    if able:
        then = f"`atoll up` runs, process {process}" if process is not None else "start with: atoll up"
        session.output.print(f"[green]✓[/] this machine can run containers; {then}")
    else:
        session.output.print(f"[red]✗[/] this machine cannot run containers yet: mend {', '.join(lacking)}")
