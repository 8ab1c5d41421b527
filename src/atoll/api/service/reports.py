"""What agents and ingresses say: statuses, events, drained endpoints. Each only about what is theirs."""

from __future__ import annotations

import ipaddress
from collections.abc import Callable, Mapping, Sequence, Set

import structlog
from msgspec.structs import replace

from atoll.api.service.access import check_id, check_name
from atoll.api.service.context import Context, Draft
from atoll.api.service.events import MESSAGE_CHARS_MAX, PER_MINUTE_MAX, Allowance, bounded
from atoll.api.service.lookups import by_node
from atoll.model import codec, keys
from atoll.model.errors import Conflict, Forbidden, Invalid, NotFound, TooLarge
from atoll.model.ports.store import Compare, Op, Put, Target, absent, unchanged
from atoll.model.records import CELL_PROJECT, Drained, Event, Ingress, Instance, Node, Severity, Status, event_id
from atoll.model.states import TRANSITIONS, Desired, Phase

STATUSES_MAX = 1_000
"""Statuses, and events, in one report."""
AHEAD_S = 5.0
"""How much later than this server's an agent's clock may date an event."""

log = structlog.get_logger()


def _closure() -> dict[Phase, frozenset[Phase]]:
    """From each phase, where an agent may have got when it reports only the newest; it never says that itself is lost."""
    reached = {phase: {phase} | (TRANSITIONS[phase] - {Phase.LOST}) for phase in Phase}
    for _ in Phase:
        for phase, found in reached.items():
            reached[phase] = found.union(*(reached[step] for step in found))
    # A machine that lost power may have forgotten that it had begun to stop.
    reached[Phase.STOPPING] |= reached[Phase.RUNNING]
    return {phase: frozenset(found) for phase, found in reached.items()}


REACHABLE = _closure()


async def report(
    context: Context,
    node: str,
    statuses: Sequence[Status],
    events: Sequence[Event],
    allowance: Allowance,
    had: Callable[[str, str], bool],
) -> None:
    """Write what `node` says of its instances. Safe to repeat.

    What concerns an instance that is gone, or would go back from an end, is left out: the agent is told of removals by its
    assignments. So is a word that comes after a newer one of the same node: a report may have been on its way for long; and an
    event in a project that has nothing there, and by `had` had nothing lately. Of the events that go beyond `allowance`, only
    their number is written.
    Raises NotFound for a node that has not registered, Forbidden for another node's instance, Conflict when all else is written
    and some of it was not the newest word (an agent whose date was set back says it again, with higher numbers), Invalid, TooLarge,
    Unavailable when this server's cache is too far behind to tell.
    """
    if context.state.get(Node, node) is None:
        raise NotFound(f"no node '{node[:60]}'", mend="register it first")
    if len(statuses) > STATUSES_MAX or len(events) > STATUSES_MAX:
        raise TooLarge(f"a report has at most {STATUSES_MAX} statuses and events, this one {len(statuses)} and {len(events)}")
    newest = {status.instance: status for status in statuses}
    for status in newest.values():
        check_id(status.instance, "statuses.instance")
        check_name(status.project, "statuses.project")
        if status.node != node:
            raise Forbidden(f"the status of instance '{status.instance}' names node '{status.node}', not '{node}'")
        if status.phase is Phase.LOST:
            raise Invalid("statuses.phase: only the control plane says that an instance is lost", field="statuses.phase")
        _check_addresses(status)
    for event in events:
        _check_event(context, node, event)
    unknown = any(context.state.get(Instance, f"{status.project}/{status.instance}") is None for status in newest.values())
    named = {event.project for event in events}
    projects = _writable(context, node, named, had)
    if unknown or projects != named:
        # Gone, or this server has not heard of it yet: the agent may have come from one that has.
        await context.be_current()
        projects = _writable(context, node, named, had)
    fresh = {f"{event.project}/{event.id}": event for event in events if event.project in projects}
    said = [_event(context, node, event) for key, event in fresh.items() if context.state.get(Event, key) is None]
    with allowance.of(node, len(said)) as (room, left_out):
        told = [_left_out(context, node, left_out)] if left_out else []
        late = await _write(context, node, newest, [*told, *said[:room]])
    if late:
        log.warning("a report came late", node=node, instances=sorted(late))
        raise Conflict(f"newer words of node '{node}' are known: {', '.join(sorted(late))}", mend="say it again as a newer one")


async def _write(context: Context, node: str, newest: Mapping[str, Status], events: Sequence[Op]) -> set[str]:
    """Write it all, and return the instances of which a newer word is known."""
    late: set[str] = set()

    def build() -> Draft[None]:
        compare: list[Compare] = []
        ops: list[Op] = list(events)
        late.clear()
        for status in newest.values():
            if _is_late(context, status):
                late.add(status.instance)
                continue
            part = _status(context, node, status)
            if part is not None:
                compare.extend(part[0])
                ops.append(part[1])
        return Draft(compare=compare, ops=ops, answer=lambda _: None)

    await context.write(type(None), build)
    return late


def _check_addresses(status: Status) -> None:
    """Raise Invalid for what is no address: other nodes, ingresses and whoever asks for a way are told of it as of one."""
    for field, text, kind in (("address", status.address, ipaddress.IPv4Address), ("ipv6", status.ipv6, ipaddress.IPv6Address)):
        if text is not None:
            try:
                kind(text)
            except ValueError:
                what = f"statuses.{field}"
                raise Invalid(f"{what}: {text[:60]!r} of instance '{status.instance}' is no address", field=what) from None


def _is_late(context: Context, status: Status) -> bool:
    old = context.state.get(Status, f"{status.project}/{status.instance}")
    return old is not None and 0 < status.word < old.record.word


def _status(context: Context, node: str, status: Status) -> tuple[list[Compare], Op] | None:
    behind = f"{status.project}/{status.instance}"
    instance = context.state.get(Instance, behind)
    if instance is None:
        return None
    if instance.record.node != node:
        raise Forbidden(f"instance '{status.instance}' is not on node '{node}'")
    old = context.state.get(Status, behind)
    if len(status.message) > MESSAGE_CHARS_MAX:
        status = replace(status, message=status.message[:MESSAGE_CHARS_MAX])
    if old is not None:
        if old.record == status:
            return None
        if status.phase not in REACHABLE[old.record.phase]:
            log.warning("an illegal step was reported", instance=status.instance, node=node, old=old.record.phase, new=status.phase)
            return None
    key = keys.status(status.project, status.instance)
    exists = Compare(keys.instance(status.project, status.instance), Target.CREATE, instance.created)
    return [exists, absent(key) if old is None else unchanged(key, old.revision)], Put(key, codec.encode(status))


def _writable(context: Context, node: str, named: Set[str], had: Callable[[str, str], bool]) -> set[str]:
    """Return in which of these its events may stand: the cell's own, and each that has an instance there, or had one lately."""
    others = named - {CELL_PROJECT}
    there = {held.record.project for held in context.state.found(Instance, by_node, node).values()} if others else set()
    return {project for project in named if project not in others or project in there or had(node, project)}


def _check_event(context: Context, node: str, event: Event) -> None:
    """An agent speaks of its instances and of itself. Raises Invalid, Forbidden."""
    check_name(event.project, "events.project")
    check_id(event.id, "events.id")
    check_id(event.code, "events.code")
    kind, _, name = event.subject.partition("/")
    if kind == "instance":
        held = context.state.get(Instance, f"{event.project}/{check_id(name, 'events.subject')}")
        if held is not None and held.record.node != node:
            raise Forbidden(f"instance '{name[:60]}' is not on node '{node}'")
    elif event.subject != f"node/{node}":
        raise Forbidden(f"an agent may not speak of '{event.subject[:60]}'")


def _event(context: Context, node: str, event: Event) -> Put:
    """Nothing is of later than now, or it would stay when all else is too old."""
    at = min(event.at, context.clock.now() + AHEAD_S)
    return Put(keys.event(event.project, event.id), codec.encode(bounded(replace(event, at=at, node=node))))


def _left_out(context: Context, node: str, count: int) -> Put:
    at = context.clock.now()
    event = Event(
        id=event_id(at, f"{node}-events-left-out"),
        at=at,
        project=CELL_PROJECT,
        subject=f"node/{node}",
        code="events-left-out",
        message=f"{count} events of node {node} were left out: it had more than {PER_MINUTE_MAX} in a minute",
        severity=Severity.WARNING,
        node=node,
    )
    return Put(keys.event(CELL_PROJECT, event.id), codec.encode(event))


async def register_ingress(context: Context, ingress: Ingress) -> None:
    """Write what an ingress says of itself, if that is new. Safe to repeat."""
    check_id(ingress.name, "name")
    if not 1 <= ingress.http_port <= 65_535:
        raise Invalid(f"http_port: {ingress.http_port} is not a port", field="http_port")
    if not 0 <= ingress.https_port <= 65_535:
        raise Invalid(f"https_port: {ingress.https_port} is not a port", field="https_port")

    def build() -> Draft[None]:
        held = context.state.get(Ingress, ingress.name)
        first = held.record.registered_at if held is not None else context.clock.now()
        record = replace(ingress, registered_at=first)
        if held is not None and held.record == record:
            return Draft(answer=lambda _: None)
        key = keys.ingress(ingress.name)
        return Draft(
            compare=[absent(key) if held is None else unchanged(key, held.revision)],
            ops=[Put(key, codec.encode(record))],
            answer=lambda _: None,
        )

    await context.write(type(None), build)


async def drained(context: Context, ingress: str, instances: Sequence[str], find: dict[str, str]) -> None:
    """Note that `ingress` has no request left to `instances`; `find` gives an id's key. Safe to repeat."""
    if len(instances) > STATUSES_MAX:
        raise TooLarge(f"at most {STATUSES_MAX} instances at once, not {len(instances)}")

    def build() -> Draft[None]:
        compare: list[Compare] = []
        ops: list[Op] = []
        for id in dict.fromkeys(instances):
            held = context.state.get(Instance, find[id]) if id in find else None
            if held is None or held.record.desired is not Desired.DRAIN or context.state.get(Drained, f"{id}/{ingress}"):
                continue
            compare.append(Compare(keys.INSTANCES + find[id], Target.CREATE, held.created))
            record = Drained(instance=id, ingress=ingress, at=context.clock.now())
            ops.append(Put(keys.drained(id, ingress), codec.encode(record)))
        return Draft(compare=compare, ops=ops, answer=lambda _: None)

    await context.write(type(None), build)
