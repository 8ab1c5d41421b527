"""What a replay looked like over time, as PNG or SVG. matplotlib is wanted here only, and is an extra of the package."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from atoll.model.errors import Unsupported
from atoll.sim.replay_report import Report

_COLOURS = ("#0b6e99", "#d9730d", "#ad1a72", "#5a8f29", "#6940a5")
_STYLES = ("-", "--", "-.", ":", "-")
_SHORTEST_S = 0.1
"""What took less is drawn as this: the axis is logarithmic."""


def draw(reports: Sequence[Report], directory: Path, *, title: str, formats: Sequence[str] = ("png", "svg")) -> list[Path]:
    """Write `utilisation`, `fragmentation`, `queueing` and `latency` into `directory`, `round-trips` where sites have coordinates,
    and `starts` where machines ran what was placed; return the files.

    Raises Unsupported where matplotlib is not installed.
    """
    plot = _matplotlib()
    directory.mkdir(parents=True, exist_ok=True)
    unit, seconds = _unit(max(report.samples[-1].at_s for report in reports))
    gpus = any(sample.gpu > 0 for report in reports for sample in report.samples)
    shares = [("GPU" if gpus else "cpu", "gpu" if gpus else "cpu"), ("memory", "memory") if not gpus else ("cpu", "cpu")]
    charts: list[tuple[str, list[tuple[str, str, str, float]]]] = [
        ("utilisation", [(f"{name} in use", "% of what is up", field, 100.0) for name, field in shares]),
        ("fragmentation", [(f"free {shares[0][0]} that typical work cannot use", "% of what is free", "fragmentation", 100.0)]),
        ("queueing", [("instances that wait", "instances", "waiting", 1.0), ("instances that run", "instances", "running", 1.0)]),
        ("latency", [("the longest that anyone waiting has waited for a node", unit, "oldest_s", 1.0 / seconds)]),
    ]
    if any(sample.latency_ms for report in reports for sample in report.samples):
        charts.append(("round-trips", [("from users to the nearest instance, weighted by demand", "ms", "latency_ms", 1.0)]))
    written: list[Path] = []
    for name, rows in charts:
        figure, axes = plot.subplots(
            len(rows), 1, figsize=(9, 1.2 + 2.6 * len(rows)), sharex=True, squeeze=False, layout="constrained"
        )
        for axis, (text, label, field, factor) in zip(axes[:, 0], rows, strict=True):
            _panel(axis, reports, text, label, field, factor, seconds)
            if name == "utilisation":
                axis.set_ylim(0, 102)
        axes[0, 0].legend(loc="upper left", bbox_to_anchor=(1.0, 1.02), frameon=False, title="policy", alignment="left")
        axes[-1, 0].set_xlabel(f"simulated time, {unit}")
        written += _written(plot, figure, f"{title}: {name}", directory / name, formats)
    if any(report.living is not None for report in reports):
        written += _written(plot, _starts(plot, reports), f"{title}: starts", directory / "starts", formats)
    return written


def _written(plot: Any, figure: Any, title: str, path: Path, formats: Sequence[str]) -> list[Path]:
    figure.suptitle(title, x=0.01, ha="left", fontsize=12, fontweight="bold")
    paths = [path.with_name(f"{path.name}.{suffix}") for suffix in formats]
    for each in paths:
        figure.savefig(each, dpi=140)
    plot.close(figure)
    return paths


def _starts(plot: Any, reports: Sequence[Report]) -> Any:
    """Draw which share was running within which time, from arrival and from the failure of its node."""
    figure, axes = plot.subplots(2, 1, figsize=(9, 6.4), squeeze=False, layout="constrained")
    rows = (("from arrival to running", "started"), ("from the failure of its node to running again", "replaced"))
    for axis, (text, field) in zip(axes[:, 0], rows, strict=True):
        found = False
        for place, report in enumerate(reports):
            spread = getattr(report.living, field) if report.living is not None else None
            found |= spread is not None
            times = [max(each, _SHORTEST_S) for each in spread.percentiles_s] if spread is not None else []
            axis.plot(
                times,
                range(len(times)),
                color=_COLOURS[place % len(_COLOURS)],
                linestyle=_STYLES[place % len(_STYLES)],
                linewidth=1.6,
                label=report.policy,
            )
        _plain(axis, text, "% of them")
        axis.set_ylim(0, 102)
        if found:
            axis.set_xscale("log")
            axis.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
            left, right = axis.get_xlim()
            axis.set_xlim(min(left, 0.5), max(right, 20.0))
        else:
            axis.text(0.5, 0.5, "none", transform=axis.transAxes, ha="center", color="#888888")
    axes[0, 0].legend(loc="upper left", bbox_to_anchor=(1.0, 1.02), frameon=False, title="policy", alignment="left")
    axes[-1, 0].set_xlabel("simulated time, seconds")
    return figure


def _panel(axis: Any, reports: Sequence[Report], text: str, label: str, field: str, factor: float, seconds: float) -> None:
    for place, report in enumerate(reports):
        axis.plot(
            [sample.at_s / seconds for sample in report.samples],
            [getattr(sample, field) * factor for sample in report.samples],
            color=_COLOURS[place % len(_COLOURS)],
            linestyle=_STYLES[place % len(_STYLES)],
            linewidth=1.6,
            label=report.policy,
        )
    _plain(axis, text, label)
    axis.set_ylim(bottom=0)
    if not any(getattr(sample, field) for report in reports for sample in report.samples):
        axis.set_ylim(0, 1)
        axis.text(0.5, 0.5, "none", transform=axis.transAxes, ha="center", color="#888888")


def _plain(axis: Any, text: str, label: str) -> None:
    axis.set_title(text, loc="left", fontsize=10)
    axis.set_ylabel(label)
    axis.margins(x=0.01)
    axis.grid(visible=True, color="#dddddd", linewidth=0.6)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)


def _unit(span_s: float) -> tuple[str, float]:
    for unit, seconds in (("days", 86_400.0), ("hours", 3_600.0), ("minutes", 60.0)):
        if span_s >= 3 * seconds:
            return unit, seconds
    return "seconds", 1.0


def _matplotlib() -> Any:
    try:
        import matplotlib
    except ImportError:
        raise Unsupported(
            "plots need matplotlib, which is not installed", mend="pip install 'atoll[plots]', or leave --plots out"
        ) from None
    matplotlib.use("Agg")
    import matplotlib.pyplot

    return matplotlib.pyplot
