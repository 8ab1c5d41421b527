"""One server: the API's service, its cache, and the leader's loops, over a store that outlives it."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from atoll.api.service.beat_keys import beat_key
from atoll.api.service.context import KINDS as API_KINDS
from atoll.api.service.service import Service
from atoll.control.detection.exchange import Exchange
from atoll.control.detection.listening import listen_for_beats
from atoll.control.heir import Heir
from atoll.control.judging import Traffic
from atoll.control.leader import Term, lead
from atoll.control.loop import Loop
from atoll.control.world import KINDS as CONTROL_KINDS
from atoll.model.errors import AtollError, Unavailable
from atoll.model.ports.store import Revision, Store
from atoll.model.records import Node
from atoll.sim.clock import VirtualClock
from atoll.sim.faults import Faults, Life
from atoll.sim.loop import VirtualLoop, process_context
from atoll.sim.members import Cluster
from atoll.sim.net import Net
from atoll.sim.store_way import STALL_S, ServerStore
from atoll.sim.story import Story
from atoll.store.cache import State

T = TypeVar("T")
KINDS: dict[str, type[Any]] = {**API_KINDS, **CONTROL_KINDS}
SECRET_KEY = bytes(range(32))
START_RETRY_S = 0.5

BEATS_PORT = 7600

Work = Callable[
    [Store, State, VirtualClock, random.Random, Mapping[str, float], Term, Exchange | None, Traffic | None, Heir | None],
    Awaitable[None],
]


async def control(
    store: Store,
    state: State,
    clock: VirtualClock,
    choose: random.Random,
    heard: Mapping[str, float],
    term: Term,
    detection: Exchange | None = None,
    traffic: Traffic | None = None,
    heir: Heir | None = None,
) -> None:
    """Run one term of the leader's loop, as a server does; without an `heir` all is loaded at its beginning."""
    joins = await heir.take(Revision(int(term.fence.expected))) if heir is not None else None
    await Loop(store, state, clock, choose, heard, term, detection=detection, traffic=traffic, joins=joins).run()


class Server:
    """The server's place; `start` and `crash` give it one life after another."""

    def __init__(
        self,
        name: str,
        cluster: Cluster,
        clock: VirtualClock,
        net: Net,
        choose: random.Random,
        faults: Faults,
        story: Story,
        *,
        through: Callable[[Store], Store] = lambda store: store,
        work: Work = control,
    ) -> None:
        self.name = name
        self.clock = clock
        self.peers: Sequence[Server] = ()
        """All servers of the cell, this one too."""
        self._cluster = cluster
        self._net = net
        self._choose = choose
        self._faults = faults
        self._story = story
        self._through = through
        self._work = work
        self._lives = 0
        self._tasks: set[asyncio.Task[Any]] = set()
        self._context = process_context(name)
        self.life = Life(name)
        self.life.end()
        self.service: Service | None = None
        """None while it does not serve."""
        self._rivals: list[Life] = []
        self.store: ServerStore | None = None

    def start(self) -> None:
        if self.life.alive:
            return
        self._lives += 1
        self.life = Life(f"{self.name} life {self._lives}")
        self._story.tell("a server starts", server=self.name, life=self._lives)
        self.spawn(self._run(self.life), name=f"{self.name} life {self._lives}")

    def spawn(self, work: Coroutine[Any, Any, T], name: str | None = None) -> asyncio.Task[T]:
        """Do something as this server: it stands still with it, and ends with it."""
        task: asyncio.Task[T] = self._loop.create_task(work, name=name, context=self._context)
        self._tasks.add(task)
        task.add_done_callback(self._done, context=self._context)
        return task

    def _done(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            task.exception()  # it belongs to whoever waited, and may have given up

    @property
    def _loop(self) -> VirtualLoop:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, VirtualLoop)  # noqa: S101 - nothing here runs on another
        return loop

    async def crash(self) -> None:
        """Kill it; when this returns, nothing of it runs any more."""
        if not self.life.alive:
            return
        self._story.tell("a server is killed", server=self.name)
        self.service = None
        self.life.end()
        self._loop.continue_process(self.name)
        while tasks := list(self._tasks):
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def pause(self) -> None:
        self._story.tell("a server stands still", server=self.name)
        self._loop.stop_process(self.name)

    def resume(self) -> None:
        self._loop.continue_process(self.name)

    @property
    def paused(self) -> bool:
        return self._loop.is_stopped(self.name)

    @property
    def well(self) -> bool:
        """Whether it serves, and nothing holds it up."""
        stalled = self.store is not None and self.store.stalled_until > asyncio.get_running_loop().time()
        return self.service is not None and not self.paused and not stalled

    def kill_rivals(self) -> None:
        """Kill them; what they still try has no effect."""
        for life in self._rivals:
            life.end()

    def stall(self) -> None:
        """Let its store hang for a while, longer than a leader's lease."""
        if self.store is not None:
            self.store.stalled_until = asyncio.get_running_loop().time() + STALL_S

    async def rival(self, span_s: float) -> None:
        """Let a second server stand for leader for a while, then kill it: only one of the two may ever write as leader."""
        if self.service is None:
            return
        life = Life("the rival")
        self._rivals.append(life)
        store = self._through(ServerStore(self._cluster, self.name, life, self._net, self._faults, self._story, self._choose))

        async def work(term: Term) -> None:
            self._story.mark("leader: rival's term")
            try:
                await self._work(store, state, self.clock, self._choose, self.heard(), term, None, None, heir)
            finally:
                heir.begin()

        try:
            async with asyncio.timeout(span_s), State(store, KINDS) as state, Heir(state, self.clock) as heir:
                await lead(store, self.clock, "rival", work)
        except (AtollError, TimeoutError):
            self._story.tell("the rival is gone")
        finally:
            life.end()

    def heard(self) -> Mapping[str, float]:
        """Return node → when any server that this one reaches has last heard of it."""
        return Heard(self, self._net)

    async def _run(self, life: Life) -> None:
        while True:
            try:
                await self._serve(life)
            except AtollError as error:
                # As a supervisor would: what could not start is started again.
                self._story.tell("a server could not start", server=self.name, cause=error.message)
                await asyncio.sleep(START_RETRY_S)

    async def _serve(self, life: Life) -> None:
        self.store = ServerStore(self._cluster, self.name, life, self._net, self._faults, self._story, self._choose)
        store = self._through(self.store)
        async with State(store, KINDS) as state:
            service = Service(
                store, state, self.clock, self._choose, SECRET_KEY, entropy=lambda count: self._choose.randbytes(count)
            )
            async with service:
                life.check()
                self.service = service

                heir = Heir(state, self.clock)

                async def work(term: Term) -> None:
                    self._story.mark("leader: term")
                    self._story.tell("a server leads", server=self.name)
                    counted = service.traffic.totals()
                    try:
                        await self._work(store, state, self.clock, self._choose, self.heard(), term, exchange, counted, heir)
                    finally:
                        heir.begin()

                exchange = self._exchange(service, state) if self._faults.profile.beats else None
                listening = (
                    self.spawn(listen_for_beats(exchange, self._net.datagrams, (self.name, BEATS_PORT))) if exchange else None
                )
                try:
                    async with heir:
                        await lead(store, self.clock, self.name, work, exchange.affirm if exchange else lambda until: None)
                finally:
                    self.service = None
                    if listening is not None:
                        listening.cancel()

    def _exchange(self, service: Service, state: State) -> Exchange:
        def site_of(node: str) -> str | None:
            held = state.get(Node, node)
            return held.record.site if held is not None else None

        return Exchange(
            key_of=lambda node, epoch: beat_key(service.context, node, epoch),
            site_of=site_of,
            last_seen=service.heartbeats.last_seen(),
            clock=self.clock,
            chance=self._choose,
        )


class Heard(Mapping[str, float]):
    """When each node was last heard of, by any server that can be asked."""

    def __init__(self, server: Server, net: Net) -> None:
        self._server = server
        self._net = net

    def _each(self) -> Iterator[Mapping[str, float]]:
        for peer in self._server.peers:
            here = peer is self._server
            if peer.service is not None and (here or (not peer.paused and self._net.talk(peer.name, self._server.name))):
                yield peer.service.heartbeats.last_seen()

    def __getitem__(self, node: str) -> float:
        found = [seen[node] for seen in self._each() if node in seen]
        if not found:
            raise KeyError(node)
        return max(found)

    def __iter__(self) -> Iterator[str]:
        return iter({node: None for seen in self._each() for node in seen})

    def __len__(self) -> int:
        return sum(1 for _ in self)


def reachable(servers: Sequence[Server], net: Net, place: str) -> list[Server]:
    """Return the servers that answer at `place`'s end of the network."""
    return [server for server in servers if server.service is not None and net.talk(place, server.name)]


def check_serving(server: Server) -> Service:
    """Raises Unavailable while it does not serve."""
    if server.service is None:
        raise Unavailable(f"{server.name} refuses connections")
    return server.service
