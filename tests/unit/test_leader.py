"""Who leads when another server's process dies: at once where its death was seen, by its lease where it was not."""

from __future__ import annotations

import asyncio
import contextlib

import pytest
from control_cell import LoopClock, run_virtual

from atoll.control.leader import LEASE_S, POLL_S, Term, check, lead
from atoll.entry.deaths import Deaths
from atoll.model import codec, keys
from atoll.model.errors import Fenced
from atoll.model.membership import Server
from atoll.model.ports.clock import SystemClock
from atoll.model.ports.store import LeaseId
from atoll.store.cache import State
from atoll.store.memory import MemoryStore

AT_ONCE_S = 0.1


class Store(MemoryStore):
    """While it is deaf, no lease is given up."""

    deaf = False

    async def lease_revoke(self, lease: LeaseId) -> None:
        if not self.deaf:
            await super().lease_revoke(lease)


class Cell:
    """Servers that wait to lead over one store, and lead without doing anything."""

    def __init__(self) -> None:
        self.clock = LoopClock()
        self.store = Store(self.clock)
        self.died: dict[str, asyncio.Event] = {}
        self.terms: list[tuple[str, Term]] = []
        self.tasks: dict[str, asyncio.Task[None]] = {}
        self.affirmed: dict[str, float] = {}
        self.begun = asyncio.Event()
        self.broken = False

    def start(self, name: str) -> None:
        async def work(term: Term) -> None:
            self.terms.append((name, term))
            self.begun.set()
            await asyncio.Event().wait()

        async def ended(identity: str) -> None:
            if self.broken:
                raise OSError("no more sockets")
            await self.died.setdefault(identity, asyncio.Event()).wait()

        def affirm(until: float) -> None:
            self.affirmed[name] = until

        self.tasks[name] = asyncio.ensure_future(lead(self.store, self.clock, name, work, affirm, ended))

    async def led_by(self, count: int) -> tuple[str, Term]:
        """Wait for the term of that number and return who leads it."""
        async with asyncio.timeout(60):
            while len(self.terms) < count:
                self.begun.clear()
                await self.begun.wait()
        return self.terms[count - 1]

    async def kill(self, name: str) -> None:
        """End it as a signal 9 does: its lease is left behind."""
        self.store.deaf = True
        self.tasks[name].cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self.tasks[name]
        self.store.deaf = False

    async def close(self) -> None:
        for task in self.tasks.values():
            task.cancel()
        await asyncio.gather(*self.tasks.values(), return_exceptions=True)


def test_a_leader_whose_process_died_is_replaced_at_once_and_by_one_alone() -> None:
    async def main() -> None:
        cell = Cell()
        cell.start("one")
        await cell.led_by(1)
        cell.start("two")
        cell.start("three")
        await asyncio.sleep(2 * POLL_S)
        await cell.kill("one")
        cell.died["one"].set()
        began = cell.clock.monotonic()
        await cell.led_by(2)
        assert cell.clock.monotonic() - began < AT_ONCE_S
        await asyncio.sleep(2 * LEASE_S)
        assert len(cell.terms) == 2, "the third goes on waiting"
        await cell.close()

    run_virtual(main())


def test_a_leader_whose_death_nobody_saw_is_replaced_when_its_lease_ends() -> None:
    async def main() -> None:
        cell = Cell()
        cell.start("one")
        await cell.led_by(1)
        cell.start("two")
        await asyncio.sleep(2 * POLL_S)
        await cell.kill("one")
        began = cell.clock.monotonic()
        await cell.led_by(2)
        assert LEASE_S / 2 < cell.clock.monotonic() - began < LEASE_S + 2 * POLL_S
        await cell.close()

    run_virtual(main())


def test_a_leader_that_ends_in_order_is_replaced_within_a_poll() -> None:
    async def main() -> None:
        cell = Cell()
        cell.start("one")
        await cell.led_by(1)
        cell.start("two")
        await asyncio.sleep(2 * POLL_S)
        cell.tasks["one"].cancel()
        began = cell.clock.monotonic()
        await cell.led_by(2)
        assert cell.clock.monotonic() - began < POLL_S + AT_ONCE_S
        await cell.close()

    run_virtual(main())


def test_a_leader_that_is_wrongly_believed_dead_is_fenced_and_stops() -> None:
    async def main() -> None:
        cell = Cell()
        cell.start("one")
        _, term = await cell.led_by(1)
        cell.start("two")
        await asyncio.sleep(2 * POLL_S)
        cell.died["one"].set()
        name, second = await cell.led_by(2)
        assert name == "two"
        with pytest.raises(Fenced):
            await check(cell.store, term)
        await check(cell.store, second)
        believed_until = cell.affirmed["one"]
        await asyncio.sleep(LEASE_S)
        assert cell.affirmed["one"] == believed_until, "its next sign of life finds no lease"
        assert len(cell.terms) == 2, "it waits for its turn"
        held = await cell.store.get(keys.LEADER)
        assert held is not None
        assert held.value == b"two"
        await cell.close()

    run_virtual(main())


def test_a_watch_for_the_leaders_death_that_fails_ends_no_term() -> None:
    async def main() -> None:
        cell = Cell()
        cell.start("one")
        _, term = await cell.led_by(1)
        cell.broken = True
        cell.start("two")
        await asyncio.sleep(3 * LEASE_S)
        await check(cell.store, term)
        assert len(cell.terms) == 1
        await cell.kill("one")
        name, _ = await cell.led_by(2)
        assert name == "two", "its lease decides"
        await cell.close()

    run_virtual(main())


class Peer:
    """A server of which only the port matters."""

    def __init__(self) -> None:
        self.lines: list[asyncio.StreamWriter] = []
        self.came = asyncio.Event()

    async def listen(self, port: int = 0) -> int:
        async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            self.lines.append(writer)
            self.came.set()

        self._server = await asyncio.start_server(accept, "127.0.0.1", port)
        return int(self._server.sockets[0].getsockname()[1])

    def hang_up(self) -> None:
        self.came.clear()
        for line in self.lines:
            line.close()
        self.lines.clear()

    def die(self) -> None:
        self._server.close()
        self.hang_up()


async def test_death_is_a_connection_that_breaks_and_a_port_that_refuses_and_nothing_less() -> None:
    store = MemoryStore(SystemClock())
    peer = Peer()
    port = await peer.listen()
    record = Server(id="one", urls=(f"http://127.0.0.1:{port}",), version="1", started_at=0.0)
    async with State(store, {keys.SERVERS: Server}) as state:
        await state.reach(await store.put(keys.server("one"), codec.encode(record)))
        death = asyncio.ensure_future(Deaths(state).of("one"))
        stranger = asyncio.ensure_future(Deaths(state).of("another"))
        async with asyncio.timeout(20):
            await peer.came.wait()
            peer.hang_up()
            await peer.came.wait()
            assert not death.done(), "a server that lives hangs up, too"
            peer.die()
            await death
        # Refused from the start: that may be a rule of a firewall.
        refused = asyncio.ensure_future(Deaths(state).of("one"))
        done, _ = await asyncio.wait({refused, stranger}, timeout=0.3)
        assert not done
        for task in (refused, stranger):
            task.cancel()
        await asyncio.gather(refused, stranger, return_exceptions=True)


async def test_a_peer_that_breaks_off_all_that_it_takes_while_it_dies_is_seen_to_die() -> None:
    store = MemoryStore(SystemClock())
    peer = Peer()
    port = await peer.listen()
    record = Server(id="one", urls=(f"http://127.0.0.1:{port}",), version="1", started_at=0.0)
    async with State(store, {keys.SERVERS: Server}) as state:
        await state.reach(await store.put(keys.server("one"), codec.encode(record)))
        death = asyncio.ensure_future(Deaths(state).of("one"))
        async with asyncio.timeout(20):
            for _ in range(5):
                await peer.came.wait()
                for line in peer.lines:
                    line.transport.abort()
                peer.hang_up()
            assert not death.done(), "whoever still takes connections lives"
            peer.die()
            await death
