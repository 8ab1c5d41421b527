"""By what instances are found: their node, their owner."""

from __future__ import annotations

from atoll.model.records import App, Instance, OwnerKind

Owner = tuple[OwnerKind, str, str]


def by_node(key: str, instance: Instance) -> str | None:
    return instance.node


def by_owner(key: str, instance: Instance) -> Owner:
    return (instance.owner_kind, instance.project, instance.owner)


def owner_of(app: App) -> Owner:
    return (OwnerKind.APP, app.project, app.name)
