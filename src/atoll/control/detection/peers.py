"""What a server knows of each node that beats: when it was heard, by which counters, under which key, and where it can be asked."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable, Iterator, Set

import numpy as np

from atoll.model.beats import WINDOW
from atoll.model.ports.datagrams import Address

_MASK = (1 << WINDOW) - 1
TRIES = 12
"""Draws of a helper before one does with fewer."""
HELPER_HEARD_S = 1.0
"""A helper must have been heard within so long."""


class Peer:
    """One node that has beaten. Mutable: it changes with every beat."""

    __slots__ = (
        "address",
        "away",
        "basis",
        "epoch",
        "inside",
        "inside_text",
        "key",
        "key_epoch",
        "last",
        "name",
        "row",
        "seen",
        "window",
    )

    def __init__(self, name: str, row: int) -> None:
        self.name = name
        self.row = row
        self.epoch = 0
        """Of the key of its last beat."""
        self.key, self.key_epoch = b"", -1
        """The last that fitted, and of when it is."""
        self.basis: object = None
        """From what that was made."""
        self.last = -1
        self.window = 0
        self.address: Address = ("", 0)
        """Where its beats come from."""
        self.inside: Address | None = None
        """Where it says that its neighbours find it."""
        self.inside_text = ""
        self.away = False
        self.seen: float | None = None
        """The value of its last heartbeat over HTTP that was looked at."""

    def takes(self, counter: int) -> bool:
        """Whether a counter is new; it is not any more afterwards."""
        ahead = counter - self.last
        if ahead > 0:
            self.window = 1 if ahead >= WINDOW or self.last < 0 else (self.window << ahead | 1) & _MASK
            self.last = counter
            return True
        if -ahead >= WINDOW or self.window >> -ahead & 1:
            return False
        self.window |= 1 << -ahead
        return True


class Peers:
    """All of them, with the times at which they were heard in one array, so that a look at 5,000 costs microseconds."""

    def __init__(self, site_of: Callable[[str], str | None], chance: random.Random) -> None:
        self._site_of = site_of
        self._chance = chance
        self._by_name: dict[str, Peer] = {}
        self._rows: list[Peer | None] = []
        self._free: list[int] = []
        self.heard = np.full(64, -np.inf)
        """By row; of rows that nobody has, minus infinity."""
        self.direct = np.full(64, -np.inf)
        """The same of what came from the node itself."""
        self._sites: dict[str, list[Peer]] = {}
        self._all: list[Peer] = []

    def __len__(self) -> int:
        return len(self._by_name)

    def __iter__(self) -> Iterator[Peer]:
        return iter(self._by_name.values())

    def get(self, name: str) -> Peer | None:
        return self._by_name.get(name)

    @property
    def names(self) -> Set[str]:
        return self._by_name.keys()

    def add(self, name: str) -> Peer:
        row = self._free.pop() if self._free else len(self._rows)
        peer = Peer(name, row)
        if row == len(self._rows):
            self._rows.append(peer)
            if row == len(self.heard):
                self.heard = np.concatenate([self.heard, np.full(row, -np.inf)])
                self.direct = np.concatenate([self.direct, np.full(row, -np.inf)])
        else:
            self._rows[row] = peer
        self._by_name[name] = peer
        return peer

    def remove(self, name: str) -> None:
        peer = self._by_name.pop(name)
        self.heard[peer.row] = self.direct[peer.row] = -np.inf
        self._rows[peer.row] = None
        self._free.append(peer.row)

    def silent(self, before: float) -> list[Peer]:
        """Return those that were last heard before that."""
        count = len(self._rows)
        rows = np.flatnonzero((self.heard[:count] < before) & (self.heard[:count] > -np.inf))
        return [peer for row in rows if (peer := self._rows[row]) is not None]

    def indirect(self, before: float) -> list[Peer]:
        """Return those of which nothing has come straight since then, though they were heard later."""
        count = len(self._rows)
        rows = np.flatnonzero((self.direct[:count] < before) & (self.heard[:count] >= before))
        return [peer for row in rows if (peer := self._rows[row]) is not None]

    def latest(self) -> float:
        """Return when any of them was heard last."""
        return float(self.heard.max())

    def index(self) -> None:
        """Sort them by site, for `helpers`. Called now and then."""
        sites: dict[str, list[Peer]] = defaultdict(list)
        for name, peer in self._by_name.items():
            sites[self._site_of(name) or ""].append(peer)
        self._sites = dict(sites)
        self._all = list(self._by_name.values())

    def helpers(self, target: Peer, count: int, now: float) -> list[tuple[Peer, bool]]:
        """Return up to `count` nodes that were heard a moment ago, and whether each is of the target's site: one is, where there
        is one, and the others are from anywhere."""
        site = self._site_of(target.name) or ""
        found: dict[str, Peer] = {}
        for among, most in ((self._sites.get(site, []), 1), (self._all, count)):
            for _ in range(TRIES if among else 0):
                if len(found) >= most:
                    break
                peer = among[int(self._chance.random() * len(among))]
                fresh = self.heard[peer.row] >= now - HELPER_HEARD_S
                if fresh and peer is not target and self._by_name.get(peer.name) is peer:
                    found[peer.name] = peer
        return [(peer, self._site_of(peer.name) == site) for peer in found.values()]
