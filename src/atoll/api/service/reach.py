"""Can A reach B, and if not, which rule or link stops it: from the same specs and records that nodes make their rules of."""

from __future__ import annotations

import ipaddress

from msgspec import Struct

from atoll.api.service.specs import spec_of
from atoll.model.errors import NotFound
from atoll.model.fabric import FabricNode, FabricPaths, ReachStep, ReachView
from atoll.model.records import Instance, Status
from atoll.model.spec import Allow, AppSpec, JobSpec, PortProtocol
from atoll.model.spec.network import network_of
from atoll.store.cache import State


class End(Struct, frozen=True):
    """One end: an instance, and what it was made from."""

    instance: Instance
    spec: AppSpec | JobSpec
    address: str | None
    ipv6: str | None = None


def end_of(state: State, project: str, name: str) -> End:
    """Return an instance by its id, or one of an app's or job's: the one that has an address, where there is one.

    Raises NotFound.
    """
    found: End | None = None
    for key, held in sorted(state.records(Instance).items()):
        instance = held.record
        if instance.project != project or name not in (instance.id, instance.owner):
            continue
        spec = spec_of(state, instance)
        if spec is None:
            continue
        status = state.get(Status, key)
        live = status.record if status is not None and not status.record.phase.final else None
        address, ipv6 = (live.address, live.ipv6) if live is not None else (None, None)
        if found is None or (found.address is None and address is not None):
            found = End(instance, spec, address, ipv6)
    if found is None:
        raise NotFound(
            f"nothing of '{name[:60]}' runs in project '{project}'", mend=f"atoll ps --project {project} lists what does"
        )
    return found


def reach(state: State, source: End, target: End, port: int, protocol: str) -> ReachView:
    """Return every step of the way, also those behind the first that stops it."""
    steps = (
        _placed("source", source),
        _placed("target", target),
        _projects(source, target),
        _egress(source, target, port, protocol),
        _declared(target, port, protocol),
        _ingress(source, target, port, protocol),
        _way(state, source, target),
    )
    return ReachView(
        source=source.instance.id,
        target=target.instance.id,
        port=port,
        protocol=protocol,
        ok=all(step.ok for step in steps),
        steps=steps,
    )


def _placed(what: str, end: End) -> ReachStep:
    if end.address is None:
        return ReachStep(what=what, ok=False, detail=f"{end.instance.id} has no address", mend=f"atoll explain {end.instance.id}")
    named = f"{end.address} ({end.ipv6})" if end.ipv6 else end.address
    return ReachStep(what=what, ok=True, detail=f"{end.instance.id} is {named} on node {end.instance.node}")


def _projects(source: End, target: End) -> ReachStep:
    one, other = source.instance.project, target.instance.project
    if one != other:
        detail = f"projects do not reach each other: '{one}' and '{other}'"
        return ReachStep(what="project", ok=False, detail=detail, mend="give the target a route, and call that")
    return ReachStep(what="project", ok=True, detail=f"both are of '{one}'")


def _egress(source: End, target: End, port: int, protocol: str) -> ReachStep:
    rules = source.spec.network.egress if source.spec.network is not None else None
    if rules is None:
        return ReachStep(what="egress", ok=True, detail=f"{source.spec.name} has no egress rules")
    for index, allow in enumerate(rules):
        if _covers(allow, target, port, protocol):
            return ReachStep(what="egress", ok=True, detail=f"network.egress[{index}] of {source.spec.name} allows it")
    mend = f'add to its spec: network.egress = [{{ app = "{target.spec.name}", ports = [{port}] }}]'
    return ReachStep(what="egress", ok=False, detail=f"no egress rule of {source.spec.name} allows it", mend=mend)


def _declared(target: End, port: int, protocol: str) -> ReachStep:
    ports = target.spec.ports if isinstance(target.spec, AppSpec) else ()
    for declared in ports:
        if declared.port == port and (declared.protocol is PortProtocol.UDP) == (protocol == "udp"):
            return ReachStep(what="port", ok=True, detail=f"{target.spec.name} declares {protocol} {port} as '{declared.name}'")
    mend = f"add it to the [[ports]] of {target.spec.name}"
    return ReachStep(what="port", ok=False, detail=f"{target.spec.name} declares no {protocol} port {port}", mend=mend)


def _ingress(source: End, target: End, port: int, protocol: str) -> ReachStep:
    rules = target.spec.network.ingress if target.spec.network is not None else None
    if rules is None:
        return ReachStep(what="ingress", ok=True, detail=f"{target.spec.name} has no ingress rules")
    for index, allow in enumerate(rules):
        if _covers(allow, source, port, protocol):
            return ReachStep(what="ingress", ok=True, detail=f"network.ingress[{index}] of {target.spec.name} allows it")
    mend = f'add to its spec: network.ingress = [{{ app = "{source.spec.name}" }}]'
    return ReachStep(what="ingress", ok=False, detail=f"no ingress rule of {target.spec.name} allows it", mend=mend)


def _covers(allow: Allow, other: End, port: int, protocol: str) -> bool:
    if allow.ports and port not in allow.ports:
        return False
    if allow.protocol is not None and (allow.protocol is PortProtocol.UDP) != (protocol == "udp"):
        return False
    if allow.app is not None:
        return allow.app == other.instance.owner
    if allow.cidr is not None and other.address is not None:
        network = network_of(allow.cidr)
        address = other.address if network.version == 4 else other.ipv6
        return address is not None and ipaddress.ip_address(address) in network
    return False


def _way(state: State, source: End, target: End) -> ReachStep:
    one, other = source.instance.node, target.instance.node
    if one is None or other is None:
        return ReachStep(what="link", ok=False, detail="an end has no node yet")
    if one == other:
        return ReachStep(what="link", ok=True, detail=f"both are on node {one}")
    nodes = [state.get(FabricNode, name) for name in (one, other)]
    for name, held in zip((one, other), nodes, strict=True):
        if held is None:
            mend = f"see why: atoll nodes show {name}, and its events"
            return ReachStep(what="link", ok=False, detail=f"node {name} is not in the fabric", mend=mend)
        if not held.record.endpoint:
            mend = "start its agent with --fabric-address"
            return ReachStep(what="link", ok=False, detail=f"node {name} has no address that others know", mend=mend)
    for here, there in ((one, other), (other, one)):
        paths = state.get(FabricPaths, here)
        if paths is not None and there in paths.record.cut:
            detail = f"node {here} does not reach node {there}, through no other either"
            return ReachStep(what="link", ok=False, detail=detail, mend="let UDP 7605 and 7606 pass between them")
    paths = state.get(FabricPaths, one)
    through = paths.record.relayed.get(other) if paths is not None else None
    if through is not None:
        return ReachStep(what="link", ok=True, detail=f"node {one} reaches node {other} through {through}, not directly")
    return ReachStep(what="link", ok=True, detail=f"node {one} reaches node {other} directly")
