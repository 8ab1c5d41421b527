"""An ACME authority in memory. Public: tests use it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from msgspec.structs import replace

from atoll.control.orders import AcmeFailed, Challenge, Order, OrderState


class FakeAuthority:
    """Signs what it is asked for once `found` says that the answer is there. Its orders outlive any leader.

    `failing` raises at every call until it is None again; `calls` are all that were made, by name.
    """

    def __init__(self, sign: Callable[[str, bytes], str], found: Callable[[str, str], bool], took_s: float = 0.1) -> None:
        self._sign = sign
        self._found = found
        self._took_s = took_s
        self._orders: dict[str, Order] = {}
        self._hosts: dict[str, str] = {}
        self._chains: dict[str, str] = {}
        self.calls: list[str] = []
        self.failing: AcmeFailed | None = None
        self.validate: Callable[[str], str] = lambda host: ""
        """Why the authority does not believe a hostname; nothing where it does."""
        self.before: Callable[[str], Awaitable[None]] | None = None
        """Called with the name of each call, before it does anything."""

    async def begin(self, host: str) -> Order:
        await self._call("begin")
        url = f"order/{len(self._orders) + 1}"
        token = f"token-{len(self._orders) + 1}"
        challenge = Challenge(url=f"challenge/{url}", token=token, answer=f"{token}.thumb")
        order = Order(url=url, state=OrderState.PENDING, finalize=f"finalize/{url}", challenges=(challenge,))
        self._orders[url], self._hosts[url] = order, host
        return order

    async def look(self, url: str) -> Order:
        await self._call("look")
        if url not in self._orders:
            raise AcmeFailed("no such order", kind="malformed")
        return self._orders[url]

    async def answered(self, challenge: Challenge) -> None:
        await self._call("answered")
        url = challenge.url.removeprefix("challenge/")
        order, host = self._orders[url], self._hosts[url]
        if not order.challenges[0].pending:
            return
        why = self.validate(host) or ("" if self._found(host, challenge.token) else "nothing is answered")
        told = replace(order.challenges[0], pending=False, error=why)
        self._orders[url] = replace(order, challenges=(told,), state=OrderState.INVALID if why else OrderState.READY)

    async def finalize(self, order: Order, request: bytes) -> None:
        await self._call("finalize")
        self._chains[order.url] = self._sign(self._hosts[order.url], request)
        self._orders[order.url] = replace(self._orders[order.url], state=OrderState.VALID, certificate=f"certificate/{order.url}")

    async def fetch(self, order: Order) -> str:
        await self._call("fetch")
        return self._chains[order.url]

    async def _call(self, name: str) -> None:
        self.calls.append(name)
        if self.before is not None:
            await self.before(name)
        await asyncio.sleep(self._took_s)
        if self.failing is not None:
            raise self.failing
