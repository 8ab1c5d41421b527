"""`atoll agent`: the node's agent, over HTTP to the server, with this machine's real runtimes, images and network."""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path

from atoll.entry.config import Config
from atoll.entry.process import run
from atoll.images.reference import CELL_HOST
from atoll.images.registry import Registries
from atoll.images.store import ImageStore
from atoll.images.transport import Access
from atoll.model.errors import Unauthenticated
from atoll.model.ports.clock import SystemClock, system_random
from atoll.network.links import LinkNetwork
from atoll.node.agent import Agent
from atoll.runtimes.runc import RuncRuntime
from atoll.sdk.control_plane import HttpControlPlane

TOKEN_WAIT_S = 60.0
"""How long a token file may take to appear; the server writes it when it first starts."""


async def main(config: Config, stop: asyncio.Event) -> None:
    """Run the agent until `stop`; then let go of what runs, or stop it first where `config.stop_instances` says so."""
    data = config.agent_data
    token = await read_token(config.agent_data / "token", stop)
    if token is None:
        return
    registries = Registries(
        {CELL_HOST: Access(url=f"http://{config.api}", username="agent", password=token)},
        default=config.default_registry or None,
    )
    images = ImageStore(data / "images", registries)
    agent = Agent(
        node=config.node_name,
        control=HttpControlPlane(f"http://{config.api}", token, node=config.node_name),
        runtimes=(RuncRuntime(data / "runtimes" / "runc"),),
        images=images,
        network=LinkNetwork(config.subnet, data / "network"),
        clock=SystemClock(),
        random=system_random(),
        data=data,
        site=config.site,
        region=config.region,
    )
    running = asyncio.create_task(agent.run())
    stopping = asyncio.create_task(stop.wait())
    await asyncio.wait({running, stopping}, return_when=asyncio.FIRST_COMPLETED)
    stopping.cancel()
    if not running.done():
        running.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await running
    await images.close()
    await registries.aclose()


async def read_token(path: Path, stop: asyncio.Event) -> str | None:
    """Return the token in a file, waiting until it is there; None when told to stop first."""
    for _ in range(int(TOKEN_WAIT_S / 0.05)):
        if stop.is_set():
            return None
        if path.exists():
            return path.read_text().strip()
        await asyncio.sleep(0.05)
    raise Unauthenticated(f"there is no token in {path}", mend="write one there: atoll token create NAME --role agent")


if __name__ == "__main__":
    run("agent", main)
