"""The leader's lease, kept alive from a thread: a leader whose event loop is busy for seconds is slow, and still the leader.

On the loop itself a keep-alive comes as late as everything else does, and the busiest server is deposed at the moment when a
change of leaders costs most. Nothing depends on the lease but who may begin to lead: what an old leader writes is fenced, so that
it does no harm to hold a lease for long. It must only not be held for a loop that will never go on: when that has not shown itself
for `STUCK_S`, the lease is left to run out.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable

import structlog

from atoll.control.leader import KEEP_EVERY_S, LEASE_S, Affirm
from atoll.model.errors import AtollError, NotFound
from atoll.model.ports.clock import Clock
from atoll.model.ports.store import LeaseId, LeaseKeeper

STUCK_S = 15.0
"""A loop that has not come round for so long does not lead any more, whatever its process does."""
SHOW_S = 0.5
"""How often the loop shows that it goes round."""
LAST_TRY_S = 0.2
"""A lease that may have ended is asked for once more, so long: after a pause it may be there still, and then nobody else leads."""

log = structlog.get_logger()


class ThreadKeeper:
    """Keeps leases by a `LeaseKeeper` of `make`, which is made, used and closed in a thread. Pass `keep` to `lead`."""

    def __init__(self, make: Callable[[], LeaseKeeper], clock: Clock) -> None:
        self._make = make
        self._clock = clock

    async def keep(self, lease: LeaseId, until: float, affirm: Affirm) -> None:
        """Return when the lease may have expired; `until` is until when it certainly has not."""
        round_ = Round(self._make, self._clock, lease, until, affirm)
        loop, ended = asyncio.get_running_loop(), asyncio.Event()

        def run() -> None:
            try:
                round_.run()
            finally:
                with contextlib.suppress(RuntimeError):  # the loop is gone, and with it whoever waits
                    loop.call_soon_threadsafe(ended.set)

        threading.Thread(target=run, name="lease", daemon=True).start()
        try:
            while not ended.is_set():
                round_.show()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(SHOW_S):
                        await ended.wait()
        finally:
            round_.stop()


class Round:
    """One term's lease: `run` is the thread's, all else the loop's."""

    def __init__(self, make: Callable[[], LeaseKeeper], clock: Clock, lease: LeaseId, until: float, affirm: Affirm) -> None:
        self._make = make
        self._clock = clock
        self._lease = lease
        self._until = until
        self._affirm = affirm
        self._shown_at = clock.monotonic()
        self._stopped = threading.Event()
        self._telling = threading.Lock()

    def show(self) -> None:
        """Say that the loop goes round."""
        self._shown_at = self._clock.monotonic()

    def stop(self) -> None:
        """End the round; from now on nothing is affirmed, though a keep-alive may be on its way."""
        with self._telling:
            self._stopped.set()

    def run(self) -> None:
        """Keep the lease alive until it may have expired, the round is stopped, or the loop is stuck."""
        keeper = self._make()
        try:
            while not self._stopped.wait(KEEP_EVERY_S) and self.once(keeper):
                pass
        except Exception:  # the edge of the thread: the term ends, and its loop says so
            log.exception("the lease is not kept alive any more")
        finally:
            keeper.close()

    def once(self, keeper: LeaseKeeper) -> bool:
        """Keep it alive once; return whether to go on."""
        asked = self._clock.monotonic()
        if asked - self._shown_at > STUCK_S:
            log.error("the event loop stands still; its lease is left to run out", still_s=round(asked - self._shown_at, 1))
            return False
        try:
            keeper.keep_alive(self._lease, max(LAST_TRY_S, self._until - asked))
        except NotFound:
            log.warning("the lease has expired")
            return False
        except AtollError as error:
            log.warning("the lease could not be kept alive", cause=error.message)
            return self._clock.monotonic() < self._until
        self._until = asked + LEASE_S
        with self._telling:
            if not self._stopped.is_set():
                self._affirm(self._until)
        return True
