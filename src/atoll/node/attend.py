"""What is done for an instance beside starting it: wait for its end, warm it, probe it, remove what it leaves."""

from __future__ import annotations

import asyncio

import structlog

from atoll.model.errors import AtollError, NotFound
from atoll.model.ports.runtime import Feature, Runtime
from atoll.model.records import Exit
from atoll.model.spec import AppSpec, Workload
from atoll.node.report import RETRY_MAX_S
from atoll.node.tools import Tools
from atoll.node.transitions import Rules

CLEAN_S = 120.0
"""Deadline of one try at removing what an instance leaves."""
RETRY_S = 0.5
"""First wait before another try; it doubles."""
WATCH_TRIES_MAX = 5
"""Failures of `wait` in a row after which the process counts as ended, and is removed to make sure."""
WARM = ("true",)
WARM_S = 30.0
"""Deadline of it; after that its sandbox is ready nevertheless."""
PROBE_SLACK_S = 5.0
"""How much longer than the check's own timeout a probe may take in all."""

log = structlog.get_logger()


async def await_exit(runtime: Runtime | None, id: str) -> Exit | None:
    """Return how the process ended; None when nobody knows."""
    for attempt in range(WATCH_TRIES_MAX if runtime is not None else 0):
        assert runtime is not None  # noqa: S101 - the range says so
        try:
            return await runtime.wait(id)  # as long as the process lives: no deadline
        except NotFound:
            return None
        except Exception as error:  # noqa: BLE001 - the outer edge of a task: an instance must not be left unwatched
            log.warning("wait failed", instance=id, error=str(error), attempt=attempt)
            await asyncio.sleep(RETRY_S * 2**attempt)
    return None


async def warm(runtime: Runtime | None, id: str) -> None:
    """Run a command in a sandbox of a pool before somebody takes it: where the processor is emulated, its first one takes many
    times as long as all others. An image without that program is warmed in part.
    """
    if runtime is None or Feature.EXEC not in runtime.features:
        return
    try:
        async with asyncio.timeout(WARM_S):
            execution = await runtime.exec(id, WARM)
            try:
                await execution.wait()
            finally:
                await execution.close()
    except (AtollError, TimeoutError) as error:
        log.info("not warmed", instance=id, error=str(error) or "timed out")
    except Exception:  # the outer edge of a task: a pool must not wait for ever
        log.exception("not warmed", instance=id)


async def probe_once(tools: Tools, runtime: Runtime | None, id: str, workload: Workload, rules: Rules, address: str | None) -> str:
    """Return why the instance's check, or else its first port, does not answer; nothing when it does."""
    health = rules.health
    try:
        async with asyncio.timeout((health.timeout if health else 0) + PROBE_SLACK_S):
            if runtime is None or not isinstance(workload, AppSpec):
                return ""
            if health is not None:
                port = workload.port_named(health.port) or (workload.ports[0] if workload.ports else None)
                number, http2 = (port.port, port.http2) if port else (0, False)
                return await tools.prober.probe(runtime, id, address, health, number, http2)
            if address is not None and rules.gate_port is not None:
                return await tools.prober.probe_port(address, rules.gate_port)
            return ""
    except TimeoutError:
        return "the check did not end in time"
    except Exception as error:  # noqa: BLE001 - the outer edge of a task: a probe that breaks is a probe that fails
        return f"the check could not be made: {error}"


async def remove(tools: Tools, runtime: Runtime | None, id: str, *, all: bool, holds: bool = False) -> None:
    """Remove root, cgroup and processes, with `all` the link and pipes too, and where it `holds` any its devices. There is no
    last try: a leak is never accepted."""
    failures = 0
    while True:
        try:
            async with asyncio.timeout(CLEAN_S):
                if runtime is not None:
                    await runtime.delete(id)
                if all:
                    await tools.network.detach(id)
            if all:
                tools.logs.close(id)
                tools.directories.remove_instance(id)
                if holds and tools.gpus is not None:
                    await tools.gpus.release(id)
            return
        except (AtollError, TimeoutError, OSError) as error:
            log.warning("removal failed, trying again", instance=id, error=str(error) or "timed out", failures=failures)
        except Exception:  # the outer edge, as above
            log.exception("removal failed, trying again", instance=id, failures=failures)
        await asyncio.sleep(min(RETRY_MAX_S, RETRY_S * 2.0 ** min(failures, 16)))
        failures += 1
