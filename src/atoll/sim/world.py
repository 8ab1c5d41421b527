"""One run: machines, a server, an ingress and users; faults while they work; then all is healed and must come to rest."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path

from atoll.model.ports.store import Store
from atoll.model.records import (
    App,
    AppPhase,
    AppStatus,
    Drained,
    Instance,
    NodeHealth,
    NodeLiveness,
    OwnerKind,
    Release,
    RouteClaim,
    Status,
)
from atoll.model.spec import Gpu
from atoll.model.states import Desired
from atoll.sim.chaos import Chaos
from atoll.sim.clock import VirtualClock
from atoll.sim.faults import Faults, Life, Profile
from atoll.sim.gpus import SPARES, WISHES, Bays
from atoll.sim.ingress import SimIngress
from atoll.sim.line import Line
from atoll.sim.machine import SimMachine
from atoll.sim.requests import Requests
from atoll.sim.rules import Rules
from atoll.sim.server import Server
from atoll.sim.story import Story
from atoll.sim.users import PROJECT, AppUser, JobUser
from atoll.store.memory import MemoryStore

REST_S = 400.0
"""After healing, everything must have come to rest within so long (virtual) a time."""
SPARE = (64_000, 64 << 30)
"""Thousandths of a core, and bytes, of the machine that joins when everything is healed."""
LOOK_S = 2.0
"""How often one looks whether it has; it must be so twice in a row."""


class Parts:
    """What a run is built from; a planted bug replaces one of these."""

    def machine(self, name: str, **rest: object) -> SimMachine:
        return SimMachine(name, **rest)  # type: ignore[arg-type]

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
        self.disk = MemoryStore(self.clock)
        self.server = Server(self.disk, self.clock, choose, self.faults, story, through=parts.store)
        self.machines: dict[str, SimMachine] = {}
        self.rules = Rules(story, self.machines, calm=profile.calm)
        for number in range(profile.nodes):
            name = f"n{number}"
            bays = Bays(choose.randint(0 if number else 1, 2), choose.randint(0, 1)) if profile.gpus else Bays(0)
            self._add_machine(name, choose.choice((2_000, 4_000, 8_000)), choose.choice((2, 4)) << 30, bays)
        self.ingress = SimIngress(self.server, choose, self.faults, story, self.rules.routed)
        self.app_users = [
            AppUser(f"app{n}", self._user_line(), choose, story, calm=profile.calm, gpu=self._gpu(first=n == 0))
            for n in range(profile.apps)
        ]
        self.job_users = [JobUser(f"job{n}", self._user_line(), choose, story, gpu=self._gpu()) for n in range(profile.jobs)]
        self.requests = Requests(self.ingress, self.machines, self.rules, story, choose, strict=profile.calm)
        self.chaos = Chaos(self)

    def _gpu(self, *, first: bool = False) -> Gpu | None:
        """Return what a user asks for of GPUs: in a run that has any, the first of the apps does."""
        if not self.profile.gpus or not (first or self.choose.random() < 0.3):
            return None
        return self.choose.choice((Gpu(), *WISHES) if first else WISHES)

    def _add_machine(self, name: str, cpu_milli: int, memory_bytes: int, bays: Bays) -> SimMachine:
        skew_s = 0.0 if self.profile.calm else self.choose.uniform(-0.5, 0.5)
        self.machines[name] = machine = self._parts.machine(
            name,
            server=self.server,
            clock=VirtualClock(asyncio.get_running_loop(), skew_s=skew_s),
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

    def _user_line(self) -> Line:
        return Line(self.server, Life("a user"), self.faults, self.story)

    async def run(self) -> None:
        """Live through it all. What was broken is in `story`."""
        observing = asyncio.create_task(self.rules.watch(self.disk), name="rules")
        self.server.start()
        for machine in self.machines.values():
            machine.start_agent()
        ingress = asyncio.create_task(self.ingress.run(), name="ingress")
        asking = asyncio.create_task(self.requests.run([user.app for user in self.app_users]), name="requests")
        wishing = [asyncio.create_task(user.run(), name=user.name) for user in (*self.app_users, *self.job_users)]
        breaking = asyncio.create_task(self.chaos.run(), name="chaos")
        await asyncio.wait({observing, ingress, asking, breaking}, timeout=self.profile.span_s, return_when=asyncio.FIRST_COMPLETED)
        for task in (observing, ingress, asking, breaking):
            if task.done():
                self.story.breaks(f"the simulator's own {task.get_name()} ended: {task.exception()!r}")
        breaking.cancel()
        await asyncio.gather(breaking, return_exceptions=True)
        self.story.tell("everything is healed")
        await self.chaos.heal()
        # Room for all that was asked for: what was turned away must come round by itself.
        for name, bays in SPARES.items() if self.profile.gpus else {"spare": Bays(0)}.items():
            self._add_machine(name, *SPARE, bays).start_agent()
        await self._finish(wishing)
        await self._come_to_rest()
        for task in (asking, ingress, observing):
            task.cancel()
        await asyncio.gather(asking, ingress, observing, return_exceptions=True)

    async def _finish(self, wishing: list[asyncio.Task[None]]) -> None:
        """Let each user get the answer to the last wish, and then wish only for what works."""
        for user in self.app_users:
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

    async def _come_to_rest(self) -> None:
        deadline = self.clock.monotonic() + REST_S
        still = 0
        reasons: list[str] = []
        while still < 2:
            await asyncio.sleep(LOOK_S)
            reasons = self.restless()
            still = 0 if reasons else still + 1
            if self.clock.monotonic() > deadline:
                for reason in reasons:
                    self.story.breaks(f"not at rest after {REST_S:g} s: {reason}")
                return
        self.story.mark("came to rest")
        for user in self.app_users:
            if user.exists:
                user.check(self.rules.records[App].get(f"{PROJECT}/{user.app}"), "the record")

    def restless(self) -> list[str]:
        """Return what is not as it must be in the end."""
        records = self.rules.records
        reasons = [f"{m.name} has no agent" for m in self.machines.values() if m.agent is None]
        for name, liveness in records[NodeLiveness].items():
            if liveness.health is not NodeHealth.READY:
                reasons.append(f"node {name} is {liveness.health}")
        for user in self.app_users:
            reasons.extend(self._app_restless(user))
        reasons.extend(reason for user in self.job_users if (reason := user.unfinished(self.rules)))
        reasons.extend(self._leaks())
        reasons.extend(self._gpus_restless())
        return reasons

    def _gpus_restless(self) -> list[str]:
        """Nothing may run on a device that has failed, and what is held on a machine is what its instances were given."""
        records = self.rules.records
        reasons = []
        for machine in self.machines.values():
            if machine.rack is None:
                continue
            placed = {i.id: (key, i) for key, i in records[Instance].items() if i.node == machine.name and i.gpus}
            live = {id: i for id, (key, i) in placed.items() if not (key in records[Status] and records[Status][key].phase.final)}
            for id, instance in live.items():
                if bad := sorted({grant.device for grant in instance.gpus} & machine.rack.lost):
                    reasons.append(f"{id} is still on {machine.name}, whose {', '.join(bad)} have failed")
            held = set(machine.rack.held())
            if held != set(live):
                reasons.append(f"{machine.name} holds devices for {sorted(held)}, and should for {sorted(live)}")
        return reasons

    def _app_restless(self, user: AppUser) -> list[str]:
        key = f"{PROJECT}/{user.app}"
        records = self.rules.records
        everything = [i for i in records[Instance].values() if (i.owner_kind, i.owner) == (OwnerKind.APP, user.app)]
        instances = [i for i in everything if not i.standby]
        standing = [i for i in everything if i.standby]
        if not user.exists:
            left = [kind.__name__ for kind in (App, AppStatus) if key in records[kind]]
            left += ["release" for name in records[Release] if name.startswith(key + "/")]
            left += ["route" for claim in records[RouteClaim].values() if claim.app == user.app]
            left += [f"instance {instance.id}" for instance in everything]
            return [f"{user.app} was deleted, but left {', '.join(left)}"] if left else []
        app: App | None = records[App].get(key)
        status: AppStatus | None = records[AppStatus].get(key)
        if app is None or status is None:
            return [f"{user.app} has no record or no status"]
        reasons = []
        wanted = AppPhase.RUNNING if app.replicas else AppPhase.STOPPED
        if status.phase is not wanted or status.ready != app.replicas or status.updated != app.replicas:
            reasons.append(f"{user.app} wants {app.replicas} and is {status.phase}: {status}")
        current = [i for i in instances if (i.release, i.generation, i.desired) == (app.release, app.generation, Desired.RUN)]
        if len(current) != app.replicas or len(instances) != app.replicas:
            reasons.append(f"{user.app} wants {app.replicas} and has {[(i.id, i.release, i.desired.value) for i in instances]}")
        rested = [self._rests(instance) for instance in standing]
        if not all(rested) or len(rested) != app.standby:
            reasons.append(f"{user.app} has {[i.id for i in standing]} to stand by, at rest {rested}, and wants {app.standby}")
        routing = self.ingress.routings.get(key)
        routed = {endpoint.instance for endpoint in routing.endpoints} if routing else set()
        if routed != {i.id for i in current}:
            reasons.append(f"{user.app} is routed to {sorted(routed)}, and has {sorted(i.id for i in current)}")
        return reasons

    def _rests(self, instance: Instance) -> bool:
        """Whether what stands by is where it belongs: parked, or awake where that failed, or without a place."""
        if instance.node is None:
            return instance.rejection is not None
        status: Status | None = self.rules.records[Status].get(f"{instance.project}/{instance.id}")
        return instance.desired is Desired.RUN and status is not None and (status.parked or status.ready)

    def _leaks(self) -> list[str]:
        records = self.rules.records
        reasons = []
        for machine in self.machines.values():
            placed = {i.id: key for key, i in records[Instance].items() if i.node == machine.name}
            live = {id for id, key in placed.items() if not (key in records[Status] and records[Status][key].phase.final)}
            here = {
                "processes": set(machine.host.processes),
                "links": set(machine.links.links),
            }
            for what, found in here.items():
                if found != live:
                    reasons.append(f"{machine.name} has {what} {sorted(found)}, and should have {sorted(live)}")
            if set(machine.record.entries) != set(placed):
                reasons.append(f"{machine.name} has recorded {sorted(machine.record.entries)}, and should {sorted(placed)}")
        for key in records[Status]:
            if key not in records[Instance]:
                reasons.append(f"the status of {key} was left behind")
        for key in records[Drained]:
            if not any(i.id == key.split("/")[0] for i in records[Instance].values()):
                reasons.append(f"the drained record {key} was left behind")
        return reasons
