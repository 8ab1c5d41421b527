"""Which faults a seed brings, how often, and the dice for them."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator
from contextlib import contextmanager

from msgspec import Struct

from atoll.model.errors import Unavailable


class Profile(Struct, frozen=True, kw_only=True):
    """What a run is made of. Rates are probabilities of each call; spans are in seconds of virtual time."""

    calm: bool
    """No faults at all: then also what only holds without them is checked."""
    nodes: int
    sites: int
    """Places far apart; machines, servers, members of the store and one ingress each are spread over them."""
    servers: int
    members: int
    """Of the store; an odd number."""
    apps: int
    jobs: int
    gpus: bool
    """Some machines have GPUs, and some users ask for them."""
    span_s: float
    """How long users and chaos are at work before everything is healed."""
    shuffle: float
    latency_s: float
    """The longest usual delay of a call."""
    lost: float
    """Requests that never arrive."""
    lost_reply: float
    """Requests that are carried out, but whose answer never arrives."""
    repeated: float
    """Requests that arrive a second time, later than others that were made after them."""
    store_fails: float
    slow_watch: float
    """Batches of a watch that come late."""
    runtime_fails: float
    chaos: tuple[str, ...]
    """Kinds of larger faults that happen."""
    chaos_every_s: float
    skew_s: float
    """The most that a machine's date is off at first, either way."""
    once: float
    """Share of the apps that must never run twice."""
    beats: bool
    """Agents beat, and silent nodes are found within seconds; without, by their heartbeats over HTTP alone."""
    shares: float = 0.0
    """Share of the apps that go by canary or blue-green."""
    drains: bool = False
    """An operator drains machines."""
    schedules: int = 0
    """Jobs with a schedule."""
    core_only: bool
    """At the end only a core is healed at first: a majority of the store, one server, some machines."""


KINDS_OF_CHAOS = (
    "agent-crash",
    "server-crash",
    "process-crash",
    "machine-restart",
    "partition",
    "ingress-cut",
    "sick",
    "pull-fails",
    "compaction",
    "stall",
    "cordon",
    "stop-instance",
    "rival",
    "gpu-vanish",
    "gpu-xid",
    "gpu-silent",
    "agent-pause",
    "server-pause",
    "member-crash",
    "member-pause",
    "member-disk",
    "member-cut",
    "server-cut",
    "one-way",
    "site-cut",
    "clock-jump",
    "disk-full",
    "record-lost",
)


def profile_of(choose: random.Random) -> Profile:
    """Return the profile that a seed's generator gives; a quarter of all are calm, the others have some faults each."""
    calm = choose.random() < 0.25

    def rate(most: float) -> float:
        return 0.0 if calm or choose.random() < 0.4 else choose.uniform(0, most)

    return Profile(
        calm=calm,
        nodes=choose.randint(2, 4),
        sites=choose.choice((1, 1, 2, 3)),
        servers=choose.choice((1, 1, 2, 3)),
        members=choose.choice((1, 1, 3)),
        apps=choose.randint(1, 3),
        jobs=choose.randint(0, 2),
        gpus=choose.random() < 0.35,
        span_s=choose.uniform(30, 60) if calm or choose.random() < 0.8 else choose.uniform(110, 160),
        shuffle=choose.choice((0.0, 0.2, 1.0)),
        latency_s=choose.choice((0.0, 0.003, 0.03)) if calm else choose.choice((0.001, 0.01, 0.2)),
        lost=rate(0.05),
        lost_reply=rate(0.05),
        repeated=rate(0.05),
        store_fails=rate(0.03),
        slow_watch=rate(0.2),
        runtime_fails=rate(0.05),
        chaos=() if calm else tuple(kind for kind in KINDS_OF_CHAOS if choose.random() < 0.4),
        chaos_every_s=choose.uniform(2, 12),
        skew_s=0.0 if calm else choose.choice((0.5, 0.5, 30.0)),
        once=0.3,
        beats=choose.random() < 0.2,
        core_only=not calm and choose.random() < 0.3,
        shares=choose.choice((0.0, 0.0, 0.5)),
        drains=choose.random() < 0.2,
        schedules=int(choose.random() < 0.2),
    )


class Faults:
    """The dice. After `heal` nothing fails any more, and delays are usual ones."""

    def __init__(self, profile: Profile, choose: random.Random) -> None:
        self.profile = profile
        self.healed = False
        self._choose = choose

    def hit(self, rate: float) -> bool:
        return rate > 0 and not self.healed and self._choose.random() < rate

    async def pause(self) -> None:
        """Take as long as a call usually does."""
        if self.profile.latency_s:
            await asyncio.sleep(self._choose.random() * self.profile.latency_s)

    async def dawdle(self, most_s: float) -> None:
        """Take much longer than usual."""
        await asyncio.sleep(self._choose.random() * most_s)

    def heal(self) -> None:
        self.healed = True


class Life:
    """One run of a process. What belongs to a process that was killed can do nothing any more, however it ends."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.alive = True
        self.adopted = False
        """An agent has taken over what runs; until then it says nothing to anybody."""
        self._watchers: dict[asyncio.Future[None], None] = {}

    def end(self) -> None:
        self.alive = False
        for watcher in self._watchers:
            if not watcher.done():
                watcher.set_result(None)

    @contextmanager
    def ending(self) -> Iterator[asyncio.Future[None]]:
        """Give a future that is done once the process was killed."""
        watcher: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._watchers[watcher] = None
        if not self.alive:
            watcher.set_result(None)
        try:
            yield watcher
        finally:
            del self._watchers[watcher]
            watcher.cancel()

    def check(self) -> None:
        """Raise Unavailable when the process was killed: whatever it still asks for does not happen."""
        if not self.alive:
            raise Unavailable(f"{self.name} was killed")
