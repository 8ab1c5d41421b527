"""The leader's lease is kept from a thread: for a loop that is busy, and not for one that stands still for good."""

from __future__ import annotations

import asyncio
import threading
import time

from atoll.control.keeping import LAST_TRY_S, STUCK_S, Round, ThreadKeeper
from atoll.control.leader import KEEP_EVERY_S, LEASE_S
from atoll.model.errors import NotFound, Unavailable
from atoll.model.ports.clock import SystemClock
from atoll.model.ports.store import LeaseId

LEASE = LeaseId(7)


class Hand:
    """A clock that is set by hand."""

    at = 1_000.0

    def now(self) -> float:
        return self.at

    def monotonic(self) -> float:
        return self.at


class FakeKeeper:
    """A store of which a test says how long it takes and what comes of it."""

    def __init__(self, clock: Hand | SystemClock) -> None:
        self.clock = clock
        self.asked: list[tuple[float, float]] = []
        """When, and how long it may take."""
        self.takes_s = 0.0
        self.fails: Exception | None = None
        self.closed = threading.Event()
        self.kept = threading.Event()

    def keep_alive(self, lease: LeaseId, wait_s: float) -> None:
        assert lease == LEASE
        self.asked.append((self.clock.monotonic(), wait_s))
        if isinstance(self.clock, Hand):
            self.clock.at += min(self.takes_s, wait_s)
        self.kept.set()
        if self.fails is not None:
            raise self.fails

    def close(self) -> None:
        self.closed.set()


class Term:
    def __init__(self) -> None:
        self.clock = Hand()
        self.keeper = FakeKeeper(self.clock)
        self.affirmed: list[float] = []
        self.began = self.clock.at
        self.round = Round(lambda: self.keeper, self.clock, LEASE, self.began + LEASE_S, self.affirmed.append)

    def once(self) -> bool:
        self.clock.at += KEEP_EVERY_S
        return self.round.once(self.keeper)


def test_a_lease_lasts_from_when_it_was_asked_for_and_not_from_when_the_answer_came() -> None:
    term = Term()
    term.keeper.takes_s = 2.0
    asked = term.clock.at + KEEP_EVERY_S
    assert term.once()
    assert term.affirmed == [asked + LEASE_S]


def test_a_store_that_does_not_answer_is_asked_until_the_lease_may_have_ended_and_no_longer() -> None:
    term = Term()
    term.keeper.fails = Unavailable("nobody is there")
    while term.once():
        assert term.clock.at < term.began + LEASE_S
    assert term.began + LEASE_S <= term.clock.at < term.began + LEASE_S + 2 * KEEP_EVERY_S
    assert len(term.keeper.asked) >= LEASE_S / KEEP_EVERY_S - 1
    assert all(wait_s <= max(LAST_TRY_S, term.began + LEASE_S - at) for at, wait_s in term.keeper.asked)
    assert term.affirmed == []


def test_a_lease_that_is_gone_is_told_at_once() -> None:
    term = Term()
    term.keeper.fails = NotFound("expired")
    assert not term.once()


def test_a_loop_that_comes_round_late_keeps_the_lease_and_one_that_does_not_loses_it() -> None:
    term = Term()
    while term.once():
        if term.clock.at - term.began < 60.0 and len(term.keeper.asked) % int(STUCK_S / KEEP_EVERY_S - 1) == 0:
            term.round.show()
    assert 60.0 < term.clock.at - term.began < 60.0 + 2 * STUCK_S
    assert term.affirmed[-1] < term.clock.at + LEASE_S


def test_once_its_term_is_over_nothing_is_affirmed_by_an_answer_that_was_on_its_way() -> None:
    term = Term()
    term.round.stop()
    term.once()
    assert term.keeper.asked
    assert term.affirmed == []


async def test_the_thread_ends_with_the_term_and_gives_its_connection_back() -> None:
    keeper = FakeKeeper(SystemClock())
    term = asyncio.create_task(
        ThreadKeeper(lambda: keeper, SystemClock()).keep(LEASE, time.monotonic() + LEASE_S, lambda until: None)
    )
    await asyncio.sleep(0)
    term.cancel()
    await asyncio.gather(term, return_exceptions=True)
    assert await asyncio.to_thread(keeper.closed.wait, 30.0)


async def test_what_the_lease_was_lost_for_ends_the_term() -> None:
    keeper = FakeKeeper(SystemClock())
    keeper.fails = NotFound("expired")
    async with asyncio.timeout(30.0):
        await ThreadKeeper(lambda: keeper, SystemClock()).keep(LEASE, time.monotonic() + LEASE_S, lambda until: None)
    assert keeper.closed.is_set()
