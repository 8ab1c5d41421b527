"""Whether one node is silent: `decide(rules, watch, event, now) -> (watch, actions)`. Pure.

    HEARD ──silence of suspect_s──▶ SUSPECT ──silent_s, asked in vain, others are heard──▶ SILENT
      ▲                                │                                                     │
      └────────── any sign ────────────┴─────────────────────────────────────────────────────┘

Times are those of one `AwakeClock`.
"""

from __future__ import annotations

import enum

from msgspec import Struct
from msgspec.structs import replace

from atoll.control.detection.rules import Rules


class Standing(enum.Enum):
    HEARD = "heard"
    SUSPECT = "suspect"
    """Not heard for a moment, and being asked. Nothing is told; it only gets nothing new."""
    SILENT = "silent"
    """It neither speaks nor answers, to us or to others."""


class Watch(Struct, frozen=True):
    """What is known of a node that is not simply heard."""

    standing: Standing = Standing.HEARD
    rounds: int = 0
    """Times that it was asked since it fell silent."""
    probe_at: float = 0.0
    helped: bool = False
    """A helper was asked to ask it."""
    denials: int = 0
    """Helpers that asked in vain."""


class Looked(Struct, frozen=True):
    """It is looked at. `heard` is when its last sign came; `others` when the last of any other node did, None without others."""

    heard: float
    others: float | None


class Asked(Struct, frozen=True):
    """Probes are on their way: straight, and through `helpers` others."""

    helpers: int


class Denied(Struct, frozen=True):
    """A helper asked it and got no answer."""


class Probe(Struct, frozen=True):
    """Ask the node, straight and through others; answer Asked."""


class Believe(Struct, frozen=True):
    """It is silent from now on."""


class Clear(Struct, frozen=True):
    """It has been heard again."""

    was: Standing


Event = Looked | Asked | Denied
Action = Probe | Believe | Clear


def decide(rules: Rules, watch: Watch, event: Event, now: float) -> tuple[Watch, tuple[Action, ...]]:
    match event:
        case Asked(helpers):
            pause_s = rules.probe_silent_every_s if watch.standing is Standing.SILENT else rules.probe_every_s
            helped = watch.helped or helpers > 0
            return replace(watch, rounds=watch.rounds + 1, probe_at=now + pause_s, helped=helped), ()
        case Denied():
            return (watch if watch.standing is Standing.HEARD else replace(watch, denials=watch.denials + 1)), ()
        case Looked(heard, others):
            return _looked(rules, watch, now - heard, None if others is None else now - others, now)


def _looked(rules: Rules, watch: Watch, silence: float, others: float | None, now: float) -> tuple[Watch, tuple[Action, ...]]:
    if silence < rules.suspect_s:
        return Watch(), (() if watch.standing is Standing.HEARD else (Clear(watch.standing),))
    actions: tuple[Action, ...] = (Probe(),) if now >= watch.probe_at else ()
    if watch.standing is Standing.HEARD:
        return replace(watch, standing=Standing.SUSPECT), (Probe(),)
    if watch.standing is Standing.SUSPECT and _convinced(rules, watch, silence, others):
        return replace(watch, standing=Standing.SILENT), (*actions, Believe())
    return watch, actions


def _convinced(rules: Rules, watch: Watch, silence: float, others: float | None) -> bool:
    if others is None or others > rules.others_s:
        return False  # nobody is heard: it is we who are cut off, or there is nobody to take over
    denied = watch.denials > 0 or not watch.helped or silence >= rules.silent_s + rules.denials_wait_s
    return silence >= rules.silent_s and watch.rounds >= rules.rounds_min and denied
