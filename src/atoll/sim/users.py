"""Users: each deploys, scales, restarts, rolls back and deletes an app of their own, and knows what was acknowledged."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from typing import TypeVar

from msgspec import UNSET, UnsetType

from atoll.api.service.access import SYSTEM
from atoll.api.service.context import RequestKey
from atoll.api.service.service import Service
from atoll.model.errors import Conflict, DeadlineExceeded, NotFound, OutcomeUnknown, Unavailable
from atoll.model.records import App, Job, JobPhase, JobStatus
from atoll.model.spec import AppSpec, Gpu, Health, HealthKind, JobSpec, Lost, Port, Resources, Restart, Rollout, Scale, Stop
from atoll.model.units import Bytes, Cores, Seconds
from atoll.model.views import AppView
from atoll.sim.line import Line
from atoll.sim.rules import Rules
from atoll.sim.story import Story

T = TypeVar("T")
PROJECT = "default"
RETRY_S = 1.0
THINK_S = 12.0
"""The longest that a user waits before the next wish."""
REPLICAS_MAX = 4
GOOD = (("serve",), ("graceful", "0.2"), ("stubborn",))
BAD = (("exit", "1", "0"), ("missing",))
"""What never gets ready."""
WORSE = (("exit", "1", "0.5"), ("exit", "0", "4"))
"""What gets ready and then dies: that an app then serves less than it should is its own fault."""


ONCE = Lost(stop_after_disconnect=Seconds(8))
"""What an app that must never run twice asks for."""
STAND_BY = ("app1",)
"""Apps of which an instance more stands by, parked."""


class User:
    """Someone at the end of a line who tries until it is acknowledged."""

    def __init__(self, name: str, line: Line, choose: random.Random, story: Story) -> None:
        self.name = name
        self.line = line
        self.choose = choose
        self.story = story
        self._requests = 0
        self.enough = False
        """Set it, and the user wishes no more, and leaves things as they are to be in the end."""

    async def insist(self, what: str, call: Callable[[Service, RequestKey], Awaitable[T]]) -> T:
        """Make one write with one request key, again until its answer arrives. Raises what the API refuses it with."""
        self._requests += 1
        request = RequestKey(caller=self.name, key=f"{self.name}-{self._requests}", fingerprint=what)
        self.story.tell(f"{self.name} asks: {what}")
        tries = 0
        while True:
            tries += 1
            try:
                answer = await self.line.call(lambda service: call(service, request))
            except (Unavailable, OutcomeUnknown, DeadlineExceeded):
                await asyncio.sleep(RETRY_S)
            else:
                self.story.mark("user: acknowledged at once" if tries == 1 else "user: acknowledged after retries")
                self.story.tell(f"{self.name} has it: {what}", tries=tries)
                return answer

    async def run(self) -> None:
        """Wish for one thing after another."""
        raise NotImplementedError

    async def idle(self, most_s: float) -> None:
        """Let time pass, less once it is enough."""
        until = asyncio.get_running_loop().time() + self.choose.random() * most_s
        while not self.enough and asyncio.get_running_loop().time() < until:  # noqa: ASYNC110 - `enough` is set once in a run
            await asyncio.sleep(RETRY_S)

    async def read(self, call: Callable[[Service], T]) -> T:
        async def found(service: Service) -> T:
            return call(service)

        async def now(service: Service) -> T:
            return await service.context.look(lambda: found(service))

        while True:
            try:
                return await self.line.call(now)
            except Unavailable:
                await asyncio.sleep(RETRY_S)


class AppUser(User):
    """Owns one app. What is expected of it is kept here and compared with every answer."""

    def __init__(
        self, name: str, line: Line, choose: random.Random, story: Story, *, calm: bool, gpu: Gpu | None = None, once: float = 0.0
    ) -> None:
        super().__init__(f"user of {name}", line, choose, story)
        self.app = name
        self.calm = calm
        self.exists = False
        self.version = 0
        self.release = 0
        self.replicas = 1
        self.generation = 1
        self.releases: dict[int, AppSpec] = {}
        self.resources = Resources(
            cpu=Cores(choose.choice((0.1, 0.5, 1.0))), memory=Bytes(choose.choice((64, 256, 512)) << 20), gpu=gpu
        )
        surge = choose.randint(0, 2)
        self.rollout = Rollout(
            max_surge=surge,
            max_unavailable=choose.randint(0 if surge else 1, 1),
            drain=Seconds(choose.choice((3, 8) if calm else (0, 3, 8))),
            deadline=Seconds(20),
        )
        self.stands_by = name in STAND_BY
        self.lost = ONCE if choose.random() < once else Lost()
        self.health = choose.choice((None, Health(kind=HealthKind.TCP, interval=Seconds(2), start=Seconds(10))))

    def spec(self, *, good: bool, scale: int | None) -> AppSpec:
        self.version += 1
        standby = 1 if scale and self.stands_by else 0
        scaled: Scale | UnsetType = UNSET if scale is None else Scale(replicas=scale, standby=standby)
        return AppSpec(
            name=self.app,
            image="registry.test/app:1",
            command=self.choose.choice(GOOD if good else BAD if self.calm else (*BAD, *WORSE)),
            env={"VERSION": str(self.version)},
            ports=(Port(port=8080),),
            resources=self.resources,
            health=self.health,
            rollout=self.rollout,
            stop=Stop(grace=Seconds(3)),
            restart=Restart(delay_max=Seconds(8)),
            lost=self.lost,
            scale=scaled,
        )

    async def run(self) -> None:
        """Wish for one thing after another, until it is enough."""
        while not self.enough:
            await self.wish()
            await asyncio.sleep(self.choose.random() * THINK_S)
        await self.finish()

    async def wish(self) -> None:
        if not self.exists:
            await self.put(good=True, scale=self.choose.randint(1, REPLICAS_MAX))
            return
        match self.choose.choice(("put", "put", "scale", "restart", "rollback", "bad", "delete", "same")):
            case "put":
                await self.put(good=True, scale=self.choose.choice((None, self.choose.randint(1, REPLICAS_MAX))))
            case "scale":
                await self.scale(self.choose.randint(0, REPLICAS_MAX))
            case "restart":
                await self.restart()
            case "rollback":
                await self.rollback()
            case "bad":
                await self.put(good=False, scale=None)
            case "delete" if self.choose.random() < 0.3:
                await self.delete()
            case "same":
                await self.put_again()

    async def put(self, *, good: bool, scale: int | None) -> None:
        spec = self.spec(good=good, scale=scale)
        self.releases[max(self.releases, default=0) + 1] = spec
        self.release = max(self.releases)
        self.replicas = self.replicas if scale is None else scale
        self._expect(await self.insist(f"release {self.release}", lambda s, r: s.apps.put(SYSTEM, spec, request=r)))
        self.exists = True

    async def put_again(self) -> None:
        spec = self.releases[self.release]
        if spec.scale is not UNSET:
            self.replicas = spec.scale.replicas
        self._expect(await self.insist("the same once more", lambda s, r: s.apps.put(SYSTEM, spec, request=r)))

    async def scale(self, replicas: int) -> None:
        self.replicas = replicas
        self._expect(await self.insist(f"{replicas} replicas", lambda s, r: s.apps.scale(PROJECT, self.app, replicas, request=r)))

    async def restart(self) -> None:
        self.generation += 1
        self._expect(await self.insist("restart", lambda s, r: s.apps.restart(PROJECT, self.app, request=r)))

    async def rollback(self) -> None:
        number = self.choose.choice(sorted(self.releases))
        self.release = number
        view = await self.insist(f"back to {number}", lambda s, r: s.apps.rollback(SYSTEM, PROJECT, self.app, number, request=r))
        self._expect(view)

    async def delete(self) -> None:
        await self.insist("delete", lambda s, r: s.apps.delete(PROJECT, self.app, request=r))
        while await self.is_there():  # noqa: ASYNC110 - a user polls
            await asyncio.sleep(RETRY_S)
        self.exists = False
        self.releases.clear()
        self.release, self.generation, self.replicas = 0, 1, 1

    async def is_there(self) -> bool:
        try:
            await self.read(lambda service: service.apps.get(PROJECT, self.app))
        except NotFound:
            return False
        return True

    async def finish(self) -> None:
        """Leave the app with a release that works."""
        if self.exists and self.releases[self.release].command not in GOOD:
            await self.put(good=True, scale=self.choose.randint(1, REPLICAS_MAX))

    def _expect(self, view: AppView) -> None:
        self.check(view.app, "the answer")

    def check(self, app: App | None, where: str) -> None:
        """Compare with what was acknowledged."""
        expected = (self.release, self.replicas, self.generation, str(self.version_of(self.release)))
        found = (app.release, app.replicas, app.generation, app.spec.env["VERSION"]) if app else None
        if found != expected:
            self.story.breaks(
                f"{where} of {self.app} is {found}; acknowledged was {expected} (release, replicas, generation, version)"
            )

    def version_of(self, release: int) -> str:
        return self.releases[release].env["VERSION"]


class JobUser(User):
    """Runs one job, and may cancel it."""

    def __init__(self, name: str, line: Line, choose: random.Random, story: Story, *, gpu: Gpu | None = None) -> None:
        super().__init__(f"user of {name}", line, choose, story)
        self.job = name
        self.cancelled = False
        self.posted = False
        self.spec = JobSpec(
            name=name,
            image="registry.test/job:1",
            command=choose.choice((("exit", "0", "3"), ("flaky", "0.3", "4"), ("exit", "1", "1"))),
            completions=choose.randint(1, 5),
            parallelism=choose.randint(1, 3),
            retries=choose.randint(0, 3),
            resources=Resources(cpu=Cores(0.2), memory=Bytes(64 << 20), gpu=gpu),
            stop=Stop(grace=Seconds(2)),
        )

    async def run(self) -> None:
        await asyncio.sleep(self.choose.random() * THINK_S)
        try:
            await self.insist("run", lambda s, r: s.jobs.create(SYSTEM, self.spec, request=r))
        except Conflict:
            self.story.breaks(f"the job {self.job} was refused, as if it were there already")
        self.posted = True
        if self.choose.random() < 0.25:
            await asyncio.sleep(self.choose.random() * THINK_S)
            await self.insist("cancel", lambda s, r: s.jobs.cancel(PROJECT, self.job, request=r))
            self.cancelled = True

    def unfinished(self, rules: Rules) -> str:
        """Return why the job has not ended as it must, or nothing."""
        status: JobStatus | None = rules.records[JobStatus].get(f"{PROJECT}/{self.job}")
        if not self.posted:
            return ""
        if f"{PROJECT}/{self.job}" not in rules.records[Job]:
            return f"the acknowledged job {self.job} is not there"
        if status is None or not status.phase.final or status.active:
            return f"job {self.job} is {status.phase if status else 'unknown'} with {status.active if status else 0} active"
        done = tuple(range(self.spec.completions))
        if status.phase is JobPhase.SUCCEEDED and status.succeeded != done:
            return f"job {self.job} succeeded with {status.succeeded}"
        if status.phase is JobPhase.CANCELLED and not self.cancelled:
            return f"job {self.job} was cancelled by nobody"
        return ""
