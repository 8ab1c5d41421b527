"""Datagrams for apps that sleep: the first one wakes the app, and what comes until an instance serves is kept, a little of it.

Envoy is told of a socket of ours on the loopback address as the only endpoint of the app's UDP port. As soon as an instance serves,
Envoy sends to that itself, and what was kept goes there, too. An answer to this goes back as long as Envoy still knows the way by
which it was asked, which is not for long: who is not answered asks again, as with any datagram that is lost.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
from collections.abc import Callable, Iterator
from typing import Any

import structlog
from msgspec import Struct

from atoll.ingress.resources import Target
from atoll.ingress.sleepers import serving, wake_s
from atoll.ingress.table import RoutingTable

LOOPBACK = "127.0.0.1"
HELD_MAX = 64
"""Datagrams that are kept for one port; of more, the first ones."""
HELD_BYTES_MAX = 256 << 10
AT_ONCE = 64
"""Datagrams that are taken in one turn of the loop."""
BYTES_MAX = 1 << 16
ANSWER_S = 5.0
"""So long an answer to what was handed over is waited for."""
ASKING_MAX = 256
"""Clients whose answers are waited for at a time; what comes from more of them is lost."""

Client = Any
"""As the socket names who sent."""
log = structlog.get_logger()


class Held(Struct):
    """What waits for one port's app."""

    until: asyncio.TimerHandle
    datagrams: list[tuple[bytes, Client]]
    bytes: int = 0


class Asking(Struct):
    """A socket from which a client's datagrams were handed over, and that its answers come to."""

    socket: socket.socket
    until: asyncio.TimerHandle


class Datagrams:
    """Holds datagrams for the UDP ports of the apps of `table` that wake; `wake` is called with an app (`project/name`)."""

    def __init__(self, table: RoutingTable, *, wake: Callable[[str], None]) -> None:
        self._table = table
        self._wake = wake
        self._sockets: dict[Target, socket.socket] = {}
        self._held: dict[Target, Held] = {}
        self._asking: dict[tuple[Target, Client], Asking] = {}

    @property
    def waiting(self) -> set[str]:
        """Apps that a datagram waits for."""
        return {_app(target) for target in self._held}

    @property
    def kept(self) -> int:
        """How many datagrams wait now."""
        return sum(len(held.datagrams) for held in self._held.values())

    def port_of(self, target: Target) -> int:
        """Return the loopback port at which datagrams for `target` wake its app, which listens from now on; 0 where it cannot."""
        listener = self._sockets.get(target)
        if listener is None:
            try:
                with _socket() as listener:
                    listener.bind((LOOPBACK, 0))
                    asyncio.get_running_loop().add_reader(listener, self._take, target, listener)
            except OSError as error:
                log.error("ingress.no-activator", app=_app(target), message=str(error))
                return 0
            self._sockets[target] = listener
        return int(listener.getsockname()[1])

    def changed(self) -> None:
        """Follow a change of the table: hand over what an instance serves now, and forget what nobody waits for."""
        for target in self._sockets.keys() - self._table.sleepers():
            self._forget(target)
            _close(self._sockets.pop(target))
        for target in list(self._held):
            if serving(self._table.endpoints_of(_app(target))):
                self._hand_over(target)

    def stop(self) -> None:
        for target in list(self._held):
            self._forget(target)
        for listener in self._sockets.values():
            _close(listener)
        self._sockets.clear()
        for target, client in list(self._asking):
            self._end(target, client)

    def _take(self, target: Target, listener: socket.socket) -> None:
        for _ in range(AT_ONCE):
            try:
                data, client = listener.recvfrom(BYTES_MAX)
            except OSError:  # nothing more; or the last answer came to nobody
                return
            self._hold(target, data, client)

    def _hold(self, target: Target, data: bytes, client: Client) -> None:
        app = _app(target)
        routing = self._table.routing_of(app)
        if routing is None:
            return
        held = self._held.get(target)
        if held is None:
            until = asyncio.get_running_loop().call_later(wake_s(routing), self._give_up, target)
            held = self._held[target] = Held(until, [])
            self._wake(app)
        if len(held.datagrams) < HELD_MAX and held.bytes + len(data) <= HELD_BYTES_MAX:
            held.datagrams.append((data, client))
            held.bytes += len(data)
        if serving(routing.endpoints):  # what Envoy sent before it was told
            self._hand_over(target)

    def _give_up(self, target: Target) -> None:
        log.warning("ingress.not-woken", app=_app(target), datagrams=len(self._held[target].datagrams))
        self._forget(target)

    def _forget(self, target: Target) -> None:
        held = self._held.pop(target, None)
        if held is not None:
            held.until.cancel()

    def _hand_over(self, target: Target) -> None:
        held = self._held.pop(target)
        held.until.cancel()
        for data, client in held.datagrams:
            asking = self._asking.get((target, client)) or self._ask(target, client)
            if asking is not None:
                with contextlib.suppress(OSError):
                    asking.socket.send(data)

    def _ask(self, target: Target, client: Client) -> Asking | None:
        """Return a socket to an instance whose answers go to `client`; None where there can be none."""
        endpoints = serving(self._table.endpoints_of(_app(target)))
        if len(self._asking) >= ASKING_MAX or not endpoints:
            return None
        loop = asyncio.get_running_loop()
        try:
            with _socket() as made:
                made.connect((random.choice(endpoints).address, target.port))
                loop.add_reader(made, self._answer, target, made, client)
        except OSError as error:
            log.warning("ingress.not-handed-over", app=_app(target), message=str(error))
            return None
        asking = self._asking[target, client] = Asking(made, loop.call_later(ANSWER_S, self._end, target, client))
        return asking

    def _answer(self, target: Target, asking: socket.socket, client: Client) -> None:
        listener = self._sockets.get(target)
        for _ in range(AT_ONCE):
            try:
                data = asking.recv(BYTES_MAX)
                if listener is not None:
                    listener.sendto(data, client)
            except BlockingIOError:
                return
            except OSError:
                self._end(target, client)
                return

    def _end(self, target: Target, client: Client) -> None:
        asking = self._asking.pop((target, client))
        asking.until.cancel()
        _close(asking.socket)


def _app(target: Target) -> str:
    return f"{target.project}/{target.app}"


@contextlib.contextmanager
def _socket() -> Iterator[socket.socket]:
    """Make a socket, which is closed if what is done with it first fails, and else stays open."""
    made = socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
    try:
        yield made
    except BaseException:
        made.close()
        raise


def _close(one: socket.socket) -> None:
    asyncio.get_running_loop().remove_reader(one)
    one.close()
