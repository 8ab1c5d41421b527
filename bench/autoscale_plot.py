"""The picture of `bench autoscale`: cold-start share against idle cost. matplotlib is wanted here only."""

from __future__ import annotations

from pathlib import Path

from bench.autoscale_policies import Outcome

OURS = "#0b6e99"
COLOURS = {"fixed window": "#d9730d", "Knative": "#ad1a72", "hybrid histogram": "#5a8f29"}
MARKS = {"fixed window": "o", "Knative": "D", "hybrid histogram": "s"}
SHORT = {"range 60 min": "1 h", "range 120 min": "2 h", "range 240 min": "4 h", "60 min": "1 h"}
NAMED_S = {60: "1 min", 300: "5 min", 600: "10 min", 1_800: "30 min", 3_600: "1 h"}


def draw(path: Path, curve: list[tuple[int, Outcome]], references: dict[str, list[tuple[str, Outcome]]], *, requests: int) -> None:
    """Write the picture to `path`, whose suffix says as what."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    curve = sorted(curve)
    figure, axis = pyplot.subplots(figsize=(9, 5.6), layout="constrained")

    def share(point: Outcome) -> float:
        return 100 * point.cold / requests

    x, y = [each.idle_s / 3600 for _, each in curve], [share(each) for _, each in curve]
    axis.plot(x, y, color=OURS, linewidth=2.2, label='idle = "predict", by its idle_after')
    for worth, each in curve:
        if worth in NAMED_S:
            axis.plot([each.idle_s / 3600], [share(each)], "o", color=OURS, markersize=5)
            axis.annotate(
                NAMED_S[worth],
                (each.idle_s / 3600, share(each)),
                xytext=(-6, -11),
                textcoords="offset points",
                ha="right",
                fontsize=8,
                color=OURS,
            )
    for family, points in references.items():
        x, y = [each.idle_s / 3600 for _, each in points], [share(each) for _, each in points]
        axis.plot(x, y, MARKS[family], linestyle=":", color=COLOURS[family], label=family)
        for (name, _), at_x, at_y in zip(points, x, y, strict=True):
            if family == "Knative":
                continue
            below = name in ("range 10 min", "range 30 min", "20 min")
            axis.annotate(
                SHORT.get(name, name.removeprefix("range ")),
                (at_x, at_y),
                xytext=(-4, -12) if below else (5, 5),
                textcoords="offset points",
                ha="right" if below else "left",
                fontsize=8,
                color=COLOURS[family],
            )
    axis.set_yscale("log")
    axis.set_yticks([0.02, 0.05, 0.1, 0.2, 0.5, 1.0], ["0.02", "0.05", "0.1", "0.2", "0.5", "1"])
    axis.minorticks_off()
    axis.margins(x=0.06)
    axis.set_xlabel("idle instances, hours in the day over all apps")
    axis.set_ylabel("requests that met a cold start, %")
    axis.grid(visible=True, which="both", alpha=0.2)
    axis.legend(frameon=False, loc="upper right")
    axis.set_title("A day of Azure Functions, 2019: apps that no weight was fitted on", loc="left", fontsize=11)
    figure.savefig(path, dpi=140)
    pyplot.close(figure)
