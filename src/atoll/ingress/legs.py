"""From an app's routing to the places it answers at, and where each leads. Pure."""

from __future__ import annotations

from collections.abc import Mapping

from msgspec import structs

from atoll.ingress import resources
from atoll.ingress.hosts import APP, PROJECT, Leg
from atoll.ingress.limits import Limit, Subject
from atoll.ingress.resources import HostPath, Target
from atoll.ingress.sleepers import serving
from atoll.model.records import Endpoint, Routing
from atoll.model.spec import Route, normal_path

Places = Mapping[HostPath, tuple[Leg, ...]]
"""Where an app answers, and the ways that each place leads: those for requests with certain headers, and one for all others."""
_Headers = tuple[tuple[str, str], ...]


def legs_of(routing: Routing) -> Places:
    """Return where the app answers, its preview among it. Of what is said twice the first counts."""
    project, app, rules, preview = routing.project, routing.app, routing.spec.ingress, routing.preview
    routes: dict[tuple[HostPath, _Headers], Route] = {}
    for route in routing.spec.routes:
        routes.setdefault((HostPath(route.host, normal_path(route.path)), _sorted(route.headers)), route)
    limited = tuple(limits_of(routing))
    chosen = rules.canary if rules is not None and canary_of(routing) else None
    found: dict[HostPath, dict[tuple[_Headers, bool], Leg]] = {}

    def add(place: HostPath, target: Target, headers: _Headers = ()) -> None:
        route = routes.get((HostPath(place.host, normal_path(place.path)), headers))
        legs = found.setdefault(place, {})
        legs.setdefault((headers, False), Leg(target, headers, rules, route, limited=limited))
        if chosen is not None and not target.raw:
            preferred = structs.replace(target, preview=True)
            legs.setdefault((headers, True), Leg(preferred, headers, rules, route, chosen, limited))

    for host, path, port, http2 in routing.hosts:
        add(HostPath(host, path), Target(project, app, port, http2))
    for rule in routing.rules:
        add(HostPath(rule.host, rule.path), Target(project, app, rule.port, rule.http2), _sorted(rule.headers))
    for each in routing.listens:
        add(HostPath(f"{each.protocol}:{each.public}", "/"), Target(project, app, each.port, raw=each.protocol.value))
    if preview is not None:
        add(HostPath(preview.host, "/"), Target(project, app, preview.port, preview.http2, preview=True))
    return {place: tuple(legs.values()) for place, legs in found.items()}


def canary_of(routing: Routing) -> tuple[Endpoint, ...]:
    """Return the endpoints of the release that requests may choose; none while none of them serves."""
    found = tuple(each for each in routing.endpoints if routing.canary and each.release == routing.canary)
    return found if serving(found) else ()


def targets_of(places: Places) -> set[Target]:
    """Return every port that a place leads to which Envoy can take."""
    return {
        leg.target
        for place, legs in places.items()
        if resources.check_host_path(place.host, place.path) is None
        for leg in legs
        if 0 < leg.target.port < 65_536
    }


def limits_of(routing: Routing) -> dict[Subject, Limit]:
    """Return what the app's requests are counted against, and how many may be."""
    found: dict[Subject, Limit] = {}
    rate = routing.spec.ingress.rate if routing.spec.ingress is not None else None
    if rate is not None:
        found[APP, f"{routing.project}/{routing.app}"] = (rate.requests, rate.burst or rate.requests)
    if routing.project_rate is not None:
        found[PROJECT, routing.project] = (routing.project_rate, routing.project_rate)
    return found


def _sorted(headers: Mapping[str, str]) -> _Headers:
    return tuple(sorted(headers.items()))
