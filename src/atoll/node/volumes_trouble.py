"""Tells of images that are shown already and whose pieces do not come: who reads them waits, and gets errors in the end."""

from __future__ import annotations

from atoll.model.ports.images import Images
from atoll.model.records import CELL_PROJECT, Severity
from atoll.node.report import Reporter

EVENT = "volume-not-fetched"


async def tell_troubles(node: str, images: Images, reporter: Reporter) -> None:
    """Make an event of each trouble, for ever."""
    async for trouble in images.troubles():
        message = (
            f"pieces of {trouble.reference} ({trouble.digest}) do not come: {trouble.message}; what reads them gets an error, "
            "and they are tried again"
        )
        reporter.event(CELL_PROJECT, f"node/{node}", EVENT, message, Severity.WARNING)
