"""Names of groups (`app/PROJECT/NAME/RELEASE/GENERATION`) and of their owners (`app/PROJECT/NAME`)."""

from __future__ import annotations

from functools import lru_cache

from atoll.model.records import OwnerKind


@lru_cache(maxsize=65_536)
def owner_of_group(group: str) -> str:
    """Return the app or job that a group belongs to."""
    return group.rsplit("/", 2)[0]


@lru_cache(maxsize=65_536)
def owners_named(group: str, name: str) -> tuple[str, ...]:
    """Return which owners `name` may mean in the spec of `group`: the app and the job of that name in its project.

    Never one of another project: a tenant must not be able to keep another's instances off nodes.
    """
    parts = owner_of_group(group).split("/")
    return tuple(f"{kind}/{parts[1]}/{name}" for kind in OwnerKind) if len(parts) == 3 else (name,)


@lru_cache(maxsize=65_536)
def project_of_group(group: str) -> str:
    """Return the project that a group belongs to; empty for a name without one."""
    parts = group.split("/")
    return parts[1] if len(parts) > 2 else ""
