"""A new agent's first work: compare its record with what the machine has, adopt what is in both, remove the rest."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar

import structlog
from msgspec.structs import replace

from atoll.model.errors import AtollError, Conflict
from atoll.model.ports.runtime import Found
from atoll.model.states import advance
from atoll.node.record import Entry
from atoll.node.report import retry_delay
from atoll.node.tools import Tools
from atoll.node.transitions import Recovered

RECOVER_S = 90.0
"""Deadline of one try at one part, of which a start that an earlier agent began may take 60 s, and its end 10. Tries go on until
one succeeds, since to go on without it would leak."""

T = TypeVar("T")
log = structlog.get_logger()


async def recover(entries: Sequence[Entry], tools: Tools, choose: random.Random) -> list[tuple[Entry, Recovered]]:
    """Return each recorded instance with what the machine says of it. What is not recorded is gone afterwards."""
    known = {entry.assignment.instance.id: entry for entry in entries}
    found: dict[str, Found] = {}
    for runtime in tools.runtimes.values():
        for each in await _persist(runtime.recover, f"{runtime.name} recover", choose):
            if each.id in known:
                found[each.id] = each
            else:
                log.warning("removing an instance that is not recorded", instance=each.id, runtime=runtime.name)
                await _persist(lambda id=each.id, runtime=runtime: runtime.delete(id), f"delete {each.id}", choose)  # type: ignore[misc]
    keep = [id for id, entry in known.items() if not entry.state.phase.final]
    if tools.gpus is not None:
        # After the runtimes: what was not recorded has ended now, and lets go of its devices, as what has ended before does.
        held = {id: known[id].assignment.instance.gpus for id in keep if known[id].assignment.instance.gpus}
        await tools.gpus.recover(lambda: held)
    links = await _persist(lambda: tools.network.recover(keep), "network recover", choose, settled=bool(known))
    ipv6 = {link.id: link.ipv6 for link in links}
    for id in tools.directories.strangers(known):
        log.warning("removing a directory that is not recorded", instance=id)
        tools.directories.remove_instance(id)
    for project, id in tools.logs.strangers(set(known)):
        tools.logs.remove(project, id)
    recovered = []
    for id, entry in known.items():
        if not entry.state.phase.final:
            _open_logs(entry, tools)
        each_found = found.get(id)
        event = Recovered(True, each_found.pid, each_found.exit) if each_found else Recovered(False)
        # The wish is recorded with the assignment first, so it may be newer than the state.
        instance = entry.assignment.instance
        desired = advance(entry.state.desired, instance.desired)
        standby = entry.state.standby and instance.standby
        still = entry.state.ipv6 if ipv6.get(id) == entry.state.ipv6 else None  # an agent without IPv6 has closed it
        recovered.append((replace(entry, state=replace(entry.state, desired=desired, standby=standby, ipv6=still)), event))
    log.info("recovered", recorded=len(known), running=sum(event.pid is not None for _, event in recovered))
    return recovered


def _open_logs(entry: Entry, tools: Tools) -> None:
    instance = entry.assignment.instance
    try:
        tools.logs.open(instance.project, instance.id)
    except AtollError as error:
        log.error("no logs", instance=instance.id, error=str(error), mend=error.mend)


async def _persist(call: Callable[[], Awaitable[T]], what: str, choose: random.Random, *, settled: bool = True) -> T:
    """Try until it succeeds. On a node that has run nothing yet (not `settled`), a setting at odds with the machine is raised."""
    failures = 0
    while True:
        try:
            async with asyncio.timeout(RECOVER_S):
                return await call()
        except (AtollError, TimeoutError, OSError) as error:
            if not settled and isinstance(error, Conflict) and error.field is not None:
                raise
            log.error("recovery fails, trying again", what=what, error=str(error) or "timed out")
        await asyncio.sleep(retry_delay(failures, choose))
        failures += 1
