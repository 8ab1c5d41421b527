"""How things are printed: tables and words for people, JSON for programs. Results go to stdout, messages to stderr."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, TextIO

import msgspec

from atoll.model import codec
from atoll.model.units import format_seconds

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.table import Table
    from rich.text import Text

PIPE_COLUMNS = 1_000
"""Into a pipe nothing is cut: each row is one line of up to so many characters."""

BAR_CELLS = 8
LAST_COLUMN_MIN = 24
"""Characters that the last column keeps before others are left out."""
CUT_MIN = 16
"""Characters that are left of what may be cut."""
MARKS = "?>~"

COLOURS = {
    "running": "green",
    "ready": "green",
    "succeeded": "green",
    "info": "dim",
    "deploying": "yellow",
    "preparing": "yellow",
    "starting": "yellow",
    "pending": "yellow",
    "draining": "yellow",
    "waking": "yellow",
    "parked": "dim",
    "standby": "dim",
    "paused": "dim",
    "template": "dim",
    "stopping": "yellow",
    "cordoned": "yellow",
    "drained": "yellow",
    "maintenance": "yellow",
    "emptying": "yellow",
    "under way": "yellow",
    "waits": "yellow",
    "progressing": "yellow",
    "promoting": "yellow",
    "keeping": "green",
    "complete": "green",
    "reverted": "red",
    "waiting": "yellow",
    "replacing": "yellow",
    "kept": "red",
    "runs": "green",
    "scheduled": "green",
    "suspended": "dim",
    "planned": "dim",
    "over": "dim",
    "stays": "dim",
    "warning": "yellow",
    "degraded": "yellow",
    "unhealthy": "yellow",
    "backoff": "red",
    "failed": "red",
    "lost": "red",
    "unreachable": "red",
    "error": "red",
    "missing": "red",
    "quarantined": "red",
    "gone": "red",
    "silent": "yellow",
    "ok": "green",
    "stopped": "dim",
    "asleep": "dim",
    "deleting": "dim",
    "cancelled": "dim",
}


class Output:
    """Prints for one command."""

    def __init__(self, *, as_json: bool) -> None:
        self.as_json = as_json
        self._out: Console | None = None
        self._err: Console | None = None

    @property
    def out(self) -> Console:
        if self._out is None:
            self._out = _console(sys.stdout)
        return self._out

    @property
    def err(self) -> Console:
        """For progress and messages."""
        if self._err is None:
            self._err = _console(sys.stderr)
        return self._err

    def json(self, value: object) -> None:
        """Print records as JSON, indented."""
        sys.stdout.write(msgspec.json.format(codec.encode(value), indent=2).decode() + "\n")
        sys.stdout.flush()

    def json_line(self, value: object) -> None:
        """Print one record of a stream on a line of its own."""
        sys.stdout.write(codec.encode(value).decode() + "\n")
        sys.stdout.flush()

    def print(self, *what: RenderableType) -> None:
        """Print results on stdout."""
        for each in what:
            _emit(self.out, sys.stdout, each)

    def show(self, what: RenderableType) -> None:
        """Print what is for people beside the results, on stderr."""
        _emit(self.err, sys.stderr, what)

    def say(self, message: str) -> None:
        """Tell people something on stderr; `message` may hold rich's markup."""
        self.err.print(message, soft_wrap=True, highlight=False)

    def table(self, columns: Sequence[str], rows: Sequence[Sequence[Any]], *, empty: str = "") -> None:
        """Print rows under headings; without rows, say so on stderr. See `table` for headings."""
        if not rows:
            if empty:
                self.say(f"[dim]{empty}[/]")
            return
        self.print(table(columns, rows, width=self.width))

    @property
    def width(self) -> int | None:
        """Columns of the terminal; None where it is none."""
        return self.out.width if self.out.is_terminal else None


def _emit(console: Console, stream: TextIO, what: RenderableType) -> None:
    """Print; without the blanks that fill a terminal's lines where there is none."""
    if console.is_terminal:
        console.print(what, soft_wrap=isinstance(what, str), highlight=False)
        return
    with console.capture() as captured:
        console.print(what, soft_wrap=isinstance(what, str), highlight=False)
    stream.write("".join(f"{line.rstrip()}\n" for line in captured.get().splitlines() or [""]))
    stream.flush()


def _console(stream: Any) -> Console:
    from rich.console import Console

    terminal = stream.isatty()
    return Console(file=stream, width=None if terminal else PIPE_COLUMNS, highlight=False, emoji=False, legacy_windows=False)


def table(columns: Sequence[str], rows: Sequence[Sequence[Any]], *, width: int | None = None) -> Table:
    """Return rows under headings. A heading may end in `>` (set to the right), `~` (its cells are cut where `width` is too
    little) and `?` (left out where that is not enough, the last such column first). The last column wraps; without a `width`
    nothing is cut."""
    from rich.table import Table

    cells = [[_cell(value) for value in row] for row in rows]
    if width is not None:
        cells = _cut(columns, cells, width)
    shown = _fitting(columns, cells, width)
    made = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim", collapse_padding=True)
    for index in shown:
        heading = columns[index]
        last = index == shown[-1] and width is not None
        justify: Literal["left", "right"] = "right" if ">" in heading else "left"
        made.add_column(heading.rstrip(MARKS), justify=justify, no_wrap=not last, overflow="fold" if last else "ellipsis")
    for row in cells:
        made.add_row(*(row[index] for index in shown))
    return made


def _fitting(columns: Sequence[str], cells: Sequence[Sequence[Text]], width: int | None) -> list[int]:
    """Return which columns are shown."""
    shown = list(range(len(columns)))
    widths = _widths(columns, cells)
    while width is not None and sum(widths[i] + 2 for i in shown) > width + 2:
        droppable = [i for i in shown if "?" in columns[i]]
        if not droppable:
            break
        shown.remove(droppable[-1])
    return shown


def _widths(columns: Sequence[str], cells: Sequence[Sequence[Text]]) -> list[int]:
    """Return what each column needs, in characters."""
    widths = [max(len(name.rstrip(MARKS)), *(row[i].cell_len for row in cells)) if cells else 0 for i, name in enumerate(columns)]
    widths[-1] = min(widths[-1], LAST_COLUMN_MIN)
    return widths


def _cut(columns: Sequence[str], cells: list[list[Text]], width: int) -> list[list[Text]]:
    """Return cells of which those that may be cut are as short as the others need; what may be left out is not counted."""
    widths = _widths(columns, cells)
    needed = sum(widths[i] + 2 for i, name in enumerate(columns) if "?" not in name) - 2
    for index, name in enumerate(columns):
        if "~" not in name or needed <= width:
            continue
        most = max(CUT_MIN, widths[index] - (needed - width))
        needed -= max(0, widths[index] - most)
        for row in cells:
            if row[index].cell_len > most:
                row[index] = row[index].copy()
                row[index].truncate(most, overflow="ellipsis")
    return cells


def _cell(value: Any) -> Text:
    from rich.text import Text

    if isinstance(value, Text):
        return value
    return Text("" if value is None else str(value))


def state(word: str, note: str = "") -> Text:
    """Return a state in its colour, with a mark that is seen without colours too."""
    from rich.text import Text

    colour = COLOURS.get(word, "")
    mark = {"green": "●", "yellow": "◐", "red": "✗", "dim": "○"}.get(colour, "·")
    text = Text(f"{mark} {word}", style=colour)
    return text.append(f" {note}", style="dim") if note else text


def dim(text: str) -> Text:
    from rich.text import Text

    return Text(text, style="dim")


def age(at: float | None, now: float | None = None) -> str:
    """Return how long ago `at` was: `"3m10s"`; a dash for what never was."""
    if not at:
        return "–"
    return format_seconds(max(0.0, (time.time() if now is None else now) - at))


def clock(at: float) -> str:
    """Return a time of day here, with the date when it was not today."""
    local = time.localtime(at)
    same_day = time.strftime("%F", local) == time.strftime("%F")
    return time.strftime("%T" if same_day else "%F %T", local)


def short_image(reference: str | None) -> str:
    """Return a reference whose digest is cut to what tells it from others."""
    name, at, digest = (reference or "–").partition("@")
    return f"{name}{at}{digest[:19]}"


def cores(milli: int) -> str:
    return f"{milli / 1000:.2f}"


def bar(part: int, whole: int, words: str) -> Text:
    """Return a share as a small bar and in words."""
    from rich.text import Text

    share = min(1.0, part / whole) if whole else 0.0
    full = round(share * BAR_CELLS)
    colour = "red" if share > 0.9 else "yellow" if share > 0.75 else "green"
    return Text.assemble(("━" * full, colour), ("━" * (BAR_CELLS - full), "bright_black"), f" {words}")
