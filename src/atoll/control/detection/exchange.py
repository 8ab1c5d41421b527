"""A server's side of the beats: takes them, acknowledges them, and while it leads asks those that are silent. No I/O of its own.

Every server hears every node, so that one that begins to lead knows who is there; only the one that leads asks and believes.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Iterable, Mapping, Set

import structlog
from msgspec import Struct

from atoll.control.detection.awake import AwakeClock
from atoll.control.detection.decide import Asked, Believe, Clear, Denied, Looked, Probe, Standing, Watch, decide
from atoll.control.detection.peers import Peer, Peers
from atoll.control.detection.rules import AWAY_S, HELPERS, PROBED_PER_TICK_MAX, Rules
from atoll.model import beats
from atoll.model.beats import Ack, Beat, Flag, Kind, NotOurs, Relay
from atoll.model.ports.clock import Clock
from atoll.model.ports.datagrams import Address

PENDING_S = 3.0
"""How long an answer to a probe is awaited."""
PENDING_MAX = 50_000
INDEX_S = 5.0
INDIRECT_S = 10.0
"""A node that for so long was heard through others only has a bad path to us."""

log = structlog.get_logger()


class Pending(Struct, frozen=True):
    """A probe whose answer is awaited."""

    target: str
    helper: str | None
    until: float


class Traffic:
    """What went in and out since the beginning."""

    def __init__(self) -> None:
        self.received = self.received_bytes = self.sent = self.sent_bytes = self.refused = self.shed = 0


class Exchange:
    """`key_of(node, epoch)` gives a node's key, `site_of(node)` its site, or None for a node that is not known. `last_seen` is node
    → a number that changes with each heartbeat over HTTP, which is a sign of life, too. `changed` is called when a node falls
    silent, or is heard again.

    `basis_of(node)` is what its key is made from and whether it is known: as long as that is the same object, its key is not made
    again. None for a node that is not known. Without it a key is made for every datagram.
    """

    def __init__(
        self,
        *,
        key_of: Callable[[str, int], bytes],
        site_of: Callable[[str], str | None],
        last_seen: Mapping[str, float],
        clock: Clock,
        chance: random.Random,
        rules: Rules | None = None,
        basis_of: Callable[[str], object | None] | None = None,
    ) -> None:
        self._key_of = key_of
        self._site_of = site_of
        self._basis_of = basis_of or (lambda name: None if site_of(name) is None else object())
        self._last_seen = last_seen
        self._clock = clock
        self._chance = chance
        self._rules = rules or Rules()
        self._session = chance.getrandbits(63) | 1
        self._pending: dict[int, Pending] = {}
        self._index_at = 0.0
        self._over_http: dict[str, float] = {}
        """Of nodes that do not beat: the value of their last heartbeat that was looked at."""
        self._over_http_at = float("-inf")
        """When one of those came, as far as it was noticed."""
        self.awake = AwakeClock(clock.monotonic())
        self.peers = Peers(site_of, chance)
        self.watches: dict[str, Watch] = {}
        """Of nodes that are not simply heard; kept by the server that leads."""
        self.traffic = Traffic()
        self.send_to: Callable[[bytes, Address], None] = lambda _data, _to: None
        self.changed: Callable[[], None] = lambda: None
        self.leading = False
        self.behind = False
        """Whether more comes than is taken."""
        self.overrun = False
        """Whether it has for so long (`BEHIND_MAX_S`) that silence says nothing: heartbeats over HTTP decide about nodes."""
        self._leads_until = float("-inf")

    def lead(self, leading: bool) -> None:
        """Begin to ask and to believe, or stop. What was heard so far holds; what a server before believed is found anew."""
        self.leading = leading
        self.watches.clear()

    def affirm(self, until: float) -> None:
        """Take in until when, on the monotonic clock, no other server can lead: an ACK says that the leader has heard only then,
        since a node may rely on it to let what must not run twice go on."""
        self._leads_until = until

    def standing(self, name: str) -> Standing | None:
        """Return how a node stands; None for one that has not beaten since this server started, and of which beats say nothing."""
        if self.peers.get(name) is None:
            return None
        watch = self.watches.get(name)
        if self.overrun and watch is None:
            return None
        return watch.standing if watch is not None else Standing.HEARD

    def silence_s(self, name: str) -> float | None:
        """Return for how long a node has not been heard, in time awake; None as above. One that has said goodbye is heard."""
        peer = self.peers.get(name)
        if peer is None:
            return None
        silence = max(0.0, self.awake.now() - float(self.peers.heard[peer.row]))
        return 0.0 if peer.away and silence < AWAY_S else silence

    @property
    def heard(self) -> Set[str]:
        """The nodes that have beaten since this server started; those in `watches` are not heard just now. A live view.

        None while more comes than is taken for long: then heartbeats over HTTP must be looked at, too.
        """
        return frozenset() if self.overrun else self.peers.names

    def roundabout(self) -> set[str]:
        """Return the nodes that are heard through others only."""
        return {peer.name for peer in self.peers.indirect(self.awake.now() - INDIRECT_S) if peer.name not in self.watches}

    # What comes in.

    def receive(self, data: bytes, sender: Address) -> None:
        """Take a datagram. What is not ours is dropped, and counted; nothing is said to who sent it."""
        self.traffic.received += 1
        self.traffic.received_bytes += len(data)
        try:
            kind, flags = beats.kind_of(data)
            match kind:
                case Kind.BEAT if self.behind and not flags:
                    self.traffic.shed += 1  # one a second asks for an answer, and that is enough to be heard
                case Kind.BEAT:
                    self._beat(data, beats.read_beat(data, flags), sender)
                case Kind.PONG:
                    self._pong(data, beats.nonce_of(data), direct=True)
                case Kind.RELAYED:
                    self._relayed(data)
                case _:
                    raise NotOurs("not for a server")
        except NotOurs:
            self.traffic.refused += 1

    def hear(self, names: Iterable[str]) -> None:
        """Take it that a beat of each of these has come just now: for a simulator of so many nodes that their beats do not travel.
        They cannot be asked, nor ask others; everything else is as with beats."""
        now = self.awake.now()
        rows = [(self.peers.get(name) or self.peers.add(name)).row for name in names]
        self.peers.heard[rows] = self.peers.direct[rows] = now

    def _key(self, name: str, epoch: int, data: bytes) -> bytes:
        """Return the node's key if it opens `data`. Raises NotOurs.

        What opened the datagram before may have run out, or be that of a machine that was replaced: `basis_of` tells.
        """
        basis = self._basis_of(name)
        if basis is None or abs(epoch - beats.epoch_at(self._clock.now())) > 1:
            raise NotOurs("a key that is out of date, or a node that is not known")
        peer = self.peers.get(name)
        if peer is not None and peer.basis is basis and peer.key_epoch == epoch:
            beats.opened(peer.key, data)
            return peer.key
        key = self._key_of(name, epoch)
        beats.opened(key, data)
        if peer is not None:
            peer.basis, peer.key_epoch, peer.key = basis, epoch, key
        return key

    def _beat(self, data: bytes, beat: Beat, sender: Address) -> None:
        key = self._key(beat.node, beat.epoch, data)
        peer = self.peers.get(beat.node)
        if beat.session == self._session:
            if peer is None:
                peer = self.peers.add(beat.node)
            if peer.takes(beat.counter):
                now = self.awake.now()
                self.peers.heard[peer.row] = now
                peer.epoch = beat.epoch
                self.peers.direct[peer.row] = now
                peer.address = sender
                if beat.inside != peer.inside_text:
                    peer.inside_text, peer.inside = beat.inside, _address(beat.inside)
                peer.away = beat.flags & Flag.AWAY != 0
                if not beat.flags & Flag.ASKS:
                    return
        last, window = (peer.last, peer.window) if peer is not None else (0, 0)
        leads = self.leading and self._clock.monotonic() < self._leads_until
        self._send(beats.pack_ack(key, Ack(self._session, beat.counter, last, window, leads, self.behind)), sender)

    def _pong(self, data: bytes, nonce: int, *, direct: bool) -> None:
        pending = self._pending.get(nonce)
        peer = self.peers.get(pending.target) if pending is not None else None
        if peer is None:
            raise NotOurs("nobody waits for this answer")
        beats.opened(self._key_of(peer.name, peer.epoch), data)
        del self._pending[nonce]
        self.peers.heard[peer.row] = self.awake.now()
        if direct:
            self.peers.direct[peer.row] = self.awake.now()

    def _relayed(self, data: bytes) -> None:
        relayed = beats.read_relayed(data)
        self._key(relayed.helper, relayed.epoch, data)
        pending = self._pending.get(relayed.nonce)
        if pending is None or pending.helper != relayed.helper:
            raise NotOurs("nobody waits for this answer")
        if relayed.pong:
            if beats.kind_of(relayed.pong)[0] is not Kind.PONG or beats.nonce_of(relayed.pong) != relayed.nonce:
                raise NotOurs("an answer to something else")
            self._pong(relayed.pong, relayed.nonce, direct=False)
        elif pending.target in self.watches:
            self.watches[pending.target], _ = decide(self._rules, self.watches[pending.target], Denied(), self.awake.now())

    # What time brings.

    def tick(self, *, behind: bool = False) -> None:
        """Look who is silent. Called every `TICK_S`. While the server is `behind` with what comes, time stands still: it believes
        nothing, answers only what asks, and says so, so that agents do not take for lost on the way what was lost here. That may
        last for `BEHIND_MAX_S`, since any stranger can have it so; then nodes are judged by heartbeats over HTTP."""
        if behind is not self.behind:
            self.behind = behind
            log.log(
                logging.WARNING if behind else logging.INFO,
                "more beats come than are taken; nobody is believed silent" if behind else "all beats are taken again",
                shed=self.traffic.shed,
            )
        now = self.awake.tick(self._clock.monotonic(), behind=behind)
        if now >= self._index_at:
            self._index_at = now + INDEX_S
            self._tidy(now)
        if self.awake.overrun is not self.overrun:
            self._overrun(self.awake.overrun)
        if not self.leading:
            return
        if self.overrun:
            self._hear(now)
            return
        rules = self._rules
        silent = self.peers.silent(now - rules.suspect_s)
        names = {peer.name for peer in silent}
        changed = False
        for name in [name for name in self.watches if name not in names]:
            changed |= self._clear(name)
        others = self._others(now) if silent else None
        asked = 0
        for peer in silent:
            heard = float(self.peers.heard[peer.row])
            if (peer.away and now - heard < AWAY_S) or self._touched(peer, now):
                changed |= peer.name in self.watches and self._clear(peer.name)
                continue
            watch, actions = decide(rules, self.watches.get(peer.name, Watch()), Looked(heard, others), now)
            for action in actions:
                match action:
                    case Probe():
                        if asked < PROBED_PER_TICK_MAX:
                            asked += 1
                            watch, _ = decide(rules, watch, Asked(self._probe(peer, now)), now)
                    case Believe():
                        changed = True
                        log.info("a node is silent", node=peer.name, silence_s=round(now - heard, 2), rounds=watch.rounds)
                    case Clear():
                        pass
            self.watches[peer.name] = watch
        if changed:
            self.changed()

    def _overrun(self, overrun: bool) -> None:
        """Begin or end to believe nobody silent by beats. Who was believed so stays; who was asked is asked anew afterwards."""
        self.overrun = overrun
        log.log(
            logging.WARNING if overrun else logging.INFO,
            "more beats come than are taken, and that does not end; heartbeats over HTTP decide"
            if overrun
            else "beats decide again",
        )
        self.watches = {name: watch for name, watch in self.watches.items() if watch.standing is Standing.SILENT}
        self.changed()

    def _hear(self, now: float) -> None:
        """Stop watching the nodes that are heard again, by a beat that got through or over HTTP."""
        silent = {peer.name: peer for peer in self.peers.silent(now - self._rules.suspect_s)}
        heard = [name for name in self.watches if name not in silent or self._touched(silent[name], now)]
        for name in heard:
            self._clear(name)
        if heard:
            self.changed()

    def _others(self, now: float) -> float | None:
        """Return when any node was heard last, where there are several: whoever hears nobody is cut off, and believes nothing.

        Those that do not beat count by their heartbeats over HTTP. When a change came that is seen for the first time is not
        known, but that look is long before a node is silent enough to be believed so.
        """
        for name, value in self._over_http.items():
            new = self._last_seen.get(name, value)
            if new != value:
                self._over_http[name], self._over_http_at = new, now
        latest = max(self.peers.latest() if len(self.peers) > 1 else float("-inf"), self._over_http_at)
        return latest if latest > float("-inf") else None

    def _clear(self, name: str) -> bool:
        """Stop watching a node that is heard again; return whether it had been believed to be silent."""
        return self.watches.pop(name).standing is Standing.SILENT

    def _touched(self, peer: Peer, now: float) -> bool:
        """Whether a heartbeat over HTTP has come since the last look: then its datagrams alone are lost."""
        value = self._last_seen.get(peer.name)
        if value is None or value == peer.seen:
            return False
        first, peer.seen = peer.seen is None, value
        if first:
            return False  # it may be from long ago
        self.peers.heard[peer.row] = now
        return True

    def _probe(self, peer: Peer, now: float) -> int:
        """Ask a node, straight and through others; return through how many."""
        if len(self._pending) + HELPERS >= PENDING_MAX or not peer.address[1]:
            return 0
        key = self._key_of(peer.name, peer.epoch)
        nonce = self._nonce(peer.name, None, now)
        self._send(beats.pack_ping(key, nonce), peer.address)
        helpers = self.peers.helpers(peer, HELPERS, now)
        for helper, near in helpers:
            nonce = self._nonce(peer.name, helper.name, now)
            where = peer.inside if near and peer.inside is not None else peer.address
            relay = Relay(nonce, where, beats.pack_ping(key, nonce))
            self._send(beats.pack_relay(self._key_of(helper.name, helper.epoch), relay), helper.address)
        return len(helpers)

    def _nonce(self, target: str, helper: str | None, now: float) -> int:
        nonce = self._chance.getrandbits(64)
        self._pending[nonce] = Pending(target, helper, now + PENDING_S)
        return nonce

    def _send(self, data: bytes, to: Address) -> None:
        self.traffic.sent += 1
        self.traffic.sent_bytes += len(data)
        self.send_to(data, to)

    def _tidy(self, now: float) -> None:
        for nonce in [nonce for nonce, pending in self._pending.items() if pending.until < now]:
            del self._pending[nonce]
        for name in [peer.name for peer in self.peers if self._site_of(peer.name) is None]:
            self.peers.remove(name)
            self.watches.pop(name, None)
        quiet = (name for name in self._last_seen if self.peers.get(name) is None and self._site_of(name) is not None)
        self._over_http = {name: self._over_http.get(name, self._last_seen[name]) for name in quiet}
        self.peers.index()
        for peer in self.peers:
            if peer.name not in self.watches:
                peer.seen = self._last_seen.get(peer.name)


def _address(text: str) -> Address | None:
    host, _, port = text.rpartition(":")
    good = host and port.isascii() and port.isdecimal() and len(port) < 6 and 0 < int(port) < 65_536
    return (host.strip("[]"), int(port)) if good else None
