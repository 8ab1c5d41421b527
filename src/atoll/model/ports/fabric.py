"""What a node's fabric asks of the control plane."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Protocol

from atoll.model.fabric import FabricBatch, FabricGrant, FabricOffer, FabricPaths


class FabricControl(Protocol):
    """Every call may raise Unavailable (safe to repeat) and Unauthenticated or Forbidden (not)."""

    async def join_fabric(self, node: str, offer: FabricOffer) -> FabricGrant:
        """Return the node's prefix, the same as long as the node is of the cell. Safe to repeat, with news of the node.

        Raises Conflict where the prefix that it wants overlaps another node's or holds a server's or node's address, or the key is
        another node's; Invalid for a prefix that is no private one or an endpoint within a prefix; Exhausted where none is left;
        NotFound where the servers are older than the fabric.
        """
        ...

    async def report_paths(self, paths: FabricPaths) -> None:
        """Tell what the node found of its ways; the newest word counts. Safe to repeat."""
        ...

    def fabric(self, node: str) -> AsyncIterator[FabricBatch]:
        """Yield first a complete batch, then changes; empty ones say that the server is there. Ends with Unavailable."""
        ...
