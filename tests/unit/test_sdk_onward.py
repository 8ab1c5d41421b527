"""A follower is not told the past by a server that is behind, unless that is all that there is."""

from __future__ import annotations

import asyncio

import pytest
from control_cell import run_virtual

from atoll.model.errors import Unavailable
from atoll.model.ports.control_plane import RoutingBatch
from atoll.sdk.onward import BEHIND_S, Onward


def batch(revision: int) -> RoutingBatch:
    return RoutingBatch(revision, True)


def test_what_is_older_than_what_was_told_is_refused_and_what_is_not_is_taken() -> None:
    async def main() -> None:
        onward = Onward()
        for revision in (7, 7, 9):
            onward.take(batch(revision))
        await asyncio.sleep(10 * BEHIND_S)
        with pytest.raises(Unavailable, match="at revision 8, and 9 is known"):
            onward.take(batch(8))
        onward.take(batch(9))

    run_virtual(main())


def test_a_store_that_was_put_back_is_believed_once_nobody_has_known_better_for_long() -> None:
    async def main() -> None:
        onward = Onward()
        onward.take(batch(900))
        for _ in range(int(BEHIND_S)):
            with pytest.raises(Unavailable):
                onward.take(batch(5))
            await asyncio.sleep(1)
        onward.take(batch(5))
        onward.take(batch(6))

    run_virtual(main())
