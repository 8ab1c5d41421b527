"""Lists in pages, in the order of their keys."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from typing import TypeVar

from atoll.model.errors import Invalid
from atoll.model.views import PAGE_LIMIT_MAX, Page
from atoll.store.cache import Held, State
from atoll.store.index import by_project

R = TypeVar("R")
V = TypeVar("V")


def page(
    state: State,
    kind: type[R],
    prefix: str,
    view: Callable[[Held[R]], V],
    *,
    limit: int,
    after: str = "",
    keep: Callable[[R], bool] | None = None,
) -> Page[V]:
    """Return up to `limit` records whose keys sort behind `prefix + after`, as `view` shows them.

    `prefix` is a project and a slash, or nothing, for all there are.
    """
    start = prefix + after
    records = state.found(kind, by_project, prefix.removesuffix("/")) if prefix else state.records(kind)
    found = [(key, held) for key, held in records.items() if (not after or key > start) and (keep is None or keep(held.record))]
    first = heapq.nsmallest(limit, found, key=lambda item: item[0])
    following = first[-1][0].removeprefix(prefix) if len(found) > limit else None
    return Page(items=tuple(view(held) for _, held in first), revision=state.revision, next=following)


def limit_of(text: str | None) -> int:
    """Return a `limit` parameter. Raises Invalid."""
    if text is None:
        return PAGE_LIMIT_MAX
    if not text.isascii() or not text.isdecimal() or not 1 <= int(text[:9]) <= PAGE_LIMIT_MAX:
        raise Invalid(f"limit: {text[:40]!r} is not a number from 1 to {PAGE_LIMIT_MAX}", field="limit")
    return int(text[:9])
