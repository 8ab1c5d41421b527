"""Datagrams that wake an app: kept within bounds, handed to what serves, forgotten with the app."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Callable

import pytest
from msgspec.structs import replace
from test_public_ports import routing

from atoll.ingress.datagrams import ASKING_MAX, HELD_BYTES_MAX, HELD_MAX, Datagrams
from atoll.ingress.table import RoutingTable
from atoll.model.ports.control_plane import RoutingBatch
from atoll.model.records import Endpoint, Listening, Routing
from atoll.model.spec import PortProtocol

PLACE = Endpoint(instance="dns-1", node="n", address="127.0.0.1")


class Waker:
    def __init__(self) -> None:
        self.table = RoutingTable()
        self.woken: list[str] = []
        self.datagrams = Datagrams(self.table, wake=self.woken.append)
        self.table.udp_waker = self.datagrams.port_of
        self._revision = 0

    def put(self, made: Routing, *, removed: bool = False) -> None:
        self._revision += 1
        self.table.apply(RoutingBatch(self._revision, False, () if removed else (made,), removed=("a/dns",) if removed else ()))
        self.datagrams.changed()

    def port(self) -> int:
        (target,) = self.table.sleepers()
        return self.datagrams.port_of(target)


@pytest.fixture
async def waker() -> AsyncIterator[Waker]:
    made = Waker()
    yield made
    made.datagrams.stop()


@pytest.fixture
async def instance() -> AsyncIterator[socket.socket]:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as made:
        made.bind(("127.0.0.1", 0))
        yield made


def client_of(port: int) -> socket.socket:
    made = socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
    made.connect(("127.0.0.1", port))
    return made


def asleep(instance: socket.socket) -> Routing:
    return routing("dns", Listening(public=5_353, protocol=PortProtocol.UDP, port=instance.getsockname()[1]), wakes=True)


async def until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(30):
        while not holds():  # noqa: ASYNC110 - what another socket has got has no event here
            await asyncio.sleep(0.005)


async def heard(one: socket.socket) -> tuple[bytes, tuple[str, int]]:
    async with asyncio.timeout(30):
        return await asyncio.get_running_loop().sock_recvfrom(one, 70_000)


async def test_what_comes_until_an_instance_serves_is_handed_to_it_and_answered(waker: Waker, instance: socket.socket) -> None:
    waker.put(asleep(instance))
    with client_of(waker.port()) as one, client_of(waker.port()) as other:
        one.send(b"one")
        await until(lambda: waker.datagrams.kept == 1)
        other.send(b"other")
        one.send(b"more")
        await until(lambda: waker.datagrams.kept == 3)
        assert (waker.woken, waker.datagrams.waiting) == (["a/dns"], {"a/dns"})  # once, however many come
        waker.put(replace(asleep(instance), endpoints=(PLACE,)))
        got = [await heard(instance) for _ in range(3)]
        assert [data for data, _ in got] == [b"one", b"other", b"more"]
        assert got[0][1] == got[2][1] != got[1][1]  # one client is one client for the instance
        instance.sendto(b"for other", got[1][1])
        assert (await heard(other))[0] == b"for other"
        assert waker.datagrams.waiting == set()
        # What Envoy sends before it is told of the instance goes there at once.
        one.send(b"late")
        assert (await heard(instance))[0] == b"late"


async def test_no_more_is_kept_than_the_bounds_say(waker: Waker, instance: socket.socket) -> None:
    waker.put(asleep(instance))
    with client_of(waker.port()) as client:
        for number in range(HELD_MAX + 10):
            client.send(b"%d" % number)
        await until(lambda: waker.datagrams.kept == HELD_MAX)
        waker.put(replace(asleep(instance), endpoints=(PLACE,)))
        assert [(await heard(instance))[0] for _ in range(HELD_MAX)] == [b"%d" % number for number in range(HELD_MAX)]
        waker.put(asleep(instance))
        large = bytes(60_000)
        for _ in range(HELD_BYTES_MAX // len(large) + 2):
            client.send(large)
            await asyncio.sleep(0.01)
        client.send(b"small")  # for which there is room
        await until(lambda: waker.datagrams.kept == HELD_BYTES_MAX // len(large) + 1)


async def test_an_app_that_goes_takes_its_socket_and_what_waited_with_it(waker: Waker, instance: socket.socket) -> None:
    waker.put(asleep(instance))
    port = waker.port()
    with client_of(port) as client:
        client.send(b"one")
        await until(lambda: waker.datagrams.kept == 1)
        waker.put(asleep(instance), removed=True)
        assert waker.datagrams.waiting == set()
        client.send(b"two")
        await asyncio.sleep(0.05)  # the kernel says no by the next one
        with pytest.raises(ConnectionRefusedError):
            client.send(b"three")


async def test_however_many_come_before_envoy_knows_a_client_has_one_socket_and_only_so_many_clients(
    waker: Waker, instance: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    waker.put(asleep(instance))
    port = waker.port()
    waker.put(replace(asleep(instance), endpoints=(PLACE,)))
    with client_of(port) as one:
        for number in range(10):
            one.send(b"%d" % number)
        got = [await heard(instance) for _ in range(10)]
        assert len({address for _, address in got}) == 1
        monkeypatch.setattr("atoll.ingress.datagrams.ASKING_MAX", 2)
        with client_of(port) as two, client_of(port) as three:
            two.send(b"two")
            assert (await heard(instance))[0] == b"two"
            three.send(b"three")
            one.send(b"one")
            assert (await heard(instance))[0] == b"one", "what is beyond the bound is lost, and nothing else"
    assert ASKING_MAX < 1_024, "files that a process may have open by default"


async def test_without_files_to_open_datagrams_are_lost_and_nothing_else(
    waker: Waker, instance: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    waker.put(asleep(instance))

    def none(*_: object) -> socket.socket:
        raise OSError(24, "Too many open files")

    with client_of(waker.port()) as client:
        client.send(b"lost")
        await until(lambda: waker.datagrams.kept == 1)
        monkeypatch.setattr("atoll.ingress.datagrams._socket", none)
        waker.put(replace(asleep(instance), endpoints=(PLACE,)))
        assert waker.datagrams.kept == 0
        monkeypatch.undo()
        client.send(b"kept")
        assert (await heard(instance))[0] == b"kept"
