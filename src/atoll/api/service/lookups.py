"""By what instances are found: their node, their owner; and nodes, by their labels."""

from __future__ import annotations

from atoll.model.evacuation import labels_of
from atoll.model.labels import described
from atoll.model.records import App, Instance, Node, NodePolicy, OwnerKind
from atoll.store.cache import State

Owner = tuple[OwnerKind, str, str]


def by_node(key: str, instance: Instance) -> str | None:
    return instance.node


def by_owner(key: str, instance: Instance) -> Owner:
    return (instance.owner_kind, instance.project, instance.owner)


def owner_of(app: App) -> Owner:
    return (OwnerKind.APP, app.project, app.name)


def labels_by_node(state: State) -> dict[str, dict[str, str]]:
    """Return each node's labels, as its agent and its operators have it."""
    policies = state.records(NodePolicy)
    return {
        name: labels_of(described(held.record, policies[name].record if name in policies else None))
        for name, held in state.records(Node).items()
    }
