"""Actions as transactions: fenced, conditional on what was read, in batches as large as the store takes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import structlog
from msgspec import Struct

from atoll.control.actions import (
    Action,
    Create,
    CreateJob,
    Forget,
    Remove,
    RemoveApp,
    RemoveJob,
    Tell,
    Update,
    UpdateJob,
    WriteAppStatus,
    WriteBrake,
    WriteJobStatus,
    WriteLiveness,
    WritePrefetch,
)
from atoll.control.leader import Term, check
from atoll.model import codec, keys, stored
from atoll.model.errors import Invalid, TooLarge
from atoll.model.ports.store import TXN_OPS_MAX, Compare, Delete, Op, Put, Revision, Store, absent, unchanged
from atoll.model.records import RouteClaim
from atoll.store.cache import State

UNIT_ACTIONS_MAX = 512
"""Actions of one decision that are written together at most; the rest follows in further units of the same batch."""

log = structlog.get_logger()


class Unit(Struct, frozen=True):
    """What is written together or not at all. `source` says whose decision it was."""

    source: object
    compare: tuple[Compare, ...]
    ops: tuple[Op, ...]


class Outcome(Struct, frozen=True):
    revision: Revision
    """Of the last transaction that was written."""
    conflicts: tuple[object, ...]
    """Sources of units of which something had changed since it was read; they were not written."""
    refused: tuple[object, ...] = ()
    """Sources of units that the store can never take."""


def units_of(source: object, actions: Sequence[Action], state: State) -> list[Unit]:
    """Return a decision as units. The cache gives the routes that an app to be removed has claimed."""
    return [unit_of(source, actions[start : start + UNIT_ACTIONS_MAX], state) for start in range(0, len(actions), UNIT_ACTIONS_MAX)]


def unit_of(source: object, actions: Sequence[Action], state: State) -> Unit:
    """Return what is written together or not at all, however much it is."""
    compare: list[Compare] = []
    ops: dict[str, Op] = {}
    for action in actions:
        more, operations = _translate(action, state)
        compare.extend(more)
        ops.update((op.key, op) for op in operations)
    return Unit(source, tuple(compare), tuple(ops.values()))


def _translate(action: Action, state: State) -> tuple[list[Compare], list[Op]]:
    match action:
        case Create(instance):
            key = keys.instance(instance.project, instance.id)
            return [absent(key)], [Put(key, codec.encode(instance))]
        case Update(instance, revision):
            key = keys.instance(instance.project, instance.id)
            return [unchanged(key, revision)], [Put(key, codec.encode(instance))]
        case Remove(instance, revision):
            key = keys.instance(instance.project, instance.id)
            status = Delete(keys.status(instance.project, instance.id))
            return [unchanged(key, revision)], [Delete(key), status, Delete(keys.drained(instance.id, ""), prefix=True)]
        case WriteAppStatus(status):
            return [], [Put(keys.app_status(status.project, status.name), codec.encode(status))]
        case WriteJobStatus(job_status, revision):
            job = keys.job(job_status.project, job_status.name)
            return [unchanged(job, revision)], [Put(keys.job_status(job_status.project, job_status.name), codec.encode(job_status))]
        case CreateJob(job_made):
            # What an earlier job of this name left would be taken for the new one's.
            key = keys.job(job_made.project, job_made.name)
            stale = Delete(keys.job_status(job_made.project, job_made.name))
            return [absent(key)], [Put(key, stored.encode(job_made)), stale]
        case UpdateJob(job_changed, revision):
            key = keys.job(job_changed.project, job_changed.name)
            return [unchanged(key, revision)], [Put(key, stored.encode(job_changed))]
        case WriteLiveness(liveness):
            return [], [Put(keys.node_liveness(liveness.name), codec.encode(liveness))]
        case WriteBrake(brake):
            return [], [Delete(keys.brake()) if brake is None else Put(keys.brake(), codec.encode(brake))]
        case WritePrefetch(prefetch):
            key = keys.prefetch(prefetch.node)
            return [], [Put(key, codec.encode(prefetch)) if prefetch.images else Delete(key)]
        case RemoveApp():
            return _remove_app(action, state)
        case RemoveJob(project, name, revision):
            key = keys.job(project, name)
            return [unchanged(key, revision)], [Delete(key), Delete(keys.job_status(project, name))]
        case Forget(key, revision, unless):
            compare = [unchanged(key, revision)]
            return (compare if unless is None else [*compare, absent(unless)]), [Delete(key)]
        case Tell(event):
            return [], [Put(keys.event(event.project, event.id), codec.encode(event))]


def _remove_app(action: RemoveApp, state: State) -> tuple[list[Compare], list[Op]]:
    """One transaction, the app's record among the rest: after a crash it is all there or all gone."""
    app = keys.app(action.project, action.name)
    compare = [unchanged(app, action.revision)]
    ops: list[Op] = [
        Delete(app),
        Delete(keys.app_status(action.project, action.name)),
        Delete(keys.RELEASES + f"{action.project}/{action.name}/", prefix=True),
    ]
    for place, held in state.records(RouteClaim).items():
        if (held.record.project, held.record.app) == (action.project, action.name):
            compare.append(unchanged(keys.ROUTES + place, held.revision))
            ops.append(Delete(keys.ROUTES + place))
    return compare, ops


class Writer:
    """Writes units under one term's fence."""

    def __init__(self, store: Store, term: Term) -> None:
        self._store = store
        self._term = term
        self._conflicts: list[object] = []
        self._refused: list[object] = []

    async def commit(self, units: Sequence[Unit]) -> Outcome:
        """Write as many of `units` as still hold, in order, in few transactions.

        Raises Fenced: this server does not lead any more, and what was not written yet never will be. Raises Unavailable or
        OutcomeUnknown as the store does; decide again from what is there.
        """
        revision = Revision(0)
        self._conflicts.clear()
        self._refused.clear()
        todo = list(reversed(list(_batches(units))))
        while todo:
            batch = todo.pop()
            written = await self._try(batch)
            if written is not None:
                revision = written
            elif len(batch) > 1:
                half = len(batch) // 2
                todo.extend((batch[half:], batch[:half]))
        return Outcome(revision, tuple(self._conflicts), tuple(self._refused))

    async def _try(self, batch: list[Unit]) -> Revision | None:
        """Write all of `batch`; None if nothing was written because one of it does not hold, or is no valid write."""
        compare = [self._term.fence, *(c for unit in batch for c in unit.compare)]
        try:
            result = await self._store.txn(compare, [op for unit in batch for op in unit.ops])
        except (Invalid, TooLarge) as error:
            # One record that the store refuses must not stop everyone else's.
            if len(batch) == 1:
                log.error("the store refuses a decision", source=str(batch[0].source), cause=error.message)
                self._refused.append(batch[0].source)
            return None
        if result.succeeded:
            return result.revision
        await check(self._store, self._term)
        if len(batch) == 1:
            log.info("a decision came too late and is made again", source=str(batch[0].source))
            self._conflicts.append(batch[0].source)
        return None


def _batches(units: Iterable[Unit]) -> Iterable[list[Unit]]:
    """Yield units in order, as many at a time as one transaction takes and as write no key twice."""
    batch: list[Unit] = []
    written: set[str] = set()
    compared = 1
    for unit in units:
        own = {op.key for op in unit.ops}
        full = len(written) + len(own) > TXN_OPS_MAX or compared + len(unit.compare) > TXN_OPS_MAX
        if batch and (full or own & written):
            yield batch
            batch, written, compared = [], set(), 1
        batch.append(unit)
        written |= own
        compared += len(unit.compare)
    if batch:
        yield batch
