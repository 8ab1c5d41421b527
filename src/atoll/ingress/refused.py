"""What of an app's routing is left out here: by the table's own checks, or because Envoy would not take it. No I/O."""

from __future__ import annotations

from atoll.ingress.http3 import HTTP3
from atoll.ingress.resources import ROUTE_CONFIG, Kind, Name, Resource
from atoll.ingress.table import RoutingTable
from atoll.model.records import INGRESS_PROBLEM

PROBLEMS_MAX = 100
REFUSALS_MAX = 10_000


class Refused:
    """Forgets a refusal as soon as what was refused has changed or gone, or is taken after all."""

    def __init__(self, table: RoutingTable) -> None:
        self._table = table
        self._words: dict[Name, tuple[str, str]] = {}
        """What was refused → its version and Envoy's words."""

    def note(self, resource: Resource, words: str) -> None:
        """Take down that Envoy does not take this version; its last good one serves."""
        if len(self._words) < REFUSALS_MAX:
            self._words[resource.kind, resource.name] = (resource.version, words)

    def taken(self, resource: Resource) -> None:
        """Take down that Envoy has taken after all what it refused."""
        if self._words.get((resource.kind, resource.name), ("", ""))[0] == resource.version:
            del self._words[resource.kind, resource.name]

    def problems(self, most: int = PROBLEMS_MAX) -> dict[str, str]:
        """Return `PROJECT/APP` → what is left out of its routing, of at most `most` apps."""
        found: dict[str, str] = {}
        for problem in self._table.problems:
            found.setdefault(problem.app, problem.message)
        for name, (version, words) in list(self._words.items()):
            newest = self._table.resources[name[0]].get(name[1])
            if newest is None or newest.version != version:
                del self._words[name]
            elif (app := self._app(name)) is not None:
                found.setdefault(app, f"Envoy does not take it, and what it took last serves on: {words}")
        return dict(sorted(found.items())[:most])

    def _app(self, name: Name) -> str | None:
        kind, text = name
        if kind is Kind.HOST:
            return self._table.owner_of(text.removeprefix(f"{ROUTE_CONFIG}/"))
        if kind is Kind.LISTENER:
            return INGRESS_PROBLEM if text == HTTP3 else self._table.owner_of(text)
        if kind in (Kind.CLUSTER, Kind.ENDPOINTS):
            return "/".join(text.split("/")[:2])
        return None
