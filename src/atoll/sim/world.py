"""One run: machines, servers, a store, ingresses and users; faults while they work; then all is healed and must come to rest."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path

from atoll.model.ports.store import Store
from atoll.model.records import App
from atoll.model.spec import Gpu
from atoll.sim.chaos import Chaos
from atoll.sim.clock import VirtualClock
from atoll.sim.faults import Faults, Life, Profile
from atoll.sim.gpus import SPARES, WISHES, Bays
from atoll.sim.ingress import SimIngress
from atoll.sim.line import Line
from atoll.sim.machine import SimMachine
from atoll.sim.members import Cluster
from atoll.sim.net import Net
from atoll.sim.operators import Operator
from atoll.sim.registers import Register
from atoll.sim.requests import Requests
from atoll.sim.rest import Rest
from atoll.sim.rules import Rules
from atoll.sim.schedules import ScheduleUser
from atoll.sim.server import Server
from atoll.sim.steering import SteeringUser
from atoll.sim.story import Story
from atoll.sim.users import PROJECT, AppUser, JobUser, User

REST_S = 400.0
"""After healing, everything must have come to rest within so long (virtual) a time."""
SPARE = (64_000, 64 << 30)
"""Thousandths of a core, and bytes, of the machine that joins when everything is healed."""
LOOK_S = 2.0
"""How often one looks whether it has; it must be so twice in a row."""
REGISTER_CLIENTS = 2
SAMPLE_S = 1.0
USERS = "users"
"""Where users are: no cut of a site reaches them."""


class Parts:
    """What a run is built from; a planted bug replaces one of these."""

    def machine(self, name: str, **rest: object) -> SimMachine:
        return SimMachine(name, **rest)  # type: ignore[arg-type]

    def server(self, *arguments: object, **rest: object) -> Server:
        return Server(*arguments, **rest)  # type: ignore[arg-type]

    def cluster(self, *arguments: object, **rest: object) -> Cluster:
        return Cluster(*arguments, **rest)  # type: ignore[arg-type]

    def ingress(self, *arguments: object) -> SimIngress:
        return SimIngress(*arguments)  # type: ignore[arg-type]

    def store(self, store: Store) -> Store:
        """Return the store as a server sees it."""
        return store


class World:
    def __init__(self, profile: Profile, choose: random.Random, data: Path, story: Story, parts: Parts) -> None:
        self.profile = profile
        self.choose = choose
        self.story = story
        self._data = data
        self._parts = parts
        self.faults = Faults(profile, choose)
        self.clock = VirtualClock(asyncio.get_running_loop())
        self.net = Net(choose, self.faults, story)
        self.sites = [f"site{n}" for n in range(profile.sites)]
        self.cluster = parts.cluster(self.clock, self.net, choose, story, members=profile.members, site_of=self.site_of)
        self.store = self.cluster.door("m0")
        self.servers: list[Server] = []
        self._make_servers()
        self.machines: dict[str, SimMachine] = {}
        self.dead: set[str] = set()
        """Machines that do not come back before a core has come to rest."""
        self.rules = Rules(story, self.machines, calm=profile.calm)
        for number in range(profile.nodes):
            name = f"n{number}"
            bays = Bays(choose.randint(0 if number else 1, 2), choose.randint(0, 1)) if profile.gpus else Bays(0)
            self._add_machine(name, number, choose.choice((2_000, 4_000, 8_000)), choose.choice((2, 4)) << 30, bays)
        self.ingresses = [self._make_ingress(site) for site in self.sites]
        self.app_users = [self._app_user(n) for n in range(profile.apps)]
        self.job_users = [JobUser(f"job{n}", self.user_line(), choose, story, gpu=self._gpu()) for n in range(profile.jobs)]
        self.schedule_users = [ScheduleUser(f"cron{n}", self.user_line(), choose, story) for n in range(profile.schedules)]
        nodes = sorted(self.machines)
        self.operators = [Operator(nodes, self.user_line(), choose, story, calm=profile.calm)] if profile.drains else []
        self.register = Register([self.user_line() for _ in range(REGISTER_CLIENTS)], choose, story)
        self.requests = Requests(
            self.ingresses,
            self.machines,
            self.net,
            lambda app: self.rules.serving.least_ready.get(app, 0) > 0,
            story,
            choose,
            strict=profile.calm,
        )
        self.chaos = Chaos(self)
        self.rest = Rest(self)

    def site_of(self, place: str, number: int) -> str:
        """Return where a process is; `number` counts those of its kind."""
        return self.sites[number % len(self.sites)]

    def _app_user(self, number: int) -> AppUser:
        name, profile = f"app{number}", self.profile
        gpu = self._gpu(first=number == 0)
        # Two sets beside each other need twice the devices, which there may never be.
        if gpu is None and profile.shares and self.choose.random() < profile.shares:
            for ingress in self.ingresses:
                ingress.tellers = ingress.tellers or [self._line(ingress.name, [server]) for server in self.servers]
            return SteeringUser(name, self.user_line(), self.choose, self.story, calm=profile.calm, once=profile.once)
        return AppUser(name, self.user_line(), self.choose, self.story, calm=profile.calm, gpu=gpu, once=profile.once)

    def _line(self, name: str, servers: list[Server]) -> Line:
        return Line(name, servers, self.net, Life(name), self.faults, self.story, self.choose)

    def _make_servers(self) -> None:
        for number in range(self.profile.servers):
            name = f"s{number}"
            self.net.place(name, self.site_of(name, number))
            clock = VirtualClock(asyncio.get_running_loop(), skew_s=self._skew_s() if number else 0.0)
            server = self._parts.server(
                name, self.cluster, clock, self.net, self.choose, self.faults, self.story, through=self._parts.store
            )
            self.servers.append(server)
        for server in self.servers:
            server.peers = self.servers

    def _make_ingress(self, site: str) -> SimIngress:
        name = f"edge-{site}"
        self.net.place(name, site)
        return self._parts.ingress(name, site, self._line(name, self.servers), self.choose, self.rules.routed)

    def _skew_s(self) -> float:
        return self.choose.uniform(-self.profile.skew_s, self.profile.skew_s) if self.profile.skew_s else 0.0

    def _gpu(self, *, first: bool = False) -> Gpu | None:
        """Return what a user asks for of GPUs: in a run that has any, the first of the apps does."""
        if not self.profile.gpus or not (first or self.choose.random() < 0.3):
            return None
        return self.choose.choice((Gpu(), *WISHES) if first else WISHES)

    def _add_machine(self, name: str, number: int, cpu_milli: int, memory_bytes: int, bays: Bays) -> SimMachine:
        site = self.site_of(name, number)
        self.net.place(name, site)
        self.machines[name] = machine = self._parts.machine(
            name,
            site=site,
            servers=self.servers,
            net=self.net,
            clock=VirtualClock(asyncio.get_running_loop(), skew_s=self._skew_s()),
            choose=self.choose,
            faults=self.faults,
            story=self.story,
            data=self._data / name,
            cpu_milli=cpu_milli,
            memory_bytes=memory_bytes,
            started=self.rules.started,
            bays=bays,
        )
        return machine

    @property
    def users(self) -> list[User]:
        return [*self.app_users, *self.job_users, *self.schedule_users, *self.operators]

    def user_line(self) -> Line:
        return Line(USERS, self.servers, self.net, Life("a user"), self.faults, self.story, self.choose)

    def set_going(self) -> set[asyncio.Task[None]]:
        """Start servers, agents, ingresses and who looks at it all; return what lasts as long as the run."""
        lasting = {asyncio.create_task(self.rules.watch(self.cluster), name="rules")}
        for server in self.servers:
            server.start()
        for machine in self.machines.values():
            machine.start_agent()
        lasting |= {asyncio.create_task(ingress.run(), name=ingress.name) for ingress in self.ingresses}
        lasting.add(asyncio.create_task(self._sample(), name="sampling"))
        return lasting

    async def run(self) -> None:
        """Live through it all. What was broken is in `story`."""
        lasting = self.set_going()
        asking = asyncio.create_task(self.requests.run([user.app for user in self.app_users]), name="requests")
        wishing = [asyncio.create_task(user.run(), name=user.name) for user in self.users]
        writing = asyncio.create_task(self.register.run(), name="register")
        breaking = asyncio.create_task(self.chaos.run(), name="chaos")
        lasting.add(asking)
        await asyncio.wait({*lasting, breaking}, timeout=self.profile.span_s, return_when=asyncio.FIRST_COMPLETED)
        for task in (*lasting, breaking):
            if task.done():
                self.story.breaks(f"the simulator's own {task.get_name()} ended: {task.exception()!r}")
        for task in (breaking, writing):
            task.cancel()
        for error in await asyncio.gather(breaking, writing, return_exceptions=True):
            if isinstance(error, Exception):
                self.story.breaks(f"the simulator's own task ended: {error!r}")
        self.register.check()
        if self.profile.core_only:
            await self.chaos.heal_core()
        else:
            self.story.tell("everything is healed")
            await self.chaos.heal()
        # Room for all that was asked for: what was turned away must come round by itself.
        for name, bays in SPARES.items() if self.profile.gpus else {"spare": Bays(0)}.items():
            self._add_machine(name, 0, *SPARE, bays).start_agent()
        await self._finish(wishing)
        await self._come_to_rest("came to rest")
        if self.profile.core_only:
            self.story.tell("the rest is healed too")
            await self.chaos.heal()
            await self._come_to_rest("came to rest again")
        for task in lasting:
            task.cancel()
        await asyncio.gather(*lasting, return_exceptions=True)

    async def _sample(self) -> None:
        """Note, again and again, which machines are not well, or out of a server's reach: of those only may any be given up."""
        while True:
            now = self.clock.monotonic()
            whole = all(server.well for server in self.servers)
            for machine in self.machines.values():
                well = whole and machine.life.alive and machine.life.adopted and not machine.paused
                if not (well and all(self.net.talk(machine.name, server.name) for server in self.servers)):
                    self.rules.unwell_at[machine.name] = now
            await asyncio.sleep(SAMPLE_S)

    async def _finish(self, wishing: list[asyncio.Task[None]]) -> None:
        """Let each user get the answer to the last wish, and then wish only for what works."""
        for user in (*self.app_users, *self.schedule_users, *self.operators):
            user.enough = True
        done, waiting = await asyncio.wait(wishing, timeout=REST_S)
        for task in waiting:
            self.story.breaks(f"{task.get_name()} got no answer within {REST_S:g} s after everything was healed")
            task.cancel()
        for task in done:
            error = task.exception()
            if error is not None:
                self.story.breaks(f"{task.get_name()} was refused: {error!r}")
        await asyncio.gather(*waiting, return_exceptions=True)

    async def _come_to_rest(self, mark: str) -> None:
        deadline = self.clock.monotonic() + REST_S
        still = 0
        reasons: list[str] = []
        while still < 2:
            await asyncio.sleep(LOOK_S)
            reasons = self.rest.reasons()
            still = 0 if reasons else still + 1
            if self.clock.monotonic() > deadline:
                for reason in reasons:
                    self.story.breaks(f"not at rest after {REST_S:g} s: {reason}")
                return
        self.story.mark(mark)
        for user in self.app_users:
            if user.exists:
                user.check(self.rules.records[App].get(f"{PROJECT}/{user.app}"), "the record")
