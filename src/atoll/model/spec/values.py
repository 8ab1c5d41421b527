"""What the parts of a spec share: types of values, and a default that a schema can tell."""

from __future__ import annotations

from typing import Annotated, TypeVar

from msgspec import Meta, field

from atoll.model.errors import Invalid

EnvValue = Annotated[str, Meta(max_length=32_768)]
Argument = Annotated[str, Meta(max_length=131_072, pattern=r"^[^\x00]*$(?!\n)", description="text without a zero byte")]
AbsolutePath = Annotated[str, Meta(pattern=r"^/[^\x00]*$(?!\n)", description="a path that begins with '/'", max_length=4_096)]
REPLICAS_MAX = 100_000
T = TypeVar("T")


def default(value: T) -> T:
    """A default that msgspec itself cannot write into a schema; `codec.json_schema` adds it."""
    return field(default_factory=lambda: value)


def check_unique(values: list[str], field: str, what: str) -> None:
    """Raise Invalid, naming `field`, where a value is there twice."""
    seen: set[str] = set()
    for value in values:
        if value in seen:
            raise Invalid(f"{field}: {what} {value!r} is given twice", field=field)
        seen.add(value)
