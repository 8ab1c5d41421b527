"""What every benchmark prints: the machine, and one row per figure with its goal and whether it holds."""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

_GOAL = re.compile(r"(<=|>=|<|>)\s*([0-9.]+)")


@dataclass(frozen=True)
class Result:
    """One figure. The goal is about `ratio` where there is a reference, else about `ours`."""

    what: str
    ours: float | None
    unit: str
    reference: float | None = None
    goal: str | None = None
    why: str | None = None
    """Why it could not be measured here, or what limits it."""

    @property
    def ratio(self) -> float | None:
        if self.ours is None or not self.reference:
            return None
        return self.ours / self.reference

    @property
    def holds(self) -> bool | None:
        value = self.ratio if self.reference is not None else self.ours
        match = _GOAL.fullmatch(self.goal or "")
        if value is None or match is None:
            return None
        bound = float(match[2])
        return {"<=": value <= bound, ">=": value >= bound, "<": value < bound, ">": value > bound}[match[1]]

    def as_json(self) -> dict[str, object]:
        row: dict[str, object] = {
            "what": self.what,
            "ours": _rounded(self.ours),
            "reference": _rounded(self.reference),
            "unit": self.unit,
            "ratio": _rounded(self.ratio),
            "goal": self.goal,
            "holds": self.holds,
        }
        if self.why:
            row["why"] = self.why
        return row


@dataclass
class Report:
    bench: str
    results: list[Result] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def add(self, result: Result) -> None:
        self.results.append(result)

    def print(self, *, as_json: bool) -> None:
        """Write the table to stderr, or one JSON object to stdout."""
        if as_json:
            print(
                json.dumps(
                    {
                        "bench": self.bench,
                        "machine": machine(),
                        "results": [result.as_json() for result in self.results],
                        "notes": self.notes,
                    }
                )
            )
            return
        from rich.console import Console
        from rich.table import Table

        table = Table(title=f"bench {self.bench}", caption=_caption(), caption_justify="left", title_justify="left")
        for column in ("what", "ours", "reference", "unit", "ratio", "goal", "holds"):
            table.add_column(column, justify="left" if column in ("what", "unit", "goal", "holds") else "right")
        marks = {True: "[green]yes[/]", False: "[red]no[/]", None: "–"}
        for result in self.results:
            table.add_row(
                result.what,
                _text(result.ours),
                _text(result.reference),
                result.unit,
                _text(result.ratio),
                result.goal or "",
                marks[result.holds],
            )
        console = Console(width=None if sys.stdout.isatty() else 140)
        console.print(table)
        for result in self.results:
            if result.why:
                console.print(f"  {result.what}: {result.why}", highlight=False)
        for note in self.notes:
            console.print(f"  {note}", highlight=False)


def _rounded(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.4g}")


def _text(value: float | None) -> str:
    return "" if value is None else f"{value:,.4g}" if abs(value) < 1000 else f"{value:,.0f}"


def _caption() -> str:
    facts = machine()
    return f"{facts['cpu']}, {facts['cores']} cores, {facts['memory_gib']} GiB, Linux {facts['kernel']}, {facts['date']}"


def machine() -> dict[str, object]:
    """Return what describes the machine that the figures were taken on."""
    model = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    memory = re.search(r"MemTotal:\s*(\d+)", Path("/proc/meminfo").read_text())
    return {
        "cpu": model[1].strip() if model else platform.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(int(memory[1]) / (1 << 20), 1) if memory else None,
        "kernel": platform.release(),
        "python": platform.python_version(),
        "load_before": round(os.getloadavg()[0], 2),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "tools": {name: _version(name) for name in ("runc", "podman", "envoy") if shutil.which(name)},
    }


def _version(name: str) -> str:
    answer = subprocess.run([name, "--version"], capture_output=True, text=True, timeout=10, check=False)
    found = re.search(r"\d+\.\d+[.\d]*", answer.stdout)
    return found[0] if found else "?"


def percentile(values: Sequence[float], percent: float) -> float:
    """Return the value below which `percent` of `values` lie (nearest rank)."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, max(0, round(percent / 100 * len(ordered) + 0.5) - 1))]


def median(values: Sequence[float]) -> float:
    return statistics.median(values)
