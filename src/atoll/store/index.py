"""Some of the records of one kind, found by what they have in common instead of by looking at all of them.

An index is a function of a record's key and the record, which gives what it is found by, or None for one that is not found.
`State.found` makes the index of a function the first time that it is asked for, and keeps it current from then on; so such
functions are module-level ones, few, and look at nothing but the record.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from types import MappingProxyType
from typing import Any

By = Callable[[str, Any], Hashable | None]
"""Key behind the kind's prefix, record → what it is found by."""

NOTHING: Mapping[str, Any] = MappingProxyType({})


class Index:
    """What stands under each value of `by`. Costs one entry for each record."""

    def __init__(self, by: By, records: Mapping[str, Any]) -> None:
        self._by = by
        self._groups: dict[Hashable, dict[str, Any]] = {}
        for key, held in records.items():
            self._add(key, held)

    def found(self, value: Hashable) -> Mapping[str, Any]:
        """Return a live view of what is found by `value` now; it is not to be kept."""
        group = self._groups.get(value)
        return MappingProxyType(group) if group is not None else NOTHING

    def change(self, key: str, old: Any, new: Any) -> None:
        """Take over one record's change; None: it was not there, or is not any more."""
        if old is not None:
            value = self._by(key, old.record)
            group = self._groups.get(value)
            if group is not None:
                group.pop(key, None)
                if not group:
                    del self._groups[value]
        if new is not None:
            self._add(key, new)

    def _add(self, key: str, held: Any) -> None:
        value = self._by(key, held.record)
        if value is not None:
            self._groups.setdefault(value, {})[key] = held


def by_project(key: str, record: Any) -> str:
    """Records whose key begins with their project's name."""
    return key.partition("/")[0]
