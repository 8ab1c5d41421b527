"""The network between the simulated processes: who reaches whom, in each direction, and what becomes of connections at a cut.

Places are names of processes. A link is directed: `cut("n0", "s0")` alone loses what the node says, not what it hears. A site that
is cut off loses every link that crosses its border, the data path's too; links inside go on.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from atoll.model.ports.datagrams import Address, MemoryNet
from atoll.sim.faults import Faults
from atoll.sim.story import Story

RESET_SHARE = 0.5
"""Share of connections that a cut breaks at once; the others fall silent, until the link is back or their end loses patience."""

DATAGRAM_LOSS = 4.0
"""Datagrams are lost so much more often than requests, which are sent again underneath."""


class Net:
    """`place` enters every process with its site; `changed` callbacks run after each cut and each mend."""

    def __init__(self, choose: random.Random, faults: Faults, story: Story) -> None:
        self._choose = choose
        self._faults = faults
        self.datagrams = MemoryNet(self._fate)
        """Carries beats."""
        self._story = story
        self._sites: dict[str, str] = {}
        self._cut: dict[tuple[str, str], int] = {}
        """Link → how many cuts lie on it; they may overlap."""
        self._away: dict[str, int] = {}
        """Sites that are cut off."""
        self._open: dict[asyncio.Future[None], tuple[str, str]] = {}
        self._waiting: dict[asyncio.Future[None], tuple[str, str]] = {}
        self.changed: list[Callable[[], None]] = []

    def _fate(self, sender: Address, to: Address) -> tuple[float, ...]:
        """Lose a datagram, deliver it once, or twice; one may overtake another."""
        profile = self._faults.profile
        if not self.reaches(sender[0], to[0]) or self._faults.hit(profile.lost * DATAGRAM_LOSS):
            return ()
        copies = 2 if self._faults.hit(profile.repeated) else 1
        return tuple(self._choose.random() * profile.latency_s for _ in range(copies))

    def place(self, name: str, site: str) -> None:
        self._sites[name] = site

    def site_of(self, name: str) -> str:
        return self._sites[name]

    @property
    def places(self) -> list[str]:
        return list(self._sites)

    def reaches(self, one: str, other: str) -> bool:
        """Whether what `one` sends comes to `other`."""
        if self._cut and (one, other) in self._cut:
            return False
        if self._away and one in self._sites and other in self._sites:
            here, there = self._sites[one], self._sites[other]
            return here == there or not (here in self._away or there in self._away)
        return True

    def talk(self, one: str, other: str) -> bool:
        """Whether each hears the other."""
        return self.reaches(one, other) and self.reaches(other, one)

    def cut(self, links: Iterable[tuple[str, str]]) -> None:
        for link in links:
            self._cut[link] = self._cut.get(link, 0) + 1
        self._look()

    def mend(self, links: Iterable[tuple[str, str]]) -> None:
        """Take away one cut of each of `links`; one without a cut stays as it is."""
        for link in links:
            left = self._cut.pop(link, 1) - 1
            if left > 0:
                self._cut[link] = left
        self._look()

    def cut_site(self, site: str) -> None:
        self._away[site] = self._away.get(site, 0) + 1
        self._story.tell("a site is cut off", site=site)
        self._look()

    def mend_site(self, site: str) -> None:
        left = self._away.pop(site, 1) - 1
        if left > 0:
            self._away[site] = left
        else:
            self._story.tell("a site is back", site=site)
        self._look()

    def mend_all(self) -> None:
        self._cut.clear()
        self._away.clear()
        self._look()

    def _look(self) -> None:
        for broken, (one, other) in list(self._open.items()):
            if not broken.done() and not self.talk(one, other) and self._choose.random() < RESET_SHARE:
                broken.set_result(None)
        for waiter, (one, other) in list(self._waiting.items()):
            if not waiter.done() and self.reaches(one, other):
                waiter.set_result(None)
        for callback in self.changed:
            callback()

    @contextmanager
    def connection(self, one: str, other: str) -> Iterator[asyncio.Future[None]]:
        """Hold a connection open; the future is done once a cut has broken it."""
        broken: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._open[broken] = (one, other)
        try:
            yield broken
        finally:
            del self._open[broken]
            broken.cancel()

    async def arrives(self, one: str, other: str) -> None:
        """Wait until what `one` sends comes to `other`; at once where nothing is cut. The caller sets the deadline."""
        while not self.reaches(one, other):
            self._story.mark("net: a connection is silent")
            waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._waiting[waiter] = (one, other)
            try:
                await waiter
            finally:
                del self._waiting[waiter]
