"""Two courses of a run: a site is cut off for ten minutes; the whole control plane is down for an hour.

Nothing else fails but processes, which crash one after another. No request that enters at the site may fail as long as another
instance is there to take it, what crashes is started again at the site, and when all is back it comes to rest within `BACK_S`.
"""

from __future__ import annotations

import asyncio

from msgspec.structs import replace

from atoll.model.spec import Lost
from atoll.sim.faults import Profile
from atoll.sim.ingress import SimIngress
from atoll.sim.machine import SimMachine
from atoll.sim.world import World

SITE_S = 600.0
CONTROL_S = 3_600.0
BACK_S = 30.0
"""How long it may take until everything is at rest again."""
CRASH_EVERY_S = 25.0
RESTART_S = 20.0
"""After a crash an instance listens again within so long; its restarts wait up to 8 s."""
AGENT_TOO = 0.3
"""How often the machine's agent is killed with it."""
DEPLOY_S = 60.0
REPLICAS = 6


def quiet(profile: Profile) -> Profile:
    """Make a run of nothing but what these courses bring."""
    return replace(
        profile,
        calm=False,
        nodes=4,
        sites=2,
        servers=2,
        members=3,
        apps=2,
        jobs=0,
        gpus=False,
        latency_s=0.01,
        lost=0.0,
        lost_reply=0.0,
        repeated=0.0,
        store_fails=0.0,
        slow_watch=0.0,
        runtime_fails=0.0,
        chaos=(),
        skew_s=0.5,
        core_only=False,
        shares=0.0,
        drains=False,
        schedules=0,
    )


class _Outage(World):
    span_s = SITE_S
    every_s = CRASH_EVERY_S

    def site_of(self, place: str, number: int) -> str:
        """The control plane and one machine are at the first site, all else at the other."""
        return self.sites[0] if place[0] in "ms" or number == 0 else self.sites[1]

    @property
    def here(self) -> list[SimMachine]:
        """The machines that are looked at."""
        return [machine for machine in self.machines.values() if machine.site == self.sites[1]]

    @property
    def entries(self) -> list[SimIngress]:
        return [ingress for ingress in self.ingresses if ingress.site == self.sites[1]]

    async def begin(self) -> None:
        raise NotImplementedError

    async def end(self) -> None:
        raise NotImplementedError

    async def run(self) -> None:
        lasting = self.set_going()
        asking = asyncio.create_task(self.requests.run([user.app for user in self.app_users]), name="requests")
        for user in self.app_users:
            user.lost = Lost()
            user.stands_by = False
            await user.put(good=True, scale=REPLICAS)
        await asyncio.sleep(DEPLOY_S)
        for reason in self.rest.reasons():
            self.story.breaks(f"before anything happened: {reason}")
        self.requests.enter_by(self.entries)
        self.requests.sure = True
        await self.begin()
        answered = self.requests.answered
        deadline = self.clock.monotonic() + self.span_s
        while self.clock.monotonic() < deadline:
            await asyncio.sleep(self.choose.uniform(0.5, 1.0) * self.every_s)
            await self._crash_one()
        if self.requests.answered == answered:
            self.story.breaks("no request was answered, so that nothing is known")
        await self.end()
        back_at = self.clock.monotonic()
        while reasons := self.rest.reasons():
            if self.clock.monotonic() - back_at > BACK_S:
                for reason in reasons:
                    self.story.breaks(f"not at rest {BACK_S:g} s after all was back: {reason}")
                return
            await asyncio.sleep(0.5)
        self.story.mark(f"{type(self).__name__}: at rest again")
        self.story.marks["requests answered meanwhile"] += self.requests.answered - answered
        for task in (asking, *lasting):
            task.cancel()
        await asyncio.gather(asking, *lasting, return_exceptions=True)

    async def _crash_one(self) -> None:
        """Crash a process whose app has another at the site, sometimes with its agent, and see it start again where it was."""
        machine = self.choose.choice([machine for machine in self.here if machine.host.running()])
        id = self.choose.choice(machine.host.running())
        app = id.rpartition("-")[0]
        others = [one for each in self.here for one in each.host.running() if one != id and one.rpartition("-")[0] == app]
        if not others:
            return
        self.story.tell("a process crashes", node=machine.name, instance=id)
        if self.choose.random() < AGENT_TOO:
            await machine.crash_agent()
            machine.host.crash(id)
            await asyncio.sleep(1.0)
            machine.start_agent()
            self.story.mark("a process and its agent crashed during an outage")
        else:
            machine.host.crash(id)
        await asyncio.sleep(RESTART_S)
        self.story.mark("a crashed process was started again at its site")
        process = machine.host.processes.get(id)
        if process is None or not process.running:
            self.story.breaks(f"{id} crashed on {machine.name} and was not started again within {RESTART_S:g} s")


class SiteCut(_Outage):
    """The site that most machines are at loses the rest of the world."""

    async def begin(self) -> None:
        self.net.cut_site(self.sites[1])

    async def end(self) -> None:
        self.net.mend_site(self.sites[1])


class ControlDown(_Outage):
    """All servers and all members of the store are dead."""

    span_s = CONTROL_S
    every_s = 6 * CRASH_EVERY_S

    async def begin(self) -> None:
        for server in self.servers:
            await server.crash()
        for name in self.cluster.members:
            self.cluster.crash(name)

    async def end(self) -> None:
        self.cluster.heal(list(self.cluster.members))
        for server in self.servers:
            server.start()
