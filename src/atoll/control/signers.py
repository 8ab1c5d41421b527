"""What the leader's certificates can come from; `entry` chooses the implementations."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Protocol

from atoll.control.orders import Connect, Pace


class Seal(Protocol):
    """The cell's key; see `api.service.sealing`."""

    def seal(self, plain: bytes, context: str) -> bytes: ...

    def open(self, sealed: bytes, context: str) -> bytes: ...


Sign = Callable[[str], Awaitable[tuple[str, bytes]]]
"""Hostname → chain and key (PEM), signed by the cell's own root."""


class Signers:
    """The cell's key, its own root, and the way to its ACME authority."""

    def __init__(self, seal: Seal, own: Sign, connect: Connect, pace: Pace = Pace()) -> None:
        self.seal = seal
        self.own = own
        self.connect = connect
        self.pace = pace
