"""An ACME authority in memory. Public: tests use it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from msgspec.structs import replace

from atoll.control.orders import AcmeFailed, Challenge, Order, OrderState


class FakeAuthority:
    """Signs what it is asked for once `found` says that the answer is there. Its orders outlive any leader.

    `failing` raises at every call until it is None again; `calls` are all that were made, by name. Its URLs begin with `base`.
    """

    def __init__(
        self,
        sign: Callable[[str, bytes], str],
        found: Callable[[str, str], bool],
        took_s: float = 0.1,
        base: str = "https://ca.test/",
    ) -> None:
        self._sign = sign
        self._found = found
        self._took_s = took_s
        self._base = base
        self._orders: dict[str, Order] = {}
        self._hosts: dict[str, str] = {}
        self._chains: dict[str, str] = {}
        self.calls: list[str] = []
        self.failing: AcmeFailed | None = None
        self.validate: Callable[[str], str] = lambda host: ""
        """Why the authority does not believe a hostname; nothing where it does."""
        self.patient = False
        """What it does not find at a hostname it looks for again at every `look`, and says meanwhile why (RFC 8555, 8.2)."""
        self.before: Callable[[str], Awaitable[None]] | None = None
        """Called with the name of each call, before it does anything."""

    async def begin(self, host: str) -> Order:
        await self._call("begin")
        url = f"{self._base}order/{len(self._orders) + 1}"
        token = f"token-{len(self._orders) + 1}"
        challenge = Challenge(url=f"challenge/{url}", token=token, answer=f"{token}.thumb")
        order = Order(url=url, state=OrderState.PENDING, finalize=f"finalize/{url}", challenges=(challenge,))
        self._orders[url], self._hosts[url] = order, host
        return order

    async def look(self, url: str) -> Order:
        await self._call("look")
        if not url.startswith(self._base):
            raise AcmeFailed("the authority cannot be reached: another's certificate is not known by this one's")
        if url not in self._orders:
            raise AcmeFailed("no such order", kind="malformed")
        if self._orders[url].state is OrderState.PENDING and not self._orders[url].challenges[0].pending:
            self._judge(url)
        return self._orders[url]

    async def answered(self, challenge: Challenge) -> None:
        await self._call("answered")
        url = challenge.url.removeprefix("challenge/")
        if self._orders[url].challenges[0].pending:
            self._judge(url)

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

    def _judge(self, url: str) -> None:
        order, host = self._orders[url], self._hosts[url]
        challenge = order.challenges[0]
        why = self.validate(host) or ("" if self._found(host, challenge.token) else "nothing is answered")
        refused = OrderState.PENDING if self.patient else OrderState.INVALID
        told = replace(challenge, pending=False, error=why)
        self._orders[url] = replace(order, challenges=(told,), state=refused if why else OrderState.READY)
