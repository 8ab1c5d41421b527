"""How room that is kept for somebody is shown: why something waits though there seems to be room."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from atoll.cli.output import Output
    from atoll.model.views import KeptRoom

COLUMNS = ("KEPT FOR", "PROJECT?", "ON", "EACH", "FROM", "UNTIL", "KEPT OUT OF>")
NAMED_MAX = 3


def show(output: Output, rooms: tuple[KeptRoom, ...]) -> None:
    """Say what is booked for it itself, and print what is kept for its project and for others."""
    from rich.markup import escape

    from atoll.model.views import KeptFor

    for room in rooms:
        if room.why is KeptFor.WAITING and room.own:
            what = "it" if room.count == 1 else f"all {room.count} of it"
            output.say(escape(f"room is booked for {what} on {_names(room.nodes, room.node_count)}: {_free(room)}"))
    rows = [_row(room) for room in rooms if not (room.own and room.why is KeptFor.WAITING)]
    output.table(COLUMNS, rows)
    away = sum(room.turns_away for room in rooms)
    if away:
        output.say("room on these nodes is kept for others; it may go there only if it is gone before they come")


def _row(room: KeptRoom) -> tuple[str, ...]:
    from atoll.model.evacuation import in_words
    from atoll.model.views import KeptFor

    waits = room.why is KeptFor.WAITING
    begins = in_words(room.start) if room.start is not None else "when what runs there ends"
    if room.start is not None and not waits and room.start <= time.time():
        begins = "now"
    return (
        _for_whom(room),
        room.project or "another",
        _names(room.nodes, room.node_count),
        _each(room),
        f"{begins} at the latest" if waits and room.start is not None else begins,
        in_words(room.end) if room.end is not None else "its end",
        f"{room.turns_away} {'node' if room.turns_away == 1 else 'nodes'}" if room.turns_away else "–",
    )


def _for_whom(room: KeptRoom) -> str:
    from atoll.model.views import KeptFor

    if room.why is KeptFor.RESERVED:
        return f"reservation {room.name}"
    if not room.instances:
        return "1 that waits" if room.count == 1 else f"{room.count} that wait"
    return f"{_names(room.instances, room.count)}, which wait{'s' if room.count == 1 else ''}"


def _free(room: KeptRoom) -> str:
    from atoll.model.evacuation import in_words

    if room.start is None:
        return "it has it when what runs there has ended, nobody knows when"
    return f"it has it by {in_words(room.start)}"


def _names(names: tuple[str, ...], count: int) -> str:
    shown = ", ".join(names[:NAMED_MAX])
    return shown if count <= NAMED_MAX else f"{shown} and {count - NAMED_MAX} more"


def _each(room: KeptRoom) -> str:
    from atoll.model.units import format_bytes

    parts = [f"{room.cpu_milli / 1000:g} cores"] if room.cpu_milli else []
    parts += [format_bytes(room.memory_bytes)] if room.memory_bytes else []
    parts += [f"{room.gpu_milli / 1000:g} GPU{'' if room.gpu_milli == 1000 else 's'}"] if room.gpu_milli else []
    return ", ".join(parts) or "the whole node"
