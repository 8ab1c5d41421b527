"""Who follows the control plane goes from newer to newer, though the next server that it asks may know less than the last one."""

from __future__ import annotations

import asyncio
from typing import Protocol

from atoll.model.errors import Unavailable

BEHIND_S = 30.0
"""So long what is older than what is known is not taken. Then all servers say so, and it is the store that was put back."""


class Batch(Protocol):
    @property
    def revision(self) -> int: ...


class Onward:
    """For one follower of one stream, over all its connections."""

    def __init__(self) -> None:
        self._newest = 0
        self._refused_since: float | None = None

    def take(self, batch: Batch) -> None:
        """Note what is told. Raises Unavailable, and notes nothing, where that is older than what was told before."""
        if batch.revision < self._newest:
            now = asyncio.get_running_loop().time()
            if self._refused_since is None:
                self._refused_since = now
            if now - self._refused_since < BEHIND_S:
                raise Unavailable(
                    f"this server is at revision {batch.revision}, and {self._newest} is known already", mend="ask another server"
                )
        self._newest = batch.revision
        self._refused_since = None
