"""What a user may do with a running instance as a whole: have it stand still, go on, and be written down."""

from __future__ import annotations

import asyncio

from atoll.model.errors import DeadlineExceeded, RuntimeFailed, Unsupported
from atoll.model.ports.control_plane import StreamKind
from atoll.model.ports.runtime import Feature, Runtime
from atoll.model.spec import SNAPSHOT_RUNTIMES
from atoll.model.streams import Held, SnapshotView
from atoll.model.units import format_seconds
from atoll.node.runner import Runner
from atoll.node.transitions import Paused

PAUSE_S, SNAPSHOT_S = 30.0, 120.0
SNAPSHOT_BYTES_PER_S_MIN = 16 << 20
"""A snapshot may take longer than `SNAPSHOT_S` by as much as all memory and disk take at this rate: one that is cut off ends a
sandbox of gVisor."""


async def hold(runner: Runner, runtime: Runtime, kind: str, node: str) -> Held:
    """Do what `kind` of StreamKind says. Safe to repeat; a second snapshot is another one, of what is there then.

    Raises Unsupported, Conflict, Exhausted, RuntimeFailed, DeadlineExceeded.
    """
    async with runner.holding:
        limit_s = _limit_s(runner, kind)
        try:
            async with asyncio.timeout(limit_s):
                snapshot = await _hold(runner, runtime, kind, node)
        except TimeoutError:
            raise DeadlineExceeded(f"{kind} of {runner.id} took over {format_seconds(limit_s)}") from None
        return Held(instance=runner.id, node=node, paused=runner.paused, snapshot=snapshot)


def _limit_s(runner: Runner, kind: str) -> float:
    if kind != StreamKind.SNAPSHOT:
        return PAUSE_S
    resources = runner.assignment.workload.resources
    return SNAPSHOT_S + (int(resources.memory) + int(resources.disk)) / SNAPSHOT_BYTES_PER_S_MIN


async def _hold(runner: Runner, runtime: Runtime, kind: str, node: str) -> SnapshotView | None:
    if kind == StreamKind.SNAPSHOT:
        if Feature.SNAPSHOT not in runtime.features:
            able = ", ".join(SNAPSHOT_RUNTIMES)
            raise Unsupported(f"{runtime.name} takes no snapshots", mend=f"use one of: {able}", field="runtime")
        if runner.assignment.instance.gpus or runner.assignment.workload.resources.devices:
            # Asked before anything is done: gVisor ends what it cannot write down.
            raise Unsupported(
                f"{runner.id} has devices of its node, and what is in them is in no snapshot",
                mend="take it of a sandbox without resources.gpu and resources.devices",
                field="resources.gpu" if runner.assignment.instance.gpus else "resources.devices",
            )
        place = await asyncio.to_thread(runner.snapshots.place, runner.project, runner.id)
        taken = await runtime.snapshot(runner.id, place)
        owner = runner.assignment.instance.owner
        await asyncio.to_thread(runner.snapshots.keep, runner.project, taken.digest, place, owner)
        return SnapshotView(
            digest=taken.digest, node=node, runtime=runtime.name, stored_bytes=taken.stored_bytes, taken_at=taken.taken_at
        )
    if Feature.PAUSE not in runtime.features:
        raise Unsupported(f"{runtime.name} cannot have an instance stand still")
    if kind == StreamKind.PAUSE and not runner.paused:
        await runtime.pause(runner.id)
        runner.handle(Paused(True))
    if kind == StreamKind.RESUME:
        try:
            await runtime.resume(runner.id)
        except RuntimeFailed:
            if runner.paused:
                raise  # else it was not paused, which some runtimes refuse; an earlier agent may have paused it
        runner.handle(Paused(False))
    return None
