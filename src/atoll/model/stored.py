"""Records with specs in them, as they stand in the store: beside all values they say which ones are no defaults.

A stored spec names every value, so that it keeps its meaning when a default changes. A server of the version before would then
refuse each spec that a newer one has written, for new fields that nobody has used yet, and in a rolling upgrade that server may
lead. So what it does not know it leaves out where it is not used, and refuses where it is: nothing is run as if it were not there.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any, TypeVar

import msgspec
from msgspec import NODEFAULT, UNSET, Struct
from msgspec.structs import fields

from atoll.model import codec
from atoll.model.errors import Invalid

T = TypeVar("T")
USED = "used"
"""Beside the record's own fields, which whoever decodes the record does not see."""


def encode(record: Struct) -> bytes:
    """Return a record that has specs in it, as it is stored."""
    return codec.encode(record)[:-1] + b',"' + USED.encode() + b'":' + codec.encode(sorted(set(_used(record, "")))) + b"}"


def decode(data: bytes, kind: type[T]) -> T:
    """Return the record that the store holds; of one that a newer Atoll has written, without what is new and not used there.

    Raises Invalid, which names what is used and not known.
    """
    try:
        return codec.decode(data, kind)
    except Invalid as error:
        if codec.UNKNOWN not in error.message:
            raise
        refused = error
    value = msgspec.json.decode(data)
    used = value.get(USED) if isinstance(value, dict) else None
    if not isinstance(used, list):
        raise refused
    left_out: set[str] = set()
    known = codec.known(kind, value, left_out)
    for path in sorted(left_out.intersection(used)):
        raise Invalid(f"{path}: this version does not know it, and it is used", field=path, mend="use the newer Atoll")
    return codec.convert(known, kind)


def beside(data: bytes, kind: type[Struct]) -> dict[str, Any] | None:
    """Return what the store holds of a record beside the fields that `kind` knows, which a newer Atoll wrote; None for nothing.

    Raises Invalid for what is no record.
    """
    value = codec.decode(data, dict[str, Any])
    names = {encoded for _, encoded, _ in _fields_of(kind)}
    return {name: one for name, one in value.items() if name not in names} or None


def encode_over(record: Struct, unknown: dict[str, Any] | None) -> bytes:
    """Return a record without specs, as it is stored, with what stood beside it (`beside`) when it was read."""
    return codec.encode({**codec.to_plain(record), **unknown} if unknown else record)


def _used(value: Struct, path: str) -> Iterator[str]:
    """Yield the fields of the specs in `value` that are not at their default, as `spec.ports.port`: without indexes and keys."""
    strict = value.__struct_config__.forbid_unknown_fields
    for name, encoded, default in _fields_of(type(value)):
        inner, place = getattr(value, name), f"{path}{encoded}"
        if inner is UNSET or inner == default:
            continue
        if strict:
            yield place
        for one in _parts(inner):
            if isinstance(one, Struct):
                yield from _used(one, f"{place}.")


@functools.cache
def _fields_of(kind: type[Struct]) -> tuple[tuple[str, str, Any], ...]:
    """Return name, name in JSON and default of each field."""
    return tuple(
        (field.name, field.encode_name, field.default if field.default_factory is NODEFAULT else field.default_factory())
        for field in fields(kind)
    )


def _parts(value: Any) -> tuple[Any, ...]:
    if isinstance(value, dict):
        return tuple(value.values())
    return tuple(value) if isinstance(value, (list, tuple)) else (value,)
