"""What a rule about placed instances is, and how it changes while a class of equal instances is placed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from atoll.scheduling.demand import Demand
from atoll.scheduling.interface import Reason, View
from atoll.scheduling.snapshot import Bools, Ints


class Bound(Protocol):
    """Which places (values of a label) take one more of the class. Every node of a place stands the same to it."""

    of: Ints
    """Row → place, or ABSENT for a node that belongs to none."""

    def open(self, place: int) -> bool: ...

    def shut(self, place: int) -> bool:
        """Return whether a place that is not open never opens again, however many more are placed."""
        ...

    def still(self, count: int) -> Bools | None:
        """Return the rows that are open now, where `count` more open no other and shut only the places that they go to; None where
        that is not so. Asked before anything is taken."""
        ...

    def take(self, place: int) -> bool:
        """Count one instance there; return whether places that were not open may be so now."""
        ...


class Rule(Protocol):
    """A hard rule that depends on where instances are."""

    name: str

    def wants(self, view: View, group: str, demand: Demand) -> bool:
        """Return whether the rule can turn anything away; if not it is skipped."""
        ...

    def passes(self, view: View, group: str, demand: Demand) -> Bools:
        """Return which rows the next instance of the class may use."""
        ...

    def bounds(self, view: View, group: str, demand: Demand, fit: Bools) -> Sequence[Bound]:
        """Return how that changes with each one placed; empty where it does not. `fit`: rows that the facts allow."""
        ...

    def room(self, view: View, group: str, demand: Demand) -> Ints | None:
        """Return how many of the class each row takes where that does not depend on other rows. Such a limit needs no bound."""
        ...

    def explain(self, view: View, group: str, demand: Demand, failed: Ints) -> Reason: ...


class Still:
    """A rule that the placing of its own class does not change."""

    def bounds(self, view: View, group: str, demand: Demand, fit: Bools) -> Sequence[Bound]:
        return ()

    def room(self, view: View, group: str, demand: Demand) -> Ints | None:
        return None
