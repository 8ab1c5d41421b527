"""What the leader's certificates can come from; `entry` chooses the implementations."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import Protocol

from atoll.control.orders import Connect, Pace


class Seal(Protocol):
    """The cell's key; see `api.service.sealing`."""

    def seal(self, plain: bytes, context: str) -> bytes: ...

    def open(self, sealed: bytes, context: str) -> bytes: ...


Sign = Callable[[str], Awaitable[tuple[str, bytes]]]
"""Hostname → chain and key (PEM), signed by the cell's own root."""


class Answered(Protocol):
    async def __call__(self, host: str, answers: Mapping[str, str]) -> None: ...


class Signers:
    """The cell's key, its own root, and the way to its ACME authority."""

    def __init__(self, seal: Seal, own: Sign, connect: Connect, pace: Pace = Pace(), answered: Answered | None = None) -> None:
        """`answered` waits until ingresses answer a challenge; without it `pace.settle_s` must do."""
        self.answered = answered
        self.seal = seal
        self.own = own
        self.connect = connect
        self.pace = pace
