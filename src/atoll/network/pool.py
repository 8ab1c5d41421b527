"""Slots made ahead, so that an instance that starts waits for none; and slots removed together, as that costs least."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from typing import Protocol

import structlog

from atoll.model.errors import AtollError, Exhausted, Unavailable
from atoll.network.addresses import AddressPool
from atoll.network.slots import Slot

PAUSE_S = 1.0
"""Before the next try after the kernel refused to make or to remove a slot."""
CALM_S = 0.005
"""After a ready slot was taken the next one is made so much later: whoever starts has the processor first."""

log = structlog.get_logger()


class Maker(Protocol):
    """What makes and removes slots; both block, and are called from other threads. `slots.SlotMaker` is the real one."""

    def make(self, number: int) -> Slot: ...

    def remove(self, numbers: Sequence[int]) -> None: ...


class SlotPool:
    """At most `prepared` slots ready beside those in use. All making is done by one task, which serves who waits first."""

    def __init__(self, maker: Maker, addresses: AddressPool, *, prepared: int, admit: Callable[[Slot], None]) -> None:
        """`admit` is called with each new slot before anybody gets it; it may raise AtollError."""
        self._maker = maker
        self._addresses = addresses
        self._prepared = prepared
        self._admit = admit
        self._ready: deque[Slot] = deque()
        self._waiting: deque[asyncio.Future[Slot]] = deque()
        self._leaving: dict[int, asyncio.Future[None]] = {}
        self._wake_maker = asyncio.Event()
        self._wake_remover = asyncio.Event()
        self._soon: asyncio.TimerHandle | None = None
        self._closed = False
        self._tasks: list[asyncio.Task[None]] = []

    @property
    def ready(self) -> tuple[Slot, ...]:
        return tuple(self._ready)

    def start(self) -> None:
        """Begin to make slots ahead. Call it once, in the running loop."""
        self._wake_maker.set()
        self._tasks = [
            asyncio.create_task(self._keep_making(), name="network-make"),
            asyncio.create_task(self._keep_removing(), name="network-remove"),
        ]

    async def take(self) -> Slot:
        """Return a slot that is now the caller's. Raises Exhausted when no address is free, RuntimeFailed as `make` does."""
        if self._closed:
            raise Unavailable("the network has been closed")
        if self._ready and not self._waiting:
            if self._soon is None:
                self._soon = asyncio.get_running_loop().call_later(CALM_S, self._refill)
            return self._ready.popleft()
        future: asyncio.Future[Slot] = asyncio.get_running_loop().create_future()
        self._waiting.append(future)
        self._wake_maker.set()
        try:
            # No deadline: the maker answers every waiter with a slot or with its error.
            return await future
        except asyncio.CancelledError:
            if future.done() and not future.cancelled() and future.exception() is None:
                self._hand_out(future.result())  # it came in the same moment; the next one has it
            raise

    def _refill(self) -> None:
        self._soon = None
        self._wake_maker.set()

    async def remove(self, number: int) -> None:
        """Remove the slot and free its address. Raises RuntimeFailed; it is then tried again until it is gone."""
        future = self._leaving.get(number)
        if future is None:
            future = self._leaving[number] = asyncio.get_running_loop().create_future()
            self._wake_remover.set()
        await asyncio.shield(future)

    async def close(self) -> list[Slot]:
        """Stop making, remove what nobody uses, and return the slots that were ready."""
        self._closed = True
        self._wake_maker.set()
        self._wake_remover.set()
        # Each ends after the step it is at: a thread that makes a slot cannot be interrupted, only waited for.
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._refuse(Unavailable("the network has been closed"))
        idle = list(self._ready)
        self._ready.clear()
        await asyncio.to_thread(self._maker.remove, [*self._leaving, *(slot.number for slot in idle)])
        return idle

    async def _keep_making(self) -> None:
        while not self._closed:
            await self._wake_maker.wait()
            self._wake_maker.clear()
            while not self._closed and (self._waiting or len(self._ready) < self._prepared):
                if not await self._make_next():
                    break

    async def _make_next(self) -> bool:
        """Make one slot and hand it out; False when there is nothing more to be done for now."""
        if self._waiting and self._ready:
            self._hand_out(self._ready.popleft())
            return True
        try:
            number = self._addresses.take()
        except Exhausted as error:
            if self._leaving:
                await asyncio.wait(list(self._leaving.values()), return_when=asyncio.FIRST_COMPLETED)
                return True
            self._refuse(error)
            return False
        try:
            slot = await asyncio.to_thread(self._maker.make, number)
            self._admit(slot)
        except (AtollError, OSError) as error:
            log.warning("network.slot-failed", number=number, message=str(error))
            self.discard(number)
            self._refuse(error if isinstance(error, AtollError) else Unavailable(f"cannot make a link: {error}"))
            asyncio.get_running_loop().call_later(PAUSE_S, self._wake_maker.set)
            return False
        self._hand_out(slot)
        return True

    def _hand_out(self, slot: Slot) -> None:
        while self._waiting:
            future = self._waiting.popleft()
            if not future.done():  # its caller may have been cancelled
                future.set_result(slot)
                return
        self._ready.append(slot)

    def _refuse(self, error: AtollError) -> None:
        while self._waiting:
            future = self._waiting.popleft()
            if not future.done():
                future.set_exception(error)

    def discard(self, number: int) -> None:
        """Remove the slot and free its address some time; it is tried until it is gone."""
        self._leaving.setdefault(number, asyncio.get_running_loop().create_future())
        self._wake_remover.set()

    async def _keep_removing(self) -> None:
        while not self._closed:
            await self._wake_remover.wait()
            self._wake_remover.clear()
            if not self._leaving or self._closed:
                continue
            batch = dict(self._leaving)
            try:
                await asyncio.to_thread(self._maker.remove, list(batch))
            except (AtollError, OSError) as error:
                log.warning("network.remove-failed", numbers=list(batch), message=str(error))
                self._try_again(batch, error if isinstance(error, AtollError) else Unavailable(f"cannot remove a link: {error}"))
                continue
            for number, future in batch.items():
                del self._leaving[number]
                self._addresses.give_back(number)
                if not future.done():
                    future.set_result(None)
            self._wake_maker.set()

    def _try_again(self, batch: dict[int, asyncio.Future[None]], error: AtollError) -> None:
        loop = asyncio.get_running_loop()
        for number, future in batch.items():
            self._leaving[number] = loop.create_future()
            if not future.done():
                future.set_exception(error)
                future.exception()  # nobody need be waiting for it
        loop.call_later(PAUSE_S, self._wake_remover.set)
