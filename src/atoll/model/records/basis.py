"""What all records have in common."""

from __future__ import annotations

from typing import ClassVar

from msgspec import Struct

CELL = "main"
"""The cell's name in ids; a fleet has many cells."""
CELL_PROJECT = "default"
"""Where events about nodes are kept."""


class Record(Struct, frozen=True, kw_only=True, omit_defaults=True, gc=False):
    """Frozen and made from text, a record is never part of a circle: Python's collector need not walk through all of a cell."""

    PIECEMEAL: ClassVar[bool] = False
    """Whether people say one part of it at a time: who writes it again keeps the fields that it does not know (`model.stored`)."""
