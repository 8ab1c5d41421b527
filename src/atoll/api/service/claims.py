"""Who owns which hostname and path. A place has one app, or the ingress would refuse everything; a hostname has one project."""

from __future__ import annotations

import re
from collections.abc import Sequence

from msgspec import Struct

from atoll.api.service.access import Caller
from atoll.api.service.context import Context
from atoll.model import codec, keys
from atoll.model.certificates import wildcards_over
from atoll.model.errors import Conflict, Forbidden, Invalid
from atoll.model.ports.store import Compare, Delete, Op, Put, absent, unchanged
from atoll.model.records import App, Project, RouteClaim, RouteHost
from atoll.model.spec import AppSpec, Port, Strategy, normal_path

DEFAULT_PROJECT = "default"
PREVIEW = "preview--"
"""Goes before the default hostname."""
PATH_BYTES_MAX = 512
_PATH = re.compile(r"/[A-Za-z0-9._~!$&'()*+,;=:@%/-]*")


class Host(Struct, frozen=True):
    """One place where an app answers."""

    host: str
    path: str
    port: Port
    headers: tuple[tuple[str, str], ...] = ()
    """Only requests with these."""

    @property
    def public(self) -> int:
        """The port of every ingress, of a place that is one; else 0."""
        return int(self.host.partition(":")[2] or 0)

    @property
    def place(self) -> tuple[str, str]:
        return self.host, self.path


def default_host(project: str, app: str, domain: str) -> str:
    return f"{app}.{domain}" if project == DEFAULT_PROJECT else f"{app}.{project}.{domain}"


def hosts_of(spec: AppSpec, domain: str) -> tuple[Host, ...]:
    """Return every place where the app answers, its default hostname first, unless a route of its own says otherwise."""
    explicit = [
        Host(route.host, normal_path(route.path), port, tuple(sorted(route.headers.items())))
        for route in spec.routes
        if (port := spec.port_named(route.port)) is not None
    ]
    default = default_host(spec.project, spec.name, domain)
    port = spec.port_named(None)
    if port is None or any(host.place == (default, "/") and not host.headers for host in explicit):
        return tuple(explicit)
    return (Host(default, "/", port), *explicit)


def listeners_of(spec: AppSpec) -> tuple[Host, ...]:
    """Return the ports of ingresses that the app has, each as the place `tcp:PORT` or `udp:PORT`, which no hostname can be."""
    return tuple(Host(f"{port.protocol}:{public}", "/", port) for public, port in spec.public_ports())


def preview_of(spec: AppSpec, domain: str) -> Host | None:
    """Return where a release of the app answers before it has the app's requests: of a blue-green rollout."""
    port = spec.port_named(None)
    if port is None or spec.rollout.strategy is not Strategy.BLUE_GREEN:
        return None
    return Host(PREVIEW + default_host(spec.project, spec.name, domain), "/", port)


def places_of(spec: AppSpec, domain: str) -> set[tuple[str, str]]:
    """Return all that the app claims."""
    preview = preview_of(spec, domain)
    places = {host.place for host in (*hosts_of(spec, domain), *listeners_of(spec))}
    return places | ({preview.place} if preview is not None else set())


def check_hosts(context: Context, spec: AppSpec) -> None:
    """Raise Invalid for a path that cannot be routed, Forbidden for a name under the cell's domain that is another project's."""
    for index, route in enumerate(spec.routes):
        field = f"routes[{index}]"
        if len(route.path) > PATH_BYTES_MAX or _PATH.fullmatch(route.path) is None or ".." in route.path.split("/"):
            raise Invalid(f"{field}.path: not the plain path of a URL, or over {PATH_BYTES_MAX} bytes", field=f"{field}.path")
        if route.host == context.domain or not route.host.endswith("." + context.domain):
            continue
        owner = route.host.removesuffix("." + context.domain).rsplit(".", 1)[-1]
        labels = route.host.count(".") - context.domain.count(".")
        if spec.project == DEFAULT_PROJECT:
            taken = labels > 1 and context.state.get(Project, owner) is not None
        else:
            taken = labels < 2 or owner != spec.project
        if taken:
            raise Forbidden(
                f"{field}.host: {route.host} is not under this project's part of {context.domain}",
                mend=f"use a name under {spec.project}.{context.domain}, or a domain of your own",
                field=f"{field}.host",
            )
    places = [(*host.place, host.headers) for host in hosts_of(spec, context.domain)]
    for place in places:
        if places.count(place) > 1:
            raise Invalid(f"routes: {place[0]}{place[1]} is given twice", field="routes")


def claim(context: Context, caller: Caller, old: AppSpec | None, new: AppSpec) -> tuple[list[Compare], list[Op]]:
    """Return what makes `new` own its places, and gives back those that only `old` had.

    Raises Conflict naming the place or hostname, and its owner where `caller` may see that.
    """
    compare: list[Compare] = []
    ops: list[Op] = []
    fresh: set[str] = set()
    wanted = places_of(new, context.domain)
    for place in sorted(wanted):
        key = keys.route(*place)
        held = context.state.get(RouteClaim, key.removeprefix(keys.ROUTES))
        if held is None:
            compare.append(absent(key))
        else:
            compare.append(unchanged(key, held.revision))
            if (held.record.project, held.record.app) == (new.project, new.name):
                continue
            compare.extend(_take(context, caller, held.record, place, new.project))
        fresh.add(place[0])
        ops.append(Put(key, codec.encode(RouteClaim(project=new.project, app=new.name))))
    for host in sorted(fresh):
        compare_host, ops_host = _enter(context, caller, new.project, host, wanted)
        compare.extend(compare_host)
        ops.extend(ops_host)
    if old is not None:
        compare_old, ops_old = release(context, old, keep=wanted)
        compare.extend(compare_old)
        ops.extend(ops_old)
    return compare, ops


def release(context: Context, spec: AppSpec, keep: set[tuple[str, str]] | None = None) -> tuple[list[Compare], list[Op]]:
    """Return what gives the app's places back, but for those in `keep`."""
    compare: list[Compare] = []
    ops: list[Op] = []
    for place in sorted(places_of(spec, context.domain) - (keep or set())):
        key = keys.route(*place)
        held = context.state.get(RouteClaim, key.removeprefix(keys.ROUTES))
        if held is not None and (held.record.project, held.record.app) == (spec.project, spec.name):
            compare.append(unchanged(key, held.revision))
            ops.append(Delete(key))
    return compare, ops


def orphans(context: Context) -> Sequence[tuple[str, int]]:
    """Return (key, revision) of claims whose app is gone or no longer wants them, and of hostnames without any."""
    found = []
    for behind, held in context.state.records(RouteClaim).items():
        host, slash, path = behind.partition("/")
        if not _wanted(context, held.record, (host, slash + path)):
            found.append((keys.ROUTES + behind, int(held.revision)))
    for host, entered in context.state.records(RouteHost).items():
        # Whoever claims a place on it writes this record too: then it is not removed.
        if not context.state.found(RouteClaim, of_host, host):
            found.append((keys.route_host(host), int(entered.revision)))
    return found


def of_host(key: str, record: RouteClaim) -> str:
    """Claims by their hostname."""
    return key.partition("/")[0]


def answering(context: Context, host: str) -> tuple[str, str] | None:
    """Return the project that answers at `host` and the hostname that it claimed, be it a wildcard; None where nobody does.

    Stores from before a hostname had one project may show several: as in the ingress, the shortest path says whose it is.
    """
    for name in (host, *wildcards_over(host)):
        found = context.state.found(RouteClaim, of_host, name)
        if found:
            return found[min(found)].record.project, name
    return None


def _enter(
    context: Context, caller: Caller, project: str, host: str, wanted: set[tuple[str, str]]
) -> tuple[list[Compare], list[Op]]:
    """Return what keeps a hostname to one project when it claims a place there, whatever others claim meanwhile."""
    key = keys.route_host(host)
    entered = context.state.get(RouteHost, host)
    compare = [absent(key) if entered is None else unchanged(key, entered.revision)]
    ops: list[Op] = [Put(key, codec.encode(RouteHost(project=project)))]
    for behind, held in context.state.found(RouteClaim, of_host, host).items():
        place = host, behind.removeprefix(host)
        if held.record.project == project or place in wanted:
            continue
        # One that nobody needs is removed: its app must not come back to it unseen.
        compare.append(unchanged(keys.ROUTES + behind, held.revision))
        compare.extend(_take(context, caller, held.record, place, project))
        ops.append(Delete(keys.ROUTES + behind))
    return compare, ops


def _take(context: Context, caller: Caller, claim: RouteClaim, place: tuple[str, str], project: str) -> list[Compare]:
    """Return the comparisons under which a claim that nobody needs any more may be taken over."""
    if _wanted(context, claim, place):
        owner = f"app '{claim.app}' in project '{claim.project}'" if caller.sees(claim.project) else "another project"
        protocol, colon, port = place[0].partition(":")
        if colon:
            what = f"ingress.ports: {protocol} port {port} of the ingresses belongs to {owner}"
            raise Conflict(what, field="ingress.ports", mend="choose another public port")
        mend = "choose another host or path" if claim.project == project else "choose another host: all its paths are one project's"
        raise Conflict(f"routes: {place[0]}{place[1]} belongs to {owner}", field="routes", mend=mend)
    key = keys.app(claim.project, claim.app)
    held = context.state.get(App, f"{claim.project}/{claim.app}")
    return [absent(key) if held is None else unchanged(key, held.revision)]


def _wanted(context: Context, claim: RouteClaim, place: tuple[str, str]) -> bool:
    held = context.state.get(App, f"{claim.project}/{claim.app}")
    return held is not None and place in places_of(held.record.spec, context.domain)
