"""One host of `bench network`: our network in the namespace that this process is in, told what to do by lines of JSON.

`nsenter --net=… python -m bench.network_node DIRECTORY`; each line `{"do": NAME, …}` is answered by `{"answer": …}` or
`{"error": …}`. At the end of its input it removes all that it made.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import structlog

from atoll.model.errors import AtollError
from atoll.model.fabric import FabricNode, Member
from atoll.model.spec import Port, PortProtocol
from atoll.network import namespaces, wireguard
from atoll.network.links import LinkNetwork
from atoll.network.slots import tag_of
from atoll.network.sysctls import no_ipv6
from atoll.network.tunnels import Tunnels
from bench.network_world import PORT

PORTS = (Port(name="tcp", port=PORT, protocol=PortProtocol.TCP), Port(name="udp", port=PORT, protocol=PortProtocol.UDP))
PROJECT = "bench"
ULA = "" if no_ipv6() else "fd00:a70:be::/48"
"""Instances have IPv6 here, as where it can be had they do everywhere: what that costs is in what is measured."""
WAIT_S = 120.0


class Host:
    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.network: LinkNetwork | None = None
        self.tunnels: Tunnels | None = None
        self.key: wireguard.Key | None = None

    async def open(self, subnet: str, prepared: int) -> str:
        """Have a network of its own, with `prepared` slots ready (0: none is made ahead); return the node's own address."""
        assert self.network is None
        self.network = LinkNetwork(
            subnet, self.directory / "network", prepared=prepared, resolver_sources=(), rules_check_s=WAIT_S, ula=ULA
        )
        (self.directory / "network").mkdir(exist_ok=True)
        await self.network.recover(())
        return self.network.node_address

    async def settle(self, ready: int) -> None:
        """Wait until so many slots are ready."""
        async with asyncio.timeout(WAIT_S):
            while self._opened().ready < ready:  # noqa: ASYNC110 - the pool tells nobody that it is full
                await asyncio.sleep(0.002)

    async def attach(self, id: str, open: bool = True) -> dict[str, Any]:
        began = time.perf_counter()
        link = await self._opened().attach(id, project=PROJECT, ports=PORTS if open else ())
        took_ms = (time.perf_counter() - began) * 1000
        return {"netns": str(link.netns), "address": link.address, "interface": link.interface, "ms": took_ms}

    async def attach_at_once(self, ids: Sequence[str]) -> list[float]:
        """Ask for all links in one moment; return how long after that moment each was there."""
        began = time.perf_counter()

        async def one(id: str) -> float:
            await self._opened().attach(id, project=PROJECT, ports=PORTS)
            return (time.perf_counter() - began) * 1000

        return await asyncio.gather(*(one(id) for id in ids))

    async def attach_in_turn(self, ids: Sequence[str]) -> list[float]:
        """Ask for one link after the other; return how long each took."""
        return [(await self.attach(id))["ms"] for id in ids]

    async def detach(self, ids: Sequence[str]) -> None:
        await asyncio.gather(*(self._opened().detach(id) for id in ids))

    async def by_hand(self, number: int) -> float:
        """Make by `ip` and `nft` what a slot is, as scripts do it, and remove it; return the milliseconds of making it."""
        name, link, address = f"bh{os.getpid()}n{number}", f"bh{number}", f"10.201.{number // 250}.{number % 250 + 2}"
        inside = ["ip", "-n", name]
        began = time.perf_counter()
        for command in (
            ["ip", "netns", "add", name],
            ["ip", "link", "add", link, "type", "veth", "peer", "name", "eth0", "netns", name],
            ["ip", "link", "set", link, "up"],
            [*inside, "link", "set", "lo", "up"],
            [*inside, "address", "add", f"{address}/32", "dev", "eth0"],
            [*inside, "link", "set", "eth0", "up"],
            [*inside, "route", "add", "169.254.1.1", "dev", "eth0"],
            [*inside, "route", "add", "default", "via", "169.254.1.1", "dev", "eth0"],
            ["ip", "route", "add", f"{address}/32", "dev", link],
            ["nft", "add", "table", "inet", "byhand"],
            ["nft", "add", "set", "inet", "byhand", "open", "{ type ipv4_addr . inet_service; }"],
            ["nft", "add", "element", "inet", "byhand", "open", f"{{ {address} . {PORT} }}"],
        ):
            subprocess.run(command, check=True, timeout=WAIT_S, stdout=subprocess.DEVNULL)  # noqa: ASYNC221 - one at a time
        took_ms = (time.perf_counter() - began) * 1000
        subprocess.run(["ip", "netns", "delete", name], check=True, timeout=WAIT_S)  # noqa: ASYNC221 - as above
        return took_ms

    async def new_key(self) -> str:
        self.key = wireguard.new_key(time.time())
        return self.key.public

    async def join(self, own: dict[str, Any], others: list[dict[str, Any]], members: list[dict[str, Any]], number: int) -> None:
        """Lead to the other hosts, and let pass what is of the same project."""
        me = FabricNode(**own)
        nodes = {other["name"]: FabricNode(**other) for other in others}
        await self._opened().see(me, nodes, [Member(**member) for member in members], number)
        if self.tunnels is None:
            self.tunnels = Tunnels(tag_of(self.directory / "network"), ULA)
        await asyncio.to_thread(self.tunnels.set, me, number, nodes, {}, self.key)

    async def close(self) -> None:
        if self.tunnels is not None:
            self.tunnels.close(remove=True)
        if self.network is not None:
            await self.network.recover(())
            await self.network.close()
        for path in namespaces.DIRECTORY.glob(f"atoll-{tag_of(self.directory / 'network')}-*"):
            namespaces.remove(path)

    def _opened(self) -> LinkNetwork:
        assert self.network is not None
        return self.network


async def main(directory: Path) -> None:
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR))
    host = Host(directory)
    reader = asyncio.StreamReader(limit=1 << 24)
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    stopped = asyncio.Event()
    for number in (15, 2):
        asyncio.get_running_loop().add_signal_handler(number, stopped.set)
    stop = asyncio.create_task(stopped.wait())
    try:
        while True:
            line = asyncio.create_task(reader.readline())
            await asyncio.wait({line, stop}, return_when=asyncio.FIRST_COMPLETED)
            if not line.done() or not line.result():
                line.cancel()
                break
            told: dict[str, Any] = json.loads(line.result())
            try:
                answer = {"answer": await getattr(host, told.pop("do"))(**told)}
            except (AtollError, OSError, TypeError, subprocess.SubprocessError) as error:
                answer = {"error": f"{type(error).__name__}: {error}"}
            print(json.dumps(answer), flush=True)
    finally:
        stop.cancel()
        with contextlib.suppress(AtollError):
            await host.close()


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1])))
