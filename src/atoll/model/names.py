"""What every part of a spec is written with: names, variables, ports, and the record that they all are."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta, Struct

NAME_CHARS_MAX = 40
NAME_PATTERN = r"^[a-z](?:[-a-z0-9]{0,38}[a-z0-9])?$(?!\n)"
Name = Annotated[
    str, Meta(pattern=NAME_PATTERN, description="lower-case letters, digits and '-', at most 40, a letter first and no '-' last")
]
EnvName = Annotated[
    str, Meta(pattern=r"^[A-Za-z_][A-Za-z0-9_]{0,127}$(?!\n)", description="letters, digits and '_', at most 128, no digit first")
]
PortNumber = Annotated[int, Meta(ge=1, le=65_535)]


class SpecRecord(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A stored spec names every value, so that a release keeps its meaning when a default changes."""
