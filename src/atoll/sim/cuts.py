"""Larger faults of the network, the servers and the store's members. Each is undone after a while, or when all is healed."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from typing import TYPE_CHECKING

from atoll.sim.server import Server

if TYPE_CHECKING:
    from atoll.sim.world import World

SPAN_S = 12.0
"""The longest that a member, a link or a pause lasts, usually."""
PAUSE_S = 9.0
"""The longest that a process stands still: longer than a leader's lease."""
SITE_S = 40.0
JUMPS_S = (-3_600.0, -90.0, -5.0, 5.0, 90.0, 3_600.0)

KINDS = (
    "server-crash",
    "server-pause",
    "stall",
    "rival",
    "member-crash",
    "member-pause",
    "member-disk",
    "member-cut",
    "server-cut",
    "one-way",
    "site-cut",
    "clock-jump",
)


class Cuts:
    def __init__(self, world: World) -> None:
        self._world = world
        self._choose: random.Random = world.choose
        self._story = world.story

    async def do(self, kind: str) -> None:
        world = self._world
        server = self._choose.choice(world.servers)
        match kind:
            case "server-crash":
                await server.crash()
                await self._wait(8.0)
                server.start()
            case "server-pause":
                await self._pause_server(server)
            case "stall":
                self._story.tell("the store hangs for a server", server=server.name)
                server.stall()
            case "rival":
                await server.rival(self._choose.random() * 25.0)
            case "member-crash" | "member-pause" | "member-disk":
                await self._harm_member(kind, self._choose.choice(list(world.cluster.members)))
            case "member-cut":
                member = self._choose.choice(list(world.cluster.members))
                others = [name for name in (*world.cluster.members, *(s.name for s in world.servers)) if name != member]
                await self._cut_for(pairs(member, self._some(others)), "links of a member are cut", SPAN_S)
            case "server-cut":
                others = [*world.cluster.members, *(s.name for s in world.servers if s is not server), *world.machines]
                await self._cut_for(pairs(server.name, self._some(others)), "links of a server are cut", SPAN_S)
            case "one-way":
                places = world.net.places
                one, other = self._choose.sample(places, 2)
                await self._cut_for([(one, other)], "a link is cut one way", 2 * SPAN_S)
            case "site-cut":
                site = self._choose.choice(world.sites)
                world.net.cut_site(site)
                await self._wait(SITE_S)
                world.net.mend_site(site)
            case "clock-jump":
                await self._jump()
            case _:
                raise AssertionError(f"no chaos is called {kind}")

    async def _pause_server(self, server: Server) -> None:
        if server.paused or not server.life.alive:
            return
        server.pause()
        await self._wait(PAUSE_S)
        server.resume()

    async def _harm_member(self, kind: str, name: str) -> None:
        cluster = self._world.cluster
        match kind:
            case "member-crash":
                cluster.crash(name, disk_lost=self._choose.random() < 0.2 and cluster.can_lose(name))
            case "member-pause":
                cluster.pause(name, True)
            case _:
                cluster.fill(name)
        await self._wait(SPAN_S)
        cluster.heal([name])

    async def _jump(self) -> None:
        clocks = {machine.name: machine.clock for machine in self._world.machines.values()}
        clocks |= {server.name: server.clock for server in self._world.servers}
        name = self._choose.choice(list(clocks))
        span_s = self._choose.choice(JUMPS_S)
        self._story.tell("a date is set", of=name, by_s=span_s)
        clocks[name].jump(span_s)

    async def _cut_for(self, links: Sequence[tuple[str, str]], what: str, most_s: float) -> None:
        self._story.tell(what, links=links)
        self._world.net.cut(links)
        await self._wait(most_s)
        self._world.net.mend(links)

    def _some(self, others: Sequence[str]) -> list[str]:
        """Return all, or some."""
        if not others or self._choose.random() < 0.5:
            return list(others)
        return self._choose.sample(list(others), self._choose.randint(1, len(others)))

    async def _wait(self, most_s: float) -> None:
        await asyncio.sleep(self._choose.random() * most_s)


def pairs(one: str, others: Sequence[str]) -> list[tuple[str, str]]:
    """Return the links between `one` and `others`, both ways."""
    return [link for other in others for link in ((one, other), (other, one))]
