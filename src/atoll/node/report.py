"""Tells the control plane what the node sees: what it acts on at once, the rest in company, and again what did not arrive."""

from __future__ import annotations

import asyncio
import random
from collections import deque

import structlog
from msgspec.structs import replace

from atoll.model.errors import AtollError, Conflict, Invalid, NotFound, TooLarge
from atoll.model.ports.clock import Clock
from atoll.model.ports.control_plane import ControlPlane
from atoll.model.records import Event, Severity, Status, event_id, new_suffix
from atoll.model.states import Phase

STATUSES_MAX = 256
"""Statuses in one report."""
EVENTS_MAX = 1_000
"""Events that wait while the control plane is away; the oldest go first."""
EVENTS_BATCH_MAX = 256
REPORT_S = 15.0
"""Deadline of one report."""
LAZY_S = 0.05
"""How long what nobody acts on (preparing, starting, running but not ready yet, events) waits for company: a start costs the server
one write, not three."""
RETRY_FIRST_S = 0.05
RETRY_GROWTH = 1.5
"""Slow enough that a server which is back after a second is found within half of one."""
RETRY_MAX_S = 5.0
SKIP_FIRST = 86_400_000
"""Words to skip at first when the control plane has heard later ones: the date was set back, here by up to a day."""

log = structlog.get_logger()


class Words:
    """Numbers of what an agent says of one thing, so that of two words the newer counts, in whatever order they arrive."""

    def __init__(self, now: float) -> None:
        self._last = int(now * 1000)
        """Above the numbers of an earlier agent, which spoke less than a thousand times a second."""
        self._skip = SKIP_FIRST

    def next(self) -> int:
        self._last += 1
        return self._last

    def skip(self) -> None:
        """Speak louder: the control plane has heard words of higher numbers from an earlier agent, whose date was later."""
        self._last += self._skip
        self._skip *= 2


def retry_delay(failures: int, choose: random.Random, max_s: float = RETRY_MAX_S) -> float:
    """Return the wait before the next try, with jitter so that nodes do not come back in step."""
    return min(max_s, RETRY_FIRST_S * RETRY_GROWTH ** min(failures, 64)) * choose.uniform(0.5, 1.0)


def _not_ready_yet(status: Status, last: Status | None) -> bool:
    """Whether it runs, and that it is ready will be what counts: that word, soon after, must not wait for this one's answer."""
    return status.phase is Phase.RUNNING and not status.ready and not (last is not None and last.phase is Phase.RUNNING)


class Reporter:
    """Newest word on each instance wins, so what waits is bounded by the instances of the node."""

    def __init__(self, node: str, control: ControlPlane, clock: Clock, choose: random.Random) -> None:
        self._node = node
        self._control = control
        self._clock = clock
        self._choose = choose
        self._statuses: dict[str, Status] = {}
        self._sending: dict[str, Status] = {}
        self._last: dict[str, Status] = {}
        self._words = Words(clock.now())
        self._events: deque[Event] = deque(maxlen=EVENTS_MAX)
        self._wake = asyncio.Event()
        self._lazy: asyncio.TimerHandle | None = None
        self.unknown_node = asyncio.Event()
        """Set when the control plane does not know this node: it must be registered again."""

    @property
    def idle(self) -> bool:
        return not self._statuses and not self._events

    def status(self, status: Status, *, urgent: bool = False) -> None:
        """Tell of an instance: at once what somebody acts on, and what is `urgent`."""
        last = self._last.get(status.instance)
        # What was said before is the same word, however often it is said.
        again = last is not None and replace(last, word=0) == status
        self._last[status.instance] = self._statuses[status.instance] = last if last and again else self._numbered(status)
        if not urgent and (status.phase in (Phase.PREPARING, Phase.STARTING) or _not_ready_yet(status, last)):
            self._wake_soon()
        else:
            self._wake.set()

    def _numbered(self, status: Status) -> Status:
        return replace(status, word=self._words.next())

    def _skip_words(self) -> None:
        self._words.skip()
        for told in (self._last, self._sending, self._statuses):
            told.update({id: self._numbered(status) for id, status in told.items()})

    def _wake_soon(self) -> None:
        if self._lazy is None and not self._wake.is_set():
            self._lazy = asyncio.get_running_loop().call_later(LAZY_S, self._wake.set)

    def let_go(self) -> None:
        """Report no more: the agent ends."""
        if self._lazy is not None:
            self._lazy.cancel()

    def forget(self, instance: str) -> None:
        """Say nothing more of an instance whose assignment is gone."""
        for told in (self._statuses, self._sending, self._last):
            told.pop(instance, None)

    def event(self, project: str, subject: str, code: str, message: str, severity: Severity = Severity.INFO) -> None:
        at = self._clock.now()
        id = event_id(at, new_suffix(self._choose.choice, 8))
        record = Event(
            id=id, at=at, project=project, subject=subject, code=code, message=message, severity=severity, node=self._node
        )
        self._events.append(record)
        self._wake_soon()

    async def run(self) -> None:
        """Report for ever; never raises for what the control plane does."""
        failures = 0
        while True:
            await self._wake.wait()  # without a deadline: there is nothing to say
            self._wake.clear()
            if self._lazy is not None:
                self._lazy.cancel()
                self._lazy = None
            while not self.idle:
                if await self._send():
                    failures = 0
                else:
                    await asyncio.sleep(retry_delay(failures, self._choose))
                    failures += 1

    async def _send(self) -> bool:
        self._sending = {id: self._statuses.pop(id) for id in list(self._statuses)[:STATUSES_MAX]}
        statuses = list(self._sending.values())
        events = [self._events.popleft() for _ in range(min(len(self._events), EVENTS_BATCH_MAX))]
        try:
            async with asyncio.timeout(REPORT_S):
                await self._control.report(self._node, statuses, events)
        except (Invalid, TooLarge) as error:
            # Sent again it would be refused again, and hold up all that comes after it.
            log.error("report refused and dropped", node=self._node, error=str(error), statuses=len(statuses), events=len(events))
        except (AtollError, TimeoutError) as error:
            log.warning("report failed", node=self._node, error=str(error) or "timed out", statuses=len(statuses))
            if isinstance(error, NotFound):
                self.unknown_node.set()
            if isinstance(error, Conflict):
                self._skip_words()
            self._put_back(events)
            return False
        except Exception:  # the outer edge: a surprise must not end the agent
            log.exception("report failed", node=self._node)
            self._put_back(events)
            return False
        finally:
            self._sending = {}
        return True

    def _put_back(self, events: list[Event]) -> None:
        for id, status in self._sending.items():
            self._statuses.setdefault(id, status)
        room = EVENTS_MAX - len(self._events)
        self._events.extendleft(reversed(events[-room:] if room else []))
