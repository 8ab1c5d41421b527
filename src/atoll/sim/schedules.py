"""A user with a job that runs by a schedule: every minute, and when it is asked for."""

from __future__ import annotations

import random

from atoll.api.service.access import SYSTEM
from atoll.model.records import Job, JobPhase, JobStatus
from atoll.model.spec import JobSpec, Overlap, Resources, Stop
from atoll.model.units import Bytes, Cores, Seconds
from atoll.sim.line import Line
from atoll.sim.rules import Rules
from atoll.sim.story import Story
from atoll.sim.users import PROJECT, THINK_S, User


class ScheduleUser(User):
    def __init__(self, name: str, line: Line, choose: random.Random, story: Story) -> None:
        super().__init__(f"user of {name}", line, choose, story)
        self.job = name
        self.posted = False
        self.spec = JobSpec(
            name=name,
            image="registry.test/job:1",
            command=choose.choice((("exit", "0", "3"), ("exit", "0", "20"), ("flaky", "0.3", "2"))),
            completions=choose.randint(1, 2),
            retries=2,
            resources=Resources(cpu=Cores(0.2), memory=Bytes(64 << 20)),
            stop=Stop(grace=Seconds(2)),
            schedule="* * * * *",
            overlap=choose.choice(tuple(Overlap)),
            runs_kept=choose.choice((1, 3)),
        )

    async def run(self) -> None:
        await self.insist("a schedule", lambda s, r: s.jobs.put(SYSTEM, self.spec, request=r))
        self.posted = True
        while not self.enough:
            await self._wish(self.choose.choice(("trigger", "suspend", "same", "wait")))
            await self.idle(THINK_S)
        await self._suspend(True)

    async def _wish(self, what: str) -> None:
        match what:
            case "trigger":
                await self.insist("a run now", lambda s, r: s.jobs.trigger(PROJECT, self.job, request=r))
            case "suspend":
                await self._suspend(True)
                await self.idle(THINK_S)
                await self._suspend(False)
            case "same":
                await self.insist("the schedule once more", lambda s, r: s.jobs.put(SYSTEM, self.spec, request=r))
            case _:
                pass

    async def _suspend(self, suspended: bool) -> None:
        what = "no more runs" if suspended else "runs again"
        await self.insist(what, lambda s, r: s.jobs.suspend(PROJECT, self.job, suspended, request=r))

    def unfinished(self, rules: Rules) -> str:
        """Return why it is not as it must be in the end: suspended, with no run that has not ended."""
        key = f"{PROJECT}/{self.job}"
        job: Job | None = rules.records[Job].get(key)
        status: JobStatus | None = rules.records[JobStatus].get(key)
        if not self.posted:
            return ""
        if job is None:
            return f"the acknowledged schedule {self.job} is not there"
        if not job.suspended or status is None or status.phase is not JobPhase.SUSPENDED or status.active:
            return f"{self.job} is to be suspended, and is {status.phase if status else 'unknown'}: {status}"
        for name, run in rules.records[Job].items():
            if run.parent == self.job:
                how: JobStatus | None = rules.records[JobStatus].get(name)
                if how is None or not how.phase.final or how.active:
                    return f"{run.name}, a run of {self.job}, is {how.phase if how else 'unknown'}"
        return ""
