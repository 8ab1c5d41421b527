"""What an ingress needs for one app: its places and the endpoints that may get requests."""

from __future__ import annotations

import functools
import ipaddress
from collections import defaultdict
from collections.abc import Iterable

from atoll.api.service.claims import Host, hosts_of, listeners_of, preview_of
from atoll.api.service.specs import release_spec
from atoll.model.fabric import PRIVATE, FabricNode, node_address
from atoll.model.records import (
    App,
    AppStatus,
    Endpoint,
    Instance,
    Listening,
    Node,
    NodeHealth,
    NodeLiveness,
    Preview,
    Project,
    Routing,
    Rule,
    Status,
)
from atoll.model.rollouts import RolloutStatus
from atoll.model.spec import AppSpec, Strategy
from atoll.model.states import Desired, Phase
from atoll.store.cache import State

Ports = tuple[tuple[int, bool] | None, ...]


def routing_of(state: State, app: App, instances: Iterable[Instance], domain: str) -> Routing | None:
    """Return the app's routing, None when it has no route.

    Endpoints are instances that are ready; those that drain stay, marked, until they are told to stop, so that the ingress can
    say when they have no request left. While a rollout changes port numbers, the places lead to the ports of the release that
    has the most endpoints (of one that goes by shares: that serve), and only to instances that listen there.
    """
    hosts = (*hosts_of(app.spec, domain), *listeners_of(app.spec))
    if not hosts:
        return None
    held = state.get(AppStatus, f"{app.project}/{app.name}")
    rollout = held.record.rollout if held is not None else None
    weights = rollout.weights if rollout is not None else {}
    groups: dict[Ports, list[tuple[int, Endpoint]]] = defaultdict(list)
    for instance in _reachable(state, instances):
        endpoint = endpoint_of(state, instance)
        spec = release_spec(state, app.project, app.name, instance.release) if endpoint is not None else None
        if endpoint is not None and spec is not None:
            groups[_ports(hosts, spec)].append((instance.release, endpoint))
    preview = _preview(state, app, rollout, groups, domain)
    if weights and not _holds_back(rollout) and not sum(_serving(group, weights) for group in groups.values()):
        weights = {}  # rather a release that was taken back than none
    wanted = _ports(hosts, app.spec)
    ports = max(
        groups, key=lambda key: (_serving(groups[key], weights), key == wanted, max(r for r, _ in groups[key])), default=wanted
    )
    endpoints = sorted((endpoint for _, endpoint in groups.get(ports, ())), key=lambda endpoint: endpoint.instance)
    leads = [(host, *(number or (host.port.port, host.port.http2))) for host, number in zip(hosts, ports, strict=True)]
    quota = project.record.quota if (project := state.get(Project, app.project)) is not None else None
    return Routing(
        project=app.project,
        app=app.name,
        spec=app.spec,
        hosts=tuple((host.host, host.path, port, http2) for host, port, http2 in leads if not host.headers and not host.public),
        rules=tuple(
            Rule(host=host.host, path=host.path, port=port, http2=http2, headers=dict(host.headers))
            for host, port, http2 in leads
            if host.headers
        ),
        canary=_chosen(app.spec, rollout),
        listens=tuple(
            Listening(public=host.public, protocol=host.port.protocol, port=port) for host, port, _ in leads if host.public
        ),
        endpoints=tuple(endpoints),
        weights=weights,
        preview=preview,
        # Kept awake or not: a request is not refused between `atoll scale APP 1` and the first instance that is ready.
        wakes=(wakes := app.spec.wakes and not app.deleting),
        starting=_starting(state, app, instances, hosts, wanted) if wakes and not (weights or endpoints or app.standby) else (),
        project_rate=quota.requests_per_s if quota is not None else None,
    )


def _chosen(spec: AppSpec, rollout: RolloutStatus | None) -> int:
    """Return the release that those requests get which choose it, while its canary rollout is under way."""
    if spec.ingress is None or spec.ingress.canary is None or rollout is None or rollout.strategy is not Strategy.CANARY:
        return 0
    return rollout.release if rollout.phase.under_way and rollout.release != rollout.stable else 0


def _holds_back(rollout: RolloutStatus | None) -> bool:
    """Whether the new release must not get a request, come what may: nobody has promoted it."""
    return rollout is not None and rollout.phase.under_way and rollout.weight == 0


def _preview(
    state: State, app: App, rollout: RolloutStatus | None, groups: dict[Ports, list[tuple[int, Endpoint]]], domain: str
) -> Preview | None:
    host = preview_of(app.spec, domain)
    if host is None:
        return None
    number = rollout.serving if rollout is not None else app.release
    spec = release_spec(state, app.project, app.name, number)
    port = spec.port_named(None) if spec is not None else None
    if port is None:
        return None
    found = [endpoint for group in groups.values() for release, endpoint in group if release == number]
    endpoints = tuple(sorted(found, key=lambda endpoint: endpoint.instance))
    return Preview(host=host.host, release=number, port=port.port, http2=port.http2, endpoints=endpoints)


def endpoint_of(state: State, instance: Instance) -> Endpoint | None:
    """Return where an instance takes requests, None when it must not get any."""
    held = state.get(Status, f"{instance.project}/{instance.id}")
    if held is None or instance.node is None or instance.desired is Desired.STOP or instance.standby:
        return None
    status = held.record
    if status.parked:
        return None
    draining = instance.desired is Desired.DRAIN
    if status.address is None or status.phase is not Phase.RUNNING or not (status.ready or draining):
        return None
    if not _has(state, instance.node, status.address):
        return None
    return _endpoint(state, instance, status.address, draining=draining)


def _endpoint(state: State, instance: Instance, address: str, *, draining: bool) -> Endpoint:
    node = state.get(Node, instance.node or "")
    site = node.record.site if node is not None else "local"
    return Endpoint(
        instance=instance.id,
        node=instance.node or "",
        site=site,
        address=address,
        draining=draining,
        release=instance.release,
    )


def _starting(state: State, app: App, instances: Iterable[Instance], hosts: Iterable[Host], wanted: Ports) -> tuple[Endpoint, ...]:
    """Return where the app's instances will be, as far as a connection alone says that they are ready; see `Routing.starting`."""
    found = []
    for instance in instances:
        status = state.get(Status, f"{instance.project}/{instance.id}")
        spec = release_spec(state, app.project, app.name, instance.release)
        if status is None or status.record.parked or spec is None or spec.health is not None or _ports(hosts, spec) != wanted:
            continue
        comes = status.record.phase in (Phase.STARTING, Phase.RUNNING) and instance.desired is Desired.RUN and not instance.standby
        address, node = status.record.address, instance.node
        if comes and address is not None and node is not None and not _lost(state, node) and _has(state, node, address):
            found.append(_endpoint(state, instance, address, draining=False))
    return tuple(sorted(found, key=lambda endpoint: endpoint.instance))


def _reachable(state: State, instances: Iterable[Instance]) -> list[Instance]:
    """Leave out instances on lost nodes, as long as there are others that take requests.

    Where all nodes seem lost, it is likely the control plane that is cut off, and what served goes on serving.
    """
    found = list(instances)
    near = [instance for instance in found if instance.node is not None and not _lost(state, instance.node)]
    serving = any((endpoint := endpoint_of(state, instance)) is not None and not endpoint.draining for instance in near)
    return near if serving else found


def _lost(state: State, node: str) -> bool:
    liveness = state.get(NodeLiveness, node)
    return liveness is not None and liveness.record.health is NodeHealth.LOST


def _has(state: State, node: str, address: str) -> bool:
    """Return whether an instance of the node can have the address: no node of the fabric can give itself another's, and none leads
    an ingress to itself or to what is near it. Of one that is in no fabric that is any which nodes can have."""
    own = ipaddress.IPv4Address(address)
    held = state.get(FabricNode, node)
    if held is not None:
        return own in _network(held.record.prefix) and address != node_address(held.record.prefix)
    return any(own in one for one in PRIVATE)


@functools.cache
def _network(prefix: str) -> ipaddress.IPv4Network:
    return ipaddress.IPv4Network(prefix)


def _ports(hosts: Iterable[Host], spec: AppSpec) -> Ports:
    """Return where a release listens for each place: by the port's name."""
    found = []
    for host in hosts:
        port = spec.port_named(host.port.name)
        found.append((port.port, port.http2) if port is not None else None)
    return tuple(found)


def _serving(group: list[tuple[int, Endpoint]], weights: dict[int, int]) -> int:
    return sum(not endpoint.draining and (not weights or weights.get(release, 0) > 0) for release, endpoint in group)
