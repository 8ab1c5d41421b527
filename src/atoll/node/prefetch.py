"""Fetches images that the control plane says will be needed soon, so that a start finds them: one at a time, and only while nothing
that is to start is being prepared.

Nothing depends on it. What cannot be fetched is tried again later and said once.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

import structlog
from msgspec import Struct

from atoll.model.errors import AtollError
from atoll.model.ports.clock import Clock
from atoll.model.ports.images import Image, Images, PullProgress
from atoll.model.records import CELL_PROJECT, Severity
from atoll.model.units import format_bytes, format_seconds
from atoll.node.report import Reporter
from atoll.node.tools import Machine

PREFETCH_BELOW = 0.70
"""Nothing is fetched for later that makes the disk fuller than this: well below where images are removed."""
IMAGES_MAX = 64
"""Images that are wanted at a time; further ones are not looked at."""
LOOK_S = 0.25
"""How often it is looked at, while one is being fetched, whether it may go on."""
PAUSE_S = 1.0
"""The same while others are prepared."""
AGAIN_S = 300.0
"""How often it is looked at whether all that is wanted is still here, and the disk where it was too full."""
FETCH_S = 1_800.0
"""Deadline of one try; the next goes on where it stopped."""
KEPT_S = 3_600.0
"""How long what is here for later is kept though the disk gets full."""
FAILED_FIRST_S = 30.0
"""Wait after a first failure; it doubles."""
FAILED_MAX_S = 3_600.0

_TOO_FULL = f"it would make the disk fuller than {PREFETCH_BELOW:.0%}"

log = structlog.get_logger()


class _Failure(Struct, frozen=True):
    count: int
    again_at: float


class Prefetch:
    """`busy` says whether an instance is being prepared or started. `run` returns never."""

    def __init__(
        self, node: str, images: Images, machine: Machine, clock: Clock, reporter: Reporter, busy: Callable[[], bool]
    ) -> None:
        self._node = node
        self._images = images
        self._machine = machine
        self._clock = clock
        self._reporter = reporter
        self._busy = busy
        self._wanted: tuple[str, ...] = ()
        self._wake = asyncio.Event()
        self._failures: dict[str, _Failure] = {}
        self._here: dict[str, tuple[str, float]] = {}
        """Reference → its image's digest, and since when it has been here."""
        self._looked_at: dict[str, float] = {}
        """Reference → when it was last found here."""
        self._progress: PullProgress | None = None
        self.fetching = ""
        """What is being fetched, and how far it is, in words."""

    @property
    def kept(self) -> set[str]:
        """Digests of images that are here for later and must not go, however full the disk is."""
        now = self._clock.monotonic()
        return {digest for digest, since in self._here.values() if now - since < KEPT_S}

    def want(self, references: Sequence[str]) -> None:
        """Have these images here, the first first, and no others. What is being fetched and is not among them is given up."""
        wanted = tuple(dict.fromkeys(references))[:IMAGES_MAX]
        if wanted == self._wanted:
            return
        self._wanted = wanted
        for gone in (self._failures.keys() | self._here.keys() | self._looked_at.keys()) - set(wanted):
            self._failures.pop(gone, None)
            self._here.pop(gone, None)
            self._looked_at.pop(gone, None)
        self._wake.set()

    async def run(self) -> None:
        while True:
            self._wake.clear()
            try:
                wait_s = await self._next()
            except Exception:  # the outer edge: nothing here may end the agent
                log.exception("prefetching tripped", node=self._node)
                wait_s = AGAIN_S
            if wait_s > 0:
                try:
                    async with asyncio.timeout(wait_s):
                        await self._wake.wait()
                except TimeoutError:
                    pass

    async def _next(self) -> float:
        """Fetch the first image that is missing and due; return how long to wait before the next call."""
        now = self._clock.monotonic()
        due_at = now + AGAIN_S
        for reference in self._wanted:
            at = max(self._looked_at.get(reference, -AGAIN_S) + AGAIN_S, self._again_at(reference))
            if at > now:
                due_at = min(due_at, at)
            elif (image := await self._images.find(reference)) is not None:
                self._found(reference, image)
            elif self._busy():
                return PAUSE_S
            elif self._machine.disk_used() >= PREFETCH_BELOW:
                log.info("no image is fetched for later: the disk is too full", node=self._node, wanted=len(self._wanted))
                return AGAIN_S
            else:
                await self._fetch(reference)
                return 0.0
        return max(0.0, due_at - now)

    def _again_at(self, reference: str) -> float:
        failure = self._failures.get(reference)
        return failure.again_at if failure is not None else float("-inf")

    def _found(self, reference: str, image: Image) -> None:
        now = self._clock.monotonic()
        if reference in self._wanted:
            self._failures.pop(reference, None)
            self._looked_at[reference] = now
            if self._here.get(reference, ("", 0.0))[0] != image.digest:
                self._here[reference] = (image.digest, now)

    async def _fetch(self, reference: str) -> None:
        log.info("fetching an image for later", node=self._node, reference=reference)
        self._progress, self.fetching = None, reference
        pull = asyncio.create_task(self._pull(reference), name="prefetch")
        try:
            while not pull.done() and not (why := self._hindrance(reference)):
                await asyncio.wait({pull}, timeout=LOOK_S)
        finally:
            self.fetching = ""
            pull.cancel()
            await asyncio.wait({pull})
        if pull.cancelled():
            if why in ("", _TOO_FULL):
                self._failed(reference, why or "it was given up")
            log.info("stopped fetching an image for later", node=self._node, reference=reference, why=why)
            return
        try:
            image = pull.result()
        except TimeoutError:
            self._failed(reference, f"not here within {format_seconds(FETCH_S)}")
        except AtollError as error:
            self._failed(reference, str(error))
        except Exception as error:  # the edge of one image's part: a bug must not keep the others away
            log.exception("an image could not be fetched for later", reference=reference)
            self._failed(reference, f"{type(error).__name__}: the agent's log has it")
        else:
            log.info("fetched an image for later", node=self._node, reference=reference, bytes=image.size_bytes)
            self._found(reference, image)

    async def _pull(self, reference: str) -> Image:
        async with asyncio.timeout(FETCH_S):
            return await self._images.ensure(reference, progress=self._progressed)

    def _progressed(self, progress: PullProgress) -> None:
        self._progress = progress

    def _hindrance(self, reference: str) -> str:
        """Return why what is being fetched must stop; nothing if it may go on."""
        if reference not in self._wanted:
            return "it is not wanted any more"
        if self._busy():
            return "an instance is being prepared"
        progress, left = self._progress, 0.0
        if progress is not None:
            of = f" of {format_bytes(progress.total_bytes)}" if progress.total_bytes else ""
            self.fetching = f"{reference} ({progress.phase} {format_bytes(progress.done_bytes)}{of})"
            left = (progress.total_bytes - progress.done_bytes) / max(1, self._machine.capacity().disk_bytes)
        return _TOO_FULL if self._machine.disk_used() + left >= PREFETCH_BELOW else ""

    def _failed(self, reference: str, why: str) -> None:
        if reference not in self._wanted:
            return
        count = self._failures[reference].count + 1 if reference in self._failures else 1
        wait_s = min(FAILED_MAX_S, FAILED_FIRST_S * 2.0 ** min(count - 1, 16))
        self._failures[reference] = _Failure(count, self._clock.monotonic() + wait_s)
        log.warning("an image could not be fetched for later", reference=reference, why=why, count=count, retry_s=wait_s)
        if count == 1:
            message = f"{reference} could not be fetched for later: {why}; it is tried again, at the latest when it is needed"
            self._reporter.event(CELL_PROJECT, f"node/{self._node}", "prefetch-failed", message, Severity.WARNING)
