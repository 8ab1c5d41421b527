"""Parking an instance and waking it: its processes leave their devices and are frozen, are let go on and come back to them.

What is done is told step by step to `tell`, so that the next agent knows what to undo. Each function ends with one answer, or
cancelled with none.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Sequence

import structlog

from atoll.model.errors import AtollError, Unsupported
from atoll.model.ports.clock import Clock
from atoll.model.ports.runtime import Feature, Runtime
from atoll.model.records import Instance
from atoll.model.units import format_bytes, format_seconds
from atoll.node.gpus import Gpus
from atoll.node.prepare import in_words
from atoll.node.transitions import Happening, Park, Parked, ParkFailed, Suspending, Wake, WakeFailed, Woken

PAUSE_S = 30.0
"""Deadline of freezing an instance, or letting it go on."""
USAGE_S = 5.0
"""Deadline of finding out how much memory an instance uses."""

Tell = Callable[[Happening], None]
log = structlog.get_logger()


async def park(
    step: Park,
    instance: Instance,
    known: Sequence[int],
    runtime: Runtime,
    gpus: Gpus | None,
    clock: Clock,
    tell: Tell,
    *,
    limit_bytes: int,
) -> None:
    """Park a running instance; `known` are processes that an earlier try took off their devices, `limit_bytes` is its bound of the
    node's memory, which is where that of its devices goes."""
    began = clock.monotonic()
    if Feature.PAUSE not in runtime.features:
        tell(ParkFailed(step.run, f"{runtime.name} cannot freeze an instance"))
        return
    if step.again:
        await _let_go_on(runtime, instance.id)
    off = list(known)
    try:
        words = await _leave_devices(step, instance, off, runtime, gpus, limit_bytes, tell)
    except (AtollError, TimeoutError) as error:
        await _put_back(step, instance, off, gpus, _words(error), tell)
        return
    try:
        async with asyncio.timeout(PAUSE_S):
            await runtime.pause(instance.id)
    except (AtollError, TimeoutError) as error:
        await _let_go_on(runtime, instance.id)
        await _put_back(step, instance, off, gpus, f"it could not be frozen: {_words(error)}", tell)
        return
    tell(Parked(step.run, f"parked in {_span(clock.monotonic() - began)}: {words}"))


async def wake(
    step: Wake, instance: Instance, pids: Sequence[int], runtime: Runtime, gpus: Gpus | None, clock: Clock, tell: Tell
) -> None:
    """Wake a parked instance; `pids` are the processes that were taken off their devices."""
    began = clock.monotonic()
    try:
        if step.again:
            await _let_go_on(runtime, instance.id)
        else:
            async with asyncio.timeout(PAUSE_S):
                await runtime.resume(instance.id)
        if pids and gpus is not None:
            with contextlib.suppress(Unsupported):  # then none of them was ever taken off
                await gpus.resume(instance.id, pids)
    except (AtollError, TimeoutError) as error:
        tell(WakeFailed(step.run, _words(error)))
        return
    tell(Woken(step.run, f"woken in {_span(clock.monotonic() - began)}"))


async def _leave_devices(
    step: Park, instance: Instance, off: list[int], runtime: Runtime, gpus: Gpus | None, limit_bytes: int, tell: Tell
) -> str:
    """Return what was done in words. `off` has the processes that may be off their devices, before and afterwards, whatever is
    raised."""
    if gpus is None or not instance.gpus:
        return "frozen"
    using = await gpus.processes_of(instance)
    pids = tuple(sorted({*off, *using}))
    if not pids:
        return "frozen; nothing of it was on a device"
    needed = sum(using.values())
    async with asyncio.timeout(USAGE_S):
        room = limit_bytes - (await runtime.usage(instance.id)).memory_bytes
    if needed > room:
        # The kernel would kill it for going over its limit.
        words = f"{format_bytes(needed)} of it do not fit below resources.memory ({format_bytes(limit_bytes)})"
        return f"frozen; its memory stays on the device: {words}"
    tell(Suspending(step.run, pids))
    off[:] = pids
    try:
        await gpus.suspend(instance.id, pids)
    except Unsupported as error:
        off.clear()
        return f"frozen; its memory stays on the device: {error}"
    return f"frozen, {format_bytes(needed)} of its memory off the device"


async def _put_back(step: Park, instance: Instance, off: Sequence[int], gpus: Gpus | None, why: str, tell: Tell) -> None:
    """Put back on its devices what was not parked after all: what would serve with its calls to them blocked is started anew."""
    try:
        if off and gpus is not None:
            with contextlib.suppress(Unsupported):  # then none of them was ever taken off
                await gpus.resume(instance.id, off)
    except (AtollError, TimeoutError) as error:
        tell(WakeFailed(step.run, f"{why}; nor could it be put back: {_words(error)}"))
    else:
        tell(ParkFailed(step.run, why))


async def _let_go_on(runtime: Runtime, id: str) -> None:
    """Let an instance go on that may not be frozen at all: some runtimes refuse that, and what is frozen shows soon enough."""
    try:
        async with asyncio.timeout(PAUSE_S):
            await runtime.resume(id)
    except (AtollError, TimeoutError) as error:
        log.debug("not let go on", instance=id, error=str(error) or "timed out")


def _span(seconds: float) -> str:
    return f"{seconds * 1000:.0f} ms" if seconds < 1 else format_seconds(seconds)


def _words(error: AtollError | TimeoutError) -> str:
    return in_words(error) if isinstance(error, AtollError) else "it took too long"
