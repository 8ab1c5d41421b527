"""The agent's side of the beats: says that it lives, to every server that may lead, and asks for them whether others do.

Everything goes out from one socket, and answers come back the way that the beats have opened, so that a node behind a
translating router needs no port of its own. No I/O here: `beating.py` gives it a socket and a clock.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable

from msgspec import Struct

from atoll.model import beats
from atoll.model.beats import WINDOW, Beat, BeatGrant, Flag, Kind, NotOurs, Relayed
from atoll.model.ports.datagrams import Address
from atoll.node.contact import Contact

RATE_MIN = 2
"""Beats a second while none is lost."""
RATE_MAX = 10
MISS_ODDS = 1e-8
"""So unlikely it shall be that all beats of a second are lost; how many that takes depends on how many are lost."""
EAGER_S = 3.0
"""A new agent beats at the full rate until it knows better."""
ASK_EVERY_S = 1.0
"""How often a beat asks for an ACK."""
STALL_S = 0.5
"""Being so much too late means that this process was paused: it says at once, and more than once, that it is back."""
BURST = 3
BURST_GAP_S = 0.05
PLACE_BITS = 46
"""Counters of one server are so far from those of the next; milliseconds since the epoch take 41 bits until 2039."""
SPAN_MIN = 5
"""Beats that must have counted before a loss is made of them."""
SENT_MAX = 128
"""Beats of which an ACK is awaited, by server."""
ANSWERS_PER_S = 200
"""Probes answered or carried a second, both together."""
CARRY_S = 0.9
"""How long a helper waits for an answer before it says that none came; one that comes later is still handed on."""
CARRY_KEPT_S = 3.0
CARRIED_MAX = 512
DEAF_S = 2.5
"""Without an ACK of the server that leads for so long, it may not hear our datagrams; heartbeats over HTTP then come sooner."""
BUSY_S = 10.0
"""So long after a server has said that it is behind it is sent few beats, and is not missed."""
DEAF_EAGER_S = 10.0
"""So long after that it beats at the full rate to a server that does not answer."""


class Carried(Struct, frozen=True):
    """A probe that is carried for a server."""

    server: Address
    denied_at: float
    until: float
    denied: bool = False


class Server:
    """What the agent knows of one server. Mutable."""

    __slots__ = ("asked_at", "burst", "busy_until", "counter", "first", "heard_at", "loss", "next", "sent", "session")

    def __init__(self, counter: int) -> None:
        self.counter = counter
        self.session = 0
        self.first = counter
        """The first that counted in this session."""
        self.sent: OrderedDict[int, float] = OrderedDict()
        """Counter → when, of beats of which an ACK would be news."""
        self.asked_at = -math.inf
        self.heard_at: float | None = None
        self.loss = 1.0
        """Share of the last beats that did not arrive; 1 while nothing is known."""
        self.next = -math.inf
        """When the next beat is due."""
        self.burst = 0
        self.busy_until = -math.inf
        """Until then what it does not hear is lost with itself, and more of it would make that worse."""

    def answers(self, now: float) -> bool:
        """Whether it is heard, as far as it ever was."""
        return self.heard_at is None or now - self.heard_at <= DEAF_S or now < self.busy_until

    def rate(self, now: float) -> int:
        """Return how many beats a second it is due: as many as the way there asks for.

        One that does not answer any more may lose what it is sent, so it is sent more for a while. One that answers is not,
        whatever the others do: else the server that takes over from one that died would be flooded at that moment.
        """
        if self.heard_at is None or now < self.busy_until:
            return RATE_MIN
        silent_s = now - self.heard_at
        if silent_s > DEAF_S:
            return RATE_MAX if silent_s < DEAF_S + DEAF_EAGER_S else RATE_MIN
        return rate_of(self.loss)


class Pulse:
    """`counter` should be above that of every earlier life of this node's agent: milliseconds of the wall clock are, and where that
    was set back a server's ACK says how far it must jump."""

    def __init__(self, node: str, *, contact: Contact, counter: int) -> None:
        self._node = node
        self._contact = contact
        self._counter = counter
        self._grant: BeatGrant | None = None
        self._servers: dict[Address, Server] = {}
        self._places = 0
        self._began: float | None = None
        self._leader: Address | None = None
        """Of the server that has led last, as far as is known here."""
        self._led_at: float | None = None
        """When the server that leads answered last; until it ever has, when any first did."""
        self._carried: dict[int, Carried] = {}
        self._budget = float(ANSWERS_PER_S)
        self._budget_at = 0.0
        self.inside = ""
        self.send_to: Callable[[bytes, Address], None] = lambda _data, _to: None
        self.sent = 0

    def serve(self, grant: BeatGrant, servers: list[Address]) -> None:
        """Beat with this key, to these; and to the one that led last, though it is not among them: its entry in the list of servers
        may have run out while it was busy, and what it does not hear any more it gives up."""
        self._grant = grant
        if self._leader is not None and self._leader not in servers:
            servers = [*servers, self._leader]
        known = self._servers
        self._servers = {}
        for address in servers:
            if address not in known:
                # Counters say which server an ACK is of; one with several addresses may answer from another than was asked.
                known[address] = Server(self._counter + (self._places << PLACE_BITS))
                self._places += 1
            self._servers[address] = known[address]

    def rate(self, now: float) -> int:
        """Return how many beats a second go to the server that gets most."""
        return max((server.rate(now) for server in self._servers.values()), default=RATE_MIN)

    @property
    def answered(self) -> bool:
        """Whether any server ever has."""
        return any(server.heard_at is not None for server in self._servers.values())

    def deaf(self, now: float) -> bool:
        """Whether the server that leads does not answer, though one has: it alone judges, so what others hear is no help."""
        return self._led_at is not None and now - self._led_at > DEAF_S

    def cut_off(self, now: float) -> bool:
        """Whether the leader does not answer, and may be one that does not hear us: some server that did answer does not any more.
        Where all do, and none says that it leads, there is no leader, or one to which this node has never beaten."""
        return self.deaf(now) and not all(server.answers(now) for server in self._servers.values())

    def tick(self, now: float) -> float:
        """Send what is due, and return when to come again. Raises nothing."""
        if self._began is None:
            self._began = now
        eager = now - self._began < EAGER_S
        due = now + 1.0 / RATE_MIN
        for address, server in self._servers.items():
            if now >= server.next:
                if STALL_S < now - server.next < math.inf:
                    server.burst = BURST
                self._beat(address, server, now)
                server.burst = max(0, server.burst - 1)
                rate = RATE_MAX if eager and now >= server.busy_until else server.rate(now)
                server.next = now + (BURST_GAP_S if server.burst else 1.0 / rate)
            due = min(due, server.next)
        carries = self.carries_until(now)
        return due if carries is None else min(due, carries)

    def carries_until(self, now: float) -> float | None:
        """Say of which probes nothing has come back, and return when to look again; None when none is carried."""
        for nonce, carried in list(self._carried.items()):
            if not carried.denied and now >= carried.denied_at:
                self._hand_back(nonce, carried.server, b"")
                self._carried[nonce] = Carried(carried.server, carried.denied_at, carried.until, True)
            elif now >= carried.until:
                del self._carried[nonce]
        return min((one.until if one.denied else one.denied_at for one in self._carried.values()), default=None)

    def say_goodbye(self, now: float) -> None:
        """Tell every server that this agent ends in order and another will follow: three times, since it is the last word."""
        for _ in range(BURST):
            for address, server in self._servers.items():
                self._beat(address, server, now, Flag.AWAY)

    def _beat(self, address: Address, server: Server, now: float, flags: int = Flag.NONE) -> None:
        if self._grant is None:
            return
        server.counter += 1
        if not server.session or now - server.asked_at >= ASK_EVERY_S - 0.01:
            flags |= Flag.ASKS
            server.asked_at = now
            server.sent[server.counter] = now
            while len(server.sent) > SENT_MAX:
                server.sent.popitem(last=False)
        beat = Beat(self._node, self._grant.epoch, server.session, server.counter, flags, self.inside)
        self._send(beats.pack_beat(self._grant.key, beat), address)

    def _send(self, data: bytes, to: Address) -> None:
        self.sent += 1
        self.send_to(data, to)

    def receive(self, data: bytes, sender: Address, now: float) -> None:
        """Take a datagram; what is not ours is dropped."""
        grant = self._grant
        if grant is None:
            return
        try:
            kind, flags = beats.kind_of(data)
            match kind:
                case Kind.ACK:
                    self._ack(beats.read_ack(grant.key, data, flags), now)
                case Kind.PING:
                    nonce = beats.nonce_of(data)
                    beats.opened(grant.key, data)
                    if self._affords(now):
                        self._send(beats.pack_pong(grant.key, nonce), sender)
                case Kind.RELAY:
                    self._carry(beats.read_relay(grant.key, data), sender, now)
                case Kind.PONG:
                    carried = self._carried.pop(beats.nonce_of(data), None)
                    if carried is not None:
                        self._hand_back(beats.nonce_of(data), carried.server, data)
                case _:
                    pass
        except NotOurs:
            pass

    def _ack(self, ack: beats.Ack, now: float) -> None:
        found = next(((at, server) for at, server in self._servers.items() if ack.counter in server.sent), None)
        if found is None:
            return  # an answer to nothing that was asked: old, or made up
        address, server = found
        sent_at = server.sent[ack.counter]
        for counter in [counter for counter in server.sent if counter <= ack.counter]:
            del server.sent[counter]
        server.heard_at = now
        if ack.leads or self._led_at is None:
            self._led_at = now
        if ack.leads:
            self._leader = address
        if ack.busy:
            server.busy_until = now + BUSY_S
        if ack.last > server.counter:
            server.counter = ack.last  # our clock was set back between two lives
        if ack.session != server.session:
            server.session, server.first, server.loss = ack.session, server.counter + 1, 1.0
            server.next = now  # the next beat is the first that counts there
            return
        span = min(WINDOW, ack.last - server.first + 1)
        if now < server.busy_until:
            server.first, server.loss = server.counter + 1, 0.0
        elif span >= SPAN_MIN:
            measured = max(0.0, 1.0 - ack.window.bit_count() / span)
            worse = measured > server.loss or server.loss == 1.0
            server.loss = measured if worse else 0.7 * server.loss + 0.3 * measured
        counted = 0 <= ack.last - ack.counter < WINDOW and ack.window >> ack.last - ack.counter & 1
        if ack.leads and counted:
            self._contact.prove(sent_at)

    def _affords(self, now: float) -> bool:
        self._budget = min(float(ANSWERS_PER_S), self._budget + max(0.0, now - self._budget_at) * ANSWERS_PER_S)
        self._budget_at = now
        if self._budget < 1.0:
            return False
        self._budget -= 1.0
        return True

    def _carry(self, relay: beats.Relay, server: Address, now: float) -> None:
        """Ask another node for a server. The question is the server's and the answer is for it: neither can be made here."""
        if beats.kind_of(relay.ping)[0] is not Kind.PING or beats.nonce_of(relay.ping) != relay.nonce:
            raise NotOurs("not a probe")
        if relay.nonce in self._carried or len(self._carried) >= CARRIED_MAX or not self._affords(now):
            return
        self._carried[relay.nonce] = Carried(server, now + CARRY_S, now + CARRY_KEPT_S)
        self._send(relay.ping, relay.address)

    def _hand_back(self, nonce: int, server: Address, pong: bytes) -> None:
        if self._grant is not None:
            relayed = Relayed(self._node, self._grant.epoch, nonce, pong)
            self._send(beats.pack_relayed(self._grant.key, relayed), server)


def rate_of(loss: float) -> int:
    """Return how many beats a second it takes that all are lost with odds of `MISS_ODDS` at most; `loss` is of each."""
    if loss <= 0.0:
        return RATE_MIN
    if loss >= 1.0:
        return RATE_MAX
    return min(RATE_MAX, max(RATE_MIN, math.ceil(math.log(MISS_ODDS) / math.log(loss))))
