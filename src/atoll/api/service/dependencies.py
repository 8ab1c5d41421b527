"""What apps may depend on: others of their project that are there, and never in a circle."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from atoll.api.service.context import Context
from atoll.model.errors import Invalid
from atoll.model.records import App
from atoll.model.spec import AppSpec


def check_dependencies(context: Context, spec: AppSpec, beside: Mapping[str, AppSpec]) -> None:
    """Raise Invalid for a dependency that is not there, or a cycle, by name. `beside` are specs that are written with this one."""
    known = {held.record.name: held.record for held in context.state.records(App).values() if held.record.project == spec.project}

    def of(name: str) -> tuple[str, ...]:
        if name == spec.name:
            return spec.depends_on
        if name in beside:
            return beside[name].depends_on
        return known[name].spec.depends_on if name in known else ()

    for index, name in enumerate(spec.depends_on):
        field = f"depends_on[{index}]"
        if name not in beside and name not in known:
            mend = "deploy it first, or both in one file with [[apps]]"
            raise Invalid(f"{field}: project '{spec.project}' has no app '{name}'", field=field, mend=mend)
        if name not in beside and known[name].deleting:
            raise Invalid(f"{field}: app '{name}' is being deleted", field=field)
    way = _cycle(spec.name, of)
    if way:
        text = f"depends_on: {' → '.join(way)}: each would wait for the next for ever"
        raise Invalid(text, field="depends_on", mend="leave one of these dependencies out")


def dependents_of(context: Context, app: App) -> list[str]:
    """Return the apps that depend on one, and are not to go themselves."""
    found = (held.record for held in context.state.records(App).values())
    return sorted(o.name for o in found if o.project == app.project and app.name in o.spec.depends_on and not o.deleting)


def _cycle(start: str, depends: Callable[[str], tuple[str, ...]]) -> list[str]:
    """Return a way from `start` back to it; empty where there is none."""
    todo: list[list[str]] = [[start]]
    seen: set[str] = set()
    while todo:
        way = todo.pop()
        for name in depends(way[-1]):
            if name == start:
                return [*way, start]
            if name not in seen:
                seen.add(name)
                todo.append([*way, name])
    return []
