"""An agent of node n1 whose every neighbour is a fake, while a test looks at it."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from atoll.images.fake import FakeImages
from atoll.model.ports.clock import Clock
from atoll.network.fake import FakeNetwork
from atoll.node.agent import Agent
from atoll.node.fake import FakeControlPlane, FakeMachine, FakeProber, MemoryLogs
from atoll.runtimes.fake import FakeHost, FakeRuntime


@asynccontextmanager
async def running_agent(control: FakeControlPlane, host: FakeHost, data: Path, clock: Clock, **parts: Any) -> AsyncIterator[Agent]:
    """Have it run with `parts` in place of what it usually has; its `record` is always among them. It is ended as by a signal."""
    usual = {
        "images": FakeImages(),
        "network": FakeNetwork(),
        "logs": MemoryLogs(),
        "prober": FakeProber(),
        "machine": FakeMachine(),
        "runtimes": [FakeRuntime(host)],
    }
    agent = Agent(node="n1", control=control, clock=clock, random=random.Random(1), data=data, **(usual | parts))
    task = asyncio.create_task(agent.run())
    try:
        yield agent
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
