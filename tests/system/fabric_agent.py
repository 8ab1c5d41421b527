"""One agent with real containers, links, tunnels and names, in a process of its own so that it can stand in a network namespace.

Arguments: a JSON object with data, layer, node, site, region, address, server, token, cgroup.
"""

from __future__ import annotations

import asyncio
import json
import random
import sys
from pathlib import Path

from atoll.entry.config import Config
from atoll.entry.fabric import enter
from atoll.entry.process import Stop
from atoll.images.fake import FakeImages
from atoll.model.ports.clock import SystemClock
from atoll.node.agent import Agent
from atoll.runtimes.runc import RuncRuntime
from atoll.sdk.control_plane import HttpControlPlane


async def main(given: dict[str, str]) -> None:
    data, clock = Path(given["data"]), SystemClock()
    control = HttpControlPlane(given["server"], given["token"], node=given["node"])
    images = FakeImages()
    images.add("box", layers=(Path(given["layer"]),), ready=True)
    config = Config(data=data, site=given["site"], region=given["region"], fabric_address=given["address"])
    (data / "network").mkdir(parents=True, exist_ok=True)
    entered = await enter(config, control, given["server"], given["node"], data / "network", clock, Stop())
    assert entered is not None
    network, fabric = entered
    fabric.remove = True
    async with fabric:
        agent = Agent(
            node=given["node"],
            control=control,
            runtimes=(RuncRuntime(data / "runc", cgroup=given["cgroup"]),),
            images=images,
            network=network,
            clock=clock,
            random=random.Random(),
            data=data,
            site=given["site"],
            region=given["region"],
        )
        running = asyncio.create_task(agent.run())
        reader = asyncio.StreamReader()
        await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
        await reader.read()  # ends with the test
        await agent.stop_instances(5)
        for id in list(agent.runners):
            await network.detach(id)
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


if __name__ == "__main__":
    asyncio.run(main(json.loads(sys.argv[1])))
