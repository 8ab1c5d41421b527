"""One agent on real parts in a process of its own, so that a test can kill it.

Reads commands as JSON lines on stdin (assign, want, remove), writes each status as a JSON line on stdout.
"""

from __future__ import annotations

import asyncio
import json
import random
import sys
from pathlib import Path

import structlog

from atoll.images.fake import FakeImages
from atoll.model import codec
from atoll.model.ports.clock import SystemClock
from atoll.model.records import Assignment
from atoll.model.states import Desired
from atoll.network.links import LinkNetwork
from atoll.node.agent import Agent
from atoll.node.fake import FakeControlPlane
from atoll.runtimes.offer import RUNTIMES


class Control(FakeControlPlane):
    async def report(self, node, statuses, events=()):  # type: ignore[no-untyped-def]
        await super().report(node, statuses, events)
        for status in statuses:
            print(codec.encode(status).decode(), flush=True)


async def main(data: Path, layer: Path, subnet: str, cgroup: str, names: list[str]) -> None:
    structlog.configure(logger_factory=structlog.PrintLoggerFactory(sys.stderr))
    control = Control()
    images = FakeImages()
    images.add("box", layers=(layer,), ready=True)
    agent = Agent(
        node="n1",
        control=control,
        runtimes=[kind(data / kind.name, cgroup=cgroup) for kind in RUNTIMES if kind.name in names],
        images=images,
        network=LinkNetwork(subnet, data / "network", prepared=1),
        clock=SystemClock(),
        random=random.Random(),
        data=data,
    )
    reader = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    known = await reader.readline()
    for assignment in codec.decode(known, list[Assignment]):
        control.assigned[assignment.instance.id] = assignment
    running = asyncio.create_task(agent.run())
    while line := await reader.readline():
        command = json.loads(line)
        match command["do"]:
            case "assign":
                control.assign(codec.convert(command["assignment"], Assignment))
            case "want":
                control.want(command["id"], Desired(command["desired"]))
            case "remove":
                control.remove(command["id"])
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], sys.argv[4], sys.argv[5:] or ["runc"]))
